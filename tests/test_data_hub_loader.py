"""A dataset of Hugging Face in streaming mode, read from a local folder; skipped where datasets is not installed."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from torchladder import data, train
from torchladder.batch_schedule import BatchSchedule
from torchladder.data import IGNORE_INDEX
from torchladder.data.sources import held_out
from torchladder.data.tokenizer import ByteTokenizer
from torchladder.registry import ConfigError

DEFAULTS = {key: parameter.default for key, parameter in data.registry.parameters("hub").items()}
T, FRACTION = 16, 0.1


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Four files of 15 documents; each tells its own number."""
    folder = tmp_path_factory.mktemp("dataset")
    for file in range(4):
        lines = [json.dumps({"text": text(15 * file + i)}) + "\n" for i in range(15)]
        (folder / f"train-{file}.jsonl").write_text("".join(lines) + json.dumps({"text": ""}) + "\n")
    (folder / "validation.jsonl").write_text("".join(json.dumps({"text": f"held {i}"}) + "\n" for i in range(20)))
    return folder


def text(number):
    return f"<{number}>" + "x" * (number * 7 % 11)


HELD = [i for i in range(60) if held_out(text(i), FRACTION)]
KEPT = [i for i in range(60) if i not in HELD]


@pytest.fixture
def load(folder, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)

    def load(**changes):
        facts = dict(seq_len=T, split="train", tokenizer=ByteTokenizer(), dp_rank=0, dp_degree=1)
        facts |= dict(local_batch_size=2, global_batch_size=8, batch_schedule=None)
        facts |= {key: changes.pop(key) for key in list(changes) if key in facts}
        files = f"{folder}/train-*.jsonl"
        base = {"path": "json", "data_files": files, "validation_fraction": FRACTION, "shuffle_buffer": 0}
        return data.registry.build(SimpleNamespace(name="hub", **{**DEFAULTS, **base, **changes}), **facts)

    return load


def take(loader, batches):
    """Stacks the next batches to (tokens, labels, positions)."""
    taken = [next(loader) for _ in range(batches)]
    return [torch.cat([getattr(batch, key) for batch in taken]) for key in ("tokens", "labels", "positions")]


def decoded(loader, batches):
    """The documents of the next batches, without those cut at either end."""
    found = ByteTokenizer().decode(take(loader, batches)[0].flatten().tolist())
    return [f"<{piece}" for piece in found.split("<")[1:-1]]


def test_rows_are_the_documents_in_order(load):
    loader = load()
    stream = [(token, place) for _ in range(2) for i in KEPT for place, token in enumerate([*text(i).encode(), 256])]
    rows = len(stream) // T // 2
    tokens, labels, positions = take(loader, rows)
    assert (tokens.dtype, labels.dtype, positions.dtype) == (torch.int64, torch.int64, torch.int32)
    for row in range(rows):
        cut = stream[row * T : row * T + T + 1]
        assert tokens[row].tolist() == [token for token, _ in cut[:-1]]
        assert labels[row].tolist() == [token for token, _ in cut[1:]]
        inside = next((i for i, (_, place) in enumerate(cut) if i and place == 0), T + 1)
        first = cut[0][1]
        assert positions[row].tolist() == [place - first * (i < inside) for i, (_, place) in enumerate(cut[:-1])]


def test_labels_may_end_with_documents(load):
    tokens, labels, positions = take(load(labels_across_documents=False), 20)
    follows = torch.cat([positions[:, 1:] == 0, tokens[:, -1:] == 256], dim=1)
    assert torch.equal(labels == IGNORE_INDEX, follows)
    assert torch.equal(take(load(), 20)[0], tokens)


def test_an_epoch_has_every_document_once_and_another_order(load):
    loader = load(shuffle_buffer=20)
    size = sum(len(text(i)) + 1 for i in KEPT)
    read = decoded(loader, -(-2 * size // (2 * T)) + 1)
    epochs = read[: len(KEPT)], read[len(KEPT) : 2 * len(KEPT)]
    for epoch in epochs:
        assert sorted(epoch) == sorted(text(i) for i in KEPT)
    assert epochs[0] != epochs[1]
    assert read == decoded(load(shuffle_buffer=20), -(-2 * size // (2 * T)) + 1)
    assert read != decoded(load(shuffle_buffer=20, seed=1), -(-2 * size // (2 * T)) + 1)


@pytest.mark.parametrize("degree", [2, 3, 4])
@pytest.mark.parametrize("shuffle_buffer", [0, 20])
def test_each_document_is_of_one_rank(load, degree, shuffle_buffer):
    ranks = [
        load(dp_rank=d, dp_degree=degree, global_batch_size=24, shuffle_buffer=shuffle_buffer) for d in range(degree)
    ]
    for epoch in range(3):
        read = [read for rank in ranks for read in rank.texts(epoch)]
        assert sorted(read) == sorted(text(i) for i in KEPT)
    assert decoded(ranks[0], 3)[0] == next(ranks[0].texts(0))


@pytest.mark.parametrize("step", [0, 1, 3, 12])
def test_resuming_reads_what_running_through_would_have(load, step):
    through, sought = load(shuffle_buffer=10), load(shuffle_buffer=10)
    rows = [through.row]
    for _ in range(4 * step):
        next(through)
        rows.append(through.row)
    assert rows == [i // 4 * 8 for i in range(4 * step + 1)]
    next(sought)
    sought.seek(through.row)
    for ours, theirs in zip(take(through, 9), take(sought, 9), strict=True):
        assert torch.equal(ours, theirs)


def test_rows_are_those_of_whole_steps_where_the_batch_grows(load):
    batch = BatchSchedule([(0, 4), (2, 8)])
    through, sought, plain = load(batch_schedule=batch), load(batch_schedule=batch), load()
    rows = []
    for _ in range(12):
        rows.append(through.row)
        assert torch.equal(next(through).tokens, next(plain).tokens)
    assert rows == [0, 0, 4, 4, *[8] * 4, *[16] * 4]
    sought.seek(8, 2)
    next(sought)
    assert sought.row == 8
    assert torch.equal(take(sought, 7)[0], take(load(), 12)[0][10:])


def test_reading_ahead_changes_nothing(load):
    plain, ahead = load(shuffle_buffer=10, prefetch=False), load(shuffle_buffer=10)
    next(ahead)
    ahead.seek(8)
    for ours, theirs in zip(take(plain, 12), take(ahead, 8), strict=True):
        assert torch.equal(ours[8:], theirs)


@pytest.mark.parametrize("named", [{}, {"validation_split": "train"}])
@pytest.mark.parametrize(("degree", "local"), [(1, 2), (2, 1), (4, 2)])
def test_validation_reads_every_label_once_and_ranks_agree(load, named, degree, local):
    settings = {"split": "validation", "dp_degree": degree, "local_batch_size": local, **named}
    ranks = [list(load(dp_rank=d, **settings)) for d in range(degree)]
    assert len({len(batches) for batches in ranks}) == 1
    labels = torch.cat([batch.labels.flatten() for batches in ranks for batch in batches])
    expected = [token for i in (range(60) if named else HELD) for token in (*text(i).encode(), 256)]
    assert sorted(labels[labels != IGNORE_INDEX].tolist()) == sorted(expected[1:])
    again = load(dp_rank=0, **settings)
    assert len(list(again)) == len(ranks[0])
    again.seek(0)
    for ours, theirs in zip(take(again, len(ranks[0])), take(iter(ranks[0]), len(ranks[0])), strict=True):
        assert torch.equal(ours, theirs)


def test_a_folder_with_splits_is_a_dataset(load, folder):
    loader = load(path=str(folder), data_files=None, validation_split="validation", split="validation")
    tokens = torch.cat([batch.tokens.flatten() for batch in loader]).tolist()
    assert ByteTokenizer().decode(tokens).startswith("held 0held 1held 2")


def test_the_fingerprint_names_what_differs(load, folder):
    base = load().fingerprints()
    assert load(prefetch=False, pin_memory=True).fingerprints() == base
    for key, changes in {
        "dataset": {"data_files": f"{folder}/train-[01].jsonl"},
        "validation_fraction": {"validation_fraction": 0.5},
        "shuffle_buffer": {"shuffle_buffer": 3},
        "seed": {"seed": 1},
        "ranks": {"dp_degree": 2},
        "seq_len": {"seq_len": 8},
        "labels_across_documents": {"labels_across_documents": False},
    }.items():
        changed = load(**changes).fingerprints()
        assert {name for name in base if changed[name] != base[name]} == {key}


def test_the_report_states_the_promise(load):
    loader = load(shuffle_buffer=7)
    described = loader.describe()
    begins = ByteTokenizer().decode(next(loader).tokens[0].tolist())  # reading ahead for the report loses no row
    assert described == [
        "train: stream of json, train, shuffled within 7 documents; resuming reads earlier rows again",
        f"the next row begins with {begins!r}",
    ]
    assert load(split="validation").describe() == ["validation: stream of json, up to 500 documents held out of train"]


def test_a_stream_of_unknown_text_is_refused_at_its_beginning(load):
    class KnowsNoX(ByteTokenizer):
        unk = ord("x")

    with pytest.raises(
        ConfigError, match=r"json: the tokenizer does not know .*'<1>xxxxxxx'.*data\.max_unknown_fraction"
    ):
        next(load(tokenizer=KnowsNoX()))
    assert next(load(tokenizer=KnowsNoX(), max_unknown_fraction=1.0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer": None}, "needs a tokenizer"),
        ({"text_key": "txt"}, "unknown column 'txt'. Did you mean 'text'"),
        ({"train_split": "training"}, "split 'training', cannot be read"),
        ({"data_files": "none/*.jsonl"}, "cannot be read"),
        ({"seed": -1}, "data.seed = -1: must be 0 or more"),
        ({"validation_documents": 0}, "data.validation_documents = 0: must be 1 or more"),
        ({"validation_fraction": 1.0}, "data.validation_fraction = 1.0: must be 0 or more and below 1"),
        ({"bos": True}, "no bos token"),
        ({"global_batch_size": 9}, "not a multiple"),
        ({"split": "validation", "validation_fraction": 0.0}, "no documents are held out"),
    ],
)
def test_invalid_settings(load, changes, message):
    with pytest.raises(ConfigError, match=message):
        load(**changes)


def test_invalid_documents(load, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": null}\n')
    (tmp_path / "b.jsonl").write_text('{"text": "a"}\n')
    broken = load(data_files=str(tmp_path / "a.jsonl"), validation_fraction=0.0)
    with pytest.raises(ConfigError, match="document 1: 'text' holds NoneType"):
        next(broken)
    with pytest.raises(ConfigError, match="no documents for data-parallel rank 1"):
        next(load(dp_rank=1, dp_degree=2, data_files=str(tmp_path / "b.jsonl")))
    with pytest.raises(ConfigError, match="cannot resume at row 3"):
        load(dp_degree=2).seek(3)


def test_a_missing_package_names_the_extra(load, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match=r"needs the package datasets: .*torchladder\[hub\]"):
        load()


def test_a_run_on_a_stream_resumes_bit_for_bit(load, folder, tmp_path):
    def run(*argv):
        debug = str(Path(__file__).parents[1] / "train_configs" / "debug.toml")
        stream = ["--data.name", "hub", "--data.path", str(folder), "--data.validation_fraction", "0.1"]
        size = ["--training.seq_len", "64", "--training.steps", "6"]
        saves = ["--checkpoint.enable", "--checkpoint.interval", "3"]
        words = ["--job.config_file", debug, "--job.dump_folder", str(tmp_path), *stream, *size, *saves, *argv]
        assert train.main(words) == 0
        found = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
        return {line["step"]: line["loss"] for line in found if "loss" in line}

    whole = run()
    assert list(whole) == list(range(1, 7))
    assert run("--checkpoint.load_step", "3") == whole

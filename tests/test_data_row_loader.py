import itertools
import json
import multiprocessing
import os
import pickle
import signal
import subprocess
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchladder import data
from torchladder.data import SourceConfig
from torchladder.data.corpus import SourceLoader
from torchladder.data.formats.indexed import IndexedWriter
from torchladder.data.row_loader import RowLoader
from torchladder.data.tokenizer import ByteTokenizer
from torchladder.registry import ConfigError

DEFAULTS = {key: parameter.default for key, parameter in data.registry.parameters("rows").items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two pairs, one source of many small pairs, and text; every document has its own tokens."""
    folder = tmp_path_factory.mktemp("sources")
    rng = np.random.default_rng(0)
    for name, documents in (("a", 30), ("b", 7), ("many/1", 5), ("many/2", 5), ("many/3", 5)):
        with IndexedWriter(folder / name, np.dtype(np.uint16)) as writer:
            for _ in range(documents):
                writer.add(rng.integers(0, 250, rng.integers(1, 40)))
    with open(folder / "text.jsonl", "w") as file:
        for i in range(200):
            file.write(json.dumps({"text": f"document number {i}"}) + "\n")
    return folder


def load(folder, **changes):
    facts = dict(
        seq_len=16,
        split="train",
        tokenizer=ByteTokenizer(),
        dp_rank=0,
        dp_degree=1,
        local_batch_size=2,
        global_batch_size=8,
    )
    facts |= {key: changes.pop(key) for key in list(changes) if key in {*facts, "steps", "vocab_size"}}
    base = {
        "sources": [SourceConfig(path=f"{folder}/a.bin", weight=2), SourceConfig(path=f"{folder}/b.bin")],
        "validation_sources": [],
        "cache_folder": str(folder / "cache"),
    }
    section = SimpleNamespace(name="rows", **{**DEFAULTS, **base, **changes})
    return data.registry.build(section, **facts)


def text(folder, **changes):
    return load(folder, sources=[SourceConfig(path=f"{folder}/text.jsonl")], **changes)


def same(left, right):
    return all(torch.equal(getattr(left, key), getattr(right, key)) for key in ("tokens", "labels", "positions"))


def take(loader, batches):
    """Stacks the next batches to (tokens, labels, positions)."""
    taken = [next(loader) for _ in range(batches)]
    return [torch.cat([getattr(batch, key) for batch in taken]) for key in ("tokens", "labels", "positions")]


def steps(folder, degree, local, count=6, **changes):
    """The global batches as ``degree`` ranks see them together."""
    ranks = [load(folder, dp_rank=d, dp_degree=degree, local_batch_size=local, **changes) for d in range(degree)]
    share = 8 // degree // local
    parts = [[take(rank, share) for rank in ranks] for _ in range(count)]
    return [[torch.cat([part[key] for part in step]) for key in range(3)] for step in parts]


def test_batches_have_the_shapes_of_the_contract(folder):
    batch = next(load(folder))
    assert (batch.tokens.shape, batch.tokens.dtype) == ((2, 16), torch.int64)
    assert (batch.labels.shape, batch.labels.dtype) == ((2, 16), torch.int64)
    assert (batch.positions.shape, batch.positions.dtype) == ((2, 16), torch.int32)
    assert batch.num_labels == 32
    moved = batch.to("meta")
    assert (moved.tokens.device.type, moved.labels.device.type, moved.positions.device.type) == ("meta", "meta", "cpu")


def test_a_source_shorter_than_a_row_is_a_warning(tmp_path, caplog):
    with IndexedWriter(tmp_path / "short", np.dtype(np.uint16)) as writer:
        writer.add(np.arange(20))
    load(tmp_path, sources=[SourceConfig(path=f"{tmp_path}/short.bin")], seq_len=20)
    assert not caplog.messages
    load(tmp_path, sources=[SourceConfig(path=f"{tmp_path}/short.bin")], seq_len=21)
    (said,) = caplog.messages
    assert said.endswith("short.bin has 20 tokens, fewer than one row of 21: lower training.seq_len, or add data.")


def test_rows_are_the_documents_in_order(folder):
    """Against a slow reading of one unshuffled source, epoch after epoch."""
    loader = load(folder, sources=[SourceConfig(path=f"{folder}/many/*.bin")], shuffle=False, local_batch_size=8)
    pairs = [
        SourceLoader(None, folder, 0, False).open(SourceConfig(path=f"{folder}/many/{i}.bin"), "train")
        for i in (1, 2, 3)
    ]
    documents = [pair.shards[0][i].tolist() for pair in pairs for i in range(len(pair.lengths))]
    stream = itertools.cycle([(token, place) for document in documents for place, token in enumerate(document)])
    reference = list(itertools.islice(stream, 40 * 16 + 1))
    tokens, labels, positions = take(loader, 5)
    for row in range(40):
        cut = reference[row * 16 : (row + 1) * 16 + 1]
        assert tokens[row].tolist() == [token for token, _ in cut[:-1]]
        assert labels[row].tolist() == [token for token, _ in cut[1:]]
        first = cut[0][1]  # the first piece counts from the row's start, later ones from their document's
        inside = next((i for i, (_, place) in enumerate(cut) if i and place == 0), 17)
        assert positions[row].tolist() == [
            place - first if i < inside else place for i, (_, place) in enumerate(cut[:-1])
        ]


@pytest.mark.parametrize(("degree", "local"), [(1, 8), (1, 1), (2, 2), (2, 4), (4, 1), (4, 2), (8, 1)])
def test_the_global_batch_is_the_same_for_any_ranks(folder, degree, local):
    for ours, one in zip(steps(folder, degree, local), steps(folder, 1, 8), strict=True):
        assert all(map(torch.equal, ours, one))


@pytest.mark.parametrize(("degree", "local"), [(1, 4), (4, 2), (8, 1)])
def test_the_number_of_ranks_may_change_where_a_run_resumes(folder, degree, local):
    whole = steps(folder, 1, 8)
    begun = [load(folder, dp_rank=d, dp_degree=2) for d in range(2)]
    for rank in begun:
        take(rank, 2 * 3)
    assert {rank.row for rank in begun} == {8 * 3}
    resumed = [load(folder, dp_rank=d, dp_degree=degree, local_batch_size=local) for d in range(degree)]
    for rank in resumed:
        rank.seek(begun[0].row)
    for step in whole[3:]:
        parts = [take(rank, 8 // degree // local) for rank in resumed]
        assert all(torch.equal(torch.cat([part[key] for part in parts]), step[key]) for key in range(3))


@pytest.mark.parametrize("taken", [1, 4, 6])
def test_a_worker_that_dies_is_replaced_and_no_row_is_lost(folder, taken, caplog):
    """In the midst of a step and between two; whatever the main process does meanwhile is not interrupted."""
    plain, worked = load(folder), load(folder, num_workers=2, prefetch_factor=1)
    first = take(worked, taken)
    for worker in multiprocessing.active_children():
        os.kill(worker.pid, signal.SIGTERM)  # sent by the parent; a signal from elsewhere is ignored
        worker.join(20)
        assert not worker.is_alive()
    both = [torch.cat(parts) for parts in zip(first, take(worked, 12 - taken), strict=True)]
    assert all(torch.equal(one, other) for one, other in zip(both, take(plain, 12), strict=True))
    assert worked.row == plain.row
    assert "starting new ones" in caplog.text


def test_workers_ignore_the_signals_of_a_run(folder):
    worked = load(folder, num_workers=2)
    take(worked, 1)
    workers = multiprocessing.active_children()
    for number in ("TERM", "INT", "USR1", "USR2"):
        subprocess.run(["kill", f"-{number}", *(str(worker.pid) for worker in workers)], check=True)
    time.sleep(0.5)
    assert all(worker.is_alive() for worker in workers)
    assert signal.getsignal(signal.SIGCHLD) == signal.SIG_DFL
    take(worked, 4)


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_workers_change_nothing(folder, workers):
    plain, worked = load(folder), load(folder, num_workers=workers, prefetch_factor=3)
    assert all(same(next(plain), next(worked)) for _ in range(10))
    worked.seek(800)
    plain.seek(800)
    assert all(same(next(plain), next(worked)) for _ in range(3))
    validation = [list(text(folder, split="validation", num_workers=n)) for n in (0, workers)]
    assert len(validation[0]) == len(validation[1]) > 0
    assert all(map(same, *validation))


def test_a_worker_may_be_sent_the_dataset(folder):
    """As spawned workers are; the tokens stay on the disk."""
    dataset = load(folder)._data_loader().dataset
    sent = pickle.dumps(dataset)
    assert same(pickle.loads(sent)[[3, 900]].to_batch(), dataset[[3, 900]].to_batch())


@given(st.integers(0, 30), st.integers(0, 5))
@settings(max_examples=25, deadline=None)
def test_seeking_equals_running_through(folder, step, before):
    through, sought = load(folder), load(folder)
    for _ in range(4 * step):  # 4 micro-batches a step
        next(through)
    for _ in range(before):
        next(sought)
    assert through.row == 8 * step
    sought.seek(through.row)
    assert sought.row == through.row
    assert all(same(next(through), next(sought)) for _ in range(5))


def test_the_row_moves_when_its_step_is_complete(folder):
    loader = load(folder)
    rows = [loader.row]
    for _ in range(9):
        next(loader)
        rows.append(loader.row)
    assert rows == [0, 0, 0, 0, 8, 8, 8, 8, 16, 16]


def test_any_row_begins_a_global_batch(folder):
    """So the batch size may change where a run resumes, and no row is lost or repeated."""
    reference = take(load(folder, global_batch_size=1, local_batch_size=1), 24)
    loader = load(folder)
    loader.seek(5)
    assert all(torch.equal(ours, rows[5:21]) for ours, rows in zip(take(loader, 8), reference, strict=True))
    assert loader.row == 21
    with pytest.raises(ConfigError, match="no row -1"):
        loader.seek(-1)


def test_starting_does_not_touch_the_random_state(folder):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    next(load(folder))
    assert torch.equal(torch.get_rng_state(), before)


# --- validation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("degree", "local"), [(1, 2), (2, 1), (4, 2), (8, 1)])
def test_validation_reads_every_label_once_and_ranks_agree_on_the_count(folder, degree, local):
    ranks = [
        list(
            text(
                folder, split="validation", validation_fraction=0.3, dp_rank=d, dp_degree=degree, local_batch_size=local
            )
        )
        for d in range(degree)
    ]
    loader = text(folder, split="validation", validation_fraction=0.3)
    corpus = loader._source_mix.corpora[0]
    assert loader.num_rows == -(-(corpus.num_tokens - 1) // 16)
    assert len({len(batches) for batches in ranks}) == 1
    labels = torch.cat([batch.labels.flatten() for batches in ranks for batch in batches])
    kept = labels[labels != data.IGNORE_INDEX]
    every = np.concatenate([corpus.shards[0][i] for i in range(len(corpus.lengths))])
    assert sorted(kept.tolist()) == sorted(every[1:].tolist())
    assert sum(batch.num_labels for batches in ranks for batch in batches) == corpus.num_tokens - 1


def test_validation_is_finite_the_same_for_any_seed_and_repeats_after_seek(folder):
    loader = text(folder, split="validation", validation_fraction=0.3)
    first = list(loader)
    with pytest.raises(StopIteration):
        next(loader)
    loader.seek(0)
    other = text(folder, split="validation", validation_fraction=0.3, seed=5)
    for again in (list(loader), list(other)):
        assert len(again) == len(first) > 1
        assert all(map(same, first, again))


def test_padding_has_its_own_positions(folder):
    *_, last = text(folder, split="validation", validation_fraction=0.3)
    assert 0 < last.num_labels < last.labels.numel()
    for tokens, labels, positions in zip(last.tokens, last.labels, last.positions, strict=True):
        padded = (labels == data.IGNORE_INDEX).nonzero().flatten().tolist()
        if padded:
            begin = padded[0] + 1 if padded[0] else 0  # the last real token has no label either
            assert positions[begin:].tolist() == list(range(16 - begin))
            assert not tokens[begin:].any()


def test_held_out_documents_are_never_trained_on(folder, monkeypatch):
    monkeypatch.setattr(RowLoader, "_row_order", lambda *_: int)  # text is easier to read in order
    decode = ByteTokenizer().decode
    validation = "".join(decode(row.tolist()) for batch in text(folder, split="validation") for row in batch.tokens)
    loader = text(folder, shuffle=False)
    steps = -(-loader._source_mix.corpora[0].num_tokens // 16)
    train = "".join(decode(row.tolist()) for _ in range(steps) for row in next(loader).tokens)
    held = [i for i in range(200) if data.sources.held_out(f"text.jsonl:{i + 1}", 0.02)]
    assert held
    assert all(f"number {i}" in validation for i in held)
    assert not any(f"document number {i}d" in train for i in held)
    assert f"document number {min(set(range(200)) - set(held))}d" in train


def test_named_validation_sources_leave_all_documents_for_training(folder):
    changes = dict(validation_sources=[SourceConfig(path=f"{folder}/b.bin"), SourceConfig(path=f"{folder}/a.idx")])
    assert len(text(folder, **changes)._source_mix.corpora[0].lengths) == 200
    loader = text(folder, split="validation", **changes)
    labels = torch.cat([batch.labels.flatten() for batch in loader])
    corpora = loader._source_mix.corpora
    assert int((labels != data.IGNORE_INDEX).sum()) == sum(corpus.num_tokens - 1 for corpus in corpora)


def test_tokens_alone_have_nothing_to_validate_on(folder):
    with pytest.raises(ConfigError, match="no documents are held out for validation: set data"):
        load(folder, split="validation")
    with pytest.raises(ConfigError, match="no documents are held out"):
        text(folder, split="validation", validation_fraction=0.0)


# --- what it says ----------------------------------------------------------------------------------------------------


def test_the_fingerprint_changes_with_whatever_changes_the_rows(folder):
    base = load(folder).fingerprints()
    sources = load(folder).sources
    assert load(folder, dp_degree=4, local_batch_size=1, num_workers=2, pin_memory=True).fingerprints() == base
    heavier = [replace(source, weight=source.weight * 3) for source in sources]
    assert load(folder, sources=heavier).fingerprints() == base
    for key, changes in {
        "sources": {"sources": [SourceConfig(path=f"{folder}/many/*.bin", weight=2), sources[1]]},
        "weights": {"sources": [replace(sources[0], weight=1), sources[1]]},
        "seed": {"seed": 1},
        "shuffle": {"shuffle": False},
        "seq_len": {"seq_len": 8},
        "tokenizer": {"tokenizer": None},
    }.items():
        changed = load(folder, **changes).fingerprints()
        assert {name for name in base if changed[name] != base[name]} == {key}


def test_other_text_and_splits_are_other_sources(folder):
    prints = {text(folder, **changes).fingerprints()["sources"] for changes in ({}, {"validation_fraction": 0.5})}
    assert len(prints) == 2


def test_the_report_names_sources_shares_and_epochs(folder):
    whole, *lines = load(folder).describe()
    assert "shuffled with seed 0" in whole
    assert "a.bin: 66.7% of the rows, 30 documents" in lines[0]
    tokens = load(folder)._source_mix.corpora[1].num_tokens
    assert f"{tokens:,} tokens, an epoch every {tokens / 16 * 3 / 8:.1f} steps" in lines[1]
    assert "rows" in text(folder, split="validation").describe()[0]


def test_training_texts_leave_out_what_is_held_out(folder):
    section = SimpleNamespace(sources=[SourceConfig(path=f"{folder}/text.jsonl")], validation_sources=[])
    section.validation_fraction = 0.5
    half = list(data.training_texts(section))
    assert 60 < len(half) < 140
    section.validation_sources = [SourceConfig(path=f"{folder}/b.bin")]
    assert len(list(data.training_texts(section))) == 200
    with pytest.raises(ConfigError, match="no source is raw text"):
        next(data.training_texts(SimpleNamespace(sources=[SourceConfig(path=f"{folder}/b.bin")])))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sources": []}, "data.sources is empty"),
        ({"sources": [SourceConfig(path="none/*.bin")]}, r"no file matches 'none/\*.bin'"),
        ({"sources": [SourceConfig(path="none.jsonl")]}, "no file matches 'none.jsonl'"),
        ({"global_batch_size": 9}, "global_batch_size 9 is not a multiple"),
        ({"dp_degree": 3}, "global_batch_size 8 is not a multiple of 3"),
        ({"dp_rank": 1}, "dp_rank is 1"),
        ({"local_batch_size": 0}, "local_batch_size is 0"),
        ({"split": "test"}, "Known: train, validation"),
        ({"seed": -1}, "data.seed = -1: must be 0 or more"),
        ({"prefetch_factor": 2}, "data.prefetch_factor = 2: .*needs data.num_workers"),
        ({"packing": "best"}, "unknown packing 'best'"),
    ],
)
def test_invalid_settings(folder, changes, message):
    with pytest.raises(ConfigError, match=message):
        load(folder, **changes)


def test_all_sources_are_looked_for_before_any_is_tokenized(folder, tmp_path):
    sources = [SourceConfig(path=f"{folder}/text.jsonl"), SourceConfig(path="missing.txt")]
    for changes in ({"sources": sources}, {"sources": sources[:1], "validation_sources": sources[1:]}):
        with pytest.raises(ConfigError, match=r"no file matches 'missing\.txt'"):
            load(folder, cache_folder=str(tmp_path), **changes)
    assert list(tmp_path.iterdir()) == []


def test_weights_are_checked(folder):
    with pytest.raises(ConfigError, match="above 0"):
        load(folder, sources=[SourceConfig(path=f"{folder}/a.bin", weight=0.0)])


def test_raw_text_needs_a_tokenizer_and_tokens_need_theirs(folder):
    with pytest.raises(ConfigError, match="needs a tokenizer"):
        text(folder, tokenizer=None)

    class Small(ByteTokenizer):
        vocab_size = 100

    with pytest.raises(
        ConfigError, match=r"a\.bin, document \d+ holds token \d+: tokens must be .* below 100, the tokenizer's"
    ):
        load(folder, tokenizer=Small())


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(("dtype", "token"), [(np.int32, 512), (np.int16, -2)])
def test_a_token_that_the_model_does_not_have_is_one_error(folder, monkeypatch, workers, dtype, token):
    """Where opening the source does not find it, the row does: in a worker, too."""
    documents = [[1] * 200 for _ in range(9)]
    documents[7][150] = token
    for name, chosen in (("far", documents), ("first", documents[:2])):
        with IndexedWriter(folder / name, np.dtype(dtype)) as writer:
            for document in chosen:
                writer.add(document)
    sources = [SourceConfig(path=f"{folder}/{name}.bin", label=name) for name in ("first", "far")]
    named = rf"far\.bin, document 7 holds token {token}: tokens must be 0 or more and below 512, the model's vocab_size"
    facts = {"sources": sources, "tokenizer": None, "vocab_size": 512}
    with pytest.raises(ConfigError, match=named):
        load(folder, **facts)
    monkeypatch.setattr("torchladder.data.corpus.MAX_CHECKED_TOKENS", 256)
    loader = load(folder, **facts, num_workers=workers)
    with pytest.raises(ConfigError, match=named) as raised:
        list(itertools.islice(loader, 300))
    assert "\n" not in str(raised.value)


def test_a_source_without_tokens_is_an_error(folder):
    with IndexedWriter(folder / "empty", np.dtype(np.uint16)) as writer:
        writer.add([])
    with pytest.raises(ConfigError, match=r"empty\.bin has 0 tokens"):
        load(folder, sources=[SourceConfig(path=f"{folder}/empty.bin")])


def test_tokens_beyond_32_bits_are_an_error(folder):
    with IndexedWriter(folder / "wide", np.dtype(np.int64)) as writer:
        writer.add([1, 1 << 31, 3])
    with pytest.raises(ConfigError, match=r"wide\.bin, document 0 holds token 2147483648"):
        next(load(folder, sources=[SourceConfig(path=f"{folder}/wide.bin")], tokenizer=None))

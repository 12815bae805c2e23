"""Loss on files: against each token alone, and what the command keeps, skips and refuses."""

import csv
import dataclasses
import json
import math
import multiprocessing
import re
import resource
import shutil
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from runs import run, validations

from torchladder import commands, config, mask, models, plots
from torchladder.commands import convert
from torchladder.commands import evaluate as command
from torchladder.commands.eval_progress import EvalProgress
from torchladder.data.corpus import Corpus
from torchladder.data.formats.indexed import IndexedWriter
from torchladder.inference.evaluation import eval_jobs
from torchladder.inference.evaluation.eval_files import EvalDocuments
from torchladder.inference.evaluation.eval_jobs import EvalJob
from torchladder.inference.evaluation.eval_slices import EvalSlices
from torchladder.inference.evaluation.position_losses import PositionLosses, position_buckets
from torchladder.inference.evaluation.result_table import COLUMNS, DISTANCES, EVALUATIONS, ResultTable
from torchladder.inference.trained_model import LoadedModel, TrainedModel
from torchladder.models.attention.dense import DenseKernel
from torchladder.models.attention.sdpa import SdpaKernel
from torchladder.registry import ConfigError

V = 11
SHAPE = models.LlamaConfig(dim=8, n_layers=2, n_heads=2, n_kv_heads=1, ffn_dim=12, vocab_size=V, init_std=0.6)

lengths = st.lists(st.integers(0, 30), max_size=8)
cuts = st.integers(1, 12).flatmap(lambda context: st.tuples(st.just(context), st.integers(1, context)))


# --- slices and losses ------------------------------------------------------------------------------------------------


@given(lengths, cuts, st.integers(1, 60))
def test_every_token_but_the_first_is_predicted_once(lengths, cut, budget):
    context, stride = cut
    slices = EvalSlices(context, stride)
    predicted, read = Counter(), 0
    for batch in slices.batches(np.array(lengths, dtype=np.int64), budget):
        sizes = batch.ends - batch.begins
        assert 1 <= sizes.min() <= sizes.max() == sizes[0] <= context
        assert len(sizes) == 1 or sizes[0] * len(sizes) <= budget
        read += int(sizes.sum())
        for document, begin, end, overlap in zip(*batch, strict=True):
            assert begin == 0 or overlap == context - stride  # the context of the first token that it predicts
            predicted.update((document, token + 1) for token in range(begin + overlap, end))
    assert predicted == Counter({(i, token): 1 for i, length in enumerate(lengths) for token in range(1, length)})
    assert slices.count_tokens(np.array(lengths, dtype=np.int64)) == read


def test_slices_of_similar_length_are_batched(monkeypatch):
    monkeypatch.setattr("torchladder.inference.evaluation.eval_slices.SORTED_SLICES", 4)
    batches = EvalSlices(8, 8).batches(np.array([2, 9, 3, 9, 5, 5, 5, 2]), 16)
    assert [(batch.ends - batch.begins).tolist() for batch in batches] == [[8, 8], [2, 1], [4, 4, 4, 1]]


@given(st.integers(1, 300))
def test_buckets_cover_each_position_once(context):
    covered = [position for first, last in position_buckets(context) for position in range(first, last + 1)]
    assert covered == list(range(context))
    assert position_buckets(16) == [(0, 0), (1, 1), (2, 3), (4, 7), (8, 15)]


def test_nothing_has_no_loss_and_much_has_infinite_perplexity():
    losses = PositionLosses(4)
    assert (losses.total().mean, losses.total().perplexity, losses.total().bits_per_byte(3)) == (None, None, None)
    losses.add(np.array([2000.0, 1.0]), np.array([1, 1]))
    assert losses.total().mean == 1000.5
    assert losses.total().perplexity == math.inf
    assert losses.total(1, 3) == (1.0, 1)


# --- against each token alone -----------------------------------------------------------------------------------------


class Shard:
    """Documents in memory."""

    fingerprint = "in memory"

    def __init__(self, documents):
        self.lengths = np.array([len(one) for one in documents], dtype=np.int64)
        self.offsets = self.lengths.cumsum() - self.lengths
        self.flat = np.array([token for one in documents for token in one], dtype=np.int32)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The settings of a run of the tiny model."""
    shape = dataclasses.asdict(SHAPE)
    sizes = [
        f"--model.{key}={shape[key]}" for key in ("dim", "n_layers", "n_heads", "n_kv_heads", "ffn_dim", "vocab_size")
    ]
    return config.load(["--model.flavor", "debug", *sizes, "--attention.masks", "causal"])


def job_of(settings, documents, context, stride, path=Path("memory.bin"), split_by="position"):
    corpus = Corpus("memory", [Shard(documents)])
    return EvalJob(
        TrainedModel(Path(), settings, {"step": 1}),
        EvalDocuments(path, corpus, None),
        EvalSlices(context, stride),
        "",
        split_by,
        None,
    )


def alone(model, start, documents, context, stride):
    """Yields (position, distance, loss) of each token, from the logits of the tokens before it in its slice."""
    for document in documents:
        scored = 1
        for begin in range(0, len(document), stride):
            for place in range(scored, min(begin + context, len(document) - 1) + 1):
                before = torch.tensor([[token ^ (token >> 63) for token in document[begin:place]]])
                logits = model(before, mask.dense(start[None, : place - begin])[:, None])[0, -1]
                if document[place] >= 0:
                    yield place - begin - 1, place - 1, -logits.double().log_softmax(-1)[document[place]].item()
                scored = place + 1


@settings(max_examples=50)
@given(
    st.lists(st.lists(st.integers(-V, V - 1), max_size=20), max_size=4),
    cuts,
    st.integers(1, 40),
    st.sampled_from(["causal", "chunk", "sliding"]),
    st.integers(1, 12),
    st.booleans(),
    st.sampled_from(["position", "distance"]),
    st.integers(0, 100),
)
def test_losses_are_those_of_each_token_alone(tiny, documents, cut, budget, name, window, tied, split_by, seed):
    """Documents of no, one and many tokens, some of which are not predicted, under several masks."""
    context, stride = cut
    shape = dataclasses.replace(SHAPE, tie_embeddings=tied)
    slow = models.Llama(shape, DenseKernel.attention, seq_len=context)
    fast = models.Llama(shape, SdpaKernel.attention, seq_len=context)
    slow.init_weights(seed)
    fast.load_state_dict(slow.state_dict())
    start = mask.registry.get(name)(torch.arange(context, dtype=torch.int32)[None], window)[0]
    job = job_of(tiny, documents, context, stride, split_by=split_by)
    read = []
    losses = eval_jobs.compute_losses(
        LoadedModel(fast, {"full_attention": start}, torch.device("cpu")), job, budget, read.append
    )
    with torch.no_grad():
        expected = list(alone(slow, start, documents, context, stride))
    longest = max([2, *map(len, documents)])  # its last token predicts none
    buckets = position_buckets(context if split_by == "position" else longest - 1)
    assert job.row_keys == [(job.fingerprint, first) for first in (None, *(first for first, _ in buckets))]
    for first, last in (None, None), *buckets:
        total = losses.total() if first is None else losses.total(first, last)
        places = [(position if split_by == "position" else distance, loss) for position, distance, loss in expected]
        some = [loss for place, loss in places if first is None or first <= place <= last]
        assert total.tokens == len(some)
        assert total.loss == pytest.approx(sum(some), rel=1e-5, abs=1e-5)
    assert sum(read) == job.num_tokens
    assert sum(losses.total(*one).tokens for one in buckets) == losses.total().tokens


def test_the_default_losses_of_a_model_are_the_same(monkeypatch):
    model = models.Llama(SHAPE, DenseKernel.attention, seq_len=9)
    model.init_weights(0)
    tokens, labels = torch.randint(V, (3, 9)), torch.randint(V, (3, 9))
    labels[1, 2:] = -100
    form = mask.dense(torch.zeros(3, 9, dtype=torch.int32))[:, None]
    losses = models.Model.per_token_loss(model, tokens, form, labels)
    assert (losses.shape, losses.dtype, losses.requires_grad) == ((3, 9), torch.float32, False)
    assert (losses[1, 2:] == 0).all()
    monkeypatch.setattr("torchladder.models.loss.MIN_CHUNK_TOKENS", 4)
    monkeypatch.setattr("torchladder.models.loss.MAX_LOGITS_CPU", 1)
    torch.testing.assert_close(model.per_token_loss(tokens, form, labels), losses)
    torch.testing.assert_close(model(tokens, form, labels).detach(), losses.sum())
    assert model.bfloat16().per_token_loss(tokens, form, labels).dtype == torch.float32


def test_a_token_that_the_model_does_not_have_is_named(tiny):
    model = models.Llama(SHAPE, SdpaKernel.attention, seq_len=4)
    loaded_model = LoadedModel(model, {"full_attention": torch.zeros(4, dtype=torch.int32)}, torch.device("cpu"))
    with pytest.raises(ConfigError, match=r"memory\.bin has token 11, but the model's vocab_size is 11"):
        eval_jobs.compute_losses(loaded_model, job_of(tiny, [[1, V, 2]], 4, 4), 100, len)


# --- the table --------------------------------------------------------------------------------------------------------


def row(fingerprint="a", **values):
    return dict.fromkeys(COLUMNS) | {"time": "now", "fingerprint": fingerprint} | values


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_rows_come_back_as_they_were(tmp_path, suffix):
    table = ResultTable(tmp_path / "new" / f"results{suffix}")
    assert table.rows() == []
    rows = [
        row("a", loss=0.1 + 0.2, tokens=3, file='a "b", c\u2028é.txt'),
        row("a", first_position=0),
        row("b", step=0),
    ]
    table.add(rows[:2])
    table.add(rows)
    assert ResultTable(table.path).rows() == rows


def test_csv_has_nan_and_json_has_null(tmp_path):
    for suffix, expected in (".csv", "nan"), (".jsonl", "None"):
        table = ResultTable(tmp_path / f"results{suffix}")
        table.add([row(loss=math.nan, perplexity=math.inf)])
        assert str(table.rows()[0]["loss"]) == expected
        assert "NaN" not in table.path.read_text()


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_a_line_that_was_cut_off_is_dropped_wherever_it_was_cut(tmp_path, suffix):
    table = ResultTable(tmp_path / f"results{suffix}")
    table.add([row("a")])
    before = table.path.read_bytes()
    table.add([row("b", loss=1.5)])
    whole = table.path.read_bytes()
    for size in [*range(0, len(before), 7), *range(len(before), len(whole), 7)]:
        table.path.write_bytes(whole[:size])
        assert [one["fingerprint"] for one in table.rows()] == (["a"] if size >= len(before) else [])
        table.add([row("a"), row("b", loss=1.5)])
        assert table.path.read_bytes() == whole


def add_rows(path, names):
    table = ResultTable(path)
    read = table._read

    def read_slowly(file):
        rows = read(file)
        time.sleep(0.005)  # the others get their turn between reading and writing
        return rows

    table._read = read_slowly
    for name in names:
        table.add([row(name, file="x" * 5000), row(name, first_position=0)])


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_processes_add_to_one_file_at_once(tmp_path, suffix):
    path = tmp_path / f"results{suffix}"
    context = multiprocessing.get_context("fork")
    # Each row is of two of them.
    names = [[f"{(worker + shift) % 4} {i}" for i in range(8) for shift in (0, 1)] for worker in range(4)]
    workers = [context.Process(target=add_rows, args=(path, some)) for some in names]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    found = [(one["fingerprint"], one["first_position"]) for one in ResultTable(path).rows()]
    assert Counter(found) == Counter(
        (f"{worker} {i}", first) for worker in range(4) for i in range(8) for first in (None, 0)
    )


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "step,loss\n1,2\n", "line 1 has the columns step, loss, not time"),
        ("a.csv", "step,los\n", "unknown column 'los'. Did you mean 'loss'"),
        ("a.csv", "my only line", "its only line is incomplete"),
        ("a.csv", ",".join(COLUMNS) + "\n1,2\n", "line 2 has 2 values, not 17"),
        ("a.jsonl", '{"step": 1}\n', "line 1 has the columns step, not time"),
        ("a.jsonl", "[]\n", "line 1 is not an object"),
        ("a.jsonl", "hello\n", "not a table of evaluations"),
        ("a.txt", "", "must end in .csv or .jsonl"),
    ],
)
def test_a_file_that_holds_something_else_is_refused_and_kept(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(ConfigError, match=message.replace(".", r"\.")):
        ResultTable(path)
    assert path.read_text() == content


def test_rows_that_do_not_fit_on_the_disk_leave_nothing(tmp_path):
    table = ResultTable(tmp_path / "results.csv")
    table.add([row("a")])
    before = table.path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 10, limits[1]))
    try:
        with pytest.raises(ConfigError, match="cannot be written: File too large"):
            table.add([row("b", loss=1.5), row("c")])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert table.path.read_bytes() == before


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be written"):
        ResultTable(tmp_path / "file" / "results.csv")


def test_the_docs_name_each_column_and_each_option(capsys):
    page = (Path(__file__).parents[1] / "docs" / "evaluation.md").read_text()
    table = page[page.index("| column |") :]
    assert {name for name in COLUMNS if f"`{name}`" not in table} == set()
    with pytest.raises(SystemExit):
        command.run(["--help"])
    options = set(re.findall(r"--[a-z-]+", capsys.readouterr().out)) - {"--help", "--no-bos"}
    assert {option for option in options if f"`{option}`" not in page} == set()


# --- the command ------------------------------------------------------------------------------------------------------

TEXTS = ["def f(x):\n    return x\n", "a", "class Größe:\n    pass\n", "x = 1\n" * 8]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Two checkpoints of a run that validates on val.jsonl, whose documents are shorter than a row; and more files."""
    root = tmp_path_factory.mktemp("evaluate")
    (root / "val.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in TEXTS))
    (root / "long.txt").write_text("while True:\n    print('ladder')\n" * 20)
    sources = [
        f'{{ path = "{root / name}", text_key = "{key}" }}'
        for name, key in (("long.txt", "text"), ("val.jsonl", "body"))
    ]
    run(root / "run", "--training.steps", "2", "--training.seq_len", "64", "--training.local_batch_size", "1",
        "--attention.masks", "document", "chunk", "--optimizer.lr", "1e-2", "--data.packing", "pad",
        "--data.sources", sources[1], "--data.validation_sources", sources[1], "--data.no_labels_across_documents",
        "--data.cache_folder", str(root / "cache"), "--validation.freq", "1", "--validation.steps", "-1",
        "--phases", "{ from_step = 1, rope_theta = 20 }",
        "--checkpoint.enable", "--checkpoint.interval", "1", "--metrics.no_enable_tensorboard")  # fmt: skip
    return root


def evaluate(root, *argv, code=0, models=("run",), files=("val.jsonl",), output=None):
    """Evaluates; returns the rows of the output."""
    output = output or root / models[0] / "evaluation.csv"
    paths = [str(root / name) for name in (*models, "--", *files) if name != "--"]
    given, read = paths[: len(models)], paths[len(models) :]
    assert command.run([*given, "--files", *read, "--output", str(output), *argv]) == code
    return ResultTable(Path(output)).rows()


def plain(rows):
    """Rows without what differs from one time to the next."""
    return [{name: value for name, value in row.items() if name != "time"} for row in rows]


def test_a_file_costs_what_the_trainers_validation_says(root, capsys):
    rows = evaluate(root)
    assert [row["step"] for row in rows] == [1, 2]
    size = len("".join(TEXTS).encode())
    for row in rows:
        assert row["loss"] == pytest.approx(validations(root / "run")[row["step"], 64], rel=1e-6)
        assert row["tokens"] == size  # of each document all bytes but the first, and its end
        assert (row["documents"], row["bytes"], row["context"], row["stride"]) == (4, size, 64, 64)
        assert row["perplexity"] == math.exp(row["loss"])
        assert row["total_loss"] == pytest.approx(row["loss"] * row["tokens"])
        assert row["bits_per_byte"] == pytest.approx(row["total_loss"] / math.log(2) / size)
    out, err = capsys.readouterr()
    assert f"{rows[1]['loss']:.4f}" in out
    assert "step-2" in err


def test_each_checkpoint_goes_out_with_the_rope_theta_of_its_step(root, tmp_path):
    pytest.importorskip("safetensors")
    for step, theta in (1, 1e4), (2, 20.0):
        out = tmp_path / str(step)
        assert convert.run(["to-hf", str(root / "run" / "checkpoint" / f"step-{step}"), "--output", str(out)]) == 0
        assert json.loads((out / "config.json").read_text())["rope_theta"] == theta


def test_finished_evaluations_are_skipped(root, tmp_path, monkeypatch, capsys):
    output = tmp_path / "results.jsonl"
    first = evaluate(root, output=output, models=("run/checkpoint/step-1",))
    loaded = []
    load = TrainedModel.load
    monkeypatch.setattr(TrainedModel, "load", lambda trained, *of: loaded.append(trained.step) or load(trained, *of))
    both = evaluate(root, output=output)
    assert loaded == [2]
    assert both[0] == first[0]
    content = output.read_bytes()
    evaluate(root, output=output, models=("run/checkpoint",))
    assert (loaded, output.read_bytes()) == ([2], content)
    assert "2 of 2 evaluations are already finished" in capsys.readouterr().err

    # By position later: the rows of all positions do not change. An incomplete line is evaluated again.
    more = evaluate(root, "--by-position", output=output)
    assert more[:2] == both
    assert [row["first_position"] for row in more[2:]] == [0, 1, 2, 4, 8, 16, 32] * 2
    for step in (1, 2):
        whole, *parts = (row for row in more if row["step"] == step)
        assert sum(row["tokens"] for row in parts) == whole["tokens"]
        assert sum(row["total_loss"] or 0 for row in parts) == pytest.approx(whole["total_loss"])
        assert [row["bits_per_byte"] for row in parts] == [None] * 7
    output.write_bytes(output.read_bytes()[:-20])
    assert plain(evaluate(root, "--by-position", output=output)) == plain(more)
    # Another stride, type, context or content is another result.
    (tmp_path / "val.jsonl").write_text(json.dumps({"body": "another"}) + "\n")
    step = {"output": output, "models": ("run/checkpoint/step-1",)}
    sizes = [
        len(evaluate(root, *argv, **step)) for argv in (["--stride", "9"], ["--dtype", "bfloat16"], ["--context", "32"])
    ]
    assert [size - len(more) for size in sizes] == [1, 2, 3]
    assert len(evaluate(root, files=(tmp_path / "val.jsonl",), **step)) == len(more) + 4


def test_rows_that_another_process_adds_meanwhile_are_not_added_twice(root, tmp_path, monkeypatch):
    output = tmp_path / "results.csv"
    compute, calls = eval_jobs.compute_losses, []

    def compute_late(*of):
        calls.append(1)
        if len(calls) == 1:
            evaluate(root, output=output)  # all of it, while the first is in hand
        return compute(*of)

    monkeypatch.setattr(eval_jobs, "compute_losses", compute_late)
    rows = evaluate(root, output=output)
    assert len(calls) == 3  # the other's two and the one in hand, not the second one again
    assert [row["step"] for row in rows] == [1, 2]


def test_csv_and_json_lines_say_the_same(root, tmp_path):
    ask = ["--by-position", "--context", "16", "80", "--stride", "7"]
    of = {"files": ("val.jsonl", "long.txt")}
    forms = [plain(evaluate(root, *ask, output=tmp_path / f"results{suffix}", **of)) for suffix in (".csv", ".jsonl")]
    assert forms[0] == forms[1]
    assert len(forms[0]) == 2 * 2 * (1 + 5 + 1 + 8)
    with (tmp_path / "results.csv").open() as file:
        assert next(csv.reader(file)) == list(COLUMNS)
    shorter = {
        row["context"]: row["loss"] for row in forms[0] if row["first_position"] is None and "long" in row["file"]
    }
    assert len(set(shorter.values())) == 2


def test_losses_by_distance_have_a_table_beside_the_others(root, tmp_path, capsys):
    shutil.copytree(root / "run", tmp_path / "run")
    for table in (tmp_path / "run").glob("*.csv"):
        table.unlink()
    picture = tmp_path / "distances.svg"
    ask = [str(tmp_path / "run"), "--files", str(root / "long.txt"), "--context", "16", "--stride", "8"]
    assert command.run([*ask, "--by-position"]) == 0
    before = (tmp_path / "run" / "evaluation.csv").read_bytes()
    capsys.readouterr()
    assert command.run([*ask, "--by-distance", "--plot", str(picture)]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1 + 2 + 2  # a line of each checkpoint
    assert "distance" in picture.read_text()
    assert (tmp_path / "run" / "evaluation.csv").read_bytes() == before
    rows = ResultTable(tmp_path / "run" / "distances.csv", DISTANCES).rows()
    by_position = ResultTable(tmp_path / "run" / "evaluation.csv").rows()
    for step in (1, 2):
        whole, *parts = (row for row in rows if row["step"] == step)
        reference = next(row for row in by_position if row["step"] == step)
        for key in ("tokens", "documents", "fingerprint"):
            assert whole[key] == reference[key]
        assert whole["loss"] == pytest.approx(reference["loss"], rel=1e-9)
        assert [row["first_distance"] for row in parts] == [0, *(1 << power for power in range(len(parts) - 1))]
        assert parts[-1]["last_distance"] == whole["tokens"] - 1  # one document
        assert sum(row["tokens"] for row in parts) == whole["tokens"]
    assert command.run([*ask, "--by-distance"]) == 0
    assert "2 of 2 evaluations are already finished" in capsys.readouterr().err
    with pytest.raises(ConfigError, match=r"evaluation\.csv is not a table of losses by distance"):
        command.run([*ask, "--by-distance", "--output", str(tmp_path / "run" / "evaluation.csv")])


def test_in_documents_within_the_context_distance_is_position(root, tmp_path):
    ask = [str(root / "run" / "checkpoint" / "step-2"), "--files", str(root / "val.jsonl"), "--context", "512"]
    tables = []
    for name, schema in ("position", EVALUATIONS), ("distance", DISTANCES):
        output = tmp_path / f"{name}.jsonl"
        assert command.run([*ask, f"--by-{name}", "--output", str(output)]) == 0
        rows = ResultTable(output, schema).rows()
        tables.append({row[f"first_{name}"]: (row["tokens"], row["loss"]) for row in rows if row["tokens"]})
    assert tables[0].keys() == tables[1].keys()
    for first, found in tables[1].items():
        assert found == pytest.approx(tables[0][first], rel=1e-9)


def test_batches_change_nothing(root, tmp_path):
    ask = {"models": ("run/checkpoint/step-2",), "files": ("long.txt", "val.jsonl")}
    options = ["--context", "24", "--by-position", "--batch-tokens"]
    sizes = [evaluate(root, *options, size, output=tmp_path / f"{size}.csv", **ask) for size in ("1", "50", "10000")]
    for other in sizes[1:]:
        assert [row["tokens"] for row in other] == [row["tokens"] for row in sizes[0]]
        assert [row["loss"] for row in other] == pytest.approx([row["loss"] for row in sizes[0]], rel=1e-6)


def test_a_hugging_face_folder_has_the_loss_of_its_checkpoint(root, tmp_path, capsys):
    pytest.importorskip("safetensors")
    tokenizers = pytest.importorskip("tokenizers")
    part = tokenizers.Tokenizer(tokenizers.models.BPE())
    part.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        special_tokens=["<s>", "</s>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    part.train_from_iterator(["ladder"], trainer)
    part.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    out = tmp_path / "out"
    run(out, "--tokenizer.name", "huggingface", "--tokenizer.path", str(tmp_path / "tokenizer.json"),
        "--training.steps", "1", "--training.seq_len", "64", "--checkpoint.enable", "--validation.no_enable",
        "--attention.masks", "causal", "--curriculum.name", "constant", "--data.cache_folder", str(root / "cache"),
        "--data.sources", f'{{ path = "{root / "long.txt"}" }}')  # fmt: skip
    assert convert.run(["to-hf", str(out / "checkpoint" / "step-1"), "--output", str(tmp_path / "hf")]) == 0
    ask = ["--files", str(root / "long.txt"), "--context", "32"]
    found = []
    for bos in ("--no-bos", "--bos"):
        assert command.run([str(out), str(tmp_path / "hf"), *ask, bos]) == 0
        found.append([ResultTable(folder / "evaluation.csv").rows()[-1] for folder in (out, tmp_path / "hf")])
        run_row, hf_row = found[-1]
        assert (run_row["step"], hf_row["step"]) == (1, None)
        assert run_row["tokens"] == hf_row["tokens"]
        assert run_row["loss"] == pytest.approx(hf_row["loss"], rel=1e-6)
    assert found[1][0]["tokens"] == found[0][0]["tokens"] + 1
    assert len(ResultTable(tmp_path / "hf" / "evaluation.csv").rows()) == 2
    # Without --context a row of the model's own length.
    capsys.readouterr()
    assert command.run([str(tmp_path / "hf"), "--files", str(root / "long.txt")]) == 0
    assert ResultTable(tmp_path / "hf" / "evaluation.csv").rows()[-1]["context"] == 64


def test_files_of_tokens_and_files_without_labels(root, tmp_path, capsys):
    for name, documents in {"some": [[104, 105], [], [7], [1] * 200], "none": [[1], [], [2]]}.items():
        with IndexedWriter(tmp_path / name, np.dtype(np.uint16)) as writer:
            for document in documents:
                writer.add(document)
    files = [str(tmp_path / name) for name in ("some.idx", "none.bin", "some.bin")]
    rows = evaluate(
        root, "--by-position", models=("run/checkpoint/step-2",), files=files, output=tmp_path / "out.jsonl"
    )
    some, *parts, none = [row for row in rows if "some" in row["file"] or row["first_position"] is None]
    assert (some["tokens"], some["documents"], some["bytes"], some["bits_per_byte"]) == (200, 4, None, None)
    assert sum(row["tokens"] for row in parts) == 200
    assert none["tokens"] == 0
    assert none["loss"] is none["perplexity"] is none["total_loss"] is None
    assert "nan" not in (tmp_path / "out.jsonl").read_text().lower()
    assert "none.bin has no token to predict" in capsys.readouterr().err


def test_a_damaged_checkpoint_is_skipped(root, tmp_path, capsys):
    shutil.copytree(root / "run", tmp_path / "run")
    (tmp_path / "run" / "evaluation.csv").unlink(missing_ok=True)
    step = tmp_path / "run" / "checkpoint" / "step-1"
    (file,) = [file for file in step.iterdir() if file.suffix == ".distcp"]
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    rows = evaluate(tmp_path, code=1, files=(root / "val.jsonl",))
    assert [row["step"] for row in rows] == [2]
    assert "step-1 is damaged: " in capsys.readouterr().err
    with pytest.raises(ConfigError, match="is damaged"):
        command.run([str(step), "--files", str(root / "val.jsonl")])
    (step / "run.json").write_text("{")
    with pytest.raises(ConfigError, match="step-1 cannot be read"):
        command.run([str(step), "--files", str(root / "val.jsonl")])
    assert [row["step"] for row in evaluate(tmp_path, code=1, files=(root / "val.jsonl",))] == [2]


@pytest.mark.parametrize("name", ["val.jsonl", "tokens.bin"])
def test_a_tokenizer_that_has_changed_is_refused(root, tmp_path, monkeypatch, name):
    with IndexedWriter(tmp_path / "tokens", np.dtype(np.uint16)) as writer:
        writer.add([1, 2, 3])
    monkeypatch.setattr("torchladder.data.tokenizer.ByteTokenizer.fingerprint", "other")
    with pytest.raises(ConfigError, match="was trained with bytes, and its settings now build other"):
        evaluate(root, files=[root / name if name == "val.jsonl" else tmp_path / name], output=tmp_path / "a.csv")


def test_files_of_tokens_need_no_tokenizer(root, tmp_path, monkeypatch):
    with IndexedWriter(tmp_path / "tokens", np.dtype(np.uint16)) as writer:
        writer.add([1, 2, 3])

    def fail(*_):
        raise ConfigError("no such file")

    monkeypatch.setattr("torchladder.data.build_tokenizer", fail)
    rows = evaluate(root, files=[tmp_path / "tokens.bin"], output=tmp_path / "a.csv")
    assert [row["tokens"] for row in rows] == [2, 2]
    with pytest.raises(ConfigError, match=r"the tokenizer of .*: no such file"):
        evaluate(root, output=tmp_path / "b.csv")


def test_a_context_longer_than_the_rows_is_reported_once(root, tmp_path, capsys):
    evaluate(root, "--context", "100", files=("long.txt", "val.jsonl"), output=tmp_path / "a.csv")
    assert capsys.readouterr().err.count("context 100: longer than the rows in training (64)") == 1


def test_a_picture_shows_losses_over_steps_and_by_position(root, tmp_path, monkeypatch):
    ask = ["--context", "16", "--by-position", "--plot", str(tmp_path / "loss.svg")]
    rows = evaluate(root, *ask, output=tmp_path / "a.csv")
    assert (tmp_path / "loss.svg").stat().st_size > 1000
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path: figures.append(figure))
    evaluate(root, *ask, output=tmp_path / "a.csv")
    steps, places = figures[0].axes
    whole = [row["loss"] for row in rows if row["first_position"] is None]
    parts = [row["loss"] for row in rows if row["first_position"] is not None and row["step"] == 2]
    assert [line.get_xydata().tolist() for line in steps.lines] == [[[1, whole[0]], [2, whole[1]]]]
    assert [line.get_xydata().tolist() for line in places.lines] == [
        [[1, parts[0]], [2, parts[1]], [4, parts[2]], [8, parts[3]], [16, parts[4]]]
    ]
    # Of a Hugging Face folder there is one value, and no step.
    plots.plot_evaluations(tmp_path / "a.png", [*rows, rows[0] | {"step": None, "checkpoint": "hf"}])
    assert {text.get_text() for text in figures[1].legends[0].get_texts()} == {
        "run: val.jsonl, context 16",
        "hf: val.jsonl, context 16",
    }
    # More files than colours: all of their tokens together.
    many = [row | {"file": f"{n}.txt", "tokens": 1 + n, "loss": 2.0 * n} for n in range(8) for row in rows[:1]]
    plots.plot_evaluations(tmp_path / "a.png", many)
    (line,) = figures[2].axes[0].lines
    assert line.get_label() == "8 files, context 16"
    assert line.get_ydata().tolist() == [pytest.approx(sum(2 * n * (1 + n) for n in range(8)) / 36)]
    # Files of the same name have different labels.
    plots.plot_evaluations(tmp_path / "a.png", [rows[0] | {"file": f"{folder}/val.jsonl"} for folder in ("de", "en")])
    assert [line.get_label() for line in figures[3].axes[0].lines] == [
        "de/val.jsonl, context 16",
        "en/val.jsonl, context 16",
    ]
    # Positions of few tokens are left out where there are others, and averaged weights are a run beside their run.
    place = {"file": "a.txt", "context": 4, "step": 1, "loss": 2.0}
    points = [place | {"tokens": 200 * (1 + n), "first_position": n, "last_position": n} for n in range(3)]
    points += [place | {"tokens": 900, "first_position": None, "last_position": None}]
    rows = [row | {"checkpoint": f"{run}/checkpoint/step-1"} for run in ("a/x", "b/y") for row in points]
    rows += [row | {"checkpoint": row["checkpoint"] + " (ema)"} for row in rows[:4]]
    plots.plot_evaluations(tmp_path / "a.png", rows)
    steps, places = figures[4].axes
    assert [line.get_xdata().tolist() for line in places.lines] == [[2, 3]] * 3
    assert places.get_title() == "by position, at the last step (points of 256 tokens or more)"
    assert {axes.get_ylabel() for axes in (steps, places)} == {"loss (nats per token)"}
    assert [line.get_label().split(":")[0] for line in steps.lines] == ["x", "y", "x (ema)"]
    with pytest.raises(ConfigError, match="no loss to draw"):
        plots.plot_evaluations(tmp_path / "a.png", [])


def test_logs_report_progress(root, capsys):
    job = job_of(config.load(["--model.flavor", "debug"]), [[1] * 9], 4, 4, Path("a.bin"))
    with EvalProgress([job, job], interval=0.0) as progress:
        progress.begin(job)
        progress.advance(6)
        progress.skip([job])
    err = capsys.readouterr().err
    assert "a.bin, context 4: 10 tokens left" in err


def test_too_little_memory_is_an_error(root, tmp_path, monkeypatch):
    def exhaust(*_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(eval_jobs, "compute_losses", exhaust)
    with pytest.raises(ConfigError, match="--batch-tokens 16384 and a context of 64 need more memory than cpu has"):
        evaluate(root, output=tmp_path / "a.csv")


def test_ctrl_c_ends_the_command(root, tmp_path, monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(eval_jobs, "compute_losses", interrupt)
    assert evaluate(root, code=130, output=tmp_path / "a.csv") == []
    assert "run the same command again to continue" in capsys.readouterr().err


VAL = ["--files", "{root}/val.jsonl"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["{root}/run", "--files", "{root}/nothing.jsonl"], "no file matches"),
        (["{root}/run", "--files", "{root}/run/config.toml"], "matches no text file. Known: .jsonl"),
        (["{root}/run", "--files", "{root}/empty"], "matches no text file. Known: .jsonl"),
        (["{root}/run", *VAL, "--text-key", "bodi"], "Did you mean 'body'"),
        (["{root}/run", *VAL, "--context", "0"], "a context of 0 tokens"),
        (["{root}/run", *VAL, "--context", "8", "4", "--stride", "5"], "from 1 to the context (4)"),
        (["{root}/run", *VAL, "--stride", "65"], "from 1 to the context (64)"),
        (["{root}/run", *VAL, "--stride", "0"], "a stride of 0"),
        (["{root}/run", *VAL, "--by-position", "--by-distance"], "--by-position and --by-distance fill different"),
        (["{root}/run", *VAL, "--batch-tokens", "0"], "--batch-tokens 0"),
        (["{root}/run", *VAL, "--bos"], "no bos token"),
        (["{root}/run", *VAL, "--output", "{root}/a.xlsx"], "must end in .csv or .jsonl"),
        (["{root}/run", *VAL, "--plot", "{root}/a.gif"], "must end in"),
        (["{root}", *VAL], "is not a run with a complete checkpoint"),
    ],
)
def test_invalid_arguments_are_refused_before_a_model_is_loaded(root, argv, message, monkeypatch, capsys):
    (root / "empty" / "folder.txt").mkdir(parents=True, exist_ok=True)
    monkeypatch.setattr(TrainedModel, "load", None)
    monkeypatch.setattr("sys.argv", ["torchladder", "evaluate", *(word.format(root=root) for word in argv)])
    assert commands.main() == 2
    assert message in " ".join(capsys.readouterr().err.split())

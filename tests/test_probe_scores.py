"""Scores of long-context probes: of a model that copies, of one that knows nothing, of checkpoints, over ranks."""

import math
import re

import layouts
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from runs import lines, run
from torch import nn

from torchladder import mask, models, plots, probes, train
from torchladder.commands import evaluate as command
from torchladder.data.tokenizer import ByteTokenizer
from torchladder.inference.evaluation import probe_scores
from torchladder.inference.evaluation.probe_jobs import PROBE_COLUMNS, PROBES
from torchladder.inference.evaluation.probe_scores import ProbeRun, ordinary_ids, probe_tokens
from torchladder.inference.evaluation.result_table import ResultTable
from torchladder.inference.trained_model import TrainedModel
from torchladder.models.attention.dense import DenseKernel
from torchladder.probes import ProbeTokens
from torchladder.registry import ConfigError

V = 150
RANDOM = ProbeTokens(np.arange(3, V))
TEXT = ProbeTokens.from_text(np.arange(V), np.random.default_rng(0).integers(0, V, 3000))
OWN = torch.ones(1, 1)


def induction(tokens, positions):
    """A model that predicts what followed the longest repeated end of its context."""
    logits = torch.zeros(*positions.shape, V)
    for b, row in enumerate(tokens.tolist()):
        for i, end in enumerate((positions[b] + 1).tolist()):
            context, best = row[:end], (0, 0)
            for place in range(1, end):
                length = 0
                while length < place and context[place - 1 - length] == context[end - 1 - length]:
                    length += 1
                best = max(best, (length, place))
            logits[b, i, context[best[1]] if best[0] else 0] = 50.0
    return logits, OWN


@pytest.mark.parametrize(("name", "tokens"), [("needle", RANDOM), ("needle", TEXT), ("copy", RANDOM), ("repeat", TEXT)])
def test_a_model_that_copies_is_perfect(name, tokens):
    probe = ProbeRun(name, 130, 2, tokens)
    for score in probe.scores(probe.losses(induction, 5, lambda _: None)):
        assert (score.rows, score.accuracy, score.exact_match) == (2, 1.0, 1.0)
        assert score.loss < 1e-9
        assert score.first_loss > 20  # nothing says what the first answer is


def test_a_model_that_knows_nothing_is_at_chance():
    def uniform(tokens, positions):
        return torch.zeros(*positions.shape, 16), OWN

    def random(tokens, positions):
        return torch.rand(*positions.shape, 16, generator=generator), OWN

    generator = torch.Generator().manual_seed(0)
    probe = ProbeRun("needle", 64, 50, ProbeTokens(np.arange(16)))
    for score in probe.scores(probe.losses(uniform, 8, lambda _: None)):
        assert score.loss == pytest.approx(math.log(16))
        assert score.first_loss == pytest.approx(math.log(16))
    scores = probe.scores(probe.losses(random, 8, lambda _: None))
    assert np.mean([score.accuracy for score in scores]) == pytest.approx(1 / 16, abs=0.02)
    assert np.mean([score.exact_match for score in scores]) < 0.01


def test_accuracy_and_exact_match_count_tokens_and_rows():
    probe = ProbeRun("needle", 64, 2, RANDOM)
    losses = np.zeros((11, 2, 3))
    losses[:, 0] = 8.0, 2.0, 4  # summed over the 4 tokens of an answer
    losses[:, 1] = 0.0, 4.0, 3
    (score, *_) = probe.scores(losses)
    assert (score.first_loss, score.loss, score.accuracy, score.exact_match) == (1.0, 0.75, 7 / 8, 0.5)


@pytest.mark.parametrize(("batch_rows", "degree"), [(1, 1), (7, 1), (100, 1), (3, 4), (1, 3), (9, 16)])
def test_batches_and_ranks_change_nothing(batch_rows, degree):
    def cheap(tokens, positions):
        return nn.functional.one_hot(tokens.take_along_dim(positions, 1), V).float() + tokens[:, :1, None] / V, OWN

    probe = ProbeRun("needle", 40, 3, RANDOM)
    whole, calls = probe.losses(cheap, 33, lambda _: None), []
    parts = []
    for rank in range(degree):
        batches = []
        parts.append(probe.losses(cheap, batch_rows, batches.append, rank, degree))
        assert set(batches) == {batch_rows * 40}
        calls.append(len(batches))
    assert set(calls) == {-(-33 // (batch_rows * degree))}  # ranks call the model together
    np.testing.assert_allclose(np.sum(parts, axis=0), whole)
    assert (np.count_nonzero([part[:, :, 1] for part in parts], axis=0) == 1).all()


def test_special_tokens_are_never_used():
    class Small(ByteTokenizer):
        bos, eos, unk, vocab_size = 0, 5, 6, 10

        def decode(self, ids):
            return "" if ids == [8] else "x"

    assert ordinary_ids(Small(), 99).tolist() == [1, 2, 3, 4, 7, 9]
    assert ordinary_ids(Small(), 8).tolist() == [1, 2, 3, 4, 7]
    assert ordinary_ids(None, 3).tolist() == [0, 1, 2]
    assert ordinary_ids(ByteTokenizer(), 512).tolist() == list(range(256))
    tokens = probe_tokens(Small(), 10, [np.arange(10), np.arange(10)], 11)
    assert tokens.text.tolist() == [1, 2, 3, 4, 7, 9] * 2
    with pytest.raises(ConfigError, match="the text has 12 tokens without special ones, too few for a probe of 12"):
        probe_tokens(Small(), 10, [np.arange(10), np.arange(10)], 12)


def test_the_text_is_the_same_for_any_context(monkeypatch):
    monkeypatch.setattr(probe_scores, "MAX_TEXT_TOKENS", 25)
    pieces = [np.full(10, number) for number in range(9)]
    for context in (5, 20):
        assert len(probe_tokens(None, 9, pieces, context).text) == 30


@pytest.mark.parametrize("tied", [False, True])
def test_logits_at_positions_are_those_of_the_whole_row(tied, monkeypatch):
    shape = models.LlamaConfig(
        dim=8, n_layers=1, n_heads=2, ffn_dim=8, vocab_size=V, tie_embeddings=tied, logit_softcap=2.0
    )
    model = models.Llama(shape, DenseKernel.attention, seq_len=9)
    model.init_weights(0)
    tokens, positions = torch.randint(V, (3, 9)), torch.tensor([[8, 0], [3, 3], [1, 2]])
    form = mask.dense(torch.zeros(3, 9, dtype=torch.int32))[:, None]
    expected = torch.stack([row[place] for row, place in zip(model(tokens, form), positions, strict=True)])
    torch.testing.assert_close(model.logits_at(tokens, form, positions), expected)
    forward = models.Llama.forward
    monkeypatch.setattr(models.Llama, "forward", lambda self, tokens, attn_mask: forward(self, tokens, attn_mask))
    torch.testing.assert_close(model.logits_at(tokens, form, positions), expected)  # a model that computes all logits


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Two checkpoints of a run that measures probes as it validates, and text."""
    root = tmp_path_factory.mktemp("probes")
    generator = np.random.default_rng(0)
    words = ["".join(map(chr, generator.integers(97, 123, 5))) for _ in range(200)]
    (root / "text.txt").write_text(" ".join(generator.choice(words, 2000)))
    run(root / "run", "--training.steps", "2", "--training.seq_len", "128", "--training.local_batch_size", "2",
        "--data.sources", f'{{ path = "{root / "text.txt"}" }}', "--data.cache_folder", str(root / "cache"),
        "--data.validation_sources", f'{{ path = "{root / "text.txt"}" }}', "--attention.masks", "document", "chunk",
        "--validation.freq", "1", "--validation.probes", "needle", "repeat", "--validation.probe_rows", "3",
        "--checkpoint.enable", "--checkpoint.interval", "1", "--metrics.no_enable_tensorboard")  # fmt: skip
    return root


def measure(root, *argv, output=None, code=0):
    output = output or root / "run" / "probes.csv"
    assert command.run([str(root / "run"), "--probe-rows", "2", "--output", str(output), *argv]) == code
    return ResultTable(output, PROBES).rows()


def test_probes_of_checkpoints_are_tabulated_and_not_repeated(root, tmp_path, capsys, monkeypatch):
    rows = measure(root, "--probes", "--context", "64", "300")
    out, err = capsys.readouterr()
    assert "without --files, these probes are left out: repeat" in err
    assert err.count("context 300: longer than the rows in training (128)") == 1
    assert "300 (extrapolation)" in out
    assert " 64 (extrapolation)" not in out
    assert list(rows[0]) == list(PROBE_COLUMNS)
    by_probe = {name: [row for row in rows if row["probe"] == name] for name in ("copy", "needle")}
    assert len(by_probe["copy"]) == 2 * (1 + 4)
    assert [row["distance"] for row in by_probe["copy"][1:5]] == [32, 64, 128, 256]
    assert [row["depth"] for row in by_probe["needle"][:11]] == [step / 10 for step in range(11)]
    assert {row["step"] for row in rows} == {1, 2}
    assert {row["max_seq_len"] for row in rows} == {128}
    assert {row["files"] for row in rows} == {None}
    for row in rows:  # an untrained model is near chance
        assert row["loss"] == pytest.approx(math.log(512), rel=0.1)
        assert 0 <= row["exact_match"] <= row["accuracy"] < 0.5
    content = (root / "run" / "probes.csv").read_bytes()
    monkeypatch.setattr(TrainedModel, "load", None)
    assert measure(root, "--probes", "needle", "copy", "--context", "300") == rows
    assert (root / "run" / "probes.csv").read_bytes() == content
    assert "4 of 4 evaluations are already finished" in capsys.readouterr().err


def test_default_contexts_and_another_format_seed_and_text(root, tmp_path):
    output = tmp_path / "probes.jsonl"
    ask = ["--probes", "needle"]
    first = measure(root, *ask, output=output)
    assert list(dict.fromkeys(row["context"] for row in first)) == [32, 64, 128]
    assert len(measure(root, *ask, "--seed", "1", output=output)) == 2 * len(first)
    more = measure(root, *ask, "--files", str(root / "text.txt"), "--dtype", "bfloat16", output=output)
    assert len(more) == 3 * len(first)
    assert more[-1]["files"] == str(root / "text.txt")
    csv = measure(root, *ask, output=tmp_path / "probes.csv")
    assert [row | {"time": ""} for row in csv] == [row | {"time": ""} for row in first]


def test_the_docs_name_each_column_and_their_commands_run(root, tmp_path, monkeypatch):
    page = (layouts.DEBUG.parents[1] / "docs" / "probes.md").read_text()
    assert {name for name in PROBE_COLUMNS if f"`{name}`" not in page} == set()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs").mkdir()
    (tmp_path / "outputs" / "quickstart").symlink_to(root / "run")
    (tmp_path / "docs").symlink_to(layouts.DEBUG.parents[1] / "docs")
    shown = re.findall(r"```sh\ntorchladder evaluate (.*)\n```", page)
    assert len(shown) == 2
    for words in shown:
        assert command.run([*words.split(), "--probe-rows", "1", "--output", "probes.csv"]) == 0
    assert (tmp_path / "outputs" / "probes.png").exists()


def test_the_plugin_of_the_docs_works(monkeypatch):
    monkeypatch.setattr(probes.registry, "_components", dict(probes.registry._components))
    page = (layouts.DEBUG.parents[1] / "docs" / "probes.md").read_text()
    exec(re.search(r"```python\n(.*?)```", page, re.S)[1], {})
    probe = ProbeRun("far_needle", 400, 1, RANDOM)
    assert [score.accuracy for score in probe.scores(probe.losses(induction, 3, lambda _: None))] == [1.0] * 3


def test_batches_do_not_change_scores(root, tmp_path):
    ask = ["--probes", "copy", "repeat", "--files", str(root / "text.txt"), "--context", "100", "--batch-tokens"]
    one, other = (measure(root, *ask, size, output=tmp_path / f"{size}.csv") for size in ("1", "100000"))
    assert [row["loss"] for row in one] == pytest.approx([row["loss"] for row in other], rel=1e-5)
    assert len(one) == 2 * (2 + 2)


def test_validation_measures_the_probes(root):
    records = [line for line in lines(root / "run") if "needle_accuracy" in line]
    assert [list(record) for record in records] == [
        ["step", "needle_accuracy", "needle_loss", "repeat_accuracy", "repeat_loss"]
    ] * 3
    assert [record["step"] for record in records] == [0, 1, 2]
    assert records[0]["needle_loss"] == pytest.approx(math.log(512), rel=0.1)
    assert len({record["needle_loss"] for record in records}) == 3


def test_a_plot_shows_maps_of_the_last_step(root, tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path: figures.append(figure))
    rows = measure(root, "--probes", "needle", "copy", "--context", "64", "300", "--plot", str(tmp_path / "maps.png"))
    needle, copy, _ = figures[0].axes
    assert (needle.get_title(), copy.get_title()) == ("needle", "copy")
    last = [row["accuracy"] for row in rows if row["step"] == 2 and row["probe"] == "needle"]
    image = needle.images[0].get_array()
    assert image.shape == (11, 2)
    assert image.T.ravel().tolist() == last
    assert [label.get_text() for label in copy.get_yticklabels()] == ["32", "64", "128", "256"]
    assert list(needle.lines[0].get_xdata()) == [0.5, 0.5]  # right of it the model has not seen the positions
    with pytest.raises(ConfigError, match="no probe to draw"):
        plots.plot_probes(tmp_path / "a.png", [])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--probes", "needel"], "unknown probe 'needel'. Did you mean 'needle'?"),
        (["--probes", "repeat"], "the probe 'repeat' is made of your own text: name files with --files"),
        (["--probes", "copy", "--context", "512", "40"], "a context of 40 tokens is too short for the probe 'copy'"),
        (["--probes", "--stride", "4"], "--stride does not apply to --probes"),
        (["--probes", "--by-position"], "--by-position does not apply to --probes"),
        (["--probes", "--by-distance"], "--by-distance does not apply to --probes"),
        (["--probes", "--probe-rows", "0"], "--probe-rows 0: must be 1 or more"),
        (["--probes", "--seed", "-1"], "--seed -1: must be 0 or more"),
        ([], "nothing to evaluate: name text or tokens with --files, or use --probes"),
        (["--probes", "needle", "--files", "TEXT", "--context", "20000"], "too few for a probe of 20000"),
        (["--probes", "needle", "--output", "evaluation.csv"], "evaluation.csv is not a table of probes: line 1"),
    ],
)
def test_what_cannot_be_measured_is_an_error(root, tmp_path, monkeypatch, argv, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evaluation.csv").write_text("time,checkpoint\n")
    argv = [str(root / "text.txt") if word == "TEXT" else word for word in argv]
    with pytest.raises(ConfigError) as error:
        command.run([str(root / "run"), *argv])
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ('probes = ["needel"]', "unknown probe 'needel'. Did you mean 'needle'?"),
        ("probe_rows = 0", "validation.probe_rows = 0: must be 1 or more"),
        ('probes = ["copy"]', "a context of 32 tokens is too short for the probe 'copy'"),
    ],
)
def test_invalid_settings(setting, message, tmp_path, capsys):
    text = f'[job]\nextends = "{layouts.DEBUG}"\n[training]\nseq_len = 32\n[validation]\n{setting}\n'
    (tmp_path / "run.toml").write_text(text)
    argv = ["--job.config_file", str(tmp_path / "run.toml"), "--job.dump_folder", str(tmp_path / "out")]
    assert train.main(argv) == 2
    assert message in capsys.readouterr().err


# --- several ranks ----------------------------------------------------------------------------------------------------

PROBED = [
    *("--validation.enable", "--validation.freq", "1", "--validation.steps", "1", "--training.steps", "1"),
    *("--validation.probes", "needle", "--validation.probe_rows", "3", "--training.seq_len", "64"),
]
TWO = {
    "FSDP2": ["--training.local_batch_size", "2"],
    "TP2": ["--parallelism.tensor_parallel_degree", "2"],
    "TP2 without loss parallel": ["--parallelism.tensor_parallel_degree", "2", "--parallelism.disable_loss_parallel"],
    "CP2": ["--parallelism.context_parallel_degree", "2"],
    "compiled": [
        "--training.local_batch_size",
        "2",
        "--compile.enable",
        "--compile.backend",
        "aot_eager",
        "--compile.components",
        "loss",
    ],
}
FOUR = {"CP2 x TP2": [*TWO["CP2"], *TWO["TP2"]]}


@pytest.fixture(scope="module")
def probed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("probed")
    for ranks, runs in ((1, {"one": []}), (2, TWO), (4, FOUR)):
        layouts.launch(layouts.train, ranks, folder, {name: [*PROBED, *argv] for name, argv in runs.items()})
    return folder


@pytest.mark.parametrize("layout", [*TWO, *FOUR])
def test_scores_do_not_depend_on_the_layout(probed, layout):
    one, other = ([line for line in lines(probed / name) if "needle_loss" in line] for name in ("one", layout))
    assert [line["step"] for line in other] == [0, 1]
    assert other[0] == pytest.approx(one[0], rel=1e-5, abs=0.01)  # a token may tie with another
    assert other[0]["needle_loss"] == pytest.approx(one[0]["needle_loss"], rel=1e-6)
    assert other[1]["needle_loss"] == pytest.approx(one[1]["needle_loss"], rel=1e-4)

"""Commands read the moving average of a run's weights, or the mean of its last checkpoints."""

import shutil

import pytest
import torch
import torch.distributed.checkpoint as dcp
from runs import run

from torchladder.checkpoint import CHECKSUM_FILE
from torchladder.commands import convert, evaluate, generate
from torchladder.inference.evaluation.result_table import ResultTable
from torchladder.inference.trained_model import TrainedModel
from torchladder.inference.weight_choice import WeightChoice
from torchladder.models.attention import causal_attention
from torchladder.models.hf.hf_folder import HFFolder
from torchladder.plots import evaluation_curves
from torchladder.registry import ConfigError

SAVING = ["--training.seq_len", "64", "--validation.no_enable", "--checkpoint.enable", "--checkpoint.interval", "1"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Runs of 3 steps with and without an average, and a text."""
    root = tmp_path_factory.mktemp("choice")
    (root / "text.txt").write_text("while True:\n    print('ladder')\n" * 20)
    for name, ema in (("averaged", ["--ema.enable", "--ema.decay", "0.5"]), ("plain", [])):
        run(root / name, "--training.steps", "3", *SAVING, "--metrics.no_enable_tensorboard", *ema)
    return root


def stored(path, kind):
    """Returns the weights of a checkpoint."""
    reader = dcp.FileSystemReader(path)
    tensors = reader.read_metadata().state_dict_metadata
    found = {key: torch.empty(tensors[key].size) for key in tensors if key.startswith(f"{kind}.")}
    dcp.load(found, storage_reader=reader, no_dist=True)
    return {key.removeprefix(f"{kind}."): tensor for key, tensor in found.items()}


def expected(folder, kind, last):
    parts = [stored(folder / f"step-{step}", kind) for step in range(4 - last, 4)]
    return {name: torch.stack([part[name].double() for part in parts]).mean(0).float() for name in parts[0]}


CHOICES = [("model", 1), ("ema", 1), ("model", 2), ("model", 3), ("ema", 2)]


@pytest.mark.parametrize(("kind", "last"), CHOICES)
def test_the_chosen_weights_are_loaded_and_exported(root, tmp_path, kind, last):
    folder = root / "averaged" / "checkpoint"
    wanted = expected(folder, kind, last)
    trained = TrainedModel.open(folder / "step-3", choice=WeightChoice(kind, last))
    for name, tensor in trained.load(causal_attention, 64).model.state_dict().items():
        torch.testing.assert_close(tensor, wanted[name], rtol=0 if last == 1 else 1e-6, atol=0 if last == 1 else 1e-8)
    out = tmp_path / "hf"
    argv = ["to-hf", str(folder / "step-3"), "--output", str(out), "--tokenizer", "none"]
    assert convert.run([*argv, "--weights", kind, "--average-last", str(last)]) == 0
    hf = HFFolder(out)
    assert len(hf.tensors) == len(wanted)
    for name, hf_name in (("norm.weight", "model.norm.weight"), ("head.weight", "lm_head.weight")):
        torch.testing.assert_close(hf.read_tensor(hf_name), wanted[name], rtol=1e-6, atol=1e-8)


def test_evaluations_of_other_weights_are_other_rows(root, tmp_path):
    out = tmp_path / "results.csv"
    argv = [str(root / "averaged"), "--files", str(root / "text.txt"), "--output", str(out)]
    for more in ([], ["--weights", "ema"], ["--average-last", "2"], ["--weights", "ema", "--average-last", "3"], []):
        assert evaluate.run([*argv, *more]) == 0
    rows = ResultTable(out).rows()
    labels = [row["checkpoint"].rpartition("/")[2] for row in rows]
    steps = ["step-1", "step-2", "step-3"]
    each = [*steps, *(f"{step} (ema)" for step in steps), "step-3 (mean of 2)", "step-3 (ema, mean of 3)"]
    assert labels == each
    curves = evaluation_curves._curves(rows, per_file=True)
    runs = [label.partition(": ")[0].rpartition("/")[2] for label in curves]
    assert runs == ["averaged", "averaged (ema)", "averaged (mean of 2)", "averaged (ema, mean of 3)"]
    assert len({row["fingerprint"] for row in rows}) == len({row["loss"] for row in rows}) == len(rows)


def test_text_is_generated_with_the_chosen_weights(root, capsys):
    argv = ["--checkpoint", str(root / "averaged" / "checkpoint" / "step-3"), "--prompt", "import ", "--seed", "2"]
    texts = []
    for more in ([], ["--weights", "ema"], ["--average-last", "3"]):
        assert generate.run([*argv, "--max-new-tokens", "20", *more]) == 0
        texts.append(capsys.readouterr().out)
    assert len(set(texts)) == 3


def test_weights_that_a_run_does_not_have_are_refused(root, tmp_path):
    step = root / "plain" / "checkpoint" / "step-3"
    lacking = r"step-\d holds no moving average of the weights: ema\.enable was off"
    out, files = tmp_path / "out", ["--files", str(root / "text.txt"), "--output", str(tmp_path / "a.csv")]
    few = r"--average-last 4: the complete checkpoints up to .*step-3 are step-1, step-2, step-3\."
    for more, message in ((["--weights", "ema"], lacking), (["--average-last", "4"], few)):
        with pytest.raises(ConfigError, match=message):
            generate.run(["--checkpoint", str(step), "--prompt", "a", *more])
        with pytest.raises(ConfigError, match=message):
            convert.run(["to-hf", str(step), "--output", str(out), *more])
        with pytest.raises(ConfigError, match=message):
            evaluate.run([str(root / "plain"), *files, *more])
    with pytest.raises(ConfigError, match="--average-last 0: must be 1 or more"):
        evaluate.run([str(root / "plain"), *files, "--average-last", "0"])
    moved = shutil.copytree(step, tmp_path / "mine")
    with pytest.raises(ConfigError, match="not named step-N"):
        generate.run(["--checkpoint", str(moved), "--prompt", "a", "--average-last", "2"])
    assert convert.run(["to-hf", str(step), "--output", str(out), "--tokenizer", "none"]) == 0
    with pytest.raises(ConfigError, match="is a Hugging Face folder: --weights and --average-last read checkpoints"):
        generate.run(["--checkpoint", str(out), "--prompt", "a", "--weights", "ema"])


def test_every_checkpoint_of_a_mean_is_verified(root, tmp_path):
    folder = shutil.copytree(root / "averaged", tmp_path / "run") / "checkpoint"
    weights = next((folder / "step-2").glob("*.distcp"))
    weights.write_bytes(weights.read_bytes()[:-1])
    argv = ["to-hf", str(folder / "step-3"), "--tokenizer", "none"]
    assert convert.run([*argv, "--output", str(tmp_path / "one")]) == 0
    with pytest.raises(ConfigError, match="step-2 is damaged"):
        convert.run([*argv, "--output", str(tmp_path / "two"), "--average-last", "2"])
    (folder / "step-3" / ".metadata").write_bytes(b"x")
    with pytest.raises(ConfigError, match=r"its \.metadata is damaged"):
        TrainedModel.open(folder / "step-3", choice=WeightChoice("ema"))
    (folder / "step-1" / CHECKSUM_FILE).unlink()  # no longer complete
    with pytest.raises(ConfigError, match=r"up to .*step-3 are step-2, step-3\."):
        TrainedModel.open(folder / "step-3", choice=WeightChoice(average_last=3))

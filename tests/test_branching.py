"""A run that branches off from a checkpoint of another: it is the run that would have continued in place."""

import re
import shlex
import shutil
from dataclasses import replace

import pytest
import torch
import torch.distributed.checkpoint as dcp
from runs import DEBUG, ROOT, lines, losses, run

from torchladder import train
from torchladder.inference.trained_model import TrainedModel

SHORT = [
    *("--training.steps", "12", "--training.seq_len", "64", "--training.local_batch_size", "2"),
    *("--curriculum.name", "constant", "--validation.freq", "4", "--metrics.log_freq", "4"),
    *("--lr_scheduler.warmup_steps", "2", "--lr_scheduler.decay_ratio", "0.25", "--lr_scheduler.decay_type", "sqrt"),
    *("--checkpoint.enable", "--checkpoint.interval", "3", "--ema.enable", "--checkpoint.keep_latest_k", "0"),
]
DECAY = ["--training.steps", "8", "--phases", "{ from_step = 7, window = 16 }", "--optimizer.weight_decay", "0.2"]
WALL_CLOCK = {"seconds", "tps", "mfu", "mfu_palm", "memory_gib"}


@pytest.fixture(scope="module")
def stable(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stable")
    run(folder, *SHORT)
    return folder


def branch(stable, folder, *argv, step=6, code=0):
    path = ["--checkpoint.initial_load_path", str(stable / "checkpoint" / f"step-{step}")]
    accept = ["--checkpoint.accept_changes", "phases.window"]
    return run(folder, *SHORT, *DECAY, *path, "--checkpoint.no_initial_load_model_only", *accept, *argv, code=code)


def files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def tensors(checkpoint):
    """All tensors of a checkpoint by name: weights, averages, and the optimizer's state."""
    reader = dcp.FileSystemReader(checkpoint)
    found = {}
    for name, entry in reader.read_metadata().state_dict_metadata.items():
        if hasattr(entry, "size"):
            found[name] = torch.empty(entry.size, dtype=entry.properties.dtype)
    dcp.load(found, storage_reader=reader)
    return found


def test_a_branch_is_the_run_continued_in_place(stable, tmp_path):
    shutil.copytree(stable, tmp_path / "in_place")
    loading = ["--checkpoint.load_step", "6", "--checkpoint.accept_changes", "phases.window"]
    expected = run(tmp_path / "in_place", *SHORT, *DECAY, *loading)
    before = files(stable)
    found = branch(stable, tmp_path / "branch")
    assert files(stable) == before
    kept = [{k: v for k, v in line.items() if k not in WALL_CLOCK} for line in expected if line["step"] > 6]
    assert [{k: v for k, v in line.items() if k not in WALL_CLOCK} for line in found] == kept
    ours, theirs = (tensors(tmp_path / name / "checkpoint" / "step-8") for name in ("branch", "in_place"))
    assert ours.keys() == theirs.keys()
    assert any("exp_avg_sq" in name for name in ours)
    assert any(name.startswith("ema") for name in ours)
    assert all(ours[name].equal(theirs[name]) for name in ours)
    # Without the optimizer's state and the position in the data it is another run.
    branch(stable, tmp_path / "weights", "--checkpoint.initial_load_model_only")
    assert losses(tmp_path / "weights")[8] != losses(tmp_path / "branch")[8]


def test_a_branch_resumes_from_its_own_checkpoints(stable, tmp_path, capfd):
    whole = branch(stable, tmp_path / "whole")
    branch(stable, tmp_path / "twice", "--job.exit_interval", "7", code=75)
    capfd.readouterr()
    again = branch(stable, tmp_path / "twice")  # step 7 is between two reports
    keys = ("step", "loss", "tokens", "flops")
    assert [[line.get(key) for key in keys] for line in again] == [[line.get(key) for key in keys] for line in whole]
    said = "".join(capfd.readouterr())
    assert f"loaded {tmp_path}/twice/checkpoint/step-7" in said
    assert f"{stable}" not in said.replace("initial_load_path", "")


def test_changes_are_checked_as_for_a_resumed_run(stable, tmp_path, capsys):
    path = ["--checkpoint.initial_load_path", str(stable / "checkpoint" / "step-6")]
    whole = [*DEBUG, "--job.dump_folder", str(tmp_path), *SHORT, *path, "--checkpoint.no_initial_load_model_only"]
    assert train.main([*whole, "--data.seed", "7", "--phases", "{ from_step = 7, window = 16 }"]) == 2
    said = capsys.readouterr().err
    assert f"settings have changed since {stable}/checkpoint/step-6 was saved:" in said
    assert "phases.window was unset, is {'from_step = 7': 16}: at step 7 the window is 16, not 64" in said
    assert "data.seed has changed" in said
    assert train.main([*whole, "--training.steps", "6"]) == 2
    assert "has taken 6 steps, so none of training.steps = 6 is left" in capsys.readouterr().err
    assert train.main([word for word in whole if word not in path]) == 2
    assert "initial_load_model_only = false: set checkpoint.initial_load_path" in capsys.readouterr().err
    assert train.main([*whole, "--checkpoint.no_enable"]) == 2
    assert "checkpoint.initial_load_path needs checkpoint.enable" in capsys.readouterr().err
    assert not (tmp_path / "checkpoint").exists()


def test_the_recipe_of_the_docs(tmp_path, monkeypatch):
    """A thousandth of its steps, on a tiny model: three decays of one run, each over its last tenth."""
    page = (ROOT / "docs" / "schedule.md").read_text()
    short = re.compile("_?000")
    for name, text in re.findall(r"```toml\n# (\w+\.toml)\n(.*?)```", page, flags=re.DOTALL):
        (tmp_path / name).write_text(short.sub("", text))
    monkeypatch.chdir(tmp_path)
    tiny = [
        *("--model.flavor", "debug", "--model.dim", "16", "--model.n_layers", "1", "--tokenizer.name", "bytes"),
        *("--training.seq_len", "16", "--training.local_batch_size", "1", "--validation.no_enable"),
        *("--training.mixed_precision_param", "float32", "--metrics.log_freq", "1", "--metrics.no_enable_tensorboard"),
    ]
    (block,) = (found for found in re.findall(r"```sh\n(.*?)```", page, flags=re.DOTALL) if "wsd.toml" in found)
    for command in block.replace("\\\n", " ").splitlines():
        words = shlex.split(short.sub("", command))
        assert train.main([*words[words.index("torchladder.train") + 1 :], *tiny]) == 0
    stable = {line["step"]: line for line in lines(tmp_path / "outputs" / "wsd")}
    for steps in (10, 20, 30):
        found = lines(tmp_path / "outputs" / f"decay-{steps}")
        assert [line["step"] for line in found] == list(range(steps - steps // 10 + 1, steps + 1))
        assert found[0]["loss"] == stable[found[0]["step"]]["loss"]
        assert [line["tokens"] for line in found] == [stable[line["step"]]["tokens"] for line in found]
        peak = stable[5]["lr"]
        assert [line["lr"] for line in found] == pytest.approx(
            [peak * (1 - (at / len(found)) ** 0.5) for at in range(len(found))]
        )
        assert stable[steps]["lr"] == peak


def test_a_run_with_phases_in_tokens_is_read_after_it(tmp_path):
    """Its last settings follow from its batch: with another, the phase would begin after the last step."""
    folder = tmp_path / "run"
    phases = ["--phases", "{ from_tokens = 1024, lr_factor = 0.5 }"]
    run(folder, "--training.steps", "4", "--checkpoint.enable", "--validation.no_enable", *phases)
    trained = TrainedModel.open(folder / "checkpoint" / "step-4")
    assert trained.final_layer_windows == trained.layer_windows == {}
    old = replace(trained, run_state=replace(trained.run_state, final_window=None, window=None))
    assert old.final_window == trained.final_window

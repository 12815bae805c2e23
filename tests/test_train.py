"""Runs, whole: what they leave, that they learn, and that they go on as if they had never stopped."""

import json
import logging
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from torchladder import checkpoint, config, models, train
from torchladder.checkpoint import CHECKSUM_FILE, write_checksums
from torchladder.config.sections import TrainingConfig
from torchladder.registry import ConfigError
from torchladder.training import run_report

ROOT = Path(__file__).parents[1]
DEBUG = ["--job.config_file", str(ROOT / "train_configs" / "debug.toml")]
LINE = {
    "step", "loss", "grad_norm", "lr", "window", "tokens", "tps", "flops", "mfu", "mfu_palm", "attention_saved",
    "effective_context", "memory_gib", "seconds",
}  # fmt: skip


def run(folder: Path, *argv: str) -> list[dict]:
    """Trains the debug config in this process; returns the lines of its metrics."""
    assert train.main([*DEBUG, "--job.dump_folder", str(folder), *argv]) == 0
    return lines(folder)


def torchrun(ranks: int, folder: Path, *argv: str) -> list[dict]:
    """Trains the debug config on several ranks over gloo."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    result = subprocess.run(
        [*command, "-m", "torchladder.train", *DEBUG, "--job.dump_folder", str(folder), *argv],
        capture_output=True, text=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    return lines(folder)


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(found: list[dict]) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in found if "loss" in line}


def validations(found: list[dict]) -> dict[tuple[int, int], float]:
    return {(line["step"], line["window"]): line["validation_loss"] for line in found if "validation_loss" in line}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of 20 steps that never stopped."""
    folder = tmp_path_factory.mktemp("whole")
    run(folder, "--samples.prompts", "import ", "--samples.max_new_tokens", "8", "--validation.windows", "16")
    return folder


def test_what_a_run_leaves(whole):
    found = lines(whole)
    assert [line["step"] for line in found if "loss" in line] == list(range(1, 21))
    assert all(set(line) == LINE for line in found if "loss" in line)
    assert set(validations(found)) == {(step, window) for step in (0, 10, 20) for window in (16, 256)}
    assert (whole / "config.toml").is_file()
    assert (whole / "ladder.png").read_bytes().startswith(b"\x89PNG")
    assert "import " in (whole / "samples.txt").read_text()
    assert any((whole / "tb").iterdir())


def test_the_run_learns_and_climbs(whole):
    found = [line for line in lines(whole) if "loss" in line]
    assert found[-1]["loss"] < found[0]["loss"] - 0.5
    windows = [line["window"] for line in found]
    assert windows[0] == 8
    assert windows[-1] == 256
    assert windows == sorted(windows)
    assert found[0]["attention_saved"] > 0.9 > found[-1]["attention_saved"]


def test_the_resolved_settings_give_the_same_run(whole, tmp_path):
    resolved = ["--job.config_file", str(whole / "config.toml"), "--job.dump_folder", str(tmp_path)]
    assert train.main([*resolved, "--training.steps", "20"]) == 0
    assert losses(lines(tmp_path)) == losses(lines(whole))


@pytest.mark.parametrize("mode", ["disabled", "async"])
def test_a_run_that_stopped_goes_on_bit_for_bit(whole, tmp_path, mode):
    saving = ["--checkpoint.enable", "--checkpoint.interval", "7", "--checkpoint.async_mode", mode]
    run(tmp_path, *saving, "--validation.windows", "16")
    assert losses(lines(tmp_path)) == losses(lines(whole))
    kept = sorted(path.name for path in (tmp_path / "checkpoint").iterdir())
    assert kept == ["step-14", "step-20", "step-7"]

    again = run(tmp_path, *saving, "--checkpoint.load_step", "7", "--validation.windows", "16")
    assert losses(again) == losses(lines(whole))
    assert validations(again) == validations(lines(whole))
    assert [line["step"] for line in again if "loss" in line] == list(range(1, 21))  # each step once
    assert again[-1].get("tokens", 0) in (0, 20 * 1024)


def test_a_run_that_stopped_twice_goes_on_bit_for_bit(tmp_path):
    """With workers, several sources that are shuffled, and a phase that begins between the two."""
    sources = []
    for name, weight, words in (("a", 3, "alpha beta"), ("b", 1, "gamma"), ("c", 2, "delta epsilon zeta")):
        documents = [json.dumps({"text": f"{words} {i} " * (i % 7 + 1)}) for i in range(40)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(documents))
        sources.append(f'{{ path = "{tmp_path}/{name}.jsonl", weight = {weight} }}')
    settings = ["--training.steps", "6", "--training.seq_len", "64", "--data.num_workers", "2"]
    settings += ["--data.sources", *sources]
    settings += ["--data.cache_folder", str(tmp_path / "cache"), "--data.packing", "best_fit", "--validation.no_enable"]
    settings += ["--phases", "{ from_step = 3, source_weights = [1, 4, 0], window = 32 }"]
    settings += ["{ from_step = 5, source_weights = [1, 1, 1], lr_factor = 0.5 }"]
    through = losses(run(tmp_path / "through", *settings))
    saving = ["--checkpoint.enable", "--job.exit_interval", "2"]
    for steps in (2, 4):
        assert train.main([*DEBUG, "--job.dump_folder", str(tmp_path / "twice"), *settings, *saving]) == 75
        assert list(losses(lines(tmp_path / "twice"))) == list(range(1, steps + 1))
    assert losses(run(tmp_path / "twice", *settings, *saving)) == through
    assert len(set(through.values())) == 6


def test_samples_of_steps_that_are_taken_again_are_there_once(tmp_path):
    saving = ["--checkpoint.enable", "--training.steps", "4", "--checkpoint.interval", "2", "--validation.no_enable"]
    drawing = ["--samples.prompts", "import ", "def ", "--samples.freq", "1", "--samples.max_new_tokens", "2"]
    run(tmp_path, *saving, *drawing)
    first = (tmp_path / "samples.txt").read_bytes()
    assert [first.count(b"--- step %d\n" % step) for step in range(6)] == [0, 2, 2, 2, 2, 0]
    run(tmp_path, *saving, *drawing, "--checkpoint.load_step", "2")
    assert (tmp_path / "samples.txt").read_bytes() == first


def test_a_finished_run_does_nothing_more(whole, tmp_path):
    saving = ["--checkpoint.enable", "--training.steps", "4", "--checkpoint.interval", "2"]
    first = run(tmp_path, *saving)
    assert run(tmp_path, *saving) == first


def test_an_incomplete_checkpoint_is_passed_over(tmp_path):
    saving = ["--checkpoint.enable", "--training.steps", "6", "--checkpoint.interval", "2"]
    first = run(tmp_path, *saving)
    (tmp_path / "checkpoint" / "step-6" / ".metadata").unlink()
    (tmp_path / "checkpoint" / "step-100.partial").mkdir()
    assert losses(run(tmp_path, *saving)) == losses(first)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--data.seed", "5"], ["data.seed", "--checkpoint.accept_changes"]),
        (["--model.dim", "32"], ["model.dim", "32", "64"]),
        (["--curriculum.ramp", "1.0"], ["curriculum.ramp was 0.5, is 1.0: at step 2 the window falls from 256 to 132"]),
        (["--checkpoint.load_step", "3"], ["load_step = 3", "2"]),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(tmp_path_factory, capsys, argv, words):
    folder = tmp_path_factory.getbasetemp() / "refused"
    saving = ["--checkpoint.enable", "--training.steps", "2", "--checkpoint.interval", "2"]
    if not folder.exists():
        run(folder, *saving)
    assert train.main([*DEBUG, "--job.dump_folder", str(folder), *saving, "--training.steps", "4", *argv]) == 2
    shown = capsys.readouterr().err
    for word in words:
        assert word in shown


def test_accumulation_equals_one_large_batch(whole, tmp_path):
    four = run(tmp_path, "--training.local_batch_size", "1", "--training.global_batch_size", "4")
    for step, loss in losses(lines(whole)).items():
        assert losses(four)[step] == pytest.approx(loss, rel=1e-4)


def test_deterministic_algorithms_give_the_same_bits_and_another_seed_others(tmp_path):
    short, before = ["--training.steps", "4", "--validation.no_enable"], torch.are_deterministic_algorithms_enabled()
    try:
        first = run(tmp_path / "first", "--debug.deterministic", *short)
        assert torch.are_deterministic_algorithms_enabled()
        assert losses(run(tmp_path / "second", "--debug.deterministic", *short)) == losses(first)
        assert losses(run(tmp_path / "other", "--debug.deterministic", "--debug.seed", "1", *short)) != losses(first)
    finally:
        torch.use_deterministic_algorithms(before)


def test_two_ranks_give_one_ranks_losses(whole, tmp_path):
    # Two micro-batches of two rows on two ranks validate on the rows that two of four rows do on one.
    two = torchrun(2, tmp_path, "--training.local_batch_size", "2", "--validation.windows", "16")
    one = lines(whole)
    assert losses(two)[1] == pytest.approx(losses(one)[1], rel=1e-6)
    for step, loss in losses(one).items():
        assert losses(two)[step] == pytest.approx(loss, rel=1e-4)
    for key, loss in validations(one).items():
        assert validations(two)[key] == pytest.approx(loss, rel=1e-4)


def test_a_checkpoint_of_two_ranks_continues_on_one(whole, tmp_path):
    saving = ["--checkpoint.enable", "--checkpoint.interval", "10"]
    torchrun(2, tmp_path, "--training.local_batch_size", "2", "--training.global_batch_size", "4", *saving)
    again = run(tmp_path, "--training.global_batch_size", "4", *saving, "--checkpoint.load_step", "10")
    for step, loss in losses(lines(whole)).items():
        assert losses(again)[step] == pytest.approx(loss, rel=1e-4)


def test_recomputed_activations_and_bf16_train(tmp_path, whole):
    full = run(tmp_path / "ac", "--activation_checkpoint.mode", "full")
    for step, loss in losses(full).items():
        assert loss == pytest.approx(losses(lines(whole))[step], rel=1e-5)
    half = run(tmp_path / "bf16", "--training.mixed_precision_param", "bfloat16")
    for step, loss in losses(half).items():
        assert loss == pytest.approx(losses(lines(whole))[step], rel=5e-3)


def test_weights_and_optimizer_state_in_bf16_train_and_resume(tmp_path, whole):
    bf16 = ("--training.dtype", "bfloat16", "--training.mixed_precision_param", "bfloat16")
    saving = ("--checkpoint.enable", "--checkpoint.interval", "10")
    found = run(tmp_path, *bf16, *saving)
    for step, loss in losses(found).items():
        assert loss == pytest.approx(losses(lines(whole))[step], rel=3e-2)
    stored = dcp.FileSystemReader(tmp_path / "checkpoint" / "step-10").read_metadata().state_dict_metadata
    tensors = {name: entry.properties.dtype for name, entry in stored.items() if hasattr(entry, "properties")}
    assert {dtype for name, dtype in tensors.items() if "step" not in name} == {torch.bfloat16}
    assert losses(run(tmp_path, *bf16, *saving, "--checkpoint.load_step", "10")) == losses(found)
    with pytest.raises(ConfigError, match=r"training.dtype = 'bfloat16' needs training.mixed_precision_param"):
        TrainingConfig(dtype="bfloat16", mixed_precision_param="float32")


@pytest.mark.parametrize("kernel", ["dense", "sdpa"])
def test_kernels_train_alike(whole, tmp_path, kernel):
    for step, loss in losses(run(tmp_path, "--attention.kernel", kernel)).items():
        assert loss == pytest.approx(losses(lines(whole))[step], rel=1e-4)


def test_flex_says_that_it_cannot_train_on_a_cpu(tmp_path, capsys):
    if torch.cuda.is_available():
        pytest.skip("flex trains here")
    assert train.main([*DEBUG, "--job.dump_folder", str(tmp_path), "--attention.kernel", "flex"]) == 2
    assert "flex" in capsys.readouterr().err
    assert not (tmp_path / "metrics.jsonl").exists()


def test_a_seed_checkpoint_begins_a_run_with_the_same_weights(whole, tmp_path):
    run_without_lines = [*DEBUG, "--job.dump_folder", str(tmp_path), "--checkpoint.enable"]
    assert train.main([*run_without_lines, "--checkpoint.create_seed_checkpoint"]) == 0
    assert [path.name for path in (tmp_path / "checkpoint").iterdir()] == ["step-0"]
    opened = [os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    assert not [path for path in opened if path.startswith(str(tmp_path))]  # metrics.jsonl, TensorBoard
    assert losses(run(tmp_path, "--checkpoint.enable")) == losses(lines(whole))


def test_the_last_checkpoint_may_hold_weights_alone_in_another_type(tmp_path, capsys):
    saving = ["--checkpoint.enable", "--training.steps", "3", "--checkpoint.interval", "2"]
    run(tmp_path, *saving, "--checkpoint.last_save_model_only", "--checkpoint.export_dtype", "bfloat16")
    metadata = dcp.FileSystemReader(tmp_path / "checkpoint" / "step-3").read_metadata().state_dict_metadata
    assert all(name.startswith("model.") for name in metadata)
    assert {value.properties.dtype for value in metadata.values()} == {torch.bfloat16}
    # Such a run cannot go on, and says how another one begins with its weights.
    assert train.main([*DEBUG, "--job.dump_folder", str(tmp_path), *saving, "--training.steps", "4"]) == 2
    assert "initial_load_path" in capsys.readouterr().err
    other = ["--checkpoint.enable", "--checkpoint.initial_load_path", str(tmp_path / "checkpoint" / "step-3")]
    assert run(tmp_path / "other", *other, "--training.steps", "2")[0]["step"] == 0


PHASES = [
    "--phases",
    "{ from_step = 0, rope_theta = 5000.0 }",
    "{ from_step = 5, rope_theta = 20000.0, lr_factor = 0.5 }",
    "{ from_fraction = 0.5, rope_theta = 1e6, window = 32 }",
]


def test_phases_set_theta_window_and_rate_and_survive_a_resume(whole, tmp_path):
    saving = [*PHASES, "--checkpoint.enable", "--checkpoint.interval", "7", "--training.steps", "14"]
    through = run(tmp_path / "through", *saving)
    steps = [line for line in through if "loss" in line]
    plain = [line for line in lines(whole) if "loss" in line]
    # Debug: 5 steps of warm-up, then a decay over the run; the phases halve it and put the window at 32.
    assert [line["window"] for line in steps[7:]] == [32] * 7
    assert losses(through)[1] != losses(plain)[1]  # another theta from the first step on

    run(tmp_path / "again", *saving)
    again = run(tmp_path / "again", *saving, "--checkpoint.load_step", "7")
    assert losses(again) == losses(through)
    assert validations(again) == validations(through)
    rates = [line["lr"] for line in again if "loss" in line]
    assert rates == [line["lr"] for line in steps]
    full = run(tmp_path / "full", *PHASES[:2], "--training.steps", "14")
    assert [line["lr"] for line in full if "loss" in line][:5] == rates[:5]
    assert [0.5 * line["lr"] for line in full if "loss" in line][5:] == rates[5:]


def test_a_phase_clips_gradients_from_its_first_step_on(whole, tmp_path):
    clipped, plain = losses(run(tmp_path, "--phases", "{ from_step = 2, max_norm = 1e-9 }")), losses(lines(whole))
    assert [clipped[step] for step in (1, 2, 3)] == [plain[step] for step in (1, 2, 3)]  # of the weights before a step
    assert all(clipped[step] != plain[step] for step in plain if step > 3)


def test_other_phases_are_another_run(tmp_path, capsys):
    saving = ["--checkpoint.enable", "--training.steps", "2", "--checkpoint.interval", "2"]
    run(tmp_path, *saving, *PHASES[:2])
    for changed, word in (
        (["--phases", "{ from_step = 0, rope_theta = 6000.0 }"], "phases.rope_theta"),
        ([*PHASES[:2], "{ from_step = 1, window = 9 }"], "phases.window"),
        ([*PHASES[:2], "{ from_step = 1, max_norm = 0.5 }"], "phases.max_norm"),
    ):
        assert train.main([*DEBUG, "--job.dump_folder", str(tmp_path), *saving, *changed]) == 2
        assert word in capsys.readouterr().err


BREAKING_LOADER = """
from dataclasses import dataclass
from torchladder import data
from torchladder.data.row_loader import RowLoader
from torchladder.registry import ConfigError

@data.register("breaking")
@dataclass(kw_only=True)
class BreakingLoader(RowLoader):
    def __next__(self):
        if self.dp_rank == self.dp_degree - 1 and self.row >= 5 * self.global_batch_size:
            raise ConfigError(f"row {self.row} is damaged")
        return super().__next__()
"""


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_row_that_is_invalid_on_one_rank_ends_the_run_with_a_checkpoint(tmp_path, ranks):
    (tmp_path / "breaking_loader.py").write_text(BREAKING_LOADER)
    settings = ["--job.plugins", "breaking_loader", "--data.name", "breaking", "--checkpoint.enable"]
    program = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"] if ranks == 2 else []
    settings += ["--data.sources", '{ name = "python-stdlib" }', "--job.dump_folder", str(tmp_path / "run")]
    done = subprocess.run(
        [sys.executable, *program, "-m", "torchladder.train", *DEBUG, *settings],
        capture_output=True, text=True, cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
    )  # fmt: skip
    assert done.returncode == (2 if ranks == 1 else 1), done.stderr  # torchrun has its own
    assert f"torchladder: row {20 * ranks} is damaged" in done.stderr
    assert [step.name for step in (tmp_path / "run" / "checkpoint").glob("step-*")] == ["step-5"]
    assert checkpoint.is_complete(tmp_path / "run" / "checkpoint" / "step-5")


def test_a_run_says_at_its_end_what_it_has_left_and_what_is_next(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))  # a shell finds the command by PATH
    logging.getLogger("torchladder").setLevel(logging.INFO)
    run(tmp_path, "--training.steps", "3", "--checkpoint.enable")
    newest = tmp_path / "checkpoint" / "step-3"
    assert f"{tmp_path} has ladder.png, metrics.jsonl, and {newest}" in caplog.text
    assert f'next        torchladder generate --checkpoint {tmp_path} --prompt "..."' in caplog.text
    command = tmp_path / "bin" / "torchladder"
    command.parent.mkdir()
    command.touch()
    monkeypatch.setattr(sys, "executable", str(command.with_name("python")))  # of an environment that is not active
    monkeypatch.chdir(tmp_path)
    run_report.log_end(config.load([*DEBUG, "--job.dump_folder", str(tmp_path), "--checkpoint.enable"]), True, 1.0, {})
    assert "next        bin/torchladder generate" in caplog.text
    caplog.clear()
    for saving, said in (
        ((), "nothing is saved: checkpoint.enable is off"),
        (("--checkpoint.enable",), f"saved {tmp_path}/b/checkpoint/step-2; the same command continues from it"),
    ):
        folder = str(tmp_path / ("b" if saving else "a"))
        assert train.main([*DEBUG, "--job.dump_folder", folder, "--job.exit_interval", "2", *saving]) == 75
        assert said in caplog.text


def test_a_checkpoint_without_a_new_field_of_the_model_is_resumed_and_its_value_still_guarded(tmp_path, capsys):
    saving = ["--checkpoint.enable", "--training.steps", "2", "--validation.no_enable", "--checkpoint.interval", "1"]
    before = run(tmp_path, *saving)
    state = tmp_path / "checkpoint" / "step-1" / "run.json"
    written = json.loads(state.read_text())
    assert written["fingerprints"].pop("model.logit_softcap") == "0.0"
    state.write_text(json.dumps(written))
    (state.parent / CHECKSUM_FILE).unlink()
    write_checksums(state.parent)
    again = run(tmp_path, *saving, "--checkpoint.load_step", "1")
    assert losses(again) == losses(before)
    capped = ["--model.logit_softcap", "30", "--checkpoint.load_step", "1"]
    assert train.main([*DEBUG, "--job.dump_folder", str(tmp_path), *saving, *capped]) == 2
    assert "model.logit_softcap was 0.0, is 30.0" in capsys.readouterr().err


# --- z-loss ----------------------------------------------------------------------------------------------------------


def test_the_loss_of_a_run_with_z_loss_is_the_cross_entropy(tmp_path, whole):
    short = ["--training.steps", "2", "--training.z_loss_multiplier", "0.01"]
    found = run(tmp_path / "z", *short)
    steps = [line for line in found if "loss" in line]
    assert all(set(line) == LINE | {"z_loss"} for line in steps)
    assert steps[0]["loss"] == pytest.approx(losses(lines(whole))[1], rel=1e-6)
    plain = next(line for line in lines(whole) if "loss" in line)
    assert steps[0]["grad_norm"] != pytest.approx(plain["grad_norm"], rel=1e-4)  # the z-loss has a gradient
    logits = math.log(512)  # the debug model has 512 tokens, and nearly equal logits at first
    assert steps[0]["z_loss"] == pytest.approx(0.01 * logits**2, rel=0.2)
    assert validations(found)[0, 256] == validations(lines(whole))[0, 256]
    accumulated = ["--training.local_batch_size", "1", "--training.global_batch_size", "4", "--validation.no_enable"]
    compiled = ["--compile.enable", "--compile.components", "loss", "--compile.backend", "aot_eager"]
    other = run(tmp_path / "compiled", *short, *accumulated, *compiled)
    for key in ("loss", "z_loss"):
        assert [line[key] for line in other] == pytest.approx([line[key] for line in steps], rel=1e-5)


def test_a_model_without_z_loss_is_refused(monkeypatch, tmp_path, capsys):
    def forward(self, tokens, attn_mask, labels=None):
        raise AssertionError

    monkeypatch.setattr(models.Llama, "forward", forward)
    assert train.main([*DEBUG, "--job.dump_folder", str(tmp_path), "--training.z_loss_multiplier", "1e-4"]) == 2
    assert "z_loss_multiplier: Llama.forward has no argument z_loss_multiplier" in capsys.readouterr().err


@pytest.mark.parametrize(("key", "value"), [("training.z_loss_multiplier", "-1e-4"), ("model.logit_softcap", "-1")])
def test_invalid_loss_settings(key, value, tmp_path, capsys):
    (tmp_path / "run.toml").write_text(f"[{key.split('.')[0]}]\n{key.split('.')[1]} = {value}\n")
    assert train.main(["--job.config_file", str(tmp_path / "run.toml"), "--job.dump_folder", str(tmp_path)]) == 2
    assert f"{key} = {float(value)}: must be " in capsys.readouterr().err

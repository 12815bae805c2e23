import json
from pathlib import Path

import pytest
import torch

from torchladder import commands, config, mask, models
from torchladder import plan as plans
from torchladder.commands import plan as command
from torchladder.registry import ConfigError

CONFIGS = Path(__file__).parents[1] / "train_configs"


def load(name: str, *argv: str) -> config.Config:
    return config.load(["--job.config_file", str(CONFIGS / f"{name}.toml"), *argv])


@pytest.mark.parametrize("name", sorted(path.stem for path in CONFIGS.glob("*.toml")))
def test_every_shipped_config_makes_a_plan(name):
    plan = plans.make(load(name), ranks=8 if name.startswith("llama") else 1)
    assert plan.parameters > 0
    assert 0 <= plan.saved < 1
    assert all(1 <= plan.window(step) <= plan.config.training.seq_len for step in (0, plan.steps // 2, plan.steps - 1))


def test_flops_are_the_sum_over_all_steps():
    plan = plans.make(load("debug", "--attention.masks", "chunk", "--training.steps", "7"))
    row = torch.arange(plan.config.training.seq_len, dtype=torch.int32)[None]
    with torch.device("meta"):
        model = models.registry.build(plan.config.model, attend=None, seq_len=row.shape[1])
    rows = plan.batch.rows
    expected = sum(
        model.flops(rows * row.shape[1], rows * mask.pairs(mask.chunk(row, plan.window(step)))) for step in range(7)
    )
    assert plan.flops == expected
    assert plan.flops_full_context == 7 * model.flops(rows * row.shape[1], rows * mask.pairs(mask.causal(row, 1)))
    assert plan.saved == pytest.approx(1 - expected / plan.flops_full_context)


def test_llama1b_dm8_is_skyladders():
    plan = plans.make(load("llama1b_dm8"), ranks=8)
    assert plan.tokens_per_step == 1_048_576
    assert plan.parameters == 1_100_048_384
    assert plan.full_at == 65_280
    assert [plan.window(step) for step in (0, 1000, 65_279, 65_280, 99_999)] == [32, 157, 8191, 8192, 8192]
    assert plan.saved == pytest.approx(0.0939, abs=0.0001)
    assert (plan.batch.local, plan.batch.accumulation) == (4, 4)


def test_json_is_one_object(capsys):
    argv = ["--job.config_file", str(CONFIGS / "llama1b_dm8.toml"), "--json", "--at", "0,1000,65280"]
    assert command.run([*argv, "--training.local_batch_size", "4"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["windows"] == {"0": 32, "1000": 157, "65280": 8192}
    assert {"steps", "tokens_per_step", "parameters", "flops", "flops_full_context", "saved"} <= set(shown)


def test_the_picture_is_written(tmp_path, capsys):
    file = tmp_path / "ladder.png"
    command.run(["--job.config_file", str(CONFIGS / "debug.toml"), "--plot", str(file)])
    assert file.read_bytes().startswith(b"\x89PNG")
    assert "window" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--training.global_batch_size", "7"], ["global_batch_size = 7", "local_batch_size 4", "4 or 8"]),
        (["--curriculum.initial_window", "999"], ["curriculum.initial_window = 999", "256"]),
        (["--attention.masks", "document"], ["chunk", "sliding", "moves the window"]),
        (["--model.flavor", "debgu"], ["debgu", "debug"]),
        (["--parallelism.data_parallel_replicate_degree", "3"], ["3", "1 x 1"]),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(argv, words):
    with pytest.raises(ConfigError) as error:
        plans.make(load("debug", *argv))
    for word in words:
        assert word in str(error.value)


def test_commands_fail_with_one_message(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["torchladder", "plam"])
    assert commands.main() == 2
    assert "plan" in capsys.readouterr().err

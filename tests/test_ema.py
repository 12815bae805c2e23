"""The moving average of the weights: its value, what leaves it unchanged, runs that stop, and several ranks."""

import itertools

import layouts
import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given
from hypothesis import strategies as st
from runs import lines, losses, run
from torch import nn

from torchladder import config, ema, train
from torchladder.ema import EMAConfig, WeightEMA
from torchladder.registry import ConfigError
from torchladder.training import model_passes, trainer
from torchladder.training import run_plan as plans

GOOD, BAD = torch.tensor(0.0), torch.tensor(1.0)


def bits(average):
    return [tensor.clone() for tensor in average.averages.values()]


def equal(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@given(
    st.floats(0, 0.9999),
    st.integers(1, 4),
    st.integers(0, 6),
    st.lists(st.booleans(), min_size=1, max_size=20),
    st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_the_average_is_the_recursion_over_good_steps(decay, every, start, bad_steps, dtype):
    torch.manual_seed(0)
    model = nn.Linear(3, 2).to(dtype)
    average = WeightEMA(EMAConfig(True, decay, every, start), model)
    expected = [parameter.detach().double() for parameter in model.parameters()]
    for step, bad in enumerate(bad_steps, start=1):
        before = bits(average)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape))
        average.update(step, BAD if bad else GOOD)
        if bad or step % every:
            assert equal(bits(average), before)
            continue
        keep = 0.0 if step <= start else decay
        weights = [parameter.detach().double() for parameter in model.parameters()]
        expected = [keep * one + (1 - keep) * weight for one, weight in zip(expected, weights, strict=True)]
    assert list(average.averages) == ["weight", "bias"]
    for found, reference in zip(bits(average), expected, strict=True):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), reference, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_weights_come_back_after_the_average_was_in_the_model(dtype):
    model = nn.Linear(3, 2).to(dtype)
    average = WeightEMA(EMAConfig(enable=True), model)
    nn.init.normal_(model.weight)
    before, kept = [parameter.detach().clone() for parameter in model.parameters()], bits(average)

    def fail():
        with average.in_model():
            assert torch.equal(model.weight, average.averages["weight"].to(dtype))
            assert not torch.equal(model.weight, before[0])
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert equal([parameter.detach() for parameter in model.parameters()], before)
    assert equal(bits(average), kept)
    average.restart()
    assert torch.equal(average.averages["weight"], model.weight.detach().float())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"decay": 1.0}, "ema.decay = 1.0: must be 0 or more and below 1"),
        ({"decay": -0.1}, "ema.decay = -0.1"),
        ({"every_n_steps": 0}, "ema.every_n_steps = 0: must be 1 or more"),
        ({"start_step": -1}, "ema.start_step = -1"),
    ],
)
def test_invalid_settings(settings, message):
    with pytest.raises(ConfigError, match=message):
        EMAConfig(**settings)


# --- runs ------------------------------------------------------------------------------------------------------------

EMA = ["--ema.enable", "--ema.decay", "0.7", "--ema.every_n_steps", "2", "--ema.start_step", "2"]
SHORT = ["--training.steps", "6", "--training.seq_len", "64", "--validation.freq", "3", "--validation.windows", "8"]
SAVING = [*SHORT, "--checkpoint.enable", "--checkpoint.interval", "3", "--metrics.no_enable_tensorboard"]


def stored(folder, part="ema"):
    """Returns the tensors of a part of a checkpoint."""
    reader = dcp.FileSystemReader(folder)
    names = [key for key in reader.read_metadata().state_dict_metadata if key.startswith(f"{part}.")]
    found = {key: torch.empty(reader.read_metadata().state_dict_metadata[key].size) for key in names}
    dcp.load(found, storage_reader=reader, no_dist=True)
    return {key.removeprefix(f"{part}."): tensor for key, tensor in found.items()}


def validated(folder):
    return {
        (line["step"], line["window"]): (line["validation_loss"], line["ema_validation_loss"])
        for line in lines(folder)
        if "validation_loss" in line
    }


@pytest.fixture(scope="module")
def averaged(tmp_path_factory):
    """A run of 6 steps with an average and two checkpoints."""
    folder = tmp_path_factory.mktemp("averaged")
    run(folder, *SAVING, *EMA)
    return folder


def test_an_average_changes_no_loss_and_is_validated_beside_the_weights(averaged, tmp_path, capsys):
    plain = run(tmp_path, *SHORT)
    assert losses(tmp_path) == losses(averaged)
    found = validated(averaged)
    assert {key: loss for key, (loss, _) in found.items()} == {
        (line["step"], line["window"]): line["validation_loss"] for line in plain if "validation_loss" in line
    }
    assert all(loss == average for (step, _), (loss, average) in found.items() if step == 0)
    assert all(loss != average for (step, _), (loss, average) in found.items() if step > 0)
    assert "ema_loss" not in capsys.readouterr().out


def test_a_run_that_stopped_continues_its_average_bit_for_bit(averaged, tmp_path):
    while_training = ["--checkpoint.async_mode", "async", "--checkpoint.interval", "2"]
    run(tmp_path, *SAVING, *EMA, *while_training, "--job.exit_interval", "4", code=75)
    run(tmp_path, *SAVING, *EMA, *while_training, "--checkpoint.load_step", "2")
    one, other = (stored(folder / "checkpoint" / "step-6") for folder in (averaged, tmp_path))
    assert one.keys() == other.keys() == stored(tmp_path / "checkpoint" / "step-6", "model").keys()
    assert equal(one.values(), other.values())
    assert validated(tmp_path) == validated(averaged)


def test_an_average_begins_and_ends_in_mid_run_with_a_warning(averaged, tmp_path, caplog):
    run(tmp_path, *SAVING)
    caplog.clear()
    run(tmp_path, *SAVING, *EMA, "--checkpoint.load_step", "3", "--ema.start_step", "0")
    assert "step-3 holds no averaged weights: the average starts as its weights" in caplog.text
    weights, last = (stored(tmp_path / "checkpoint" / f"step-{step}", "model") for step in (3, 6))
    found = stored(tmp_path / "checkpoint" / "step-6")
    assert all(not torch.equal(found[name], last[name]) for name in found)
    assert losses(tmp_path) == losses(averaged)
    caplog.clear()
    run(tmp_path, *SAVING, "--training.steps", "7", "--checkpoint.accept_changes", "training.steps")
    assert "the averaged weights in" in caplog.text
    assert "ema.enable continues them" in caplog.text
    assert not stored(tmp_path / "checkpoint" / "step-7")
    assert weights.keys() == found.keys()


def test_the_average_of_a_new_run_begins_as_the_weights_that_it_loads(averaged, tmp_path):
    source = averaged / "checkpoint" / "step-6"
    run(tmp_path, *SAVING, *EMA, "--checkpoint.initial_load_path", str(source), "--checkpoint.create_seed_checkpoint")
    found, weights = stored(tmp_path / "checkpoint" / "step-0"), stored(source, "model")
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], weights[name]) for name in found)


def test_a_skipped_step_does_not_update_the_average(tmp_path, monkeypatch):
    """The last step has a loss of NaN."""
    kept = []

    class Watched(ema.WeightEMA):
        def update(self, step, bad):
            kept.append((float(bad), bits(self)))
            super().update(step, bad)
            kept[-1] += (bits(self),)

    forward_backward = model_passes.ModelPasses.forward_backward

    calls = itertools.count()

    def broken(self, *arguments):
        found = forward_backward(self, *arguments)
        if next(calls) == 3:
            next(self.model.parameters()).grad.fill_(torch.nan)
        return found

    monkeypatch.setattr(trainer, "WeightEMA", Watched)
    monkeypatch.setattr(model_passes.ModelPasses, "forward_backward", broken)
    argv = ["--training.steps", "5", "--resilience.on_bad_step", "skip", "--validation.no_enable"]
    run(tmp_path, *argv, "--ema.enable", "--ema.decay", "0.5")
    assert [bad for bad, _, _ in kept] == [0, 0, 0, 1, 0]
    assert [equal(before, after) for _, before, after in kept] == [False, False, False, True, False]


def test_float8_weights_that_are_gathered_in_float8_are_refused(tmp_path, capsys):
    words = ["--ema.enable", "--float8.enable", "--float8.emulate", "--float8.enable_fsdp_float8_all_gather"]
    debug = ["--job.config_file", "train_configs/debug.toml"]
    assert train.main([*debug, "--job.dump_folder", str(tmp_path), *words]) == 2
    assert "ema.enable does not support float8.enable_fsdp_float8_all_gather" in capsys.readouterr().err


LAYOUTS = {
    "FSDP2": ["--training.local_batch_size", "2"],
    "kept gathered": ["--training.local_batch_size", "2", "--parallelism.fsdp_reshard_after_forward", "never"],
    "TP2, checkpointed": ["--parallelism.tensor_parallel_degree", "2", "--activation_checkpoint.mode", "full"],
}


STEP_3 = ["--checkpoint.load_step", "3"]


def resume_one(ranks, folder):
    """Loads the checkpoints of two ranks on one, without a step."""
    for name in LAYOUTS:
        settings = config.load([*layouts.ALWAYS, "--job.dump_folder", str(folder / name), *SAVING, *EMA, *STEP_3])
        run = trainer.Trainer(plans.make_plan(settings, 1), ranks)
        expected = stored(folder / name / "checkpoint" / "step-3")
        assert run.step == 3
        assert run.ema.averages.keys() == expected.keys()
        assert all(torch.equal(run.ema.averages[key], expected[key]) for key in expected)


def test_two_ranks_have_the_average_of_one_and_one_continues_it(averaged, tmp_path):
    on = ["--validation.enable", *SAVING, *EMA]
    layouts.launch(layouts.train, 2, tmp_path, {name: [*on, *argv] for name, argv in LAYOUTS.items()})
    for name in LAYOUTS:
        for key, pair in validated(averaged).items():
            assert validated(tmp_path / name)[key] == pytest.approx(pair, rel=1e-5), (name, key)
        found, expected = (stored(folder / "checkpoint" / "step-6") for folder in (tmp_path / name, averaged))
        assert found.keys() == expected.keys()
        for key in expected:
            torch.testing.assert_close(found[key], expected[key], rtol=1e-3, atol=1e-4)
    layouts.launch(resume_one, 1, tmp_path)

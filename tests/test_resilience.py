"""Bad steps: found without waiting, never learnt from, told with their rows; rows that are left out."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from runs import lines, losses, run
from torch import nn

from torchladder import checkpoint, optim
from torchladder.data.row_skipping import RowSkipper
from torchladder.registry import ConfigError
from torchladder.resilience.bad_steps import (
    HISTORY_STEPS,
    MIN_HISTORY_STEPS,
    BadStepDetector,
    BadStepError,
    ResilienceConfig,
    Rollback,
    StepOutcome,
    backward_seed,
)
from torchladder.training import model_passes

CPU = torch.device("cpu")


class Thing:
    def __init__(self, **optimizer) -> None:
        torch.manual_seed(0)
        self.model = nn.Linear(3, 2)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), **optimizer)

    def gradients(self, value: float) -> None:
        for parameter in self.model.parameters():
            parameter.grad = torch.full_like(parameter, value)

    def bits(self) -> list[torch.Tensor]:
        state = [value for one in self.optimizer.state.values() for value in one.values()]
        return [value.detach().clone() for value in (*self.model.parameters(), *state)]


@pytest.mark.parametrize("kind", [{"fused": True}, {"foreach": True}, {"foreach": False}])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_bad_step_leaves_weights_and_optimizer_as_they_were(kind, bad):
    thing, plain = Thing(**kind), Thing(**kind)
    detector = BadStepDetector(ResilienceConfig("skip"), CPU, optim.is_fused(thing.optimizer))
    for step, value in enumerate([0.1, bad, 0.3, bad, 0.2], start=1):
        before = thing.bits()
        thing.gradients(value)
        outcome = step_of(detector, step, value)
        if optim.should_step(thing.optimizer, outcome.bad):
            thing.optimizer.step()
        detector.record(outcome)
        if math.isfinite(value):
            plain.gradients(value)
            plain.optimizer.step()
        else:
            assert all(torch.equal(one, other) for one, other in zip(thing.bits(), before, strict=True))
    assert all(torch.equal(one, other) for one, other in zip(thing.bits(), plain.bits(), strict=True))
    detector.flush()
    assert detector.num_bad == 2


def step_of(detector, step, norm, losses=()):
    """A step as the trainer records it."""
    norm = torch.tensor(norm)
    return StepOutcome(step, (4 * step, 4 * step + 3), detector.check(norm), norm, list(losses))


def reference(norms: list[float], deviations: float) -> list[bool]:
    """What check does, slowly."""
    good: list[float] = []
    bad = []
    for norm in norms:
        last = good[-HISTORY_STEPS:]
        far = False
        if len(last) >= MIN_HISTORY_STEPS:
            mean = sum(last) / len(last)
            far = norm > mean + deviations * math.sqrt(sum((value - mean) ** 2 for value in last) / len(last))
        bad.append(far or not math.isfinite(norm))
        good += [] if bad[-1] else [norm]
    return bad


@given(st.integers(0, 2**31), st.floats(1.5, 6.0), st.integers(0, 3 * HISTORY_STEPS))
def test_norms_are_judged_like_the_slow_reference_and_across_a_resume(number, deviations, stop):
    random = torch.Generator().manual_seed(number)
    norms = torch.randn(3 * HISTORY_STEPS, generator=random, dtype=torch.float64).exp().tolist()
    norms[number % len(norms)] = math.nan
    config = ResilienceConfig("skip", deviations)
    detector, found = BadStepDetector(config, CPU, fused=True), []
    for step, norm in enumerate(norms):
        if step == stop:
            state = detector.state_dict()
            detector = BadStepDetector(config, CPU, fused=True)
            detector.load_state_dict(state)
        found.append(bool(detector.check(torch.tensor(norm, dtype=torch.float64))))
    assert found == reference(norms, deviations)


def test_a_loss_that_is_not_finite_reaches_every_gradient():
    weight = torch.ones(3, requires_grad=True)
    finite = weight.sum()
    finite.backward(backward_seed(finite))
    assert torch.equal(weight.grad, torch.ones(3))
    loss = weight.sum() + torch.inf  # its gradient would be 1
    weight.grad = None
    loss.backward(backward_seed(loss))
    assert weight.grad.isnan().all()


def detector_after(policy: str, **settings) -> BadStepDetector:
    detector = BadStepDetector(ResilienceConfig(policy, **settings), CPU, fused=True)
    for step in (1, 2, 3):
        norm = math.nan if step == 2 else 1.0
        detector.record(step_of(detector, step, norm, [((8, 9), torch.tensor(norm))]))
    return detector


def test_what_is_reported_and_what_follows(caplog):
    with pytest.raises(BadStepError, match="bad step 2: rows 8 to 11"):
        detector_after("stop").flush()
    assert "bad step 2: gradient norm nan, rows 8 to 11 (1 so far)" in caplog.text
    assert "the loss is nan on rows 8, 9" in caplog.text
    with pytest.raises(Rollback) as back:
        detector_after("rollback").flush()
    assert back.value.rows == [(8, 11)]
    detector = detector_after("skip", max_bad_steps=1)
    detector.flush()
    detector.flush()  # each is seen once
    assert detector.num_bad == 1
    detector.record(step_of(detector, 4, math.inf))
    with pytest.raises(BadStepError, match="2 bad steps since the last checkpoint"):
        detector.flush()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"sigma_factor": -1.0}, "sigma_factor"),
        ({"sigma_factor": math.inf}, "sigma_factor"),
        ({"max_bad_steps": 0}, "max_bad_steps"),
    ],
)
def test_settings_that_cannot_be(settings, words):
    with pytest.raises(ConfigError, match=words):
        ResilienceConfig(**settings)


def test_skip_on_a_gpu_needs_a_fused_optimizer():
    fused = optim.is_fused(Thing(foreach=True).optimizer)
    with pytest.raises(ConfigError, match="fused"):
        BadStepDetector(ResilienceConfig("skip"), torch.device("meta"), fused)


# --- rows -----------------------------------------------------------------------------------------------------------

RANGES = st.lists(
    st.tuples(st.integers(0, 60), st.integers(0, 9)).map(lambda one: (one[0], one[0] + one[1])), max_size=6
)


@given(RANGES, st.integers(0, 70), st.integers(0, 40), st.integers(0, 40))
def test_rows_are_left_out_as_by_a_list(ranges, row, count, more):
    skipping = RowSkipper(ranges)
    kept = [one for one in range(300) if not any(first <= one <= last for first, last in ranges)]
    following = [one for one in kept if one >= row]
    assert skipping.take(row, count) == following[:count]
    after = skipping.advance(row, count)
    assert skipping.take(after, more) == following[count : count + more]
    assert skipping.advance(after, more) == skipping.advance(row, count + more) or more == 0


@pytest.mark.parametrize("wrong", [(3, 2), (-1, 4)])
def test_ranges_that_are_none(wrong):
    with pytest.raises(ConfigError, match="is not a range"):
        RowSkipper([wrong])


# --- runs -----------------------------------------------------------------------------------------------------------

RUN = [
    *("--training.steps", "8", "--training.local_batch_size", "2", "--training.global_batch_size", "4"),
    *("--training.seq_len", "64", "--validation.no_enable", "--metrics.no_enable_tensorboard"),
    *("--checkpoint.enable", "--checkpoint.interval", "3", "--metrics.log_freq", "2"),
]
BAD = 18
"""A row of the fifth step, which trains on rows 16 to 19."""


def poison(monkeypatch, row: int = BAD) -> None:
    forward_backward = model_passes.ModelPasses.forward_backward

    def poisoned(self, batch, *arguments):
        losses = forward_backward(self, batch, *arguments)
        if row in batch.rows:
            next(self.model.parameters()).grad += torch.nan
            losses["loss"] = losses["loss"] * torch.nan
        return losses

    monkeypatch.setattr(model_passes.ModelPasses, "forward_backward", poisoned)


def saved_losses(folder) -> dict[int, float]:
    return {step: loss for step, loss in losses(folder).items() if loss is not None}


def test_stop_saves_nothing_bad(tmp_path, monkeypatch, caplog):
    poison(monkeypatch)
    run(tmp_path, *RUN, code=1)
    assert checkpoint.complete_steps(tmp_path / "checkpoint") == [3]
    assert "bad step 5: rows 16 to 19" in caplog.text
    assert "the loss is nan on rows 18, 19" in caplog.text


@pytest.mark.parametrize(("batch", "last"), [([], 19), (["--phases", "{ from_step = 4, global_batch_size = 8 }"], 23)])
def test_rollback_leaves_the_rows_out_and_equals_a_run_without_them(tmp_path, monkeypatch, batch, last):
    argv = [*RUN, *batch]
    run(tmp_path / "without", *argv, "--data.skip_rows", "16", str(last), "--metrics.log_freq", "1")
    with monkeypatch.context() as patch:
        poison(patch)
        run(tmp_path / "back", *argv, "--resilience.on_bad_step", "rollback")
        run(tmp_path / "again", *argv, "--resilience.on_bad_step", "rollback", "--job.exit_interval", "7", code=75)
        run(tmp_path / "again", *argv, "--resilience.on_bad_step", "rollback")  # the rows stay out
    without = losses(tmp_path / "without")
    for name in ("back", "again"):
        found = losses(tmp_path / name)
        assert found == {step: without[step] for step in found}
        assert {2, 4, 6, 8} <= set(found)
        steps = [line["step"] for line in lines(tmp_path / name)]
        assert steps == sorted(set(steps))


def test_skip_goes_on_as_if_the_step_had_not_been(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        poison(patch)
        run(tmp_path / "skip", *RUN, "--resilience.on_bad_step", "skip")
    with monkeypatch.context() as patch:
        steps = []

        def all_but_the_fifth(optimizer, bad):
            steps.append(bad)
            return len(steps) != 5

        patch.setattr(optim, "should_step", all_but_the_fifth)
        run(tmp_path / "none", *RUN)
    assert losses(tmp_path / "skip") == losses(tmp_path / "none")


def test_a_bad_first_step_has_nothing_to_go_back_to(tmp_path, monkeypatch, caplog):
    poison(monkeypatch, row=2)
    run(tmp_path, *RUN, "--resilience.on_bad_step", "rollback", code=1)
    assert "no checkpoint yet to roll back to" in caplog.text

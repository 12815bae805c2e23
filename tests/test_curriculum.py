"""Curricula against SkyLadder's formulas written out slowly, and properties of every curriculum."""

import math
import re
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import pairwise
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchladder import curriculum
from torchladder.curriculum import full_context_step, skyladder, to_stages
from torchladder.registry import ConfigError

RAMPS = ["linear", "sine", "cosine", "exponential", "logarithmic", "inverse"]
STEPS, SEQ_LEN = 100_000, 8192


def make(name, steps=1000, seq_len=1024, **settings):
    return curriculum.registry.get(name)(steps=steps, seq_len=seq_len, **settings)


# --- SkyLadder's schedules -------------------------------------------------------------------------------------------


def reference(shape, step, length, first, last):
    """The paper's formulas with the last window at seq_len, cosine over its whole half period and log over steps."""
    if step >= length:
        return last
    x = step / length
    if shape in ("dm", "lin"):
        return first + math.floor((last - first) * Fraction(step, length))
    if shape == "sin":
        return first + int((last - first) * math.sin(math.pi / 2 * x))
    if shape == "cos":
        return first + int((last - first) * (1 - math.cos(math.pi * x)) / 2)
    if shape == "exp":
        return int(first * (last / first) ** x)
    if shape == "log":
        return int(first * (last / first) ** (math.log(1 + step) / math.log(1 + length)))
    return last - math.floor((last - first) * Fraction(step, length))  # inv


def family():
    """Every schedule in use: (name, shape, N or None, percent or None, initial window, multiple)."""
    for rate in (1, 2, 3, 4, 5, 6, 7, 8, 16, 32):
        yield f"dm{rate}", "dm", rate, None, 32, 1
    for shape in ("lin", "sin", "cos", "exp", "log", "inv"):
        for rate in (2, 8):
            yield f"{shape}{rate}", shape, rate, None, 32, 1
        for percent in (29, 70, 80, 90, 95, 100):
            yield f"{shape}{percent}p", shape, None, percent, 32, 1
    for shape in ("dm", "exp", "sin"):
        for rate in (2, 8):
            yield f"{shape}{rate}inc1024", shape, rate, None, 32, 1024
    for rate in (1, 2, 4, 8):
        for first in (4, 8, 16, 32, 64, 128, 256, 512):
            yield f"dm{rate}st{first}", "dm", rate, None, first, 1
    yield "exp2st8inc256", "exp", 2, None, 8, 256


@pytest.mark.parametrize(("name", "shape", "rate", "percent", "first", "multiple"), list(family()), ids=str)
def test_skyladder_names_follow_the_formulas(name, shape, rate, percent, first, multiple):
    length = (SEQ_LEN - first) * rate if rate else STEPS * percent // 100
    made = skyladder(name, steps=STEPS, seq_len=SEQ_LEN)
    for step in [*range(40), *range(40, STEPS, 977), length - 1, length, STEPS - 1]:
        window = reference(shape, step, length, first, SEQ_LEN)
        if step < length:
            window = min(window // multiple * multiple or first, SEQ_LEN)
        assert made(step) == window, step


def test_values_of_the_released_code():
    """Windows read off SkyLadder's own schedules at 8K; they differ where those end at 8193 instead of 8192."""

    def at(name, *steps):
        made = skyladder(name, STEPS, SEQ_LEN)
        return [made(step) for step in steps]

    assert at("dm1", 0, 100, 8000, 8159, 8160) == [32, 132, 8032, 8191, 8192]
    assert at("dm8", 1000, 8000, 32000, 65279, 65280) == [157, 1032, 4032, 8191, 8192]
    assert at("exp8", 8000, 16000, 32000, 65280) == [63, 124, 484, 8192]
    assert at("exp2", 4000, 8000) == [124, 484]
    assert at("sin8", 1000, 8000, 32000) == [228, 1593, 5712]
    assert at("lin95p", 1000, 94999, 95000) == [117, 8191, 8192]
    assert at("dm2inc1024", 1000, 4000, 8000, 8160) == [32, 1024, 3072, 4096]
    assert at("exp8inc1024", 32000, 48000, 65000, 65280) == [32, 1024, 7168, 8192]
    assert at("inv8", 0, 32000, 65279, 65280) == [8192, 4192, 33, 8192]


def test_rates_are_read_as_numbers():
    dm1, dm3, dm16, dm32 = (skyladder(f"dm{n}", 10**6, SEQ_LEN) for n in (1, 3, 16, 32))
    assert [dm1(1600), dm3(1600), dm16(1600), dm32(1600)] == [1632, 565, 132, 82]
    assert full_context_step(dm16, 10**6, SEQ_LEN) == 2 * 65_280
    assert full_context_step(dm32, 10**6, SEQ_LEN) == 4 * 65_280


def test_cosine_spans_the_whole_ramp():
    cos8 = skyladder("cos8", STEPS, SEQ_LEN)
    assert cos8(65_280 // 2) == pytest.approx((32 + 8192) / 2, abs=1)
    assert full_context_step(cos8, STEPS, SEQ_LEN) > 64_000


def test_constant_name():
    assert to_stages(skyladder("constant", STEPS, SEQ_LEN), STEPS) == [(0, SEQ_LEN)]


@pytest.mark.parametrize(
    "schedule", ["dm", "8", "foo8", "sin70pp", "dm8incc", "dm8 ", "DM8", "strict", "", "dm8inc4st4"]
)
def test_unknown_names_are_answered_with_the_grammar(schedule):
    with pytest.raises(ConfigError, match=r"unknown schedule .*A schedule is 'constant', or a curve"):
        skyladder(schedule, STEPS, SEQ_LEN)


def test_unknown_name_hints_at_the_nearest():
    with pytest.raises(ConfigError, match="Did you mean 'exp8'"):
        skyladder("expo8", STEPS, SEQ_LEN)


def test_names_with_document_masks_point_to_the_masks():
    with pytest.raises(ConfigError, match=r"\[attention\] masks = \[\"document\", \"chunk\"\] and schedule = 'dm8'"):
        skyladder("intradm8", STEPS, SEQ_LEN)
    with pytest.raises(ConfigError, match=r"\[attention\] masks = \[\"document\"\]\."):
        skyladder("intramask", STEPS, SEQ_LEN)


# --- properties of every ramp ----------------------------------------------------------------------------------------


@st.composite
def ramps(draw):
    seq_len = draw(st.integers(1, 3000))
    final = draw(st.integers(1, seq_len))
    length = draw(
        st.sampled_from([{}, {"every": draw(st.integers(1, 50))}, {"ramp": draw(st.floats(1e-6, 1))}]),
    )
    return make(
        draw(st.sampled_from(RAMPS)),
        steps=draw(st.integers(1, 5000)),
        seq_len=seq_len,
        initial_window=draw(st.integers(1, final)),
        final_window=final,
        multiple_of=draw(st.integers(1, 300)),
        **length,
    )


@given(ramps(), st.lists(st.integers(0, 200_000), min_size=2))
def test_ramps_are_pure_bounded_and_monotone(ramp, steps):
    steps = sorted(steps)
    seen = [ramp(step) for step in steps]
    assert all(isinstance(window, int) for window in seen)
    assert seen == [replace(ramp)(step) for step in reversed(steps)][::-1]
    assert all(ramp.initial_window <= window <= ramp.final_window for window in seen)
    climb = [window for step, window in zip(steps, seen, strict=True) if step < ramp.ramp_steps]
    assert climb == sorted(climb, reverse=isinstance(ramp, curriculum.Inverse))


@given(ramps())
def test_ramps_end_exactly_at_the_final_window(ramp):
    assert ramp(ramp.ramp_steps) == ramp(ramp.ramp_steps + 1) == ramp(10**9) == ramp.final_window
    if ramp.ramp_steps and not isinstance(ramp, curriculum.Inverse):
        assert ramp(0) == ramp.initial_window
    if ramp.every:
        assert ramp.ramp_steps == (ramp.final_window - ramp.initial_window) * ramp.every
    else:
        assert 1 <= ramp.ramp_steps <= ramp.steps


@pytest.mark.parametrize("name", RAMPS)
def test_rounding_ends_at_a_final_window_that_is_no_multiple(name):
    ramp = make(name, seq_len=1000, multiple_of=128, every=1)
    on_the_way = {ramp(step) for step in range(ramp.ramp_steps)}
    assert on_the_way <= {32, 128, 256, 384, 512, 640, 768, 896}
    assert ramp(ramp.ramp_steps) == 1000


def test_ramp_share_and_default():
    assert make("linear", ramp=0.29, steps=100).ramp_steps == 29
    assert make("linear", steps=100_000).ramp_steps == 64_000
    assert make("linear", steps=1)(0) == 32


# --- tables ----------------------------------------------------------------------------------------------------------


def test_stages():
    made = curriculum.Stages(seq_len=1024, stages=[(0, 128), (10, 512), (30, 256), (31, 1024)])
    assert to_stages(made, 40) == [(0, 128), (10, 512), (30, 256), (31, 1024)]
    assert full_context_step(made, 40, 1024) == 31


def test_constant():
    assert to_stages(make_constant(window=None), 5) == [(0, 64)]
    assert to_stages(make_constant(window=8), 5) == [(0, 8)]


def make_constant(window):
    return curriculum.Constant(seq_len=64, window=window)


# --- random windows --------------------------------------------------------------------------------------------------


@st.composite
def random_windows(draw):
    seq_len = draw(st.integers(1, 5000))
    shared = {"seq_len": seq_len, "steps": draw(st.integers(1, 10**7)), "seed": draw(st.integers(0, 99))}
    shared["hold"] = draw(st.integers(1, 20))
    if draw(st.booleans()):
        return curriculum.Random(windows=draw(st.lists(st.integers(1, seq_len), min_size=1, max_size=6)), **shared)
    low = draw(st.integers(1, seq_len))
    return curriculum.Random(
        min_window=low,
        max_window=draw(st.none() | st.integers(low, seq_len)),
        distribution=draw(st.sampled_from([None, "log_uniform", "uniform"])),
        multiple_of=draw(st.integers(1, 300)),
        **shared,
    )


@given(random_windows(), st.lists(st.integers(0, 10**7), min_size=2))
def test_random_windows_are_pure_bounded_and_held(made, steps):
    seen = [made(step) for step in steps]
    assert seen == [replace(made)(step) for step in reversed(steps)][::-1]
    assert all(isinstance(window, int) for window in seen)
    assert all(made.shortest <= window <= made.longest for window in seen)
    if made.windows:
        assert set(seen) <= set(made.windows)
    else:
        assert all(
            window % made.multiple_of == 0 or window == made.shortest for window in seen if window != made(10**9)
        )
    for step, window in zip(steps, seen, strict=True):
        first = step // made.hold * made.hold
        assert all(made(other) == window for other in range(first, first + made.hold) if other < made.steps - 1 > step)
    assert made(made.steps - 1) == made.longest


def test_random_windows_have_their_distribution():
    """The fractions of 20,000 draws: of each window of a list, and below the middle of a range."""
    steps, draws = 10**6, range(20_000)
    listed = curriculum.Random(steps=steps, seq_len=64, windows=[8, 64, 64])
    assert sum(listed(step) == 64 for step in draws) / len(draws) == pytest.approx(2 / 3, abs=0.02)
    for distribution, middle in ((None, 256), ("uniform", 2048 + 8)):
        made = curriculum.Random(steps=steps, seq_len=8192, min_window=16, max_window=4096, distribution=distribution)
        seen = [made(step) for step in draws]
        assert sum(window < middle for window in seen) / len(draws) == pytest.approx(0.5, abs=0.02)
        assert 16 <= min(seen) <= 24
        assert 4000 <= max(seen) <= 4096
    ends = curriculum.Random(steps=steps, seq_len=4, min_window=1, distribution="uniform")
    assert {ends(step) for step in range(100)} == {1, 2, 3, 4}


def test_another_seed_draws_other_windows():
    one, other = (curriculum.Random(steps=10**6, seq_len=8192, min_window=32, seed=seed) for seed in (0, 1))
    assert [one(step) for step in range(6)] == [744, 4554, 3746, 7454, 621, 205]
    assert sum(one(step) == other(step) for step in range(100)) < 10


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "set curriculum.windows or min_window"),
        ({"max_window": 64}, "set curriculum.windows or min_window"),
        ({"windows": [8, 2000]}, "windows = 2000: must be from 1 to training.seq_len = 1024"),
        ({"windows": [0]}, "windows = 0: must be from 1"),
        ({"min_window": 0}, "min_window and max_window = 0: must be from 1"),
        ({"min_window": 8, "max_window": 2000}, "max_window = 2000: must be from 1 to training.seq_len = 1024"),
        ({"min_window": 64, "max_window": 32}, "min_window = 64: must be at most max_window, 32"),
        ({"windows": [8], "min_window": 4}, "windows and min_window = 4: a list has no range; remove one"),
        ({"windows": [8], "max_window": 4}, "windows and max_window = 4"),
        ({"windows": [8], "distribution": "uniform"}, "windows and distribution = 'uniform'"),
        ({"windows": [8], "multiple_of": 2}, "windows and multiple_of = 2"),
        ({"min_window": 8, "hold": 0}, "hold = 0: must be 1 or more"),
        ({"min_window": 8, "multiple_of": 0}, "multiple_of = 0: must be 1 or more"),
    ],
)
def test_invalid_random_windows(settings, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        make("random", **settings)


# --- invalid settings ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"initial_window": 0}, "initial_window = 0: must be 1 or more"),
        ({"initial_window": 2000}, "initial_window = 2000: must be at most the final window, 1024"),
        ({"initial_window": 64, "final_window": 32}, "initial_window = 64: must be at most the final window, 32"),
        ({"final_window": 2048}, "final_window = 2048: must be from 1 to training.seq_len = 1024"),
        ({"every": 0}, "every = 0"),
        ({"every": -3}, "every = -3"),
        ({"ramp": 0.0}, "ramp = 0.0: must be above 0"),
        ({"ramp": 1.5}, "ramp = 1.5"),
        ({"ramp": math.nan}, "ramp = nan"),
        ({"every": 8, "ramp": 0.5}, "every = 8 and ramp = 0.5: both set the length of the ramp; remove one"),
        ({"multiple_of": 0}, "multiple_of = 0"),
    ],
)
@pytest.mark.parametrize("name", RAMPS)
def test_invalid_ramps(name, settings, message):
    with pytest.raises(ConfigError, match=message):
        make(name, **settings)


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([], "must begin at step 0"),
        ([(5, 32)], "must begin at step 0"),
        ([(0, 32), (10, 64), (10, 128)], "step 10 follows step 10"),
        ([(0, 32), (10, 64), (5, 128)], "step 5 follows step 10"),
        ([(0, 0)], "window at step 0 = 0"),
        ([(0, 32), (10, 4096)], "window at step 10 = 4096: must be from 1 to training.seq_len = 1024"),
    ],
)
def test_invalid_stages(stages, message):
    with pytest.raises(ConfigError, match=message):
        curriculum.Stages(seq_len=1024, stages=stages)


@pytest.mark.parametrize("window", [0, -1, 65])
def test_invalid_constants(window):
    with pytest.raises(ConfigError, match=f"window = {window}: must be from 1 to training.seq_len = 64"):
        make_constant(window)


# --- a whole run -----------------------------------------------------------------------------------------------------


@given(ramps(), st.integers(1, 300))
def test_stages_rebuild_the_run(ramp, steps):
    stages = to_stages(ramp, steps)
    ends = [first for first, _ in stages[1:]] + [steps]
    rebuilt = [window for (first, window), end in zip(stages, ends, strict=True) for _ in range(first, end)]
    assert rebuilt == [ramp(step) for step in range(steps)]
    assert all(one[1] != next_one[1] for one, next_one in pairwise(stages))


@given(ramps(), st.integers(1, 300))
def test_full_context_step_is_the_first_step_that_stays_full(ramp, steps):
    full = full_context_step(ramp, steps, ramp.seq_len)
    steps_not_full = [step for step in range(steps) if ramp(step) < ramp.seq_len]
    expected = steps_not_full[-1] + 1 if steps_not_full else 0
    assert full == (expected if expected < steps else None)


def test_full_context_step_is_none_if_the_ramp_outlasts_the_run():
    dm8 = skyladder("dm8", STEPS, SEQ_LEN)
    assert full_context_step(dm8, STEPS, SEQ_LEN) == 65_280
    assert full_context_step(dm8, 65_281, SEQ_LEN) == 65_280
    assert full_context_step(dm8, 65_280, SEQ_LEN) is None


def test_a_linear_ramp_has_one_stage_per_token():
    assert len(to_stages(skyladder("dm8", STEPS, SEQ_LEN), STEPS)) == 8192 - 32 + 1


# --- the registry ----------------------------------------------------------------------------------------------------


def test_settings_are_the_parameters_that_the_run_does_not_pass():
    ramp = ["initial_window", "final_window", "every", "ramp", "multiple_of"]
    for name in RAMPS:
        assert list(curriculum.registry.parameters(name)) == ramp
    assert list(curriculum.registry.parameters("constant")) == ["window"]
    assert list(curriculum.registry.parameters("stages")) == ["stages"]
    assert list(curriculum.registry.parameters("skyladder")) == ["schedule"]


def test_a_plugin_is_built_from_its_own_settings():
    @curriculum.register("a-stair-of-this-test")
    @dataclass(frozen=True)
    class Staircase:
        """A few fixed windows, each for the same number of steps."""

        stairs: list[int]
        steps_per_stair: int = 1000

        def __call__(self, step: int) -> int:
            return self.stairs[min(step // self.steps_per_stair, len(self.stairs) - 1)]

    try:
        section = SimpleNamespace(name="a-stair-of-this-test", stairs=[512, 2048, 8192], steps_per_stair=10)
        made = curriculum.registry.build(section, steps=100, seq_len=8192)
        assert to_stages(made, 100) == [(0, 512), (10, 2048), (20, 8192)]
        assert full_context_step(made, 100, 8192) == 20
    finally:
        del curriculum.registry._components["a-stair-of-this-test"]


def test_build_passes_steps_and_seq_len():
    section = SimpleNamespace(name="skyladder", schedule="dm8")
    assert curriculum.registry.build(section, steps=STEPS, seq_len=SEQ_LEN)(1000) == 157
    with pytest.raises(ConfigError, match=r"unknown curriculum 'liner'\. Did you mean 'linear'"):
        curriculum.registry.get("liner")

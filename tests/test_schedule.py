"""The schedule of a run against a slow reference; phases that do not fit."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchladder.batch_schedule import BatchSchedule
from torchladder.registry import ConfigError
from torchladder.schedule import Phase, Schedule, StepSettings, change_batch


def make(phases, steps=100, seq_len=100):
    batch = change_batch(BatchSchedule.constant(1, seq_len), phases, steps)
    return Schedule(lambda step: step + 1, lambda step: 1 / (step + 1), phases, steps, batch)


def test_without_phases_it_is_the_curriculum_and_the_learning_rate():
    assert make([])(9) == StepSettings(window=10, lr_factor=0.1)


def test_phases_begin_at_steps_tokens_and_fractions():
    phases = [Phase(from_step=0, window=4), Phase(from_tokens=1001, window=5), Phase(from_fraction=0.29, window=6)]
    schedule = make(phases)
    assert schedule.phase_steps == [0, 11, 29]
    assert [schedule.window(step) for step in (0, 10, 11, 28, 29, 99)] == [4, 4, 5, 5, 6, 6]
    assert schedule.overrides("window") == {0: 4, 11: 5, 29: 6}
    assert schedule.overrides("rope_theta") == {}


settings = st.fixed_dictionaries(
    {},
    optional={
        "window": st.integers(1, 50),
        "lr_factor": st.floats(0.1, 3.0),
        "max_norm": st.floats(0.1, 3.0),
        "rope_theta": st.floats(1e3, 1e6),
        "source_weights": st.lists(st.integers(0, 5).map(float), min_size=2, max_size=2),
        "global_batch_size": st.integers(1, 64),
    },
).filter(bool)


@given(st.dictionaries(st.integers(0, 99), settings, max_size=5), st.integers(0, 99))
def test_each_setting_is_that_of_the_last_phase_to_set_it(phases, step):
    """The reference plays the run step by step."""
    schedule = make([Phase(from_step=first, **phases[first]) for first in sorted(phases)])
    held: dict = {}
    for one in range(step + 1):
        held |= phases.get(one, {})
    assert schedule(step) == StepSettings(
        window=held.get("window", step + 1),
        lr_factor=1 / (step + 1) * held.get("lr_factor", 1.0),
        max_norm=held.get("max_norm"),
        rope_theta=held.get("rope_theta"),
        source_weights=held.get("source_weights"),
        global_batch_size=held.get("global_batch_size", 1),
    )


@pytest.mark.parametrize(
    ("phases", "message"),
    [
        ([dict(window=3)], "set exactly one of from_step, from_tokens, from_fraction"),
        ([dict(from_step=1, from_fraction=0.5, window=3)], "from_step and from_fraction: set exactly one"),
        ([dict(from_step=1)], "changes nothing"),
        ([dict(from_step=-1, window=3)], r"phases\.from_step = -1: must be 0 or more"),
        ([dict(from_fraction=1.0, window=3)], r"phases\.from_fraction = 1\.0: must be 0 or more and below 1"),
        ([dict(from_step=1, window=0)], "window = 0"),
        ([dict(from_step=1, global_batch_size=0)], "global_batch_size = 0: must be 1 or more"),
        ([dict(from_step=1, lr_factor=0.0)], "lr_factor = 0.0"),
        ([dict(from_step=1, max_norm=0.0)], r"phases\.max_norm = 0\.0: must be above 0"),
        ([dict(from_step=1, rope_theta=math.inf)], "rope_theta = inf"),
        ([dict(from_step=5, window=3), dict(from_step=5, window=4)], "each must begin after the one before"),
        ([dict(from_step=7, window=3), dict(from_step=5, window=4)], "steps 7 and 5"),
        ([dict(from_step=50, window=3)], "begins at step 50, but the run has 20 steps"),
    ],
)
def test_phases_that_do_not_fit(phases, message):
    with pytest.raises(ConfigError, match=message):
        make([Phase(**phase) for phase in phases], steps=20)

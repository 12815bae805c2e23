"""Settings that change between a checkpoint and the run that resumes from it."""

from types import SimpleNamespace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from runs import DEBUG, losses, run

from torchladder import train
from torchladder.batch_schedule import BatchSchedule, BatchSizeWarmup
from torchladder.config.attention_section import AttentionConfig
from torchladder.curriculum import Constant, Linear
from torchladder.optim import LRSchedulerConfig
from torchladder.schedule import Phase, Schedule, change_batch
from torchladder.training.changed_settings import compare, schedule_settings

SAVING = ["--checkpoint.enable", "--checkpoint.interval", "4", "--validation.no_enable"]
FLAT = ["--curriculum.name", "constant", "--lr_scheduler.decay_type", "constant"]


# --- the comparison, against the definition --------------------------------------------------------------------------


def make(steps, window, ramp, decay_type, warmup, phases):
    """Returns the settings of a schedule on rows of 64 tokens, and the schedule."""
    windows = {"seq_len": 64, "window": window} if ramp is None else {"initial_window": window, "ramp": ramp}
    built = Constant(**windows) if ramp is None else Linear(steps=steps, seq_len=64, **windows)
    rates = LRSchedulerConfig(warmup_steps=warmup, decay_type=decay_type, decay_ratio=0.25)
    config = SimpleNamespace(
        training=SimpleNamespace(steps=steps), curriculum=SimpleNamespace(**windows), optimizer=SimpleNamespace(),
        lr_scheduler=rates, phases=phases, attention=AttentionConfig(), batch_size_warmup=BatchSizeWarmup(),
    )  # fmt: skip
    batch = change_batch(BatchSchedule.constant(4, seq_len=64), phases, steps)
    return schedule_settings(config), Schedule(built, lambda step: rates.factor(step, steps), phases, steps, batch)


PHASES = st.lists(
    st.builds(
        Phase,
        from_fraction=st.sampled_from([0.25, 0.5, 0.75]),
        window=st.sampled_from([None, 8, 64]),
        rope_theta=st.sampled_from([None, 1e4]),
        lr_factor=st.just(0.5),
    ),
    max_size=1,
)
PLANS = st.builds(
    make,
    st.integers(4, 24),
    st.sampled_from([8, 64]),
    st.sampled_from([None, 0.5, 1.0]),
    st.sampled_from(["constant", "linear"]),
    st.sampled_from([0, 3]),
    PHASES,
)


@given(PLANS, PLANS, st.integers(0, 24))
def test_a_run_is_refused_only_for_windows_rates_and_bases_that_differ(saved, current, step):
    (before, planned), (now, schedule) = saved, current
    assume(step <= planned.steps)
    step = min(step, schedule.steps - 1)
    remaining = range(step, min(max(planned.steps, step + 1), schedule.steps))
    changes = {one.name: one for one in compare(before, now, planned, schedule, step)}
    assert changes.keys() == {name for name in now if before.get(name) != now[name]}
    refused = {name for name, one in changes.items() if one.refused}
    if all(planned(at) == schedule(at) for at in remaining):
        assert not refused
        return
    assert any(one.effect for one in changes.values())
    if any(planned.window(at) != schedule.window(at) for at in remaining[:1]):
        assert refused  # whether by the steps, the curriculum or a phase
    if changes.keys() == {"training.steps"}:
        assert refused == ({"training.steps"} if planned(step) != schedule(step) else set())
    elif "training.steps" not in changes and any(planned.window(at) != schedule.window(at) for at in remaining):
        assert refused
    if all(name.startswith("lr_scheduler.") for name in changes):
        assert not refused


def test_what_follows_is_said_with_both_values():
    (before, planned), (now, schedule) = (
        make(steps, 8, 0.5, "linear", 0, [Phase(from_fraction=0.8, window=16)]) for steps in (60, 62)
    )
    early, late = (compare(before, now, planned, schedule, step) for step in (2, 40))
    assert [(one.refused, str(one)) for one in early] == [
        (False, "training.steps was 60, is 62: at step 6 the window is 18, not 19; "
         "at step 46 the learning-rate factor is 1, not 0.9333; the phase moves from step 48 to 50"),
    ]  # fmt: skip
    assert [(one.refused, str(one)) for one in late] == [
        (False, "training.steps was 60, is 62: at step 46 the learning-rate factor is 1, not 0.9333; "
         "at step 48 the window is 64, not 16; the phase moves from step 48 to 50"),
    ]  # fmt: skip
    (falling,) = compare(before, now, planned, schedule, 20)
    assert falling.refused
    assert "at step 20 the window falls from 45 to 44" in str(falling)


# --- a run -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ladder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ladder")
    run(folder, *SAVING, "--training.steps", "10")
    return folder


def resume(folder, *argv):
    loading = ["--checkpoint.load_step", "4", "--checkpoint.load_only", "--training.steps", "10"]
    return train.main([*DEBUG, "--job.dump_folder", str(folder), *SAVING, *loading, *argv])


def test_all_refusals_are_reported_together(ladder, capsys):
    assert resume(ladder, "--model.dim", "32", "--data.seed", "4", "--training.steps", "60") == 2
    said = capsys.readouterr().err
    assert "data.seed has changed since the checkpoint was saved (it was 0, it is 4)" in said
    assert "To continue anyway: --checkpoint.accept_changes training.steps\n" in said
    assert "training.steps was 10, is 60: at step 4 the window falls from 206 to 41; at step 6 the learning" in said
    assert "model.dim was 64, is 32: the weights have other shapes; set it back, or start a new run" in said
    assert said.endswith("--data.first_step 4 --checkpoint.accept_changes data.seed data.first_step\n")


@pytest.mark.parametrize("accepted", [(), ("--checkpoint.accept_changes", "model.dim")])
def test_another_shape_cannot_be_accepted(ladder, tmp_path, capsys, accepted):
    assert resume(ladder, "--model.dim", "32", *accepted) == 2
    said = capsys.readouterr().err
    assert "the weights have other shapes" in said
    assert "accept_changes" not in said
    path = str(ladder / "checkpoint" / "step-4")
    loading = ["--model.dim", "32", "--checkpoint.initial_load_path", path]
    assert train.main([*DEBUG, "--job.dump_folder", str(tmp_path), *SAVING, *loading]) == 2
    assert f"{path} is of another model: embedding.weight has the shape [512, 64]" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--optimizer.weight_decay", "0.5"], "changed: optimizer.weight_decay was 0.1, is 0.5"),
        (
            ["--lr_scheduler.decay_type", "cosine"],
            "was linear, is cosine: at step 6 the learning-rate factor",
        ),
        (["--curriculum.ramp", "0.8", "--checkpoint.accept_changes", "curriculum.ramp"], "was 0.5, is 0.8: at step 4"),
    ],
)
def test_a_change_that_takes_effect_is_said(ladder, capfd, argv, said):
    assert resume(ladder, *argv) == 0
    assert said in "".join(capfd.readouterr())


def test_a_longer_run_resumes_if_nothing_planned_changes(tmp_path, capfd):
    run(tmp_path / "short", *SAVING, *FLAT, "--training.steps", "4")
    run(tmp_path / "short", *SAVING, *FLAT, "--training.steps", "8")
    assert "changed: training.steps was 4, is 8\n" in "".join(capfd.readouterr())
    run(tmp_path / "long", *SAVING, *FLAT, "--training.steps", "8")
    assert losses(tmp_path / "short") == losses(tmp_path / "long")


def test_source_weights_count_from_the_first_step(tmp_path, capsys):
    """What was read of a source depends on all earlier weights, so a phase that has begun cannot move."""
    names = "abc"
    for name in names:
        (tmp_path / f"{name}.txt").write_text(f"the text of {name} " * 500)
    sources = [f'{{ path = "{tmp_path}/{name}.txt", label = "{name}" }}' for name in names]
    weights = "{ from_fraction = 0.5, source_weights = { a = 1, b = 1, c = 2 } }"
    argv = [*SAVING, *FLAT, "--data.sources", *sources, "--data.cache_folder", str(tmp_path / "cache")]
    run(tmp_path, *argv, "--training.steps", "12", "--phases", weights)
    for step, code in ((4, 0), (8, 2)):
        loading = ["--checkpoint.load_step", str(step), "--checkpoint.load_only", "--training.steps", "14"]
        # The same shares in other words are no change.
        run(tmp_path, *argv, *loading, "--phases", weights.replace("{ a = 1, b = 1, c = 2 }", "[2, 2, 4]"), code=code)
    said = capsys.readouterr().err
    assert "at step 6 the source weights are as without phases, not [0.25, 0.25, 0.5]" in said
    assert "the phase moves from step 6 to 7" in said

"""Settings that have changed since a checkpoint was saved: applied, to be accepted, or impossible to continue with."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch

from torchladder import checkpoint, config, models
from torchladder.checkpoint import RunState
from torchladder.config import Config
from torchladder.data.mixing.source_mix import in_order
from torchladder.models.layer_types import LAYER_TYPES
from torchladder.registry import ConfigError, require, unknown_name
from torchladder.schedule import FULL_ATTENTION, PHASE_SETTINGS, Difference, Schedule, differences
from torchladder.training.run_plan import Plan

APPLIED = ("optimizer.", "lr_scheduler.", "phases.lr_factor")
"""Settings that may change: they take effect at the next step, and the optimizer's state remains valid."""

SECTIONS = {
    "window": ("curriculum.", "phases.window"),
    "lr_factor": ("lr_scheduler.", "phases.lr_factor"),
    "global_batch_size": ("batch_size_warmup.", "phases.global_batch_size"),
    **{
        name: (f"attention.{name}.window", f"attention.{name}.curriculum", "phases.window")
        for name in LAYER_TYPES
        if name != FULL_ATTENTION
    },
}
"""What a schedule says of each step -> how the names of the settings begin that it comes from."""

SHARED = ("training.steps", "training.global_batch_size", "data.seq_len")
"""Settings that everything in a schedule may depend on."""

TERMS = {
    "lr_factor": "learning-rate factor",
    "max_norm": "maximum gradient norm",
    "rope_theta": "RoPE base",
    "source_weights": "source weights",
    **{name: f"window of {name}" for name in LAYER_TYPES},
    "global_batch_size": "global batch size",
}


@dataclass(frozen=True)
class ChangedSetting:
    """A setting with its values in the checkpoint and in this run.

    Attributes:
        effect: what follows for the remaining steps; empty if nothing does.
        refused: whether the run continues only if the change is accepted.
        acceptable: whether it can be accepted.
    """

    name: str
    saved: Any
    current: Any
    effect: str = ""
    refused: bool = True
    acceptable: bool = True

    def __str__(self) -> str:
        saved, current = ("unset" if value in (None, {}) else value for value in (self.saved, self.current))
        return f"{self.name} was {saved}, is {current}" + (f": {self.effect}" if self.effect else "")


def check_changes(
    plan: Plan, fingerprints: dict[str, str], state: RunState, path: str, data_problem: str = ""
) -> list[str]:
    """Compares this run with a checkpoint that it resumes from; returns a line on each change that takes effect.

    Args:
        plan: of this run.
        fingerprints: of this run.
        state: of the checkpoint.
        path: of the checkpoint.
        data_problem: why the sources cannot continue where they were, with the settings to use instead, or nothing.

    Raises:
        ConfigError: ``data_problem`` and changes that ``checkpoint.accept_changes`` does not name, or that cannot be
            accepted, all of them together; or the checkpoint has no run state or settings.
    """
    require(
        bool(state.fingerprints),
        "the checkpoint holds only weights, no run state: load it with checkpoint.initial_load_model_only = true.",
    )
    saved, current = _with_shares(_saved_config(path)), _with_shares(plan.config)
    schedule = current.schedule(plan.batch.global_batch_size)
    if "train_state" in set(current.checkpoint.exclude_from_loading) - set(state.excluded):
        planned = schedule  # the run starts over at step 0: what was planned does not count
    else:
        planned = saved.schedule(int(state.fingerprints["training.global_batch_size"]))
    # Fields that the model did not have when the checkpoint was saved had their defaults.
    model = {f"model.{key}": str(value) for key, value in dataclasses.asdict(models.resolve(saved.model)).items()}
    before, now = model | state.fingerprints | schedule_settings(saved), fingerprints | schedule_settings(current)
    # The source weights of later phases are part of the schedule, which may change in steps that are still to come.
    before, now = ({name: value for name, value in one.items() if name != "data.phases"} for one in (before, now))
    changes = compare(before, now, planned, schedule, state.step)
    if any(one.name.startswith("model.") for one in changes) and _weight_shapes(saved) != _weight_shapes(current):
        effect = "the weights have other shapes; set it back, or start a new run in another checkpoint.folder"
        changes = [
            replace(one, effect=effect, acceptable=False) if one.name.startswith("model.") else one for one in changes
        ]

    accepted = current.checkpoint.accept_changes
    for name in accepted:
        if name not in now:
            raise unknown_name("entry", name, now, "checkpoint.accept_changes")
    refused = [one for one in changes if one.refused and not (one.acceptable and one.name in accepted)]
    if data_problem:  # it explains the changes of the data
        refused = [one for one in refused if not one.name.startswith("data.")]
    if refused:
        lines = [f"settings have changed since {path} was saved:", *(f"  {one}" for one in refused)]
        names = " ".join(one.name for one in refused if one.acceptable)
        lines += [f"To continue anyway: --checkpoint.accept_changes {names}"] if names else []
        raise ConfigError("\n".join([*lines, *([data_problem] if data_problem else [])]))
    if data_problem:
        raise ConfigError(data_problem)
    return [str(one) for one in changes]


def compare(
    before: Mapping[str, Any], now: Mapping[str, Any], planned: Schedule, schedule: Schedule, step: int
) -> list[ChangedSetting]:
    """Returns the settings that differ, with what follows for the remaining steps.

    What is not part of the schedule is refused. Another length of the run is refused if the next step is not as
    planned, and any other setting of the schedule if a later step is not; ``APPLIED`` never is. The batches of steps
    that have been taken cannot change, since the rows of each step would be others.

    Args:
        before: setting -> value in the checkpoint.
        now: setting -> value in this run.
        planned: the schedule of the checkpoint.
        schedule: that of this run.
        step: the next step.
    """
    found, scheduled = differences(planned, schedule, step), ("curriculum.", "phases.", "batch_size_warmup.")
    changes = []
    for name in now:
        if before.get(name) == now[name]:
            continue
        own = [one for one in found if name in SHARED or name.startswith(_settings_of(one))]
        effects = _describe(own, step)
        if name == "training.steps":
            effects += _phase_moves(planned, schedule)
        refused = not name.startswith(APPLIED)
        if name == "training.steps":
            refused = any(one.step <= step for one in own)
        elif name.startswith(scheduled) or name.endswith((".window", ".curriculum")):
            refused = refused and bool(own)
        past = any(one.setting == "global_batch_size" and one.step < step for one in own)
        past = past and name not in ("training.global_batch_size", "data.seq_len")  # these are accepted as a whole
        if past:
            effects.append(f"set it back, and let a phase with from_step = {step} or more change the batch")
        changes.append(
            ChangedSetting(name, before.get(name), now[name], "; ".join(effects), refused or past, acceptable=not past)
        )
    return changes


def schedule_settings(config: Config) -> dict[str, Any]:
    """Returns the settings that the schedule and the optimizer are built from, by name."""
    found: dict[str, Any] = {"training.steps": config.training.steps}
    for section in ("curriculum", "optimizer", "lr_scheduler", "batch_size_warmup"):
        found |= {f"{section}.{key}": value for key, value in vars(getattr(config, section)).items()}
    for name, table in config.attention.tables.items():
        found |= {f"attention.{name}.{key}": getattr(table, key) for key in ("window", "curriculum")}
    for key in PHASE_SETTINGS:
        starts = {phase.start: getattr(phase, key) for phase in config.phases}
        found[f"phases.{key}"] = {start: value for start, value in starts.items() if value is not None}
    return found


def _saved_config(path: str) -> Config:
    """Returns the settings of the run that saved a checkpoint."""
    file = f"{path}/{checkpoint.CONFIG_FILE}"
    try:
        text = checkpoint.get_storage(path).read(file).decode()
        # The settings include those of the Hugging Face folder, which may have been deleted.
        return config.load_text(text, file, {"model.hf_assets_path": "", "checkpoint.initial_load_in_hf": False})
    except (OSError, ConfigError) as error:
        raise ConfigError(
            f"the settings of {path} cannot be read, so the run cannot continue from it: {error} "
            "Its weights can be used: set checkpoint.initial_load_path in a new run."
        ) from error


def _with_shares(config: Config) -> Config:
    """Returns the settings with the source weights of each phase as shares in the order of the sources."""
    labels = [source.title for source in getattr(config.data, "sources", [])]
    phases = []
    for phase in config.phases:
        if phase.source_weights is not None and labels:
            weights = in_order(phase.source_weights, labels)
            phase = replace(phase, source_weights=[round(weight / (sum(weights) or 1), 9) for weight in weights])
        phases.append(phase)
    return replace(config, phases=phases)


def _weight_shapes(config: Config) -> dict[str, torch.Size]:
    with torch.device("meta"):
        model = models.registry.build(config.model, attention_fn=None, seq_len=config.training.seq_len)
    return {name: parameter.shape for name, parameter in model.named_parameters()}


def _settings_of(difference: Difference) -> tuple[str, ...]:
    return SECTIONS.get(difference.setting, (f"phases.{difference.setting}",))


def _phase_moves(planned: Schedule, schedule: Schedule) -> list[str]:
    """Returns a sentence for each phase that is the same and begins at another step."""
    starts = {phase.start: step for phase, step in zip(planned.phases, planned.phase_steps, strict=True)}
    moves = zip(schedule.phases, schedule.phase_steps, strict=True)
    pairs = [(starts[phase.start], step) for phase, step in moves if starts.get(phase.start, step) != step]
    return [f"the phase moves from step {before:,} to {step:,}" for before, step in pairs]


def _describe(found: Iterable[Difference], step: int) -> list[str]:
    """Returns a sentence for each step at which something differs."""
    sentences = []
    for at, group in groupby(sorted(found, key=lambda one: one.step), key=lambda one: one.step):
        parts = []
        for one in group:
            term = f"the {TERMS.get(one.setting, one.setting)}"
            saved, current = _show(one.saved), _show(one.current)
            if at == step and isinstance(one.saved, int | float) and isinstance(one.current, int | float):
                parts.append(f"{term} {'falls' if one.current < one.saved else 'rises'} from {saved} to {current}")
            else:
                parts.append(f"{term} {'are' if one.setting == 'source_weights' else 'is'} {current}, not {saved}")
        sentences.append(f"at step {at:,} {' and '.join(parts)}")
    return sentences


def _show(value: Any) -> str:
    """Returns a value of a schedule as text; None is that of the section."""
    if value is None:
        return "as without phases"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}" if isinstance(value, float) else str(value)

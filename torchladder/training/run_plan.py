"""What a run will do, known before it starts: its windows, tokens, FLOPs, memory. Nothing large is allocated."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

from torchladder import curriculum, mask, models
from torchladder.config import Config
from torchladder.data.dataloader import BaseDataLoader
from torchladder.data.mixing.phases import Timetable
from torchladder.distributed import mesh
from torchladder.registry import ConfigError
from torchladder.training import data_setup
from torchladder.training.data_setup import BatchSizes


@dataclass(frozen=True)
class Plan:
    """A run in figures.

    Attributes:
        config: the settings that it is the plan of, with the number of steps.
        window: step → window: the curriculum, and the phases that set one.
        phases: the stage table.
        steps: optimizer steps.
        tokens_per_step: tokens of one step over all ranks.
        parameters: trainable numbers of the model.
        flops: forward and backward of the whole run under its windows.
        flops_full_context: the same with every row at full causal context.
        attention_flops_full_context: the part of the latter that attention takes.
        full_at: the first step with the full window, None where there is none.
        state_bytes: weights, gradients and optimizer state on one rank.
        batch: how a step's rows are divided.
        degrees: how the ranks are divided.
    """

    config: Config
    window: curriculum.Curriculum
    phases: Timetable
    steps: int
    tokens_per_step: int
    parameters: int
    flops: int
    flops_full_context: int
    attention_flops_full_context: int
    full_at: int | None
    state_bytes: int
    batch: BatchSizes
    degrees: mesh.Degrees

    @property
    def tokens(self) -> int:
        return self.steps * self.tokens_per_step

    @property
    def saved(self) -> float:
        """The share of all FLOPs that the windows save against full context."""
        return 1 - self.flops / self.flops_full_context

    @property
    def attention_saved(self) -> float:
        """The share of attention's FLOPs that the windows save."""
        return (self.flops_full_context - self.flops) / self.attention_flops_full_context

    @property
    def attention_share(self) -> float:
        """The share of attention in the FLOPs at full context."""
        return self.attention_flops_full_context / self.flops_full_context


def make_plan(config: Config, ranks: int = 1) -> Plan:
    """Returns the plan of a run on that many ranks.

    Raises:
        ConfigError: settings that cannot be, alone or together.
    """
    degrees = mesh.degrees(config.parallelism, ranks)
    batch = data_setup.batch_sizes(config, degrees.data)
    config = data_setup.resolve(config, batch)
    training = config.training
    phases = Timetable(getattr(config.data, "phases", []), training.steps, batch.rows * training.seq_len)
    window = _window(config, phases)
    masks = [mask.registry.get(name) for name in config.attention.masks]
    _check_window_is_used(config, window, phases)

    with torch.device("meta"):
        model = models.registry.build(config.model, attention_fn=None, seq_len=training.seq_len)
        for theta in phases.history("rope_theta").values():
            model.set_rope_theta(theta)  # a model without rotary positions refuses
    if degrees.context > 1 and config.samples.prompts:
        raise ConfigError("samples.prompts: ranks that share rows (context_parallel_degree) draw no samples.")
    mesh.check_degrees(config.parallelism, model.heads(), training.seq_len)
    row = torch.arange(training.seq_len, dtype=torch.int32)[None]
    stretches = curriculum.windows(window, training.steps)
    pairs = {w: mask.pairs(mask.compose(*(allow(row, w) for allow in masks))) for _, w in stretches}
    full = mask.pairs(mask.causal(row, training.seq_len))
    rows = batch.rows
    tokens_per_step = rows * training.seq_len
    linear = model.flops(tokens_per_step, 0)
    attention = model.flops(0, rows * full)
    ends = [step for step, _ in stretches[1:]] + [training.steps]
    attended = sum(pairs[w] * (end - step) for (step, w), end in zip(stretches, ends, strict=True))
    return Plan(
        config=config,
        window=window,
        phases=phases,
        steps=training.steps,
        tokens_per_step=tokens_per_step,
        parameters=model.num_parameters(),
        flops=training.steps * linear + model.flops(0, rows * attended),
        flops_full_context=training.steps * (linear + attention),
        attention_flops_full_context=training.steps * attention,
        full_at=curriculum.full_at(window, training.steps, training.seq_len),
        state_bytes=16
        * model.num_parameters()
        // (degrees.shard * degrees.model_parallel),  # float32: weight, gradient and two moments
        batch=batch,
        degrees=degrees,
    )


def summary_lines(plan: Plan) -> list[str]:
    """Returns the plan as a few lines of text, for the start of a run."""
    config, batch = plan.config, plan.batch
    first, last = plan.window(0), plan.window(plan.steps - 1)
    ladder = f"{config.curriculum.name}, window {first:,} at step 0"
    if plan.full_at is not None and plan.full_at > 0:
        ladder += f", the full {config.training.seq_len:,} from step {plan.full_at:,}"
    elif last != config.training.seq_len:
        ladder += f", {last:,} at the last step: never the full {config.training.seq_len:,}"
    return [
        f"model       {f'{config.model.name} {config.model.flavor}'.strip()}, {plan.parameters:,} parameters, "
        f"{plan.state_bytes / 2**30:.2f} GiB of weights, gradients and optimizer state per rank",
        f"step        {batch.rows} rows x {config.training.seq_len:,} tokens = {plan.tokens_per_step:,} tokens "
        f"({batch.data_ranks} ranks x {batch.local} rows x {batch.accumulation} accumulated)",
        f"run         {plan.steps:,} steps, {plan.tokens:,} tokens, {plan.flops:.3e} FLOPs",
        f"curriculum  {ladder}",
        f"masks       {' + '.join(config.attention.masks)}: {plan.attention_saved:.1%} of attention saved, "
        f"{plan.saved:.1%} of all FLOPs",
    ]


def fingerprints(plan: Plan, model: Any, loader: BaseDataLoader) -> dict[str, str]:
    """Returns what must be as it was for a run to go on: data, tokenizer, and what gives the state its meaning."""
    config = plan.config
    settings = {
        "model": dataclasses.asdict(model),
        "curriculum": dataclasses.asdict(config.curriculum),
        "attention": {"masks": config.attention.masks},
        "training": {"global_batch_size": plan.batch.rows, "max_norm": config.training.max_norm},
        "phases": {key: plan.phases.history(key) for key in ("window", "rope_theta")},
    }
    named = {f"{name}.{key}": str(value) for name, keys in settings.items() for key, value in keys.items()}
    return named | {f"data.{name}": value for name, value in loader.fingerprint().items()}


def _window(config: Config, phases: Timetable) -> curriculum.Curriculum:
    """Returns the window of each step: what the last phase that sets one says, until then the curriculum."""
    training = config.training
    for window in phases.history("window").values():
        if window > training.seq_len:
            raise ConfigError(f"data.phases: window = {window}: a row has {training.seq_len} tokens.")
    ladder = curriculum.registry.build(config.curriculum, steps=training.steps, seq_len=training.seq_len)
    return lambda step: phases("window", step) or ladder(step)


def _check_window_is_used(config: Config, window: curriculum.Curriculum, phases: Timetable) -> None:
    """A window that moves and that no mask reads would be silently ignored: refuse it."""
    length = config.training.seq_len
    row = torch.arange(length, dtype=torch.int32)[None]
    masks = [mask.registry.get(name) for name in config.attention.masks]
    reads = any(not torch.equal(allow(row, 1), allow(row, length)) for allow in masks) or length == 1
    seen = {window(step) for step in {0, config.training.steps // 2, config.training.steps - 1, *phases.starts}}
    if not reads and seen != {length}:
        moves = "data.phases move" if phases.history("window") else f"curriculum {config.curriculum.name!r} moves"
        raise ConfigError(
            f"{moves} the window, but none of attention.masks = {config.attention.masks} reads it. "
            "Add 'chunk' or 'sliding'."
        )

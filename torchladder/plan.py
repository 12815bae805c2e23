"""What a run will do, known before it starts: its windows, tokens, FLOPs, memory. Nothing large is allocated."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from torchladder import curriculum, mask, models
from torchladder.config import Config
from torchladder.distributed import mesh
from torchladder.registry import ConfigError


@dataclass(frozen=True)
class Plan:
    """A run in figures.

    Attributes:
        config: the settings that it is the plan of.
        window: the curriculum, step → window.
        steps: optimizer steps.
        tokens_per_step: tokens of one step over all ranks.
        parameters: trainable numbers of the model.
        flops: forward and backward of the whole run under its windows.
        flops_full_context: the same with every row at full causal context.
        attention_flops_full_context: the part of the latter that attention takes.
        full_at: the first step with the full window, None where there is none.
        state_bytes: weights, gradients and optimizer state on one rank.
        batch: how a step's rows are divided.
    """

    config: Config
    window: curriculum.Curriculum
    steps: int
    tokens_per_step: int
    parameters: int
    flops: int
    flops_full_context: int
    attention_flops_full_context: int
    full_at: int | None
    state_bytes: int
    batch: Batching

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


@dataclass(frozen=True)
class Batching:
    """How the rows of one step are divided: ``rows = data_ranks * local * accumulation``."""

    rows: int
    local: int
    accumulation: int
    data_ranks: int


def batching(config: Config, data_ranks: int) -> Batching:
    """Divides a step's rows over ranks and micro-batches.

    Raises:
        ConfigError: they do not divide; the message names the nearest sizes that would.
    """
    local, rows = config.training.local_batch_size, config.training.global_batch_size
    at_once = local * data_ranks
    if rows == -1:
        rows = at_once
    if rows % at_once:
        below, above = rows // at_once * at_once, -(-rows // at_once) * at_once
        raise ConfigError(
            f"training.global_batch_size = {rows} is not a multiple of training.local_batch_size {local} x "
            f"{data_ranks} data-parallel ranks = {at_once}. Nearest: {below or above} or {above}."
        )
    return Batching(rows, local, rows // at_once, data_ranks)


def make(config: Config, ranks: int = 1) -> Plan:
    """Returns the plan of a run on that many ranks.

    Raises:
        ConfigError: settings that cannot be, alone or together.
    """
    training = config.training
    replicate, shard = mesh.degrees(config.parallelism, ranks)
    batch = batching(config, replicate * shard)
    window = curriculum.registry.build(config.curriculum, steps=training.steps, seq_len=training.seq_len)
    masks = [mask.registry.get(name) for name in config.attention.masks]
    _check_window_is_used(config, window)

    with torch.device("meta"):
        model = models.registry.build(config.model, attend=None, seq_len=training.seq_len)
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
        steps=training.steps,
        tokens_per_step=tokens_per_step,
        parameters=model.num_parameters(),
        flops=training.steps * linear + model.flops(0, rows * attended),
        flops_full_context=training.steps * (linear + attention),
        attention_flops_full_context=training.steps * attention,
        full_at=curriculum.full_at(window, training.steps, training.seq_len),
        state_bytes=16 * model.num_parameters() // shard,  # float32: weight, gradient and two moments
        batch=batch,
    )


def lines(plan: Plan) -> list[str]:
    """Returns the plan as a few lines of text, for the start of a run."""
    config, batch = plan.config, plan.batch
    first, last = plan.window(0), plan.window(plan.steps - 1)
    ladder = f"{config.curriculum.name}, window {first:,} at step 0"
    if plan.full_at is not None and plan.full_at > 0:
        ladder += f", the full {config.training.seq_len:,} from step {plan.full_at:,}"
    elif last != config.training.seq_len:
        ladder += f", {last:,} at the last step: never the full {config.training.seq_len:,}"
    return [
        f"model       {config.model.name} {config.model.flavor}, {plan.parameters:,} parameters, "
        f"{plan.state_bytes / 2**30:.2f} GiB of weights, gradients and optimizer state per rank",
        f"step        {batch.rows} rows x {config.training.seq_len:,} tokens = {plan.tokens_per_step:,} tokens "
        f"({batch.data_ranks} ranks x {batch.local} rows x {batch.accumulation} accumulated)",
        f"run         {plan.steps:,} steps, {plan.tokens:,} tokens, {plan.flops:.3e} FLOPs",
        f"curriculum  {ladder}",
        f"masks       {' + '.join(config.attention.masks)}: {plan.attention_saved:.1%} of attention saved, "
        f"{plan.saved:.1%} of all FLOPs",
    ]


def _check_window_is_used(config: Config, window: curriculum.Curriculum) -> None:
    """A curriculum that moves a window which no mask reads would be silently ignored: refuse it."""
    length = config.training.seq_len
    row = torch.arange(length, dtype=torch.int32)[None]
    masks = [mask.registry.get(name) for name in config.attention.masks]
    reads = any(not torch.equal(allow(row, 1), allow(row, length)) for allow in masks) or length == 1
    for asked in config.validation.windows:
        if asked > length or not reads:
            why = f"a row has {length} tokens" if asked > length else f"attention.masks = {config.attention.masks}"
            raise ConfigError(f"validation.windows = {config.validation.windows}: {asked} has no meaning, {why}.")
    seen = {window(step) for step in {0, config.training.steps // 2, config.training.steps - 1}}
    if not reads and seen != {length}:
        raise ConfigError(
            f"curriculum {config.curriculum.name!r} moves the window, but none of attention.masks = "
            f"{config.attention.masks} reads it. Add 'chunk' or 'sliding'."
        )

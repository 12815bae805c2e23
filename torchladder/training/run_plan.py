"""What a run will do, known before it starts: windows, tokens, FLOPs, memory. Nothing large is allocated."""

from __future__ import annotations

import dataclasses
import inspect
import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from torchladder import curriculum, mask, models, optim
from torchladder.config import Config
from torchladder.data.dataloader import BaseDataLoader, TracksSources
from torchladder.distributed import mesh
from torchladder.distributed.parallelize import ParallelizeConfig, Precision
from torchladder.distributed.ranks import Ranks
from torchladder.inference import hf_export
from torchladder.metrics import RunInfo
from torchladder.models.attention import AttentionKernel
from torchladder.registry import ConfigError, require
from torchladder.schedule import Schedule
from torchladder.training import data_setup
from torchladder.training.data_setup import BatchSizes, batch_sizes

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """A run in numbers.

    Attributes:
        config: the settings of the run, ``training.steps`` known.
        tokens_per_step: tokens of one step over all ranks, if neither warmup nor phases change the batch.
        num_parameters: trainable parameters of the model.
        flops: forward and backward FLOPs of the whole run under its windows.
        flops_full_context: the same with every row at full causal context.
        attention_flops_full_context: the attention FLOPs in ``flops_full_context``.
        window_range: the shortest and the longest window of the run.
        full_context_step: the first step from which the window stays the whole row; None if the last window is shorter.
        optimizer_groups: the optimizer's parameter groups; none for a plugin that does not report them.
    """

    config: Config
    schedule: Schedule
    steps: int
    tokens_per_step: int
    num_parameters: int
    flops: int
    flops_full_context: int
    attention_flops_full_context: int
    window_range: tuple[int, int]
    full_context_step: int | None
    batch: BatchSizes
    degrees: mesh.Degrees
    optimizer_groups: list[optim.ParameterGroup]

    @property
    def moments(self) -> int:
        """Numbers that the optimizer keeps over all ranks: two for each parameter unless its groups say otherwise."""
        return sum(group.state_elements for group in self.optimizer_groups) or 2 * self.num_parameters

    @property
    def state_bytes(self) -> int:
        """Bytes of weights, gradients and optimizer state on one rank."""
        itemsize = getattr(torch, self.config.training.dtype).itemsize
        weights_and_gradients = 2 * self.num_parameters
        shards = self.degrees.dp_shard * self.degrees.model_parallel
        return itemsize * (weights_and_gradients + self.moments) // shards

    @property
    def num_tokens(self) -> int:
        return self.schedule.batch.tokens_before(self.steps)

    @property
    def saved(self) -> float:
        """The fraction of all FLOPs that the windows save against full context."""
        return 1 - self.flops / self.flops_full_context

    @property
    def attention_saved(self) -> float:
        """The fraction of the attention FLOPs that the windows save."""
        return (self.flops_full_context - self.flops) / self.attention_flops_full_context

    @property
    def attention_share(self) -> float:
        """The fraction of attention in the FLOPs at full context."""
        return self.attention_flops_full_context / self.flops_full_context


def make_plan(config: Config, ranks: int = 1) -> Plan:
    """Plans a run on a number of ranks.

    Raises:
        ConfigError: settings that are out of range or do not fit together.
    """
    degrees = mesh.degrees(config.parallelism, ranks)
    batch = batch_sizes(config, degrees.dp)
    config = data_setup.with_steps(config, batch)
    training = config.training
    schedule = config.schedule(batch.global_batch_size)
    data_setup.check_batch_schedule(config, batch, schedule.batch)
    windows: Counter[int] = Counter()  # window -> its rows
    for step in range(training.steps):
        windows[schedule.window(step)] += schedule.batch(step)
    _check_window_is_used(config, schedule, set(windows))
    if config.checkpoint.last_save_in_hf:
        hf_export.check_exportable(config, schedule(training.steps - 1))
    for window in config.validation.windows:
        require(
            window <= training.seq_len,
            f"validation.windows = {window}: a row has {training.seq_len} tokens (training.seq_len).",
        )
    folder = Path(config.job.dump_folder)
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    require(existing.is_dir(), f"job.dump_folder = {str(folder)!r}: {existing} is a file.")
    if not data_setup.all_sources_repeat(config.data):
        data_setup.build_loader(config, batch, schedule)  # fails if a source runs out before the last step

    with torch.device("meta"):
        model = models.registry.build(config.model, attention_fn=None, seq_len=training.seq_len)
        for theta in schedule.overrides("rope_theta").values():
            model.set_rope_theta(theta)  # a model without rotary embeddings refuses
    if training.z_loss_multiplier and "z_loss_multiplier" not in inspect.signature(model.forward).parameters:
        raise ConfigError(
            f"training.z_loss_multiplier: {type(model).__name__}.forward has no argument z_loss_multiplier: set 0."
        )
    if config.ema.enable and config.float8.enable_fsdp_float8_all_gather:
        raise ConfigError("ema.enable does not support float8.enable_fsdp_float8_all_gather: disable one of them.")
    if degrees.cp > 1 and config.samples.prompts:
        raise ConfigError("samples.prompts: not with context parallelism (parallelism.context_parallel_degree).")
    mesh.check_degrees(config.parallelism, model.head_counts(), training.seq_len)
    groups = optim.parameter_groups(config.optimizer, model)
    if training.enable_cpu_offload and any(group.algorithm == "Muon" for group in groups):
        raise ConfigError(
            f"training.enable_cpu_offload: not with optimizer.name = {config.optimizer.name!r}, which orthogonalizes "
            "whole matrices on the GPU. Set it to false, or use AdamW."
        )

    row = torch.arange(training.seq_len, dtype=torch.int32)[None]
    attended = sum(
        mask.pairs(mask.from_names(config.attention.masks, row, window)) * rows for window, rows in windows.items()
    )
    all_rows = schedule.batch.rows_before(training.steps)
    linear_flops = model.flops(all_rows * training.seq_len, 0)
    attention_flops = model.flops(0, all_rows * mask.pairs(mask.causal(row, training.seq_len)))
    return Plan(
        config=config,
        schedule=schedule,
        steps=training.steps,
        tokens_per_step=batch.global_batch_size * training.seq_len,
        num_parameters=model.num_parameters(),
        flops=linear_flops + model.flops(0, attended),
        flops_full_context=linear_flops + attention_flops,
        attention_flops_full_context=attention_flops,
        window_range=(min(windows), max(windows)),
        full_context_step=curriculum.full_context_step(schedule.window, training.steps, training.seq_len),
        batch=batch,
        degrees=degrees,
        optimizer_groups=groups,
    )


def summary_lines(plan: Plan) -> list[str]:
    """Returns the plan as a few lines of text, for the start of a run."""
    config, batch, seq_len = plan.config, plan.batch, plan.config.training.seq_len
    first, last = plan.schedule.window(0), plan.schedule.window(plan.steps - 1)
    (shortest, longest), ends = plan.window_range, (first, last)
    ladder = f"{config.curriculum.name}, window {first:,} at step 0"
    if shortest < min(ends) or longest > max(ends):
        ladder += f", then {shortest:,} to {longest:,}"
    if plan.full_context_step is not None and plan.full_context_step > 0:
        ladder += f", the full {seq_len:,} from step {plan.full_context_step:,}"
    elif last != seq_len:
        ladder += f", {last:,} at the last step" + (f": never the full {seq_len:,}" if longest < seq_len else "")
    ranks = f"{batch.dp_degree} rank{'s' if batch.dp_degree > 1 else ''}"
    return [
        f"model       {f'{config.model.name} {config.model.flavor}'.strip()}, {plan.num_parameters:,} parameters, "
        f"{plan.state_bytes / 2**30:.2f} GiB of weights, gradients and optimizer state per rank",
        f"step        {batch.global_batch_size} rows x {seq_len:,} tokens = {plan.tokens_per_step:,} tokens "
        f"({ranks} x {batch.local_batch_size} rows x {batch.accumulation_steps} accumulated)",
        *([f"batch       {plan.schedule.batch}"] if plan.schedule.batch.varies else []),
        f"run         {plan.steps:,} steps, {plan.num_tokens:,} tokens, {plan.flops:.3e} FLOPs",
        f"curriculum  {ladder}",
        f"masks       {' + '.join(config.attention.masks)}: {plan.attention_saved:.1%} of attention saved, "
        f"{plan.saved:.1%} of all FLOPs",
        *(f"optimizer   {group}" for group in plan.optimizer_groups),
    ]


def log_plan(plan: Plan, kernel: AttentionKernel, loaders: list[BaseDataLoader], step: int) -> None:
    """Writes the resolved settings to config.toml and logs what the run will do after its first ``step`` steps."""
    config, text = plan.config, plan.config.to_toml()
    folder = Path(config.job.dump_folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.toml").write_text(text)
    lines = [config.job.description] if config.job.description else []
    lines += [*summary_lines(plan), f"kernel      {kernel.name}: {kernel.reason}"]
    lines += [f"data        {line}" for loader in loaders for line in loader.describe()]
    lines += [f"resume      after step {step:,}"] if step else []
    lines += [f"settings:\n{text}"] if config.job.print_config else []
    for line in lines:
        logger.info("%s", line)
    if "document" in config.attention.masks and isinstance(loaders[0], TracksSources):
        for source, share in loaders[0].boundary_shares().items():
            logger.info("documents   begin inside %.0f%% of the rows of %s", 100 * share, source)
            if not share:
                logger.warning(
                    "attention.masks: 'document' changes nothing in %s: no document begins inside a sampled row. If "
                    "these rows were packed elsewhere, documents_by_eos = true finds their documents by the eos token.",
                    source,
                )


def run_info(plan: Plan, ranks: Ranks, flops: Callable[[int, int], int]) -> RunInfo:
    """Returns what the metrics report about a run; ``flops`` is the model's ``(tokens, pairs) -> FLOPs``."""
    return RunInfo(
        folder=Path(plan.config.job.dump_folder),
        steps=plan.steps,
        seq_len=plan.config.training.seq_len,
        flops=flops,
        device=ranks.device,
        rank=ranks.rank,
        ranks=ranks.world_size,
        settings=dataclasses.asdict(plan.config),
    )


def parallelize_config(config: Config) -> ParallelizeConfig:
    """Returns the sections that ``parallelize_model`` applies."""
    training = config.training
    dtypes = (getattr(torch, name) for name in (training.mixed_precision_param, training.mixed_precision_reduce))
    return ParallelizeConfig(
        config.parallelism,
        config.float8,
        config.activation_checkpoint,
        config.compile,
        Precision(*dtypes),
        offload=training.enable_cpu_offload,
    )


def fingerprints(plan: Plan, loader: BaseDataLoader) -> dict[str, str]:
    """Returns all that must be unchanged when a run resumes, except its schedule: data, tokenizer, model, batch."""
    config = plan.config
    settings = {
        "model": dataclasses.asdict(models.resolve(config.model)),
        "attention": {"masks": config.attention.masks},
        "training": {"global_batch_size": plan.batch.global_batch_size, "max_norm": config.training.max_norm},
    }
    named = {f"{name}.{key}": str(value) for name, keys in settings.items() for key, value in keys.items()}
    return named | {f"data.{name}": value for name, value in loader.fingerprints().items()}


def _check_window_is_used(config: Config, schedule: Schedule, windows: set[int]) -> None:
    """Refuses a window that changes and that no mask reads: it would be silently ignored."""
    names, seq_len = config.attention.masks, config.training.seq_len
    row = torch.arange(seq_len, dtype=torch.int32)[None]
    reads = seq_len == 1 or not torch.equal(mask.from_names(names, row, 1), mask.from_names(names, row, seq_len))
    if not reads and windows != {seq_len}:
        subject = "phases set" if schedule.overrides("window") else f"curriculum {config.curriculum.name!r} sets"
        raise ConfigError(
            f"{subject} a window, but none of attention.masks = {names} reads it. Add 'chunk' or 'sliding'."
        )

"""What a run will do, known before it starts: windows, tokens, FLOPs, memory. Nothing large is allocated."""

from __future__ import annotations

import dataclasses
import inspect
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from torchladder import curriculum, mask, models, optim, probes
from torchladder.config import Config
from torchladder.data.dataloader import BaseDataLoader
from torchladder.distributed import mesh
from torchladder.distributed.parallelize import ParallelizeConfig, Precision
from torchladder.distributed.pipeline import build_stages
from torchladder.distributed.pipeline_layout import PipelineLayout, pipeline_layout
from torchladder.distributed.ranks import Ranks
from torchladder.inference import hf_export
from torchladder.metrics import RunInfo
from torchladder.registry import ConfigError, require
from torchladder.schedule import Schedule
from torchladder.training import data_setup
from torchladder.training.data_setup import BatchSizes, batch_sizes


@dataclass(frozen=True)
class LayerTypePlan:
    """The attention of the layers of one type over the whole run.

    Attributes:
        layers: their number.
        first_window: tokens a query may attend to at the first step.
        last_window: the same at the last step.
        window_range: its smallest and its largest value over the run.
        flops: forward and backward FLOPs of their attention.
        flops_full_context: the same with every row at full causal context.
    """

    layer_type: str
    layers: int
    masks: list[str]
    first_window: int
    last_window: int
    window_range: tuple[int, int]
    flops: int
    flops_full_context: int

    @property
    def saved(self) -> float:
        """The fraction of the attention FLOPs that the windows save."""
        return 1 - self.flops / self.flops_full_context


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
        full_context_step: the first step from which the window stays the whole row; None if the last window is shorter.
        layer_types: the attention of each layer type, full_attention first.
        optimizer_groups: the optimizer's parameter groups; none for a plugin that does not report them.
        model: the whole model, on the meta device.
        pipeline: the stages of the model; None without pipeline parallelism.
    """

    config: Config
    schedule: Schedule
    steps: int
    tokens_per_step: int
    num_parameters: int
    flops: int
    flops_full_context: int
    attention_flops_full_context: int
    full_context_step: int | None
    layer_types: list[LayerTypePlan]
    batch: BatchSizes
    degrees: mesh.Degrees
    optimizer_groups: list[optim.ParameterGroup]
    model: models.Model
    pipeline: PipelineLayout | None = None

    @property
    def moments(self) -> int:
        """Numbers that the optimizer keeps over all ranks: two for each parameter unless its groups say otherwise."""
        return sum(group.state_elements for group in self.optimizer_groups) or 2 * self.num_parameters

    @property
    def state_bytes(self) -> int:
        """Bytes of weights, gradients and optimizer state on one rank, in a pipeline on average."""
        itemsize = getattr(torch, self.config.training.dtype).itemsize
        weights_and_gradients = 2 * self.num_parameters
        shards = self.degrees.dp_shard * self.degrees.model_parallel
        return itemsize * (weights_and_gradients + self.moments) // shards

    @property
    def num_tokens(self) -> int:
        return self.schedule.batch.tokens_before(self.steps)

    @property
    def windows(self) -> dict[str, Callable[[int], int]]:
        """The window of each layer type, as a function of the step."""
        return {one.layer_type: partial(self.schedule.window, layer_type=one.layer_type) for one in self.layer_types}

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
    windows: dict[str, Counter[int]] = {name: Counter() for name in config.layer_masks}  # -> window -> its rows
    for layer_type in windows:
        for step in range(training.steps):
            windows[layer_type][schedule.window(step, layer_type)] += schedule.batch(step)
        _check_window_is_used(config, schedule, layer_type, set(windows[layer_type]))
    if config.checkpoint.last_save_in_hf:
        hf_export.check_exportable(config, schedule(training.steps - 1))
    for window in config.validation.windows:
        require(
            window <= training.seq_len,
            f"validation.windows = {window}: a row has {training.seq_len} tokens (training.seq_len).",
        )
        require(
            any(map(mask.reads_window, config.attention.masks)),
            f"validation.windows = {window}: none of attention.masks = {config.attention.masks} reads a window.",
        )
    _check_has_effect(config, schedule)
    if config.validation.enable:
        probes.registry.build_all(config.validation.probes, [training.seq_len])
    folder = Path(config.job.dump_folder)
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    require(existing.is_dir(), f"job.dump_folder = {str(folder)!r}: {existing} is a file.")
    if not data_setup.all_sources_repeat(config.data):
        data_setup.build_loader(config, batch, schedule)  # fails if a source runs out before the last step

    with torch.device("meta"):
        model = models.registry.build(config.model, attention_fn=None, seq_len=training.seq_len)
        for theta in schedule.overrides("rope_theta").values():
            model.set_rope_theta(theta)  # a model without rotary embeddings refuses
    for setting, argument in ("z_loss_multiplier", "z_loss_multiplier"), ("context_weight_exponent", "label_weights"):
        require(
            not getattr(training, setting) or argument in inspect.signature(model.forward).parameters,
            f"training.{setting}: {type(model).__name__}.forward has no argument {argument}: set 0.",
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

    layer_types = [_plan_layer_type(config, schedule, model, name, windows[name]) for name in windows]
    attention_flops_full_context = sum(one.flops_full_context for one in layer_types)
    linear_flops = model.flops(schedule.batch.tokens_before(training.steps), 0)
    return Plan(
        config=config,
        schedule=schedule,
        steps=training.steps,
        tokens_per_step=batch.global_batch_size * training.seq_len,
        num_parameters=model.num_parameters(),
        flops=linear_flops + sum(one.flops for one in layer_types),
        flops_full_context=linear_flops + attention_flops_full_context,
        attention_flops_full_context=attention_flops_full_context,
        layer_types=layer_types,
        full_context_step=curriculum.full_context_step(schedule.window, training.steps, training.seq_len),
        batch=batch,
        degrees=degrees,
        optimizer_groups=groups,
        model=model,
        pipeline=_plan_pipeline(config, model, batch),
    )


def _plan_layer_type(
    config: Config, schedule: Schedule, model: models.Model, layer_type: str, windows: Counter[int]
) -> LayerTypePlan:
    """Plans the layers of one type; ``windows`` maps each of their windows to its number of rows."""
    steps, seq_len, masks = config.training.steps, config.training.seq_len, config.layer_masks[layer_type]
    layers = Counter(model.layer_types)[layer_type]
    row = torch.arange(seq_len, dtype=torch.int32)[None]
    attended = sum(mask.pairs(mask.from_names(masks, row, window)) * count for window, count in windows.items())
    return LayerTypePlan(
        layer_type=layer_type,
        layers=layers,
        masks=masks,
        first_window=schedule.window(0, layer_type),
        last_window=schedule.window(steps - 1, layer_type),
        window_range=(min(windows), max(windows)),
        flops=model.flops(0, layers * attended),
        flops_full_context=model.flops(0, layers * windows.total() * mask.pairs(mask.causal(row, seq_len))),
    )


def _plan_pipeline(config: Config, model: models.Model, batch: BatchSizes) -> PipelineLayout | None:
    """Divides the model into the stages of a pipeline.

    Raises:
        ConfigError: it cannot be divided so, or a setting does not work in a pipeline.
    """
    layout = pipeline_layout(config.parallelism, list(model.layers), batch.local_batch_size)
    if layout is None:
        return None
    build_stages(model, layout, rank=0)  # a model without stages refuses
    key = f"parallelism.pipeline_parallel_schedule = {layout.schedule!r}"
    if layout.schedule == "ZBVZeroBubble":
        require(
            not config.compile.compiles("model"),
            f"compile.enable: not with {key}, which divides the backward pass of a block. Use another schedule, or "
            "compile.components = ['loss'].",
        )
        require(
            not config.activation_checkpoint.by_op,
            f"activation_checkpoint.selective_ac_option = 'op': not with {key}, which divides the backward pass of a "
            "block. Use another schedule, or the mode full.",
        )
        require(
            config.parallelism.fsdp_reshard_after_forward == "never",
            f"{key} needs parallelism.fsdp_reshard_after_forward = 'never'.",
        )
    return layout


def run_info(plan: Plan, ranks: Ranks) -> RunInfo:
    """Returns what the metrics report about a run."""
    return RunInfo(
        folder=Path(plan.config.job.dump_folder),
        steps=plan.steps,
        seq_len=plan.config.training.seq_len,
        flops=plan.model.flops,
        layers=len(plan.model.layer_types),
        device=ranks.device,
        rank=ranks.rank,
        ranks=ranks.world_size,
        machines=ranks.world_size // int(os.environ.get("LOCAL_WORLD_SIZE", ranks.world_size)),
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
    for layer_type, table in config.attention.tables.items():
        settings[f"attention.{layer_type}"] = {"masks": table.masks}
    named = {f"{name}.{key}": str(value) for name, keys in settings.items() for key, value in keys.items()}
    return named | {f"data.{name}": value for name, value in loader.fingerprints().items()}


def _check_has_effect(config: Config, schedule: Schedule) -> None:
    """Refuses settings that would be silently ignored in this run."""
    steps, last = config.training.steps, schedule.batch.stages[-1][0]
    scaling = config.lr_scheduler.batch_size_scaling
    require(
        schedule.batch.varies or scaling == "none",
        f"lr_scheduler.batch_size_scaling = {scaling!r}: the batch does not change, set [batch_size_warmup] or "
        "phases.global_batch_size.",
    )
    require(
        config.batch_size_warmup.initial_batch_size is None or last < steps,
        f"batch_size_warmup: the last batch begins at step {last:,}, but the run has {steps:,} steps.",
    )
    require(
        not config.ema.enable or config.ema.start_step < steps,
        f"ema.start_step = {config.ema.start_step}: the run has {steps:,} steps.",
    )
    for key in "probes", "masks":
        require(
            config.validation.enable or not getattr(config.validation, key),
            f"validation.{key} needs validation.enable: enable it, or remove the {key}.",
        )
    run, other = (
        {x for x in masks if not mask.reads_window(x)} | {"causal"}
        for masks in (config.attention.masks, config.validation.masks)
    )
    require(
        not config.validation.masks or run != other,
        f"validation.masks = {config.validation.masks}: at full context attention.masks = {config.attention.masks} are "
        "the same, and validated already: remove validation.masks.",
    )


def _check_window_is_used(config: Config, schedule: Schedule, layer_type: str, windows: set[int]) -> None:
    """Refuses windows that no row has, and one that changes and that no mask of the layer type reads."""
    names, seq_len = config.layer_masks[layer_type], config.training.seq_len
    is_full = config.layer_attention[layer_type] is config.attention
    source = f"curriculum {config.curriculum.name!r}" if is_full else f"[attention.{layer_type}]"
    for window in windows:
        # That of a further layer type may exceed the row, which is then seen whole.
        require(
            isinstance(window, int) and window >= 1 and (window <= seq_len or not is_full),
            f"{source} sets a window of {window}: must be a whole number from 1 to {seq_len}, the tokens of a row "
            "(training.seq_len).",
        )
    row = torch.arange(seq_len, dtype=torch.int32)[None]
    reads = seq_len == 1 or not torch.equal(mask.from_names(names, row, 1), mask.from_names(names, row, seq_len))
    if not reads and windows != {seq_len}:
        subject = "phases set" if schedule.overrides("window") else f"{source} sets"
        key = "attention" if is_full else f"attention.{layer_type}"
        raise ConfigError(f"{subject} a window, but none of {key}.masks = {names} reads it. Add 'chunk' or 'sliding'.")

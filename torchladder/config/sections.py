"""All sections of a config; a section of one package is defined there, the others here."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import tomli_w
from annotated_types import Ge, Gt, Le, Lt

from torchladder import curriculum, mask, models, optim, probes
from torchladder.batch_schedule import BatchSchedule, BatchSizeWarmup
from torchladder.checkpoint import CheckpointConfig
from torchladder.config.attention_section import AttentionConfig, LayerAttentionConfig, check_mask_names
from torchladder.config.metrics_section import MetricsSection
from torchladder.config.values import tables_argument
from torchladder.distributed.activation_checkpoint import ActivationCheckpointConfig
from torchladder.distributed.float8 import Float8Config
from torchladder.distributed.mesh import ParallelismConfig
from torchladder.distributed.parallelize import CompileConfig
from torchladder.distributed.ranks import CommConfig
from torchladder.ema import EMAConfig
from torchladder.models.layer_types import types_of_config
from torchladder.profiling import ProfilingConfig
from torchladder.registry import ConfigError, check_bounds, require
from torchladder.resilience.bad_steps import ResilienceConfig
from torchladder.schedule import FULL_ATTENTION, Phase, Schedule, change_batch


@dataclass(frozen=True)
class JobConfig:
    """The run as a whole: files, plugins, limits."""

    config_file: str = ""
    """A TOML file with the run's settings; the command line overrides it."""

    extends: str = ""
    """In a file: the TOML file that it overrides, by a path relative to it."""

    plugins: list[str] = field(default_factory=list)
    """Python modules to import first; they register components. Found on the Python path, in the working folder or
    in the folder of the config file."""

    dump_folder: str = "./outputs"
    """Output folder of the run."""

    description: str = ""
    """Purpose of the run in one line, logged at the start."""

    print_config: bool = False
    """Print the resolved settings at the start."""

    max_minutes: Annotated[float, Ge(0), Lt(math.inf)] = 0.0
    """Save and exit with code 75, for a restart, after this many minutes; 0: no limit."""

    exit_interval: Annotated[int, Ge(0)] = 0
    """Save and exit with code 75 at every multiple of this many steps; 0: never."""

    def __post_init__(self) -> None:
        check_bounds(self, "job")


@dataclass(frozen=True)
class TrainingConfig:
    """Length of the run, batch sizes, precision."""

    steps: Annotated[int, Ge(1)] = -1
    """Optimizer steps of the run; -1: as many as training.epochs take, or 10,000."""

    epochs: Annotated[float | None, Gt(0), Lt(math.inf)] = None
    """Instead of steps: passes over the tokens of all sources together."""

    seq_len: Annotated[int, Ge(1)] = 2048
    """Tokens in a row (sequence): the full context."""

    local_batch_size: Annotated[int, Ge(1)] = 8
    """Rows of a micro-batch on one data-parallel rank."""

    global_batch_size: Annotated[int, Ge(1)] = -1
    """Rows of an optimizer step over all ranks; a multiple of local_batch_size x data-parallel ranks is reached by
    gradient accumulation. -1: without accumulation."""

    max_norm: Annotated[float, Gt(0)] = 1.0
    """Gradients are clipped to this global norm."""

    z_loss_multiplier: Annotated[float, Ge(0), Lt(math.inf)] = 0.0
    """Adds this times logsumexp(logits)**2 to the loss of each label (z-loss), against logits that drift; 0: not."""

    context_weight_exponent: Annotated[float, Ge(0), Le(4)] = 0.0
    """Weights the loss of a label by the context that predicts it, rounded down to a power of two, to this power; the
    mean weight of a step is 1. 0: all labels count alike."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of weights, gradients and optimizer state. bfloat16 halves their memory, and AdamW's small updates round to
    nothing: for measurements and short experiments."""

    mixed_precision_param: Literal["bfloat16", "float32"] = "bfloat16"
    """Dtype of the computation."""

    mixed_precision_reduce: Literal["bfloat16", "float32"] = "float32"
    """Dtype in which gradients are reduced over ranks."""

    enable_cpu_offload: bool = False
    """Keep weights, gradients and optimizer state in CPU memory and run the optimizer there (FSDP2)."""

    gc_freq: Annotated[int, Ge(1)] = 50
    """Steps between Python garbage collections; automatic ones are off, so that no rank waits for another's."""

    def __post_init__(self) -> None:
        check_bounds(self, "training")
        require(
            self.dtype == "float32" or self.mixed_precision_param == self.dtype,
            f"training.dtype = {self.dtype!r} needs training.mixed_precision_param = {self.dtype!r}, "
            f"not {self.mixed_precision_param!r}.",
        )
        require(
            self.epochs is None or self.steps == -1,
            f"training.epochs = {self.epochs} and training.steps = {self.steps} both set the run's length: set one. "
            'An inherited value is unset by steps = -1, or by epochs = "None".',
        )


@dataclass(frozen=True)
class ValidationConfig:
    """Loss on held-out documents during training."""

    enable: bool = True
    """Validate at the start, every freq steps and at the end."""

    freq: Annotated[int, Ge(1)] = 500
    """Steps between validations."""

    steps: Annotated[int, Ge(-1)] = 20
    """Micro-batches per rank in one validation; -1: all held-out rows."""

    windows: list[int] = field(default_factory=list)
    """Windows to validate at in addition to the full context."""

    masks: list[str] = field(default_factory=list)
    """Masks of a second validation at full context, instead of attention.masks and combined as they are; none: only
    under attention.masks."""

    probes: list[str] = field(default_factory=list)
    """Long-context probes to measure in full rows at each validation: needle, copy, repeat, or a plugin's."""

    probe_rows: Annotated[int, Ge(1)] = 8
    """Rows per depth or distance of a probe, over all ranks."""

    def __post_init__(self) -> None:
        check_bounds(self, "validation")
        require(self.steps != 0, "validation.steps = 0: must be 1 or more, or -1; validation.enable turns it off.")
        require(all(w >= 1 for w in self.windows), f"validation.windows = {self.windows}: must be 1 or more.")
        probes.registry.build_all(self.probes, [])  # refuses unknown names
        check_mask_names(self.masks, "validation")
        for name in filter(mask.reads_window, self.masks):
            raise ConfigError(
                f"validation.masks = {self.masks}: {name!r} reads a window, and these masks are measured at full "
                "context: remove it. validation.windows measures windows under attention.masks."
            )


@dataclass(frozen=True)
class SamplesConfig:
    """Text samples during training."""

    prompts: list[str] = field(default_factory=list)
    """Prompts to complete; none: no samples."""

    freq: Annotated[int, Ge(0)] = 0
    """Steps between samples; 0: only at the end of the run."""

    max_new_tokens: Annotated[int, Ge(1)] = 128
    """Tokens to generate for each prompt, at most."""

    temperature: Annotated[float, Ge(0)] = 0.8
    """Sampling temperature; 0: greedy decoding."""

    top_k: Annotated[int, Ge(0)] = 0
    """Sample from this many of the likeliest tokens; 0: from all."""

    repetition_penalty: Annotated[float, Gt(0), Lt(math.inf)] = 1.0
    """Divides the logits of tokens that are in the prompt or the text already, multiplies negative ones; 1: not."""

    top_p: Annotated[float, Gt(0), Le(1)] = 0.95
    """Nucleus sampling: sample from the smallest set of tokens with this total probability."""

    def __post_init__(self) -> None:
        check_bounds(self, "samples")

    def due(self, step: int, last: bool) -> bool:
        """Returns whether to generate samples after a step."""
        return bool(self.prompts) and (last or (self.freq > 0 and step % self.freq == 0))


@dataclass(frozen=True)
class DebugConfig:
    """Seeds and determinism."""

    seed: int = 0
    """Seed of the initial weights and of sampling; data.seed is that of the data order."""

    deterministic: bool = False
    """Use deterministic algorithms only: slower, bit-identical on the same machine."""

    deterministic_warn_only: bool = False
    """Only warn about operations without a deterministic algorithm."""


@dataclass(frozen=True, kw_only=True)
class ComponentSection:
    """A section whose other keys are the parameters of the component ``name``; ``config_type`` adds them."""

    name: str


@dataclass(frozen=True, kw_only=True)
class ModelSection(ComponentSection):
    """The section ``[model]``; its other keys are the fields of the model's config."""

    flavor: str
    hf_assets_path: str


@dataclass(frozen=True)
class Config:
    """All settings of a run."""

    job: JobConfig
    model: ModelSection
    tokenizer: ComponentSection
    data: ComponentSection
    attention: AttentionConfig
    curriculum: ComponentSection
    training: TrainingConfig
    batch_size_warmup: BatchSizeWarmup
    optimizer: ComponentSection
    lr_scheduler: optim.LRSchedulerConfig
    ema: EMAConfig
    parallelism: ParallelismConfig
    activation_checkpoint: ActivationCheckpointConfig
    compile: CompileConfig
    float8: Float8Config
    checkpoint: CheckpointConfig
    resilience: ResilienceConfig
    validation: ValidationConfig
    samples: SamplesConfig
    metrics: MetricsSection
    profiling: ProfilingConfig
    comm: CommConfig
    debug: DebugConfig
    phases: Annotated[list[Phase], tables_argument(list[Phase])] = field(default_factory=list)
    """Overrides of window, learning rate, clipping, RoPE theta, source weights and batch size from a step on."""

    @property
    def layer_attention(self) -> dict[str, AttentionConfig | LayerAttentionConfig]:
        """Layer type -> its masks and kernel; one type in most models, else ``full_attention`` first.

        Raises:
            ConfigError: a layer type of the model has no masks, or the model does not have a type that is set.
        """
        return self.attention.of_types(types_of_config(models.resolve(self.model)))

    @property
    def layer_masks(self) -> dict[str, list[str]]:
        """Layer type -> its masks."""
        return {name: section.masks for name, section in self.layer_attention.items()}

    @property
    def validation_layer_masks(self) -> dict[str, list[str]]:
        """Layer type -> its masks under ``validation.masks``, which replace ``attention.masks``; empty without them."""
        full, masks = next(iter(self.layer_masks)), self.validation.masks
        return {**self.layer_masks, full: masks} if masks else {}

    def batch_schedule(self, global_batch_size: int) -> BatchSchedule:
        """Returns the rows of every step: those of ``[batch_size_warmup]``, and of ``[[phases]]`` over them.

        Args:
            global_batch_size: rows of one optimizer step over all ranks where neither sets another number.

        Raises:
            ConfigError: the warmup has no room below ``global_batch_size``, or the steps of the run are unknown and a
                phase depends on them.
        """
        for phase in self.phases if self.training.steps == -1 else ():
            require(
                phase.global_batch_size is None or phase.from_fraction is None,
                f"phases: the phase at {phase.start} sets global_batch_size, on which the steps of training.epochs "
                "depend: set from_step or from_tokens, or training.steps.",
            )
        batch = self.batch_size_warmup.schedule(global_batch_size, self.training.seq_len)
        return change_batch(batch, self.phases, self.training.steps)

    def schedule(self, global_batch_size: int) -> Schedule:
        """Returns the schedule of the run; ``training.steps`` must be resolved.

        Args:
            global_batch_size: as in ``batch_schedule``.

        Raises:
            ConfigError: a setting of the curriculum or of the batch is invalid, or the phases do not fit the run.
        """
        batch = self.batch_schedule(global_batch_size)
        steps, seq_len = self.training.steps, self.training.seq_len
        windows = curriculum.registry.build(self.curriculum, steps=steps, seq_len=seq_len)
        others = {name: x for name, x in self.layer_attention.items() if isinstance(x, LayerAttentionConfig)}

        def lr_factor(step: int) -> float:
            return self.lr_scheduler.factor(step, steps) * self.lr_scheduler.batch_factor(
                batch(step) / global_batch_size
            )

        schedule = Schedule(
            windows,
            lr_factor,
            self.phases,
            steps,
            batch,
            {name: x.build_curriculum(f"attention.{name}", steps, seq_len) for name, x in others.items()},
        )
        for window in (phase.windows.get(FULL_ATTENTION, 1) for phase in self.phases):
            require(window <= seq_len, f"phases: window = {window}: a row has {seq_len} tokens (training.seq_len).")
        return schedule

    def to_toml(self) -> str:
        """Returns the settings as a TOML file that reproduces the run."""
        settings = _without_none(dataclasses.asdict(self))
        settings["job"].update(config_file="", extends="")
        settings["attention"] = _without_none(self.attention.settings())
        if not self.phases:
            del settings["phases"]
        return tomli_w.dumps(settings)


def _without_none(value: Any) -> Any:
    """TOML has no null: unset values are left out."""
    if isinstance(value, dict):
        return {key: _without_none(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list | tuple):
        return [_without_none(inner) for inner in value]
    return value

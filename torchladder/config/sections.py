"""The sections of a run that belong to no single room, and the whole of them."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import tomli_w

from torchladder import curriculum, mask, optim
from torchladder.checkpoint import CheckpointConfig
from torchladder.config.values import tables
from torchladder.distributed.activation_checkpoint import ActivationCheckpointConfig
from torchladder.distributed.float8 import Float8Config
from torchladder.distributed.mesh import ParallelismConfig
from torchladder.distributed.parallelize import CompileConfig
from torchladder.distributed.ranks import CommConfig
from torchladder.metrics import MetricsConfig
from torchladder.models import attention
from torchladder.profiling import ProfilingConfig
from torchladder.registry import ConfigError
from torchladder.resilience.bad_steps import ResilienceConfig
from torchladder.schedule import Phase, Schedule


@dataclass(frozen=True)
class JobConfig:
    """The run as a whole."""

    config_file: str = ""
    """A TOML file with the run's settings; the command line wins over it."""

    extends: str = ""
    """In a file: another TOML file, relative to this one, whose settings this one starts from."""

    plugins: list[str] = field(default_factory=list)
    """Python modules to import first; they register parts. Found on the path, here or beside the config file."""

    dump_folder: str = "./outputs"
    """Where the run leaves everything that it writes."""

    description: str = ""
    """A line that says what the run is for."""

    print_config: bool = False
    """Print the resolved settings at the start."""

    max_minutes: float = 0.0
    """Minutes after which the run saves and ends with exit code 75, to be started again; 0: no limit."""

    exit_interval: int = 0
    """Steps after which the run saves and ends with exit code 75, at every multiple of it; 0: never."""

    def __post_init__(self) -> None:
        _require(0 <= self.max_minutes < math.inf, f"job.max_minutes = {self.max_minutes}: must be 0 or more.")
        _require(self.exit_interval >= 0, f"job.exit_interval = {self.exit_interval}: must be 0 or more.")


@dataclass(frozen=True)
class AttentionConfig:
    """Who sees whom, and which kernel computes it."""

    masks: list[str] = field(default_factory=lambda: ["causal"])
    """Masks that all have to allow a pair: causal, document, chunk, sliding, or a plugin's."""

    kernel: str = "auto"
    """What computes attention: flex, fold, varlen, flash, sdpa, dense; auto chooses by device and masks."""

    def __post_init__(self) -> None:
        _require(len(self.masks) > 0, "attention.masks is empty: name one at least, causal for no mask but the order.")
        for name in self.masks:
            mask.registry.get(name)
        if self.kernel != "auto":
            attention.registry.get(self.kernel)


@dataclass(frozen=True)
class TrainingConfig:
    """Steps, batches, precision."""

    steps: int = -1
    """Optimizer steps of the whole run; -1: as many as epochs ask for, or 10,000."""

    epochs: float | None = None
    """Instead of steps: how many times the tokens of all sources together are read."""

    seq_len: int = 2048
    """Tokens in a row: the full context."""

    local_batch_size: int = 8
    """Rows that a rank puts through the model at once."""

    global_batch_size: int = -1
    """Rows of one optimizer step over all ranks; -1: local_batch_size times the data-parallel ranks."""

    max_norm: float = 1.0
    """Gradients are scaled down to this global norm at most."""

    mixed_precision_param: Literal["bfloat16", "float32"] = "bfloat16"
    """Type of the model's computation; weights and optimizer state stay float32."""

    mixed_precision_reduce: Literal["bfloat16", "float32"] = "float32"
    """Type in which gradients are added up over ranks."""

    enable_cpu_offload: bool = False
    """Keep weights, gradients and optimizer state in the host's memory, and the optimizer's work there; with FSDP2."""

    gc_freq: int = 50
    """Steps between Python garbage collections, which are off otherwise: ranks then never wait for one."""

    def __post_init__(self) -> None:
        for key in ("seq_len", "local_batch_size", "gc_freq"):
            _require(getattr(self, key) >= 1, f"training.{key} = {getattr(self, key)}: must be 1 or more.")
        _require(self.steps == -1 or self.steps >= 1, f"training.steps = {self.steps}: must be 1 or more, or -1.")
        _require(
            self.epochs is None or 0 < self.epochs < math.inf, f"training.epochs = {self.epochs}: must be above 0."
        )
        _require(
            self.epochs is None or self.steps == -1,
            f"training.epochs = {self.epochs} and training.steps = {self.steps} both say how long the run is: set one "
            "(steps = -1 takes back what another file sets).",
        )
        _require(self.max_norm > 0, f"training.max_norm = {self.max_norm}: must be positive.")
        _require(
            self.global_batch_size == -1 or self.global_batch_size >= 1,
            f"training.global_batch_size = {self.global_batch_size}: must be 1 or more, or -1.",
        )


@dataclass(frozen=True)
class ValidationConfig:
    """Loss on held-out documents while training."""

    enable: bool = True
    """Validate at the start, every freq steps and at the end."""

    freq: int = 500
    """Steps between validations."""

    steps: int = 20
    """Micro-batches per rank of one validation; -1: all held-out rows."""

    windows: list[int] = field(default_factory=list)
    """Further windows to validate at, beside the full context."""

    def __post_init__(self) -> None:
        _require(self.freq >= 1, f"validation.freq = {self.freq}: must be 1 or more.")
        _require(self.steps >= 1 or self.steps == -1, f"validation.steps = {self.steps}: must be 1 or more, or -1.")
        _require(all(w >= 1 for w in self.windows), f"validation.windows = {self.windows}: must be 1 or more.")


@dataclass(frozen=True)
class SamplesConfig:
    """Text samples while training."""

    prompts: list[str] = field(default_factory=list)
    """Texts to continue; none: no samples."""

    freq: int = 0
    """Steps between samples; 0: at the end of the run only."""

    max_new_tokens: int = 128
    """Tokens to continue each prompt by."""

    temperature: float = 0.8
    """Divides the logits; 0 takes the likeliest token each time."""

    top_p: float = 0.95
    """Draw from the likeliest tokens that hold this much probability together."""

    def __post_init__(self) -> None:
        if self.freq < 0 or self.max_new_tokens < 1:
            raise ConfigError(
                f"samples.freq = {self.freq} and samples.max_new_tokens = {self.max_new_tokens}: "
                "must be 0 or more, and 1 or more."
            )
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ConfigError(
                f"samples.temperature = {self.temperature} and samples.top_p = {self.top_p}: "
                "must be 0 or more, and above 0 up to 1."
            )

    def due(self, step: int, last: bool) -> bool:
        """Whether samples are to be drawn after that many steps."""
        return bool(self.prompts) and (last or (self.freq > 0 and step % self.freq == 0))


@dataclass(frozen=True)
class DebugConfig:
    """Reproducibility."""

    seed: int = 0
    """Seed of the initial weights and of sampling; the order of data has its own, data.seed."""

    deterministic: bool = False
    """Use deterministic algorithms only: slower, and the same bits each time on the same machine."""

    deterministic_warn_only: bool = False
    """Warn of what has no deterministic algorithm, and go on."""


@dataclass(frozen=True)
class Config:
    """All settings of a run."""

    job: JobConfig
    model: Any
    tokenizer: Any
    data: Any
    attention: AttentionConfig
    curriculum: Any
    training: TrainingConfig
    optimizer: Any
    lr_scheduler: optim.LRSchedulerConfig
    parallelism: ParallelismConfig
    activation_checkpoint: ActivationCheckpointConfig
    compile: CompileConfig
    float8: Float8Config
    checkpoint: CheckpointConfig
    resilience: ResilienceConfig
    validation: ValidationConfig
    samples: SamplesConfig
    metrics: MetricsConfig
    profiling: ProfilingConfig
    comm: CommConfig
    debug: DebugConfig
    phases: Annotated[list[Phase], tables(list[Phase])] = field(default_factory=list)
    """Overrides of window, learning rate, RoPE theta and source weights from a step on; a table each, [[phases]]."""

    def schedule(self, tokens_per_step: int) -> Schedule:
        """Returns what changes during the run, as a function of the step; ``training.steps`` must be known.

        Args:
            tokens_per_step: tokens of one optimizer step over all ranks.

        Raises:
            ConfigError: the curriculum refuses its settings, or the phases do not fit the run.
        """
        steps, seq_len = self.training.steps, self.training.seq_len
        ladder = curriculum.registry.build(self.curriculum, steps=steps, seq_len=seq_len)
        schedule = Schedule(
            ladder, lambda step: self.lr_scheduler.factor(step, steps), self.phases, steps, tokens_per_step
        )
        for window in schedule.overrides("window").values():
            _require(window <= seq_len, f"phases: window = {window}: a row has {seq_len} tokens (training.seq_len).")
        return schedule

    def to_toml(self) -> str:
        """Returns the settings as a TOML file that gives the same run."""
        settings = _without_none(dataclasses.asdict(self))
        settings["job"].update(config_file="", extends="")
        if not self.phases:
            del settings["phases"]
        return tomli_w.dumps(settings)


def _without_none(value: Any) -> Any:
    """TOML has no null: what is unset is left out."""
    if isinstance(value, dict):
        return {key: _without_none(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list | tuple):
        return [_without_none(inner) for inner in value]
    return value


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)

"""The section ``[metrics]``, and the registry of outputs that its entries name."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Annotated, Any, Protocol

from annotated_types import Ge, Gt, Lt

from torchladder.metrics.metric_table import Report
from torchladder.registry import Registry, check_bounds, require


class Output(Protocol):
    """A destination of reports; ``name`` is what a warning calls it. Only rank 0 has outputs."""

    name: str

    def write(self, report: Report) -> None:
        """Shows a report."""
        ...

    def close(self) -> None:
        """Ends the output; called once, also if the run fails."""
        ...


registry: Registry[Output] = Registry(
    "metrics output",
    runtime_args={
        "run": "constants of the run, a RunInfo",
        "config": "the section [metrics], with the run's name, group and tags",
        "step": "optimizer steps already taken; reports of an earlier process after it are void",
    },
)
register_output = registry.register


@dataclass(frozen=True, kw_only=True)
class OutputConfig:
    """One entry of ``metrics.outputs``; an instance of a subclass that also has the parameters of the output."""

    name: str
    """The registered output."""

    @staticmethod
    def subclass_for(settings: Mapping[str, Any]) -> type[OutputConfig]:
        """Returns the subclass for an entry with these keys; raises ``ConfigError`` if no output has its name."""
        known = ", ".join(registry.names())
        require("name" in settings, f"an output needs a name. Known: {known}.")
        return _subclass(str(settings["name"]), registry.get(str(settings["name"])))

    @staticmethod
    def subclasses() -> dict[str, type[OutputConfig]]:
        """Returns the subclasses of all registered outputs by name."""
        return {name: _subclass(name, registry.get(name)) for name in registry.names()}


@cache
def _subclass(name: str, component: Any) -> type[OutputConfig]:
    settings = registry.config_fields(name)
    taken = any(key == "name" for key, _, _ in settings)
    require(not taken, f"metrics output {name!r}: the parameter name 'name' is reserved. Rename it.")
    return dataclasses.make_dataclass("OutputConfig", settings, bases=(OutputConfig,), frozen=True, kw_only=True)


@dataclass(frozen=True, kw_only=True)
class MetricsConfig:
    """The section ``[metrics]``."""

    log_freq: Annotated[int, Ge(1)] = 10
    """Steps between reports; the first and the last step always report."""

    enable_tensorboard: bool = True
    """Write TensorBoard events."""

    save_tb_folder: str = "tb"
    """Folder of the TensorBoard events, inside job.dump_folder."""

    enable_wandb: bool = False
    """Log to Weights & Biases, configured by the keys below and its own variables (WANDB_RUN_ID, WANDB_RESUME, ...)."""

    project: str = ""
    """Project of the run in W&B (default: WANDB_PROJECT, or torchladder)."""

    run_name: str = ""
    """Name of the run in W&B (default: WANDB_NAME, or a random one)."""

    group: str = ""
    """Group of the run in W&B, such as an ablation (default: WANDB_RUN_GROUP, or none)."""

    tags: list[str] = field(default_factory=list)
    """Tags of the run in W&B (default: WANDB_TAGS, or none)."""

    outputs: list[OutputConfig] = field(default_factory=list)
    """Further outputs: tables with the name of a registered output and its settings."""

    disable_color_printing: bool = False
    """Print the console lines without colors."""

    disable_progress_bar: bool = False
    """Print the time left in each line instead of a progress bar; only a terminal ever shows a bar."""

    peak_flops: Annotated[float | None, Gt(0), Lt(math.inf)] = None
    """Peak FLOP/s of one device, for MFU, such as 989e12; default: looked up by the device's name."""

    energy_country: str = ""
    """Reports energy and CO2 of the run, on the electricity of this country: three letters of ISO 3166, such as BRA or
    DEU (needs codecarbon); default: neither."""

    def __post_init__(self) -> None:
        check_bounds(self, "metrics")

    def chosen_outputs(self) -> list[OutputConfig]:
        """Returns the outputs besides console and metrics.jsonl; an entry replaces the output that a flag enables."""
        named = {output.name for output in self.outputs}
        flags = {"wandb": self.enable_wandb, "tensorboard": self.enable_tensorboard}
        enabled = [OutputConfig(name=name) for name, on in flags.items() if on and name not in named]
        return [*self.outputs, *enabled]

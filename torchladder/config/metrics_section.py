"""The section ``[metrics]`` with its outputs as tables on the command line."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from torchladder.config.values import tables_argument
from torchladder.metrics import MetricsConfig, OutputConfig


@dataclass(frozen=True, kw_only=True)
class MetricsSection(MetricsConfig):
    """The section ``[metrics]``."""

    outputs: Annotated[list[OutputConfig], tables_argument(list[OutputConfig])] = field(default_factory=list)
    """Further outputs, such as a plugin's: tables with the name of a registered output and its settings."""

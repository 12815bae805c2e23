"""The settings of a run: defaults in the dataclasses, then a TOML file, then the command line."""

from torchladder.config.load import fail, load
from torchladder.config.parts import PARTS, config_type
from torchladder.config.sections import (
    AttentionConfig,
    Config,
    DebugConfig,
    ExperimentalConfig,
    JobConfig,
    TrainingConfig,
    ValidationConfig,
)
from torchladder.config.values import fields

__all__ = [
    "PARTS",
    "AttentionConfig",
    "Config",
    "DebugConfig",
    "ExperimentalConfig",
    "JobConfig",
    "TrainingConfig",
    "ValidationConfig",
    "config_type",
    "fail",
    "fields",
    "load",
]

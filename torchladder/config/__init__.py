"""The settings of a run. Precedence: command line, TOML file, defaults of the dataclasses."""

from torchladder.config.component_sections import COMPONENTS, config_type
from torchladder.config.load import fail, load, load_file
from torchladder.config.sections import (
    AttentionConfig,
    Config,
    DebugConfig,
    JobConfig,
    SamplesConfig,
    TrainingConfig,
    ValidationConfig,
)
from torchladder.config.values import fields

__all__ = [
    "COMPONENTS",
    "AttentionConfig",
    "Config",
    "DebugConfig",
    "JobConfig",
    "SamplesConfig",
    "TrainingConfig",
    "ValidationConfig",
    "config_type",
    "fail",
    "fields",
    "load",
    "load_file",
]

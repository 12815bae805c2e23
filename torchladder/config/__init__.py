"""The settings of a run. Precedence: command line, TOML file, defaults of the dataclasses."""

from torchladder.config.command_line import option_names
from torchladder.config.component_sections import COMPONENTS, config_type
from torchladder.config.load import as_config_error, load, load_file, load_text, print_config_error
from torchladder.config.sections import Config, SamplesConfig, TrainingConfig
from torchladder.config.values import fields

__all__ = ["COMPONENTS", "Config", "SamplesConfig", "TrainingConfig"]
__all__ += [
    "as_config_error",
    "config_type",
    "fields",
    "load",
    "load_file",
    "load_text",
    "option_names",
    "print_config_error",
]

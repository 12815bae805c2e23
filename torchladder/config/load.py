"""From a command line to the settings of a run.

Some sections stand for a part chosen by ``name``; their keys are that part's own parameters, so they exist only once
the part is known: the names are read first, then plugins are imported, and then the sections are made.
"""

from __future__ import annotations

import json
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pydantic
import tyro

from torchladder.config import hf_defaults, toml_files
from torchladder.config.component_sections import config_type
from torchladder.config.sections import Config
from torchladder.config.values import adapter, fields, flag, flags, problem
from torchladder.registry import ConfigError, unknown_name


def load(argv: list[str]) -> Config:
    """Reads the settings of a run from a command line and the file that it names.

    Exits with code 2, as command lines do, where the command line itself is wrong, and with 0 after ``--help``.

    Raises:
        ConfigError: a file, section, key, value or plugin is not what it should be; the message says which.
    """
    file = flag(argv, "job.config_file")
    settings, origins = toml_files.read(Path(file)) if file else ({}, {})
    _import_plugins(settings, argv, Path(file).parent if file else Path())
    hf_defaults.apply_hf_defaults(settings, origins, argv)

    sections: dict[str, Any] = {}
    kind = config_type(settings, argv)
    for name in settings:
        if name not in fields(kind):
            raise unknown_name(f"section in {toml_files.origin(origins, name)}", name, fields(kind))
    for name, section in fields(kind).items():
        sections[name] = _section(section.kind, name, settings.get(name, {}), origins)
    config = tyro.cli(
        kind,
        default=kind(**sections),
        args=argv,
        prog="torchladder.train",
        description="Trains a language model on a context-length curriculum. The file that --job.config_file names "
        "comes first, the command line wins over it.",
        use_underscores=True,
    )
    hf_defaults.check_hf_settings(config)
    return config


def fail(error: ConfigError) -> int:
    """Prints an error of the user's settings as one message and returns the exit code for it, 2."""
    print(f"torchladder: {error}", file=sys.stderr)
    return 2


def _section(kind: type, name: str, settings: dict[str, Any], origins: toml_files.Origins) -> Any:
    """Makes one section from the file's settings, checking every key and type."""
    hints = fields(kind)
    values: dict[str, Any] = {}
    for key, value in settings.items():
        where = f"{toml_files.origin(origins, name, key)}: {name}.{key}"
        if key not in hints:
            raise unknown_name(f"key in [{name}] of {toml_files.origin(origins, name, key)}", key, hints)
        try:
            # JSON has TOML's types, and in it a list may stand for a tuple while "3" does not stand for 3.
            values[key] = adapter(hints[key].kind).validate_json(json.dumps(value), strict=True)
        except pydantic.ValidationError as error:
            raise ConfigError(f"{where} = {value!r}: {problem(error)}") from None
        except TypeError:
            raise ConfigError(f"{where} = {value!r}: dates and times have no meaning here.") from None
    for key, hint in hints.items():
        if key not in values and hint.required:
            values[key] = tyro.MISSING  # the command line may still give it
    try:
        return kind(**values)
    except ConfigError as error:
        named = {str(toml_files.origin(origins, name, key)) for key in settings}
        raise ConfigError(f"{', '.join(sorted(named)) or 'defaults'}: {error}") from None


def _import_plugins(settings: toml_files.RawSettings, argv: list[str], beside: Path) -> None:
    """Imports the modules that register further parts, from the path, the working folder or beside the file."""
    names = flags(argv, "job.plugins") or settings.get("job", {}).get("plugins", [])
    custom = flag(argv, "experimental.custom_import") or settings.get("experimental", {}).get("custom_import")
    for folder in (str(beside.resolve()), str(Path.cwd())):
        if folder not in sys.path:
            sys.path.append(folder)
    for name in [*names, *([custom] if custom else [])]:
        try:
            import_module(name)
        except ModuleNotFoundError as error:
            if error.name != name.split(".")[0] and error.name != name:
                raise ConfigError(f"plugin {name!r} imports {error.name!r}, which is not installed.") from error
            raise ConfigError(f"plugin {name!r} is not on the path, not here and not in {beside.resolve()}.") from None

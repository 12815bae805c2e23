"""From a command line, or a file and some overrides, to the settings of a run.

Some sections stand for a component chosen by ``name``; their keys are that component's own parameters, so they exist
only once the component is known: names are read first, then plugins are imported, and then the sections are made.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import pydantic
import tyro

from torchladder.config import hf_defaults, renamed_keys, toml_files
from torchladder.config.component_sections import config_type
from torchladder.config.sections import Config
from torchladder.config.values import adapter, fields, flag, flags, problem
from torchladder.registry import ConfigError, unknown_name


def load(argv: list[str]) -> Config:
    """Reads the settings of a run from a command line and the file that it names.

    Exits with code 2, as command lines do, if the command line itself is wrong, and with 0 after ``--help``.

    Raises:
        ConfigError: a file, section, key, value or plugin is not what it should be; the message says which.
    """
    renamed_keys.check((word[2:].partition("=")[0] for word in argv if word.startswith("--")), "the command line")
    file = flag(argv, "job.config_file")
    defaults = _defaults(Path(file) if file else None, {}, argv)
    config = tyro.cli(
        type(defaults),
        default=defaults,
        args=argv,
        prog="torchladder.train",
        description="Trains a language model on a context-length curriculum. The command line overrides the file that "
        "--job.config_file names.",
        use_underscores=True,
    )
    hf_defaults.check_hf_settings(config)
    return config


def load_file(path: Path | None, overrides: Mapping[str, Any] | None = None) -> Config:
    """Reads the settings of a run from a file.

    Args:
        path: a TOML file; None for the defaults.
        overrides: ``section.key`` -> value, over those of the file.

    Raises:
        ConfigError: as ``load``, or a required key is missing.
    """
    config = _defaults(path, overrides or {}, [])
    for name in fields(type(config)):
        for key, value in vars(getattr(config, name)).items() if name not in toml_files.TABLES else ():
            if value is tyro.MISSING:
                raise ConfigError(f"{path or 'the settings'}: {name}.{key} is required.")
    hf_defaults.check_hf_settings(config)
    return config


def fail(error: ConfigError) -> int:
    """Prints an error of the user's settings as one message and returns the exit code for it, 2."""
    print(f"torchladder: {error}", file=sys.stderr)
    return 2


def _defaults(file: Path | None, overrides: Mapping[str, Any], argv: list[str]) -> Config:
    """Returns the settings below the command line; required keys that only it may give are ``tyro.MISSING``."""
    settings, origins = toml_files.read(file) if file else ({}, {})
    for name, value in overrides.items():
        section, _, key = name.partition(".")
        settings.setdefault(section, {})[key] = value
    for name, section in settings.items():
        keys = {key for table in section for key in table} if isinstance(section, list) else section
        renamed_keys.check((f"{name}.{key}" for key in keys), str(toml_files.origin(origins, name)))
    _import_plugins(settings, argv, file.parent if file else Path())
    hf_defaults.apply_hf_defaults(settings, origins, argv)
    kind = config_type(settings, argv)
    for name in settings:
        if name not in fields(kind):
            raise unknown_name(f"section in {toml_files.origin(origins, name)}", name, fields(kind))
    sections: dict[str, Any] = {}
    for name, field in fields(kind).items():
        if name in toml_files.TABLES:
            sections[name] = _value(field.kind, settings.get(name, []), f"{toml_files.origin(origins, name)}: {name}")
        else:
            sections[name] = _section(field.kind, name, settings.get(name, {}), origins)
    return kind(**sections)


def _section(kind: type, name: str, settings: dict[str, Any], origins: toml_files.Origins) -> Any:
    """Makes one section from the file's settings, checking every key and type."""
    hints = fields(kind)
    values: dict[str, Any] = {}
    for key, value in settings.items():
        if key not in hints:
            raise unknown_name(f"key in [{name}] of {toml_files.origin(origins, name, key)}", key, hints)
        values[key] = _value(hints[key].kind, value, f"{toml_files.origin(origins, name, key)}: {name}.{key}")
    for key, hint in hints.items():
        if key not in values and hint.required:
            values[key] = tyro.MISSING  # the command line may still set it
    try:
        return kind(**values)
    except ConfigError as error:
        named = {str(toml_files.origin(origins, name, key)) for key in settings}
        raise ConfigError(f"{', '.join(sorted(named)) or 'defaults'}: {error}") from None


def _value(kind: Any, value: Any, where: str) -> Any:
    """Returns a value of a file as its type, which it must have already: "3" is not 3."""
    try:
        # JSON has TOML's types, and in it a list may stand for a tuple.
        return adapter(kind).validate_json(json.dumps(value), strict=True)
    except pydantic.ValidationError as error:
        raise ConfigError(f"{where} = {value!r}: {problem(error)}") from None
    except TypeError:
        raise ConfigError(f"{where} = {value!r}: dates and times are not allowed here.") from None


def _import_plugins(settings: toml_files.RawSettings, argv: list[str], beside: Path) -> None:
    """Imports the modules that register components, from the path, the working folder or beside the file."""
    names = flags(argv, "job.plugins") or settings.get("job", {}).get("plugins", [])
    for folder in (str(beside.resolve()), str(Path.cwd())):
        if folder not in sys.path:
            sys.path.append(folder)
    for name in names:
        try:
            import_module(name)
        except ModuleNotFoundError as error:
            if error.name != name.split(".")[0] and error.name != name:
                raise ConfigError(f"plugin {name!r} imports {error.name!r}, which is not installed.") from error
            raise ConfigError(
                f"plugin {name!r} is not on the Python path, in the working folder or in {beside.resolve()}."
            ) from None

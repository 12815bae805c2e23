"""Loads the settings of a run from the command line and a TOML file.

The keys of a component section depend on the component, which a plugin may register. So the names of components are
read first, then plugins are imported, then the sections are made and everything is checked.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import tyro

from torchladder.config import command_line, hf_defaults, toml_files
from torchladder.config.component_sections import config_type
from torchladder.config.sections import Config
from torchladder.config.values import check_type, cli_value, cli_values, fields
from torchladder.disk_errors import describe_disk_error, find_disk_error
from torchladder.registry import ConfigError, unknown_name


def load(argv: list[str], prog: str = "torchladder train") -> Config:
    """Loads the settings of a run from a command line and the file that it names; exits with 0 after ``--help``.

    ``prog`` is what the help calls the program.

    Raises:
        ConfigError: an option, file, section, key, value or plugin is invalid.
    """
    command_line.check_words(argv)
    file = cli_value(argv, "job.config_file")
    settings, origins = toml_files.read_settings(Path(file)) if file else ({}, {})
    defaults = _make_defaults(settings, origins, Path(file).parent if file else Path(), argv)
    config = command_line.parse(argv, defaults, prog)
    hf_defaults.check_hf_settings(config)
    return config


def load_file(path: Path | None, overrides: Mapping[str, Any] | None = None) -> Config:
    """Loads the settings of a run from a file.

    Args:
        path: a TOML file; None for the defaults.
        overrides: ``section.key`` -> value, over those of the file.

    Raises:
        ConfigError: as ``load``, or a required key is missing.
    """
    settings, origins = toml_files.read_settings(path) if path else ({}, {})
    return _load_settings(settings, origins, path.parent if path else Path(), overrides or {})


def load_text(text: str, path: str, overrides: Mapping[str, Any] | None = None) -> Config:
    """Loads the settings of a run from the text of its ``config.toml``.

    Args:
        text: of a file that extends no other.
        path: of the file, for error messages.
        overrides: as in ``load_file``.

    Raises:
        ConfigError: as ``load_file``.
    """
    settings = toml_files.parse_settings(text, path)
    origins: toml_files.Origins = {
        (name, key): path
        for name, section in settings.items()
        for key in (section if isinstance(section, dict) else [""])
    }
    return _load_settings(settings, origins, Path(), overrides or {})


def print_config_error(error: ConfigError | OSError) -> int:
    """Prints the message of an error and returns its exit code, 2; raises an OSError that is not about a file."""
    print(f"torchladder: {as_config_error(error)}", file=sys.stderr)
    return 2


def as_config_error(error: ConfigError | OSError) -> ConfigError:
    """Returns an error with a message for the user; raises an OSError that is not about a file."""
    if not isinstance(error, OSError):
        return error
    if find_disk_error(error) is not None:
        return ConfigError(describe_disk_error(error))
    if error.filename is not None:
        return ConfigError(f"{error.filename}: {error.strerror}")
    raise error


def _load_settings(
    settings: toml_files.RawSettings, origins: toml_files.Origins, folder: Path, overrides: Mapping[str, Any]
) -> Config:
    """Returns the settings of a file in ``folder`` without a command line."""
    path = next(iter(origins.values()), "the settings")
    for name, value in overrides.items():
        section, _, key = name.partition(".")
        settings.setdefault(section, {})[key] = value
    config = _make_defaults(settings, origins, folder, [])
    for name, section in vars(config).items():
        for key, value in vars(section).items() if name not in toml_files.TABLES else ():
            if value is tyro.MISSING:
                raise ConfigError(f"{path}: {name}.{key} is required.")
    hf_defaults.check_hf_settings(config)
    return config


def _make_defaults(
    settings: toml_files.RawSettings, origins: toml_files.Origins, folder: Path, argv: list[str]
) -> Config:
    """Returns the settings that the command line overrides; a missing required key is ``tyro.MISSING``."""
    for name, section in settings.items():
        keys = {key for table in section for key in table} if isinstance(section, list) else section
        command_line.refuse_foreign_names((f"{name}.{key}" for key in keys), str(toml_files.origin(origins, name)))
    _import_plugins(settings, argv, folder)
    hf_defaults.apply_hf_defaults(settings, origins, argv)
    kind = config_type(settings, argv)
    for name in settings:
        if name not in fields(kind):
            raise unknown_name("section", name, fields(kind), str(toml_files.origin(origins, name)))
    sections: dict[str, Any] = {}
    for name, field in fields(kind).items():
        if name in toml_files.TABLES:
            place = f"{toml_files.origin(origins, name)}: {name}"
            sections[name] = check_type(field.type, settings.get(name, []), place)
        else:
            sections[name] = _make_section(field.type, name, settings.get(name, {}), origins)
    return kind(**sections)


def _make_section(kind: type, name: str, settings: dict[str, Any], origins: toml_files.Origins) -> Any:
    known = fields(kind)
    values = {key: tyro.MISSING for key, field in known.items() if field.required}  # the command line may set them
    for key, value in settings.items():
        file = toml_files.origin(origins, name, key)
        if key not in known:
            raise unknown_name("key", key, known, f"[{name}] of {file}")
        values[key] = check_type(known[key].type, value, f"{file}: {name}.{key}")
    try:
        return kind(**values)
    except ConfigError as error:
        files = {str(toml_files.origin(origins, name, key)) for key in settings}
        raise ConfigError(f"{', '.join(sorted(files)) or 'defaults'}: {error}") from None


def _import_plugins(settings: toml_files.RawSettings, argv: list[str], config_folder: Path) -> None:
    """Imports the plugins from the Python path, the config file's folder or the working folder."""
    for folder in (str(config_folder.resolve()), str(Path.cwd())):
        if folder not in sys.path:
            sys.path.append(folder)
    for name in cli_values(argv, "job.plugins") or settings.get("job", {}).get("plugins", []):
        try:
            import_module(name)
        except ModuleNotFoundError as error:
            if error.name not in (name, name.split(".")[0]):
                raise ConfigError(f"plugin {name!r} imports {error.name!r}, which is not installed.") from error
            raise ConfigError(
                f"plugin {name!r} is not on the Python path, in the working folder or in {config_folder.resolve()}."
            ) from None

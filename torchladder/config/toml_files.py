"""Config files, which may extend one another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tomli

from torchladder.registry import ConfigError, unknown_name

RawSettings = dict[str, Any]
"""section -> key -> value, and the list of ``[[phases]]``"""

TABLES = {"phases"}
"""Arrays of tables, ``[[phases]]``; everything else in a file is a section."""

NESTED = {"attention"}
"""Sections with tables of settings inside, ``[attention.sliding_attention]``."""

Origins = dict[tuple[str, str], Path | str]
"""(section, key) -> the file that sets it, for error messages"""


def read_settings(path: Path, seen: tuple[Path, ...] = ()) -> tuple[RawSettings, Origins]:
    """Reads a file and those that it extends.

    Returns:
        The merged settings, and the file that each key comes from.

    Raises:
        ConfigError: a file is missing, not TOML, or extends itself.
    """
    path = path.resolve() if seen else path
    if path.resolve() in seen:
        raise ConfigError(f"{path}: job.extends: the file extends itself.")
    try:
        own = parse_settings(path.read_text(encoding="utf-8-sig"), path)
    except FileNotFoundError:
        raise unknown_name("config file", str(path), map(str, path.parent.glob("*.toml"))) from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: byte {error.start} is not UTF-8: save the file as UTF-8.") from None
    except OSError as error:
        raise ConfigError(f"{path}: {error}") from None
    base = own.get("job", {}).pop("extends", "")
    if not isinstance(base, str):
        raise ConfigError(f"{path}: job.extends = {base!r}: must be a file name.")
    settings, origins = read_settings(path.parent / base, (*seen, path.resolve())) if base else ({}, {})
    for name, section in own.items():
        if isinstance(section, list):
            settings[name], origins[name, ""] = section, path
            continue
        settings[name] = _merge(settings.get(name, {}), section, nested=name in NESTED)
        origins.update({(name, key): path for key in section})
    return settings, origins


def parse_settings(text: str, path: Path | str) -> RawSettings:
    """Returns the settings in the text of a file; raises ConfigError if it is not TOML, or not in sections."""
    try:
        own = tomli.loads(text)
    except tomli.TOMLDecodeError as error:
        raise ConfigError(f"{path}: {error}") from None
    for name, section in own.items():
        if name in TABLES:
            if not isinstance(section, list):
                raise ConfigError(f"{path}: {name} is a list of tables; write [[{name}]] above each entry.")
        elif not isinstance(section, dict):
            raise ConfigError(f"{path}: {name!r} is outside of a section; write [section] above it.")
    return own


def _merge(base: RawSettings, own: RawSettings, nested: bool) -> RawSettings:
    """Returns a table over that of the file that it extends; keys of another component are dropped.

    ``nested``: tables inside of it are merged, too; otherwise they are values, which replace one another.
    """
    merged = {} if "name" in own and own["name"] != base.get("name") else dict(base)
    for key, value in own.items():
        inner = merged.get(key)
        if nested and isinstance(inner, dict) and isinstance(value, dict):
            merged[key] = _merge(inner, value, nested)
        else:
            merged[key] = value
    return merged


def origin(origins: Origins, section: str, key: str | None = None) -> Path | str:
    """Returns the file that sets a key or, without a key, the last one that sets any key of the section."""
    files = [file for (name, own), file in origins.items() if name == section and key in (None, own)]
    return files[-1] if files else "the defaults"

"""TOML files that extend files, and which of them sets what."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tomli

from torchladder.registry import ConfigError, unknown_name

RawSettings = dict[str, Any]
"""section -> key -> value, and the list of ``[[phases]]``"""

TABLES = ("phases",)
"""What a file holds as an array of tables, ``[[phases]]``, and not as a section."""

Origins = dict[tuple[str, str], Path]
"""(section, key) -> the file that sets it, for error messages"""


def read(path: Path, seen: tuple[Path, ...] = ()) -> tuple[RawSettings, Origins]:
    """Reads a file over the one that it extends."""
    path = path.resolve() if seen else path
    if path.resolve() in seen:
        raise ConfigError(f"{path}: job.extends comes back to the file itself.")
    try:
        own = tomli.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        beside = [str(other) for other in sorted(path.parent.glob("*.toml"))] if path.parent.is_dir() else []
        raise unknown_name("config file", str(path), beside) from None
    except (OSError, UnicodeDecodeError, tomli.TOMLDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from None
    for name, section in own.items():
        if name in TABLES:
            if not isinstance(section, list):
                raise ConfigError(f"{path}: {name} is a list of tables; write [[{name}]] above each entry.")
        elif not isinstance(section, dict):
            raise ConfigError(f"{path}: {name!r} stands outside of a section; write [section] above it.")

    base = own.get("job", {}).pop("extends", "")
    if not isinstance(base, str):
        raise ConfigError(f"{path}: job.extends = {base!r}: must be a file's name.")
    settings, origins = read(path.parent / base, (*seen, path.resolve())) if base else ({}, {})
    for name, section in own.items():
        if isinstance(section, list):
            settings[name] = section
            origins[name, ""] = path
            continue
        if "name" in section and section["name"] != settings.get(name, {}).get("name"):
            settings[name] = {}  # another part: the settings of the one it replaces mean nothing to it
        settings.setdefault(name, {}).update(section)
        origins.update({(name, key): path for key in section})
    return settings, origins


def origin(origins: Origins, section: str, key: str | None = None) -> Path | str:
    """Returns the file that sets a key, or anything in its section where no key is given."""
    files = [file for (name, own), file in origins.items() if name == section and key in (None, own)]
    return files[-1] if files else "the defaults"

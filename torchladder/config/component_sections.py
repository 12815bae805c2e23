"""Sections made from parts: a part's parameters, with their meanings, as a dataclass."""

from __future__ import annotations

import dataclasses
import inspect
from dataclasses import field
from typing import Annotated, Any, get_args, get_origin

import tyro

from torchladder import curriculum, data, models, optim
from torchladder.config.sections import Config
from torchladder.config.toml_files import RawSettings
from torchladder.config.values import fields, flag, tables
from torchladder.registry import Registry

COMPONENTS: dict[str, tuple[Registry[Any], str]] = {
    "model": (models.registry, "llama"),
    "tokenizer": (data.tokenizer.registry, "sentencepiece"),
    "data": (data.registry, "rows"),
    "curriculum": (curriculum.registry, "constant"),
    "optimizer": (optim.registry, "AdamW"),
}
"""The sections that a registry fills, each with its default part."""


def config_type(settings: RawSettings, argv: list[str]) -> type[Config]:
    """Returns Config with the sections of the parts that the file and the command line name."""
    parts = {}
    for section, (registry, default) in COMPONENTS.items():
        name = _chosen(section, default, settings, argv)
        parts[section] = _part_type(registry, section, name)
    types = [(name, parts.get(name, section.kind)) for name, section in fields(Config).items()]
    return dataclasses.make_dataclass("Config", types, bases=(Config,), frozen=True)


def _chosen(section: str, default: str, settings: RawSettings, argv: list[str]) -> str:
    """Returns the part that a section names; one from the command line drops the file's settings for another."""
    in_file = settings.get(section, {}).get("name", default)
    name = flag(argv, f"{section}.name") or in_file
    if name != in_file and settings.get(section):
        dropped = ", ".join(key for key in settings[section] if key != "name")
        print(f"torchladder: --{section}.name {name} replaces {in_file!r} of the file, with its settings ({dropped}).")
        settings[section] = {}
    return name


def _part_type(registry: Registry[Any], section: str, name: str) -> type:
    """Returns the section of one part: its name and its parameters."""
    part = registry.get(name)
    meanings = registry.docs(name)
    settings: list[Any] = [("name", _documented(str, f"{registry.kind}: {', '.join(registry.names())}."), name)]
    for key, parameter in registry.parameters(name).items():
        kind = _documented(parameter.annotation, meanings.get(key, ""))
        if parameter.default is inspect.Parameter.empty:
            settings.append((key, kind))
        else:
            settings.append((key, kind, _default(part, key, parameter.default)))
    made = dataclasses.make_dataclass(section.capitalize(), settings, frozen=True, kw_only=True)
    made.__doc__ = inspect.getdoc(part)
    return made


def _default(part: Any, key: str, default: Any) -> Any:
    """Returns a field that repeats the part's default, also where the part makes it anew each time."""
    if dataclasses.is_dataclass(part):
        factory = fields(part)[key].factory
        if factory is not None:
            return field(default_factory=factory)
    return field(default=default)


def _documented(kind: Any, meaning: str) -> Any:
    if get_origin(kind) is list and dataclasses.is_dataclass(get_args(kind)[0]):
        return Annotated[kind, tyro.conf.arg(help=meaning), tables(kind)]
    return Annotated[kind, tyro.conf.arg(help=meaning)]

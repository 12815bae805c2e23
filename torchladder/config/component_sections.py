"""Component sections: dataclasses made from the parameters of a component and their documentation."""

from __future__ import annotations

import dataclasses
import inspect
import sys
from typing import Annotated, Any, get_args, get_origin

import tyro

from torchladder import curriculum, data, models, optim
from torchladder.config.sections import Config
from torchladder.config.toml_files import RawSettings
from torchladder.config.values import cli_value, fields, table_help, tables_argument
from torchladder.registry import Registry

COMPONENTS: dict[str, tuple[Registry[Any], str]] = {
    "model": (models.registry, "llama"),
    "tokenizer": (data.tokenizer.registry, "sentencepiece"),
    "data": (data.registry, "rows"),
    "curriculum": (curriculum.registry, "constant"),
    "optimizer": (optim.registry, "AdamW"),
}
"""section -> registry, default component"""


def config_type(settings: RawSettings, argv: list[str]) -> type[Config]:
    """Returns Config with the sections of the components that the file and the command line name."""
    types = [
        (section, _section_type(registry, section, _chosen_name(section, default, settings, argv)))
        for section, (registry, default) in COMPONENTS.items()
    ]
    return dataclasses.make_dataclass("Config", types, bases=(Config,), frozen=True)


def _chosen_name(section: str, default: str, settings: RawSettings, argv: list[str]) -> str:
    """Returns the component of a section; naming another one on the command line drops the keys of the file."""
    in_file = settings.get(section, {}).get("name", default)
    name = cli_value(argv, f"{section}.name") or in_file
    if name != in_file and settings.get(section):
        dropped = ", ".join(key for key in settings[section] if key != "name")
        if dropped:
            notice = f"--{section}.name {name} replaces {in_file!r} of the config file; its keys are ignored"
            print(f"torchladder: {notice}: {dropped}.", file=sys.stderr)
        settings[section] = {}
    return name


def _section_type(registry: Registry[Any], section: str, name: str) -> type:
    name_help = tyro.conf.arg(help=f"{registry.kind}: {', '.join(registry.names())}.")
    section_fields: list[Any] = [("name", Annotated[str, name_help], name)]
    explained: dict[Any, str] = {}  # type of a table -> the key whose help explains the keys of such tables
    for key, kind, field in registry.config_fields(name):
        help, item = field.metadata["help"], get_args(kind)[0] if get_origin(kind) is list else None
        if dataclasses.is_dataclass(item):
            help += f" Keys as in {explained[item]}." if item in explained else f"\n{table_help(item)}"
            explained.setdefault(item, key)
            kind = Annotated[kind, tables_argument(kind)]
        section_fields.append((key, Annotated[kind, tyro.conf.arg(help=help)], field))
    bases = (fields(Config)[section].type,)
    section_type = dataclasses.make_dataclass(
        section.capitalize(), section_fields, bases=bases, frozen=True, kw_only=True
    )
    section_type.__doc__ = inspect.getdoc(registry.get(name))
    return section_type

"""Values of settings: type checks, tables on the command line, and flags read before the command line is parsed."""

from __future__ import annotations

import dataclasses
import json
from functools import partial
from types import SimpleNamespace
from typing import Annotated, Any, NamedTuple, get_args, get_origin, get_type_hints

import pydantic
import tomli
import tyro
from docstring_parser import parse_from_object

from torchladder.registry import ConfigError, Registry, require, unknown_name


def check_type(kind: Any, value: Any, place: str) -> Any:
    """Returns a value of a file as its type, without conversion: "3" is not 3. ``place`` begins the error message.

    A dataclass in a list of tables whose keys depend on the entry, as in ``data.sources``, has the methods
    ``subclass_for(table)``, the dataclass of an entry, and ``subclasses()``, all of them by name.

    Raises:
        ConfigError: another type, or an unknown or missing key of a table.
    """
    kind = get_args(kind)[0] if get_origin(kind) is Annotated else kind
    if value == "None" and type(None) in get_args(kind):
        return None  # TOML has no null; the command line has the same word
    if dataclasses.is_dataclass(kind):
        try:
            return _make_table(kind, value)
        except ValueError as error:
            raise ConfigError(f"{place}: {error}") from None
    if get_origin(kind) is list and dataclasses.is_dataclass(item := get_args(kind)[0]):
        kind = list[Annotated[Any, pydantic.PlainValidator(partial(_make_table, item))]]
    try:
        # JSON has the types of TOML, except dates, and its strict mode allows a list as a tuple.
        return pydantic.TypeAdapter(kind).validate_json(json.dumps(value), strict=True)
    except pydantic.ValidationError as error:
        raise ConfigError(f"{place} = {value!r}: {_describe_error(error)}") from None
    except TypeError:
        raise ConfigError(f"{place} = {value!r}: dates and times are not allowed here.") from None


def _make_table(item: Any, table: Any) -> Any:
    if not isinstance(table, dict):
        raise ValueError(f"must be a table such as {TABLE!r}")
    kind = item.subclass_for(table) if hasattr(item, "subclass_for") else item
    known = fields(kind)
    for key in table:
        if key not in known:
            raise unknown_name("key", key, known)
    for key, field in known.items():
        require(key in table or not field.required, f"the key {key!r} is required.")
    return kind(**{key: check_type(known[key].type, value, key) for key, value in table.items()})


def _describe_error(error: pydantic.ValidationError) -> str:
    """Returns the message of the first error, with its place inside a list or table."""
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] != "value_error":  # a message of pydantic, in the terms of JSON
        message = message.replace("Input should", "must").replace("array", "list").replace("object", "table")
    return f"{place}: {message}" if place else message


TABLE = '{ key = "value" }'


def tables_argument(kind: Any) -> tyro.constructors.PrimitiveConstructorSpec[Any]:
    """Returns tyro's parser of a list of tables, each written as in a file: ``'{ key = "value" }'``."""

    def parse(words: list[str]) -> Any:
        try:
            tables = [tomli.loads(f"table = {word}")["table"] for word in words]
        except tomli.TOMLDecodeError as error:
            raise ValueError(f"{words} must be tables as in a file, such as {TABLE!r}: {error}") from None
        return check_type(kind, tables, "value")

    def show(tables: list[Any]) -> list[str]:
        return [
            _show_table(vars(table), {own.name: own.default for own in dataclasses.fields(table)}) for table in tables
        ]

    return tyro.constructors.PrimitiveConstructorSpec(
        nargs="*",
        metavar="[TABLE [TABLE ...]]",
        instance_from_str=parse,
        is_instance=lambda value: isinstance(value, list),
        str_from_instance=show,
    )


def _show_table(table: dict[str, Any], defaults: dict[str, Any]) -> str:
    """Returns a table as in a file, without defaults and empty collections."""
    shown = {key: value for key, value in table.items() if value not in (defaults.get(key), [], {})}
    return f"{{ {', '.join(f'{key} = {json.dumps(value)}' for key, value in shown.items())} }}"


def table_argument(kind: Any) -> tyro.constructors.PrimitiveConstructorSpec[Any]:
    """Returns tyro's parser of one table, written as in a file: ``'{ name = "linear", ramp = 0.5 }'``."""
    several = tables_argument(list[kind])
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="TABLE",
        instance_from_str=lambda words: several.instance_from_str(words)[0],
        is_instance=lambda value: value is None or isinstance(value, dict),
        str_from_instance=lambda table: ["none" if table is None else _show_table(table, {})],
    )


def build_component(registry: Registry[Any], table: dict[str, Any], place: str, **runtime_args: Any) -> Any:
    """Builds the component that a table names and sets, with defaults for the settings that it lacks.

    Raises:
        ConfigError: no name, an unknown or missing key, or a value of another type; ``place`` begins the message.
    """
    name = table.get("name")
    require(isinstance(name, str), f"{place} has no name. Known: {', '.join(registry.names())}.")
    fields = {key: (kind, field) for key, kind, field in registry.config_fields(str(name))}
    section: dict[str, Any] = {"name": name}
    for key in table.keys() - {"name"}:
        if key not in fields:
            raise unknown_name("key", key, fields, place)
        section[key] = check_type(fields[key][0], table[key], f"{place}.{key}")
    for key, (_, field) in fields.items():
        if key not in section:
            default, factory = field.default, field.default_factory
            required = default is factory is dataclasses.MISSING
            require(not required, f"{place}.{key} is required.")
            section[key] = default if factory is dataclasses.MISSING else factory()
    return registry.build(SimpleNamespace(**section), **runtime_args)


def table_help(item: Any) -> str:
    """Returns the help of a list of tables: the keys of every table, then those of each kind."""
    docs = {param.arg_name: param.description for param in parse_from_object(item).params}
    common = [field.name for field in dataclasses.fields(item)]
    lines = ["Keys of each table:", *(f"  {key}: {docs.get(key)}" for key in common)]
    kinds: dict[str, list[str]] = {}
    for name, kind in item.subclasses().items() if hasattr(item, "subclasses") else ():
        own = [field for field in dataclasses.fields(kind) if field.name not in common]
        keys = "\n".join(f"  {field.name}: {field.metadata['help']}" for field in own) or "  no others"
        kinds.setdefault(keys, []).append(name)
    return "\n".join([*lines, *(f"Keys of {', '.join(names)}:\n{keys}" for keys, names in kinds.items())])


class Field(NamedTuple):
    """A field of a dataclass."""

    type: Any
    required: bool  # whether it has no default


def fields(kind: Any) -> dict[str, Field]:
    """Returns the fields of a dataclass by name, with their annotations resolved."""
    hints = get_type_hints(kind, include_extras=True)
    return {
        field.name: Field(hints[field.name], field.default is field.default_factory is dataclasses.MISSING)
        for field in dataclasses.fields(kind)
    }


def cli_values(argv: list[str], key: str) -> list[str]:
    """Returns the values after ``--key`` on the command line, before it is parsed as a whole."""
    values: list[str] = []
    reading = False
    for word in argv:
        name, _, value = word.partition("=")
        if name.startswith("--"):
            reading = name[2:].replace("-", "_") == key
            values += [value] if reading and value else []
        elif reading:
            values.append(word)
    return values


def spell_flags(argv: list[str], kind: type) -> list[str]:
    """Returns the command line with ``--a.b true``, ``--a.b=false`` and the like as ``--a.b`` and ``--a.no_b``.

    Args:
        argv: the command line.
        kind: the type of the settings, whose sections have the boolean keys.
    """
    booleans = {
        f"{section}.{key}"
        for section, table in fields(kind).items()
        if dataclasses.is_dataclass(table.type)
        for key, field in fields(table.type).items()
        if bool in (field.type, *get_args(field.type)[:1])  # Annotated, with its help
    }
    words, spelled = list(argv), []
    while words:
        name, _, value = (word := words.pop(0)).partition("=")
        if name[2:].replace("-", "_") in booleans and name.startswith("--"):
            if not value and words and words[0].lower() in ("true", "false"):
                value = words.pop(0)
            if value.lower() in ("true", "false"):
                section, _, key = name[2:].partition(".")
                word = name if value.lower() == "true" else f"--{section}.no_{key}"
        spelled.append(word)
    return spelled


def cli_value(argv: list[str], key: str) -> str:
    """Returns the value after ``--key`` on the command line, empty if it is not given."""
    return (cli_values(argv, key) or [""])[-1]

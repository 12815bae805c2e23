"""Single values: their types, checked; and those that the command line sets, read before it is parsed."""

from __future__ import annotations

import dataclasses
import json
from functools import partial
from typing import Annotated, Any, NamedTuple, get_args, get_origin, get_type_hints

import pydantic
import tomli
import tyro
from docstring_parser import parse_from_object

from torchladder.registry import ConfigError, unknown_name


def adapter(kind: Any) -> pydantic.TypeAdapter[Any]:
    """Returns the validator of a type; the tables of a list must have only known keys.

    A dataclass whose keys depend on the entry, as those of ``data.sources`` do, has a method ``subclass_for(table)``
    that returns the dataclass of one entry, and a method ``subclasses()`` that returns all of them by name.
    """
    kind = get_args(kind)[0] if get_origin(kind) is Annotated else kind
    if get_origin(kind) is list and dataclasses.is_dataclass(item := get_args(kind)[0]):
        kind = list[Annotated[Any, pydantic.PlainValidator(partial(_validate_table, item))]]
    return pydantic.TypeAdapter(kind, config=pydantic.ConfigDict(extra="forbid"))


def _validate_table(item: Any, table: Any) -> Any:
    """Returns one entry of a list of tables as its dataclass."""
    if not isinstance(table, dict):
        raise ValueError(f"must be a table such as {TABLE!r}")
    kind = item.subclass_for(table) if hasattr(item, "subclass_for") else item
    for key in table:
        if key not in fields(kind):
            raise unknown_name("key", key, fields(kind))
    try:
        return pydantic.TypeAdapter(kind).validate_json(json.dumps(table), strict=True)
    except pydantic.ValidationError as error:
        raise ConfigError(problem(error)) from None


def problem(error: pydantic.ValidationError) -> str:
    """Returns what is wrong in one phrase, with the place inside a list or table if there is one."""
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] != "value_error":  # pydantic's own words, which are those of JSON
        message = message.replace("array", "list").replace("object", "table").replace("keyword argument", "key")
    return f"{place}: {message}" if place else message


TABLE = '{ path = "a.txt" }'


def tables(kind: Any) -> tyro.constructors.PrimitiveConstructorSpec[Any]:
    """Returns how the command line spells a list of tables: each as in a file, ``'{ path = "a.txt" }'``."""

    def parse(words: list[str]) -> Any:
        try:
            tables = [tomli.loads(f"table = {word}")["table"] for word in words]
            return adapter(kind).validate_json(json.dumps(tables), strict=True)
        except tomli.TOMLDecodeError as error:
            raise ValueError(f"{words} are not tables as in a file, such as {TABLE!r}: {error}") from None
        except pydantic.ValidationError as error:
            raise ValueError(problem(error)) from None

    def show(tables: list[Any]) -> list[str]:
        named = [{f.name: getattr(one, f.name) for f in dataclasses.fields(one)} for one in tables]
        changed = [{key: value for key, value in one.items() if value} for one in named]
        return [f"{{ {', '.join(f'{key} = {json.dumps(value)}' for key, value in one.items())} }}" for one in changed]

    return tyro.constructors.PrimitiveConstructorSpec(
        nargs="*",
        metavar="[TABLE [TABLE ...]]",
        instance_from_str=parse,
        is_instance=lambda value: isinstance(value, list),
        str_from_instance=show,
    )


def table_help(item: Any) -> str:
    """Returns the keys of the tables of a list, for ``--help``: those of every table, then those of each kind."""
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
    """A field of a dataclass: its type, and whether it has no default."""

    kind: Any
    required: bool


def fields(kind: Any) -> dict[str, Field]:
    """Returns the fields of a dataclass by name, with their annotations resolved."""
    hints = get_type_hints(kind, include_extras=True)
    none = dataclasses.MISSING
    return {
        one.name: Field(hints[one.name], required=one.default is none and one.default_factory is none)
        for one in dataclasses.fields(kind)
    }


def flags(argv: list[str], key: str) -> list[str]:
    """Returns the values after ``--key`` on the command line, before it is parsed as a whole."""
    values: list[str] = []
    reading = False
    for word in argv:
        flag, _, value = word.partition("=")
        if flag.startswith("--"):
            reading = flag[2:].replace("-", "_") == key
            values += [value] if reading and value else []
        elif reading:
            values.append(word)
    return values


def flag(argv: list[str], key: str) -> str:
    """Returns the value after ``--key`` on the command line, empty if it is not given."""
    return (flags(argv, key) or [""])[-1]

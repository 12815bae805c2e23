"""Single values: their types, checked; what the command line says of them, read ahead."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any, NamedTuple, get_type_hints

import pydantic
import tomli
import tyro


def adapter(kind: Any) -> pydantic.TypeAdapter[Any]:
    """Returns what checks a value of that type; in the tables of a list, too, every key must be known."""
    return pydantic.TypeAdapter(kind, config=pydantic.ConfigDict(extra="forbid"))


def problem(error: pydantic.ValidationError) -> str:
    """Returns what is wrong in one phrase, with the place inside a list or table where there is one."""
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"])
    message = first["msg"].replace("array", "list").replace("object", "table").replace("keyword argument", "key")
    return f"{place}: {message}" if place else message


def tables(kind: Any) -> tyro.constructors.PrimitiveConstructorSpec[Any]:
    """Returns how a list of tables is given on the command line: each as in a file, '{ path = "a.txt" }'."""

    def parse(words: list[str]) -> Any:
        try:
            tables = [tomli.loads(f"table = {word}")["table"] for word in words]
            return adapter(kind).validate_json(json.dumps(tables), strict=True)
        except tomli.TOMLDecodeError as error:
            example = '{ path = "a.txt" }'
            raise ValueError(f"{words} are not tables as in a file, such as {example!r}: {error}") from None
        except pydantic.ValidationError as error:
            raise ValueError(problem(error)) from None

    def show(tables: list[Any]) -> list[str]:
        named = [{key: value for key, value in dataclasses.asdict(one).items() if value} for one in tables]
        return [f"{{ {', '.join(f'{key} = {json.dumps(value)}' for key, value in one.items())} }}" for one in named]

    return tyro.constructors.PrimitiveConstructorSpec(
        nargs="*",
        metavar="[TABLE [TABLE ...]]",
        instance_from_str=parse,
        is_instance=lambda value: isinstance(value, list),
        str_from_instance=show,
    )


class Field(NamedTuple):
    """A field of a dataclass: its type, whether it has no default, and what makes its default anew, if anything."""

    kind: Any
    required: bool
    factory: Callable[[], Any] | None


def fields(kind: Any) -> dict[str, Field]:
    """Returns the fields of a dataclass by name, with their annotations resolved."""
    hints = get_type_hints(kind, include_extras=True)
    none = dataclasses.MISSING
    return {
        one.name: Field(
            hints[one.name],
            required=one.default is none and one.default_factory is none,
            factory=None if one.default_factory is none else one.default_factory,
        )
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
    """Returns the value after ``--key`` on the command line, empty where it is not given."""
    return (flags(argv, key) or [""])[-1]

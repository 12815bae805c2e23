"""Names for parts: register a part once, then a config section can name it.

A part is a dataclass or a function. Its parameters *are* its config section: whatever is declared in its signature can
be set in the file and on the command line, and nothing else can. A parameter whose name is one of the registry's
*facts* (the run's total steps, the row length, ...) is not a setting: the run hands it over when the part is built.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Generic, TypeVar, get_type_hints

from docstring_parser import parse_from_object

T = TypeVar("T")
Component = TypeVar("Component", bound=Callable[..., Any])


class ConfigError(ValueError):
    """A setting or an input that cannot be. The message names the thing, what is allowed and the nearest match."""


def unknown_name(what: str, name: str, known: Iterable[str]) -> ConfigError:
    """Returns the error for a name that nobody knows, with the nearest known one first."""
    known = sorted(known)
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
    return ConfigError(f"unknown {what} {name!r}.{hint} Known: {', '.join(known) or 'none'}.")


class Registry(Generic[T]):
    """Parts of one kind by name.

    Args:
        kind: what the parts are, as error messages call it, for example ``"curriculum"``.
        facts: names of the parameters that the run hands over at build, with their meaning.
    """

    def __init__(self, kind: str, facts: Mapping[str, str] | None = None) -> None:
        self.kind = kind
        self.facts = dict(facts or {})
        self._parts: dict[str, Callable[..., T]] = {}

    def register(self, name: str) -> Callable[[Component], Component]:
        """Returns a decorator that makes ``name`` stand for the decorated part.

        Raises:
            ConfigError: another part already has that name.
        """

        def add(part: Component) -> Component:
            taken = self._parts.get(name)
            if taken is not None and _origin(taken) != _origin(part):
                raise ConfigError(f"{self.kind} {name!r} is registered twice: {_origin(taken)} and {_origin(part)}.")
            self._parts[name] = part
            return part

        return add

    def names(self) -> list[str]:
        return sorted(self._parts)

    def get(self, name: str) -> Callable[..., T]:
        """Returns the part of that name.

        Raises:
            ConfigError: no part has that name.
        """
        if name not in self._parts:
            raise unknown_name(self.kind, name, self._parts)
        return self._parts[name]

    def parameters(self, name: str) -> dict[str, inspect.Parameter]:
        """Returns the settings of a part: its parameters without the facts, each with its resolved type."""
        part = self.get(name)
        hints = get_type_hints(part.__init__ if inspect.isclass(part) else part)
        return {
            key: parameter.replace(annotation=hints.get(key, Any))
            for key, parameter in inspect.signature(part).parameters.items()
            if key not in self.facts
        }

    def docs(self, name: str) -> dict[str, str]:
        """Returns what the docstrings of a part, and of the classes that it extends, say of its parameters."""
        part = self.get(name)
        objects = reversed(part.__mro__[:-1]) if inspect.isclass(part) else [part]
        params = [param for documented in objects for param in parse_from_object(documented).params]
        return {param.arg_name: param.description or "" for param in params}

    def config_fields(self, name: str) -> list[tuple[str, Any, Any]]:
        """Returns the settings of a component as ``dataclasses.make_dataclass`` takes them, each with its help."""
        docs, made = self.docs(name), getattr(self.get(name), "__dataclass_fields__", {})
        fields = []
        for key, parameter in self.parameters(name).items():
            default: dict[str, Any] = {}
            if key in made and made[key].default_factory is not dataclasses.MISSING:
                default = {"default_factory": made[key].default_factory}
            elif parameter.default is not inspect.Parameter.empty:
                default = {"default": parameter.default}
            help = {"help": docs.get(key, "")}
            fields.append((key, parameter.annotation, dataclasses.field(**default, metadata=help)))
        return fields

    def build(self, section: Any, **facts: Any) -> T:
        """Makes the part that ``section.name`` names from the section's settings and the facts it declares.

        Args:
            section: an object with the attribute ``name`` and one attribute per setting of that part.
            **facts: values for every fact of this registry; each part receives the ones it declares.
        """
        part = self.get(section.name)
        declared = inspect.signature(part).parameters
        settings = {key: getattr(section, key) for key in self.parameters(section.name)}
        return part(**settings, **{key: value for key, value in facts.items() if key in declared})


def _origin(part: Callable[..., Any]) -> str:
    return f"{part.__module__}.{part.__qualname__}"

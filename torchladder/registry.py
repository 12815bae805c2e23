"""Registries of components: register a component once, and a config section can select it by name.

A component is a dataclass or a function, and its parameters *are* its config section: every parameter can be set in the
TOML file and on the command line, and no other key is accepted. Parameters listed as *runtime arguments* of the
registry (total steps, sequence length, ...) are not settings: the run passes them when it builds the component.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Generic, TypeVar, get_type_hints

from annotated_types import Ge, Gt, Le, Lt
from docstring_parser import parse_from_object

T = TypeVar("T")
Component = TypeVar("Component", bound=Callable[..., Any])


class ConfigError(ValueError):
    """An invalid setting or input. The message names the key, the allowed values and, if there is one, the remedy."""


def require(condition: bool, message: str) -> None:
    """Raises ``ConfigError`` with the message unless the condition holds."""
    if not condition:
        raise ConfigError(message)


_BOUNDS = {Ge: (operator.ge, "{} or more"), Gt: (operator.gt, "above {}")}
_BOUNDS |= {Le: (operator.le, "at most {}"), Lt: (operator.lt, "below {}")}


def check_bounds(config: Any, section: str) -> None:
    """Checks the fields of a dataclass against the bounds in their annotations; None and defaults are always valid.

    Example: ``seq_len: Annotated[int, Ge(1)] = 2048`` refuses 0: "training.seq_len = 0: must be 1 or more."
    """
    hints = get_type_hints(type(config), include_extras=True)
    for field in dataclasses.fields(config):
        value, metadata = getattr(config, field.name), getattr(hints[field.name], "__metadata__", ())
        bounds = [(*_BOUNDS[type(bound)], *dataclasses.astuple(bound)) for bound in metadata if type(bound) in _BOUNDS]
        if value not in (None, field.default) and not all(holds(value, limit) for holds, _, limit in bounds):
            allowed = " and ".join(text.format(limit) for _, text, limit in bounds)
            unset = ", or -1" if field.default == -1 else ""
            raise ConfigError(f"{section}.{field.name} = {value}: must be {allowed}{unset}.")


def unknown_name(what: str, name: str, known: Iterable[str], where: str = "") -> ConfigError:
    """Returns the error for an unknown name, which suggests the nearest known one and lists all of them."""
    known = sorted(known)
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
    place = f" in {where}" if where else ""
    return ConfigError(f"unknown {what} {name!r}{place}.{hint} Known: {', '.join(known) or 'none'}.")


class Registry(Generic[T]):
    """Components of one kind, by name.

    Args:
        kind: what error messages call a component, for example ``"curriculum"``.
        runtime_args: parameters that the run passes to ``build``, each with its meaning.
    """

    def __init__(self, kind: str, runtime_args: Mapping[str, str] | None = None) -> None:
        self.kind = kind
        self.runtime_args = dict(runtime_args or {})
        self._components: dict[str, Callable[..., T]] = {}

    def register(self, name: str) -> Callable[[Component], Component]:
        """Returns a decorator that registers a component under ``name``, which no other component may have."""

        def add(component: Component) -> Component:
            taken = self._components.get(name)
            if taken is not None and _qualified_name(taken) != _qualified_name(component):
                raise ConfigError(
                    f"{self.kind} {name!r} is registered twice: "
                    f"{_qualified_name(taken)} and {_qualified_name(component)}."
                )
            self._components[name] = component
            return component

        return add

    def names(self) -> list[str]:
        return sorted(self._components)

    def get(self, name: str) -> Callable[..., T]:
        """Returns the component registered under ``name``; raises ``ConfigError`` if there is none."""
        if name not in self._components:
            raise unknown_name(self.kind, name, self._components)
        return self._components[name]

    def parameters(self, name: str) -> dict[str, inspect.Parameter]:
        """Returns the settings of a component: its parameters except runtime arguments, with resolved types."""
        component = self.get(name)
        plain = inspect.isclass(component) and not dataclasses.is_dataclass(component)
        hints = get_type_hints(component.__init__ if plain else component)
        return {
            key: parameter.replace(annotation=hints.get(key, Any))
            for key, parameter in inspect.signature(component).parameters.items()
            if key not in self.runtime_args
        }

    def docs(self, name: str) -> dict[str, str]:
        """Returns the help text of each setting."""
        return parameter_docs(self.get(name))

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

    def build(self, section: Any, **runtime_args: Any) -> T:
        """Builds the component ``section.name`` from the section's settings.

        Args:
            section: an object with the attribute ``name`` and one attribute per setting of the component.
            **runtime_args: a value for every runtime argument; the component receives those that it declares.
        """
        component = self.get(section.name)
        declared = inspect.signature(component).parameters
        settings = {key: getattr(section, key) for key in self.parameters(section.name)}
        return component(**settings, **{key: value for key, value in runtime_args.items() if key in declared})


def parameter_docs(component: Callable[..., Any]) -> dict[str, str]:
    """Returns the description of each parameter, from the docstrings of a component and its base classes."""
    objects = reversed(component.__mro__[:-1]) if inspect.isclass(component) else [component]
    return {name: text for documented in objects for name, text in _own_parameter_docs(documented).items()}


@functools.cache
def _own_parameter_docs(component: Callable[..., Any]) -> dict[str, str]:
    """Returns those in the component's own docstrings, which are parsed from its source."""
    return {param.arg_name: param.description or "" for param in parse_from_object(component).params}


def _qualified_name(component: Callable[..., Any]) -> str:
    return f"{component.__module__}.{component.__qualname__}"

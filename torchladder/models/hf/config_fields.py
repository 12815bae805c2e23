"""Checks the types of a config.json's entries, so that what reads them later can rely on them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any

import pydantic
from annotated_types import Ge

from torchladder.registry import ConfigError

SHARED_TYPES = {
    "model_type": str,
    "max_position_embeddings": Annotated[int, Ge(1)],
    "original_max_position_embeddings": int,
    "sliding_window": Annotated[int, Ge(1)] | None,
    "layer_types": list[str] | None,
    "use_sliding_window": bool | None,
    "max_window_layers": int,
    "sliding_window_pattern": Annotated[int, Ge(1)],
    "rope_theta": float | None,
    "rope_local_base_freq": float,
    "no_rope_layers": list[int] | None,
    "no_rope_layer_interval": Annotated[int, Ge(1)],
    "rope_scaling": dict[str, Any] | None,
    "rope_parameters": dict[str, Any] | None,
}
"""Entries that all families have -> their types; those of a family have the types of its config's fields."""


def check_types(entries: Mapping[str, Any], types: Mapping[str, Any], table: str = "") -> None:
    """Raises ``ConfigError`` for an entry of another type, without conversion: neither "96" nor 96.0 is an integer.

    Args:
        entries: of a JSON object; those without a type are not checked.
        types: key -> type.
        table: key of the object inside config.json, for the error.
    """
    strict = pydantic.ConfigDict(strict=True, allow_inf_nan=False)
    for key in types.keys() & entries.keys():
        try:
            pydantic.TypeAdapter(types[key], config=strict).validate_python(entries[key])
        except pydantic.ValidationError as error:
            allowed = error.errors()[0]["msg"].replace("Input should", "must").replace("dictionary", "object")
            name = f"{table}.{key}" if table else key
            raise ConfigError(f"{name} = {json.dumps(entries[key])}: {allowed}.") from None

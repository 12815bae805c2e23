"""Layer types in config.json: ``layer_types``, and ``sliding_window`` of the sliding ones.

Hugging Face's sliding window counts the query (``kv > q - w``), as the mask ``sliding`` does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torchladder.registry import ConfigError, require
from torchladder.schedule import FULL_ATTENTION

SLIDING_ATTENTION = "sliding_attention"


def read_layer_types(entries: Mapping[str, Any]) -> tuple[list[str] | None, int | None]:
    """Returns the type of each layer, None if all are alike, and the window of the sliding ones, None without any.

    Args:
        entries: of a config.json, checked for their types, with the defaults of its ``model_type``.

    Raises:
        ConfigError: layers of a type that is not supported, not as many as the model has, or without a window.
    """
    window: int | None = entries.get("sliding_window") if entries.get("use_sliding_window", True) else None
    num_layers, types = entries.get("num_hidden_layers", 0), entries.get("layer_types")
    if types is None:
        first = 0 if window is None else entries.get("max_window_layers", 0)
        types = [FULL_ATTENTION if window is None or i < first else SLIDING_ATTENTION for i in range(num_layers)]
    if others := {*types} - {FULL_ATTENTION, SLIDING_ATTENTION}:
        raise ConfigError(f"layer_types has {min(others)!r}: must be {FULL_ATTENTION} or {SLIDING_ATTENTION}.")
    require(
        len(types) == num_layers,
        f"layer_types has {len(types)} layers, and num_hidden_layers = {num_layers}: must agree.",
    )
    if SLIDING_ATTENTION not in types:
        return None, None
    require(window is not None, f"layer_types has {SLIDING_ATTENTION}, and sliding_window is null or not used.")
    return (types if FULL_ATTENTION in types else None), window


def write_layer_types(config: Any, model_type: str, window: int | None) -> dict[str, Any]:
    """Returns the entries of a model whose layers differ, or all slide.

    Raises:
        ConfigError: Hugging Face's model has no such layers.
    """
    types: list[str] = config.expanded_layer_types
    if {*types} == {FULL_ATTENTION}:
        types = [SLIDING_ATTENTION] * len(types)
    if others := {*types} - {FULL_ATTENTION, SLIDING_ATTENTION}:
        raise ConfigError(f"Hugging Face's {model_type} has no {min(others)} layers.")
    require(
        window is not None, f"Hugging Face's {model_type} needs the mask 'sliding' in its {SLIDING_ATTENTION} layers."
    )
    return {"layer_types": types, "use_sliding_window": True, "max_window_layers": 0}

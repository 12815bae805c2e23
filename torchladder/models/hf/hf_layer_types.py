"""Layer types in config.json: ``layer_types``, and ``sliding_window`` of the sliding ones.

Hugging Face's sliding window counts the query (``kv > q - w``), as the mask ``sliding`` does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torchladder.models.hf.hf_rope import read_nope_layers
from torchladder.registry import ConfigError, require
from torchladder.schedule import FULL_ATTENTION

SLIDING_ATTENTION = "sliding_attention"


Slides = Callable[[Mapping[str, Any], int], bool]
"""Entries of a config.json without ``layer_types``, number of a layer from 0 -> whether the layer slides."""


def slides_after_first_layers(entries: Mapping[str, Any], layer: int) -> bool:
    """Qwen3: layers from ``max_window_layers`` on slide if the model has a window."""
    return _window(entries) is not None and layer >= entries.get("max_window_layers", 0)


def slides_between_full_layers(entries: Mapping[str, Any], layer: int) -> bool:
    """Gemma 3, OLMo 3: every ``sliding_window_pattern``-th layer is full."""
    return (layer + 1) % entries["sliding_window_pattern"] != 0


def slides_without_rope(entries: Mapping[str, Any], layer: int) -> bool:
    """SmolLM 3: layers without RoPE slide if the model has a window."""
    return _window(entries) is not None and layer in read_nope_layers(entries)["nope_layers"]


def read_layer_types(
    entries: Mapping[str, Any], slides: Slides = slides_after_first_layers
) -> tuple[list[str] | None, int | None]:
    """Returns the type of each layer, None if all are alike, and the window of the sliding ones, None without any.

    Args:
        entries: of a config.json, checked for their types, with the defaults of its ``model_type``.
        slides: which layers slide if the entries do not say it.

    Raises:
        ConfigError: layers of a type that is not supported, not as many as the model has, or without a window.
    """
    window = _window(entries)
    num_layers, types = entries.get("num_hidden_layers", 0), entries.get("layer_types")
    if types is None:
        types = [SLIDING_ATTENTION if slides(entries, layer) else FULL_ATTENTION for layer in range(num_layers)]
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


def write_layer_types(
    config: Any, model_type: str, window: int | None, slides: Slides = slides_after_first_layers
) -> dict[str, Any]:
    """Returns the entries of a model whose layers may differ; if they do not, all slide or, without a window, none.

    Args:
        config: the model's config.
        model_type: of the config.json, for errors.
        window: of the sliding layers.
        slides: see ``read_layer_types``.

    Raises:
        ConfigError: Hugging Face's model has no such layers.
    """
    types: list[str] = config.expanded_layer_types
    if {*types} == {FULL_ATTENTION} and window is not None:
        types = [SLIDING_ATTENTION] * len(types)
    if others := {*types} - {FULL_ATTENTION, SLIDING_ATTENTION}:
        raise ConfigError(f"Hugging Face's {model_type} has no {min(others)} layers.")
    if SLIDING_ATTENTION not in types:
        return {"layer_types": types}
    require(
        window is not None, f"Hugging Face's {model_type} needs the mask 'sliding' in its {SLIDING_ATTENTION} layers."
    )
    optional = slides is not slides_between_full_layers
    use = {"use_sliding_window": True, "max_window_layers": 0} if optional else {}
    return {"sliding_window": window, "layer_types": types, **use}


def _window(entries: Mapping[str, Any]) -> int | None:
    window: int | None = entries.get("sliding_window") if entries.get("use_sliding_window", True) else None
    return window

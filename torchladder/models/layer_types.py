"""Layer types: which layers of a model share their masks, window and RoPE theta; by Hugging Face's names.

A model with several types receives an attention mask, and an attention function, per type. A model with one type
receives just the one, so that nothing changes for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from torchladder.registry import require, unknown_name
from torchladder.schedule import FULL_ATTENTION

LAYER_TYPES = (FULL_ATTENTION, "sliding_attention", "chunked_attention")

Value = TypeVar("Value")


def expand_layer_types(pattern: Sequence[str] | None, n_layers: int) -> list[str]:
    """Returns the type of each layer: the pattern, repeated; ``full_attention`` for all without one.

    Raises:
        ConfigError: an unknown type, a pattern that does not fill the layers, or several types without full_attention.
    """
    if pattern is None:
        return [FULL_ATTENTION] * n_layers
    for name in pattern:
        if name not in LAYER_TYPES:
            raise unknown_name("layer type", name, LAYER_TYPES, "model.layer_types")
    size = len(pattern)
    require(
        size > 0 and n_layers % size == 0,
        f"model.layer_types has {size} types, which do not fill model.n_layers = {n_layers}: list the type of every "
        "layer, or a pattern whose length divides the layers.",
    )
    require(
        FULL_ATTENTION in pattern or len({*pattern}) == 1,
        f"model.layer_types has {', '.join(sorted({*pattern}))}: of several types, one must be {FULL_ATTENTION}.",
    )
    return [*pattern] * (n_layers // size)


def sliding_pattern(n_layers: int, every: int) -> list[str]:
    """Returns the type of each layer if every ``every``-th is ``full_attention`` and the others slide."""
    return [FULL_ATTENTION if number % every == 0 else "sliding_attention" for number in range(1, n_layers + 1)]


def types_of_config(config: Any) -> list[str]:
    """Returns the types of the layers of a model's config, each once, ``full_attention`` first if there are several."""
    types = dict.fromkeys(getattr(config, "layer_types", None) or [FULL_ATTENTION])
    return sorted(types, key=LAYER_TYPES.index)


def collapse(by_type: Mapping[str, Value]) -> Value | Mapping[str, Value]:
    """Returns what a model receives: the value of its only layer type, or all values by type."""
    return next(iter(by_type.values())) if len(by_type) == 1 else by_type

"""RoPE in config.json: one table of parameters for all layers or, in some families, one for each layer type.

transformers 5 has all of it in ``rope_parameters``; transformers 4 has ``rope_scaling`` next to ``rope_theta``, and
``rope_local_base_freq`` for the sliding layers of Gemma 3.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, get_args

from torchladder.models.hf.config_fields import check_types
from torchladder.models.layer_types import types_of_config
from torchladder.registry import ConfigError, require, unknown_name
from torchladder.schedule import FULL_ATTENTION

ORIGINAL = "original_max_position_embeddings"

ROPE_SCALINGS: dict[str, dict[str, str]] = {
    "linear": {"rope_condense_ratio": "factor"},
    "llama3": {
        "rope_scaling_factor": "factor",
        "rope_low_freq_factor": "low_freq_factor",
        "rope_high_freq_factor": "high_freq_factor",
        "rope_original_seq_len": ORIGINAL,
    },
    "yarn": {
        "rope_scaling_factor": "factor",
        "rope_original_seq_len": ORIGINAL,
        "rope_beta_fast": "beta_fast",
        "rope_beta_slow": "beta_slow",
        "rope_attention_factor": "attention_factor",
        "rope_truncate": "truncate",
    },
}
"""``rope_type`` -> field of the model's config -> key in the table of RoPE parameters."""

OPTIONAL = {"beta_fast", "beta_slow", "attention_factor", "truncate"}
"""Keys that have a default."""

TABLE_TYPES = {
    "rope_type": str,
    "type": str,
    "rope_theta": float | None,
    "partial_rotary_factor": float | None,
    "mscale": float | None,
    "mscale_all_dim": float | None,
}
"""Keys of a table of RoPE parameters -> their types; the others have the types of their fields."""


def read_rope(
    entries: Mapping[str, Any],
    types: Mapping[str, Any],
    thetas: Mapping[str, float],
    layer_types: Sequence[str],
) -> dict[str, Any]:
    """Returns the RoPE fields of a model's config.

    Args:
        entries: of a config.json.
        types: field of the model's config -> its type.
        thetas: layer type -> its default theta; more than one if the family has a table for each layer type.
        layer_types: the types of the layers.

    Raises:
        ConfigError: parameters that are missing, have another type, are not supported or contradict each other.
    """
    if len(thetas) == 1:
        return _read_shared_table(entries, types, thetas[FULL_ATTENTION])
    tables = _tables_by_type(entries, thetas)
    by_type = {name: _read_table(f"rope_parameters.{name}", table, entries, types) for name, table in tables.items()}
    if len({*layer_types}) == 1:
        return by_type[layer_types[0]]
    theta = {name: fields.pop("rope_theta") for name, fields in by_type.items()}
    scaled = [name for name, fields in by_type.items() if fields]
    scalings = [by_type[name] for name in scaled]
    require(
        all(fields == scalings[0] for fields in scalings),
        f"rope_parameters: {' and '.join(scaled)} have different scalings, which are not supported.",
    )
    found: dict[str, Any] = {"rope_theta": theta.pop(FULL_ATTENTION), **(scalings[0] if scalings else {})}
    if own := {name: value for name, value in theta.items() if value != found["rope_theta"]}:
        found["layer_rope_theta"] = own
    if 0 < len(scaled) < len(by_type):
        found["rope_scaling_layer_types"] = scaled
    return found


def write_rope(config: Any, model_type: str, per_type: bool) -> dict[str, Any]:
    """Returns the entries of a model's RoPE.

    Args:
        config: the model's config.
        model_type: of the config.json, for errors.
        per_type: whether the family has a table for each layer type.

    Raises:
        ConfigError: Hugging Face's model has no such RoPE.
    """
    scaled, condensed = config.rope_scaling_factor != 1, config.rope_condense_ratio != 1
    unsupported = {
        "model.positional_embedding = 'none'": config.positional_embedding != "rope",
        "model.rope_restart": config.rope_restart,
        "model.rope_scaling_factor and model.rope_condense_ratio together": scaled and condensed,
        "model.partial_rotary_factor": config.partial_rotary_factor != 1,
        "model.nope_layer_types": config.nope_layer_types,
        "model.layer_rope_theta": config.layer_rope_theta and not per_type,
        "model.rope_scaling_layer_types": config.rope_scaling_layer_types is not None and not per_type,
    }
    for name, value in unsupported.items():
        require(not value, f"Hugging Face's {model_type} does not support {name}.")
    scaling: dict[str, Any] = {}
    if scaled or condensed:
        rope_type = config.rope_scaling_type if scaled else "linear"
        table = {key: getattr(config, name) for name, key in ROPE_SCALINGS[rope_type].items()}
        scaling = {"rope_type": rope_type, **{key: value for key, value in table.items() if value is not None}}
    if not per_type:
        return {"rope_theta": config.rope_theta, "rope_scaling": scaling or None}
    tables = {}
    for name in {FULL_ATTENTION: None, "sliding_attention": None, **dict.fromkeys(types_of_config(config))}:
        theta = (config.layer_rope_theta or {}).get(name, config.rope_theta)
        is_scaled = config.rope_scaling_layer_types is None or name in config.rope_scaling_layer_types
        tables[name] = {"rope_theta": theta, **((is_scaled and scaling) or {"rope_type": "default"})}
    return {"rope_parameters": tables}


def read_nope_layers(entries: Mapping[str, Any]) -> dict[str, list[int]]:
    """Returns the field ``nope_layers`` of a family with ``no_rope_layers``, which has a 1 for each layer with RoPE.

    Without that list every ``no_rope_layer_interval``-th layer has none.
    """
    layers, interval = entries["num_hidden_layers"], entries["no_rope_layer_interval"]
    has_rope = entries.get("no_rope_layers") or [(number + 1) % interval for number in range(layers)]
    require(
        len(has_rope) == layers,
        f"no_rope_layers has {len(has_rope)} layers, and num_hidden_layers = {layers}: must agree.",
    )
    return {"nope_layers": [number for number, has in enumerate(has_rope) if not has]}


def write_nope_layers(config: Any) -> dict[str, Any]:
    """Returns the entries of the layers without RoPE; ``read_nope_layers`` reads them."""
    return {"no_rope_layers": [int(number not in config.nope_layers) for number in range(config.n_layers)]}


def _read_shared_table(entries: Mapping[str, Any], types: Mapping[str, Any], theta: float) -> dict[str, Any]:
    """Reads the one table of a family.

    ``rope_scaling`` and ``rope_parameters`` must agree, since transformers reads ``rope_scaling`` alone.
    """
    found = []
    for name in [name for name in ("rope_scaling", "rope_parameters") if entries.get(name)] or ["rope_parameters"]:
        table = {"rope_theta": entries.get("rope_theta", theta), **(entries.get(name) or {})}
        found.append(_read_table(name, table, entries, types))
    first, *others = found
    if others and others[0] != first:
        raise ConfigError(
            "rope_scaling and rope_parameters differ: transformers ignores rope_parameters if there is a "
            f"rope_scaling, and its rope_theta is then {first['rope_theta']:g}. Remove one of the two."
        )
    return first


def _tables_by_type(entries: Mapping[str, Any], thetas: Mapping[str, float]) -> dict[str, dict[str, Any]]:
    """Returns layer type -> its table, with ``rope_theta``, of a family that has several."""
    given = entries.get("rope_parameters") or {}
    for name, table in given.items():
        if name not in thetas or not isinstance(table, Mapping | None):
            raise ConfigError(f"rope_parameters.{name}: must be a table for each of {', '.join(thetas)}.")
    tables: dict[str, dict[str, Any]] = {name: {**(given.get(name) or {})} for name in thetas}
    tables[FULL_ATTENTION] |= entries.get("rope_scaling") or {}
    for name, key in ((FULL_ATTENTION, "rope_theta"), ("sliding_attention", "rope_local_base_freq")):
        tables[name].setdefault("rope_theta", entries.get(key, thetas[name]))
    return tables


def _read_table(
    name: str, table: Mapping[str, Any], entries: Mapping[str, Any], types: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns the fields of one table of RoPE parameters, which has ``rope_theta``."""
    if nested := [key for key, value in table.items() if isinstance(value, Mapping)]:
        raise ConfigError(f"{name}.{nested[0]}: RoPE parameters per type of layer are not supported.")
    if table["rope_theta"] is None:
        raise ConfigError("rope_theta = null: must be a number.")
    check_types(table, TABLE_TYPES, name)
    if table.get("partial_rotary_factor") not in (None, 1.0):
        raise ConfigError(f"{name}.partial_rotary_factor = {table['partial_rotary_factor']}: must be 1.0.")
    theta, rope_type = {"rope_theta": float(table["rope_theta"])}, table.get("rope_type", table.get("type", "default"))
    if rope_type == "default":
        return theta
    if rope_type not in ROPE_SCALINGS:
        raise unknown_name(f"{name}.rope_type", rope_type, ["default", *ROPE_SCALINGS])
    keys = ROPE_SCALINGS[rope_type]
    if ORIGINAL in entries and ORIGINAL in keys.values():
        table = {**table, ORIGINAL: entries[ORIGINAL]}
    check_types(table, {key: types[field] for field, key in keys.items()}, name)
    given = {field: table[key] for field, key in keys.items() if table.get(key) is not None}
    if missing := [key for field, key in keys.items() if field not in given and key not in OPTIONAL]:
        raise ConfigError(f"{name} of type {rope_type} lacks {', '.join(missing)}.")
    mscales = [table.get(key) or 0.0 for key in ("mscale", "mscale_all_dim")]
    if rope_type == "yarn" and "rope_attention_factor" not in given and all(mscales):
        above, below = (0.1 * mscale * math.log(given["rope_scaling_factor"]) + 1 for mscale in mscales)
        given["rope_attention_factor"] = above / below
    kind = {"rope_scaling_type": rope_type} if rope_type in get_args(types["rope_scaling_type"]) else {}
    return {**theta, **kind, **given}

"""A config.json and the config of a model, each from the other."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch

from torchladder.models.hf.adapter import HFAdapter
from torchladder.models.model import registry
from torchladder.registry import ConfigError, unknown_name

KEYS = {
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "ffn_dim": "intermediate_size",
    "vocab_size": "vocab_size",
    "norm_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
    "init_std": "initializer_range",
}
"""Field of a model's config -> key of a config.json."""

DEFAULTS = {"rms_norm_eps": 1e-6, "tie_word_embeddings": False, "initializer_range": 0.02}
"""What a config.json means that leaves a key out."""

FIXED: dict[str, Any] = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "use_sliding_window": False,
    "partial_rotary_factor": 1.0,
    "quantization_config": None,
}
"""Keys that may be missing, and the one value that our models compute with."""

SCALINGS = {
    "linear": {"rope_condense_ratio": "factor"},
    "llama3": {
        "rope_scaling_factor": "factor",
        "rope_low_freq_factor": "low_freq_factor",
        "rope_high_freq_factor": "high_freq_factor",
        "rope_original_seq_len": "original_max_position_embeddings",
    },
}
"""Type of a scaled RoPE -> field of a model's config -> key of the rotation's table."""


@dataclass(frozen=True)
class HFMetadata:
    """What a config.json says beside the shape of the model.

    Attributes:
        seq_len: tokens of the longest row.
        window: tokens that a query sees with itself, where a sliding mask leaves it fewer than the row.
        rope_theta: base of the rotations, where phases changed that of the model's config.
        tokens: ids of special tokens by their key, such as eos_token_id.
    """

    seq_len: int
    window: int | None = None
    rope_theta: float | None = None
    tokens: dict[str, Any] = field(default_factory=dict)


def adapter_of(name: str) -> HFAdapter:
    """Returns how a registered model is written in Hugging Face's form.

    Raises:
        ConfigError: it has no such form.
    """
    found = getattr(registry.get(name), "hugging_face", None)
    if found is None:
        raise ConfigError(f"the model {name!r} has no Hugging Face form: it sets no hugging_face.")
    return found


def name_of(config: dict[str, Any]) -> str:
    """Returns the registered model that a config.json describes.

    Raises:
        ConfigError: none does.
    """
    types = {}
    for name in registry.names():
        form = getattr(registry.get(name), "hugging_face", None)
        types.update(dict.fromkeys(form.architectures if form else (), name))
    kind = str(config.get("model_type"))
    if kind not in types:
        raise unknown_name("model_type in config.json", kind, types)
    return types[kind]


def read(config: dict[str, Any]) -> dict[str, Any]:
    """Returns the settings of the model that a config.json describes, every field of its config among them.

    Raises:
        ConfigError: an unknown type, a missing key, or something that our models do not compute.
    """
    name = name_of(config)
    for key, value in FIXED.items():
        if config.get(key) not in (None, value):
            raise ConfigError(f"config.json has {key} = {config[key]!r}; here it can only be {value!r}.")
    kinds = {*(config.get("layer_types") or ())} - {
        "full_attention" if window_of(config) is None else "sliding_attention"
    }
    if kinds:
        raise ConfigError(f"config.json has layers of the kind {min(kinds)} (layer_types); here all layers are alike.")
    values: dict[str, Any] = {ours: config.get(theirs, DEFAULTS.get(theirs)) for ours, theirs in KEYS.items()}
    values["n_kv_heads"] = values["n_kv_heads"] or values["n_heads"]
    missing = [KEYS[ours] for ours, value in values.items() if value is None and ours != "head_dim"]
    if missing:
        raise ConfigError(f"config.json does not say {', '.join(missing)}.")
    values["head_dim"] = values["head_dim"] or adapter_of(name).head_dim or values["dim"] // values["n_heads"]
    return {"name": name, "flavor": "", **values, **_read_rope(config), "initialization": "normal"}


def window_of(config: dict[str, Any]) -> int | None:
    """Returns the tokens that a query of such a model sees with itself, None for all before it."""
    windowed = adapter_of(name_of(config)).windowed
    return config.get("sliding_window", 4096) if windowed and config["model_type"] == windowed else None


def check_compatible(fields: dict[str, Any], config: Any, what: str) -> None:
    """Compares what a config.json says with a model's config; more rows of the vocabulary are no difference.

    Raises:
        ConfigError: they are two models; the message begins with ``what``.
    """
    same = registry.config_type(fields["name"])(**{key: fields[key] for key in fields if key not in ("name", "flavor")})
    if type(same) is not type(config):
        raise ConfigError(f"{what} describes a {fields['name']}, which the model of this run is not.")
    for key, value in vars(same).items():
        chosen = getattr(config, key)
        if key in ("initialization", "init_std") or (key == "vocab_size" and chosen >= value):
            continue
        value, chosen = (same.kv_heads, config.kv_heads) if key == "n_kv_heads" else (value, chosen)
        value, chosen = (same.head_size, config.head_size) if key == "head_dim" else (value, chosen)
        if value != chosen:
            hint = " To train on with another base, set it in data.phases." if key == "rope_theta" else ""
            raise ConfigError(f"{what} says model.{key} = {value}, the settings say {chosen}.{hint}")


def write(name: str, config: Any, facts: HFMetadata, dtype: torch.dtype) -> dict[str, Any]:
    """Returns the config.json of a model.

    Args:
        name: the registered model.
        config: its config.
        facts: what else is to be said.
        dtype: of the weights.

    Raises:
        ConfigError: the model computes something that the form cannot say.
    """
    form = adapter_of(name)
    config = config if facts.rope_theta is None else replace(config, rope_theta=facts.rope_theta)
    if facts.window is not None and not form.windowed:
        raise ConfigError(f"a {name} with a sliding window of {facts.window} tokens has no Hugging Face form.")
    kind = next(iter(form.architectures)) if facts.window is None else form.windowed
    values = {theirs: getattr(config, ours) for ours, theirs in KEYS.items()}
    values |= {"num_key_value_heads": config.kv_heads, "head_dim": config.head_size}
    return {
        "architectures": [form.architectures[kind]],
        "model_type": kind,
        **values,
        **_write_rope(config),
        "max_position_embeddings": facts.seq_len,
        **({"sliding_window": facts.window} if form.windowed and facts.window else {}),
        "hidden_act": "silu",
        "attention_bias": False,
        **facts.tokens,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }


def _read_rope(config: dict[str, Any]) -> dict[str, Any]:
    """Returns the fields of the rotation, which newer files keep in one table and older ones in two places."""
    table = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = table.get("rope_type", table.get("type", "default"))
    fields = {"rope_theta": float(table.get("rope_theta", config.get("rope_theta", 10000.0)))}
    if table.get("partial_rotary_factor", 1.0) != 1.0:
        raise ConfigError("config.json rotates a part of each head (partial_rotary_factor); here it is all or none.")
    if kind == "default":
        return fields
    if kind not in SCALINGS:
        raise unknown_name("rope_type in config.json", str(kind), ["default", *SCALINGS])
    missing = [key for key in SCALINGS[kind].values() if key not in table]
    if missing:
        raise ConfigError(f"config.json has RoPE of the type {kind}, but does not say {', '.join(missing)}.")
    scaled = {ours: float(table[theirs]) for ours, theirs in SCALINGS[kind].items()}
    if "rope_original_seq_len" in scaled:
        scaled["rope_original_seq_len"] = int(scaled["rope_original_seq_len"])
    return {**fields, **scaled}


def _write_rope(config: Any) -> dict[str, Any]:
    scaled, condensed = config.rope_scaling_factor != 1, config.rope_condense_ratio != 1
    if config.positional_embedding != "rope" or config.rope_restart or (scaled and condensed):
        raise ConfigError(
            "Hugging Face's form knows neither model.positional_embedding = 'none' nor model.rope_restart, nor "
            "model.rope_scaling_factor and model.rope_condense_ratio together."
        )
    if not (scaled or condensed):
        return {"rope_theta": config.rope_theta, "rope_scaling": None}
    kind = "llama3" if scaled else "linear"
    table = {theirs: getattr(config, ours) for ours, theirs in SCALINGS[kind].items()}
    return {"rope_theta": config.rope_theta, "rope_scaling": {"rope_type": kind, **table}}

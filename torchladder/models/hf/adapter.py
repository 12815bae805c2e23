"""Maps a model family to Hugging Face and back: config.json entries, tensor names, and what is not supported."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from torchladder.registry import ConfigError, unknown_name


@dataclass(frozen=True)
class HFMetadata:
    """Entries of config.json in addition to the model's shape.

    Attributes:
        seq_len: tokens in the longest row (``max_position_embeddings``).
        window: tokens a query may see, including itself (``sliding_window``); None for full attention.
        rope_theta: RoPE base; None for that of the model's config.
        token_ids: special tokens by key, such as ``eos_token_id``.
    """

    seq_len: int
    window: int | None = None
    rope_theta: float | None = None
    token_ids: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class HFAdapter:
    """Hugging Face support of a model family; set it as ``hf_adapter`` of the model class.

    Attributes:
        architectures: ``model_type`` of a config.json -> class in transformers; exports use the first one.
        tensor_names: parameter -> Hugging Face tensor, with ``*`` for the layer index.
        config_keys: field of the model's config -> key of config.json.
        defaults: key of config.json -> its value if the key is missing.
        fixed_values: key of config.json -> the one value that is supported; the key may be missing or null.
        rope_scalings: ``rope_type`` -> field of the model's config -> key in the table of RoPE parameters.
        sliding_window_type: the ``model_type`` that has a sliding window; empty if none has.
        vocab_tensors: parameters with one row per token.
    """

    architectures: Mapping[str, str]
    tensor_names: Mapping[str, str]
    config_keys: Mapping[str, str]
    defaults: Mapping[str, Any]
    fixed_values: Mapping[str, Any]
    rope_scalings: Mapping[str, Mapping[str, str]]
    sliding_window_type: str = ""
    vocab_tensors: tuple[str, ...] = ("embedding.weight", "head.weight")

    def hf_name(self, name: str) -> str:
        """Returns the Hugging Face name of a parameter."""
        layer = re.match(r"layers\.(\d+)\.", name)
        pattern = re.sub(r"^layers\.\d+\.", "layers.*.", name)
        if pattern not in self.tensor_names:
            model_type = next(iter(self.architectures))
            raise ConfigError(f"the parameter {name} has no Hugging Face name (HFAdapter of {model_type}).")
        return self.tensor_names[pattern].replace("*", layer[1] if layer else "*")

    def sliding_window(self, hf_config: Mapping[str, Any]) -> int | None:
        """Returns the window of a config.json in tokens, None for full attention."""
        if hf_config["model_type"] != self.sliding_window_type:
            return None
        window: int | None = hf_config.get("sliding_window", self.defaults.get("sliding_window"))
        return window

    def from_hf(self, hf_config: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the fields of the model's config from the entries of a config.json.

        Raises ``ConfigError`` if a key is missing or has a value that the model does not support.
        """
        for key, value in self.fixed_values.items():
            if hf_config.get(key) not in (None, value):
                raise ConfigError(f"config.json: {key} = {hf_config[key]!r} is not supported, only {value!r}.")
        layer_type = "full_attention" if self.sliding_window(hf_config) is None else "sliding_attention"
        if others := {*(hf_config.get("layer_types") or ())} - {layer_type}:
            raise ConfigError(f"config.json: layer_types has {min(others)!r}; all layers must be {layer_type!r}.")
        fields = {name: hf_config.get(key, self.defaults.get(key)) for name, key in self.config_keys.items()}
        fields["n_kv_heads"] = fields["n_kv_heads"] or fields["n_heads"]
        missing = [key for name, key in self.config_keys.items() if fields[name] is None and name != "head_dim"]
        if missing:
            raise ConfigError(f"config.json lacks {', '.join(missing)}.")
        head_dim = fields["head_dim"] or self.defaults.get("head_dim")
        fields["head_dim"] = head_dim or fields["dim"] // fields["n_heads"]
        return {**fields, **self._rope_from_hf(hf_config), "initialization": "normal"}

    def to_hf(self, config: Any, metadata: HFMetadata, dtype: torch.dtype) -> dict[str, Any]:
        """Returns the config.json of a model, from the model's config, the other entries and the dtype of the weights.

        Raises ``ConfigError`` if Hugging Face's model lacks a feature of this one.
        """
        if metadata.rope_theta is not None:
            config = replace(config, rope_theta=metadata.rope_theta)
        model_type = next(iter(self.architectures))
        if metadata.window is not None:
            if not self.sliding_window_type:
                raise ConfigError(f"Hugging Face's {model_type} has no sliding window ({metadata.window} tokens here).")
            model_type = self.sliding_window_type
        shape = {key: getattr(config, name) for name, key in self.config_keys.items()}
        shape |= {"num_key_value_heads": config.kv_heads, "head_dim": config.head_size}
        return {
            "architectures": [self.architectures[model_type]],
            "model_type": model_type,
            **shape,
            **self._rope_to_hf(config),
            "max_position_embeddings": metadata.seq_len,
            **({"sliding_window": metadata.window} if metadata.window else {}),
            **{key: self.fixed_values[key] for key in ("hidden_act", "attention_bias")},
            **metadata.token_ids,
            "torch_dtype": str(dtype).removeprefix("torch."),
        }

    def _rope_from_hf(self, hf_config: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the RoPE fields: ``rope_parameters`` has all of them (transformers 5), or ``rope_scaling`` next to
        ``rope_theta`` (transformers 4)."""
        table = hf_config.get("rope_parameters") or hf_config.get("rope_scaling") or {}
        rope_type = table.get("rope_type", table.get("type", "default"))
        theta = {"rope_theta": float(table.get("rope_theta", hf_config.get("rope_theta", 10000.0)))}
        if table.get("partial_rotary_factor", 1.0) != 1.0:
            raise ConfigError("config.json: partial_rotary_factor is not supported, only 1.0.")
        if rope_type == "default":
            return theta
        if rope_type not in self.rope_scalings:
            raise unknown_name("rope_type", str(rope_type), ["default", *self.rope_scalings], "config.json")
        keys = self.rope_scalings[rope_type]
        missing = [key for key in keys.values() if key not in table]
        if missing:
            raise ConfigError(f"config.json: the RoPE parameters of type {rope_type} lack {', '.join(missing)}.")
        scaling: dict[str, Any] = {name: float(table[key]) for name, key in keys.items()}
        if "rope_original_seq_len" in scaling:
            scaling["rope_original_seq_len"] = int(scaling["rope_original_seq_len"])
        return theta | scaling

    def _rope_to_hf(self, config: Any) -> dict[str, Any]:
        scaled, condensed = config.rope_scaling_factor != 1, config.rope_condense_ratio != 1
        if config.positional_embedding != "rope" or config.rope_restart or (scaled and condensed):
            raise ConfigError(
                "Hugging Face models support neither model.positional_embedding = 'none' nor model.rope_restart, nor "
                "model.rope_scaling_factor and model.rope_condense_ratio together."
            )
        if not (scaled or condensed):
            return {"rope_theta": config.rope_theta, "rope_scaling": None}
        rope_type = "llama3" if scaled else "linear"
        table = {key: getattr(config, name) for name, key in self.rope_scalings[rope_type].items()}
        return {"rope_theta": config.rope_theta, "rope_scaling": {"rope_type": rope_type, **table}}

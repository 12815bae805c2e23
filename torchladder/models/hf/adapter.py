"""Maps a model family to Hugging Face and back: config.json entries, tensor names, and what is not supported."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from torchladder.models.hf import hf_layer_types, hf_rope
from torchladder.models.hf.config_fields import SHARED_TYPES, check_types
from torchladder.models.layer_types import types_of_config
from torchladder.registry import ConfigError
from torchladder.schedule import FULL_ATTENTION

WRITTEN_VALUES = ("hidden_act", "hidden_activation", "attention_bias")
"""Keys whose fixed value is written."""


@dataclass(frozen=True)
class HFMetadata:
    """Entries of config.json in addition to the model's shape.

    Attributes:
        seq_len: tokens in the longest row (``max_position_embeddings``).
        window: tokens a query may see, including itself (``sliding_window``), in all layers or, if the model has
            several layer types, in the sliding ones; None for full attention.
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
        type_defaults: ``model_type`` -> defaults that only this type has.
        fixed_values: key of config.json -> the one value that is supported; the key may be missing or null.
        null_values: key of config.json -> the value of the field if the key is null or missing, and written as null.
        has_nope_layers: whether config.json says which layers have RoPE (``no_rope_layers``, SmolLM 3).
        rope_thetas: layer type -> RoPE theta if it is missing; several if config.json has a RoPE for each layer type.
        sliding_window_type: the ``model_type`` that has a sliding window in all layers; empty if none has.
        layer_types_type: the ``model_type`` whose layers may have a sliding window each; empty if none has.
        slides: which layers slide if config.json has no ``layer_types``.
        vocab_tensors: parameters with one row per token.
    """

    architectures: Mapping[str, str]
    tensor_names: Mapping[str, str]
    config_keys: Mapping[str, str]
    defaults: Mapping[str, Any]
    fixed_values: Mapping[str, Any]
    sliding_window_type: str = ""
    layer_types_type: str = ""
    vocab_tensors: tuple[str, ...] = ("embedding.weight", "head.weight")
    type_defaults: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    null_values: Mapping[str, Any] = field(default_factory=dict)
    slides: hf_layer_types.Slides = hf_layer_types.slides_after_first_layers
    has_nope_layers: bool = False
    rope_thetas: Mapping[str, float] = field(default_factory=lambda: {FULL_ATTENTION: 10000.0})

    def hf_name(self, name: str) -> str:
        """Returns the Hugging Face name of a parameter."""
        layer = re.match(r"layers\.(\d+)\.", name)
        pattern = re.sub(r"^layers\.\d+\.", "layers.*.", name)
        if pattern not in self.tensor_names:
            model_type = next(iter(self.architectures))
            raise ConfigError(f"the parameter {name} has no Hugging Face name (HFAdapter of {model_type}).")
        return self.tensor_names[pattern].replace("*", layer[1] if layer else "*")

    def sliding_window(self, hf_config: Mapping[str, Any]) -> int | None:
        """Returns the window of a config.json's sliding layers in tokens, None if it has none."""
        entries = {**self._defaults(hf_config), **hf_config}
        if hf_config["model_type"] == self.layer_types_type:
            return hf_layer_types.read_layer_types(entries, self.slides)[1]
        window: int | None = entries.get("sliding_window")
        return window if hf_config["model_type"] == self.sliding_window_type else None

    def from_hf(self, hf_config: Mapping[str, Any], types: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the fields of the model's config from the entries of a config.json.

        Args:
            hf_config: the entries.
            types: field of the model's config -> its type, which is that of its entry, too.

        Raises:
            ConfigError: an entry is missing, or has another type or a value that the model does not support.
        """
        keys, defaults = self.config_keys, self._defaults(hf_config)
        nullable = {key: types[name] | None for name, key in keys.items() if key in self.null_values}
        check_types(hf_config, SHARED_TYPES | {key: types[name] for name, key in keys.items()} | nullable)
        for key, value in self.fixed_values.items():
            found = hf_config.get(key)
            if found is not None and (found != value or isinstance(found, bool) != isinstance(value, bool)):
                raise ConfigError(
                    f"{key} = {json.dumps(found)}: must be {json.dumps(value)}, others are not supported."
                )
        layer_types = None
        layer_type = FULL_ATTENTION if self.sliding_window(hf_config) is None else hf_layer_types.SLIDING_ATTENTION
        if hf_config["model_type"] == self.layer_types_type:
            layer_types = hf_layer_types.read_layer_types({**defaults, **hf_config}, self.slides)[0]
        elif others := {*(hf_config.get("layer_types") or ())} - {layer_type}:
            raise ConfigError(f"layer_types has {min(others)!r}; all layers must be {layer_type!r}.")
        fields = {name: hf_config.get(key, defaults.get(key)) for name, key in keys.items()}
        fields |= {name: self.null_values.get(key) for name, key in keys.items() if fields[name] is None}
        missing = [key for name, key in keys.items() if fields[name] is None and name not in ("head_dim", "n_kv_heads")]
        if missing:
            raise ConfigError(f"lacks {', '.join(missing)}.")
        if fields["n_kv_heads"] is None:
            fields["n_kv_heads"] = fields["n_heads"]
        if fields["head_dim"] is None:
            fields["head_dim"] = defaults.get("head_dim", fields["dim"] // max(fields["n_heads"], 1))
        mixed = {"layer_types": layer_types} if layer_types else {}
        rope = hf_rope.read_rope({**defaults, **hf_config}, types, self.rope_thetas, layer_types or [layer_type])
        nope = hf_rope.read_nope_layers({**defaults, **hf_config}) if self.has_nope_layers else {}
        return {**fields, **mixed, **rope, **nope, "initialization": "normal"}

    def _defaults(self, hf_config: Mapping[str, Any]) -> Mapping[str, Any]:
        return {**self.defaults, **self.type_defaults.get(hf_config["model_type"], {})}

    def to_hf(self, config: Any, metadata: HFMetadata, dtype: torch.dtype) -> dict[str, Any]:
        """Returns the config.json of a model, from the model's config, the other entries and the dtype of the weights.

        Raises ``ConfigError`` if Hugging Face's model lacks a feature of this one.
        """
        if metadata.rope_theta is not None:
            config = replace(config, rope_theta=metadata.rope_theta)
        model_type = next(iter(self.architectures))
        sliding: dict[str, Any] = {}
        always = self.slides is hf_layer_types.slides_between_full_layers
        if always or metadata.window is not None or len(types_of_config(config)) > 1:
            every = self.sliding_window_type if len(types_of_config(config)) == 1 else ""
            if not (every or self.layer_types_type):
                raise ConfigError(f"Hugging Face's {model_type} has no sliding window ({metadata.window} tokens here).")
            model_type = every or self.layer_types_type
            sliding = {"sliding_window": metadata.window}
            if not every:
                sliding = hf_layer_types.write_layer_types(config, model_type, metadata.window, self.slides)
        if getattr(config, "logit_softcap", 0) and "logit_softcap" not in self.config_keys:
            raise ConfigError(
                f"model.logit_softcap = {config.logit_softcap}: Hugging Face's {model_type} has no "
                "final_logit_softcapping."
            )
        for name in ("attention_sinks", *(() if self.has_nope_layers else ("nope_layers",))):
            if getattr(config, name, None):
                raise ConfigError(f"Hugging Face's {model_type} does not support model.{name}.")
        shape = {key: getattr(config, name) for name, key in self.config_keys.items()}
        shape |= {key: None for key, value in self.null_values.items() if shape[key] == value}
        shape |= {"num_key_value_heads": config.kv_heads, "head_dim": config.head_size}
        return {
            "architectures": [self.architectures[model_type]],
            "model_type": model_type,
            **shape,
            **hf_rope.write_rope(config, model_type, len(self.rope_thetas) > 1),
            **(hf_rope.write_nope_layers(config) if self.has_nope_layers else {}),
            "max_position_embeddings": metadata.seq_len,
            **sliding,
            **{key: self.fixed_values[key] for key in WRITTEN_VALUES if key in self.fixed_values},
            **{"pad_token_id": None, **metadata.token_ids},
            "torch_dtype": str(dtype).removeprefix("torch."),
        }

"""Finds the adapter for a model or a config.json, and checks that the two describe the same model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_type_hints

from torchladder.models.hf.adapter import HFAdapter
from torchladder.models.hf.hf_rope import ROPE_SCALINGS
from torchladder.models.model import Model, registry
from torchladder.registry import ConfigError, unknown_name

RESOLVED = {"n_kv_heads": "kv_heads", "head_dim": "head_size", "layer_types": "expanded_layer_types"}
"""Fields that may be None -> the property that has their value."""


def adapter_for(model: str | Model) -> HFAdapter:
    """Returns the adapter of a model, or of the model that is registered under a name."""
    kind: Any = registry.get(model) if isinstance(model, str) else type(model)
    adapter: HFAdapter | None = getattr(kind, "hf_adapter", None)
    if adapter is None:
        raise ConfigError(f"{kind.__name__} does not support Hugging Face: it sets no hf_adapter.")
    return adapter


def model_name(hf_config: dict[str, Any]) -> str:
    """Returns the name of the registered model that a config.json describes."""
    names = {}
    for name in registry.names():
        adapter = getattr(registry.get(name), "hf_adapter", None)
        names.update(dict.fromkeys(adapter.architectures if adapter else (), name))
    model_type = str(hf_config.get("model_type"))
    if model_type not in names:
        raise unknown_name("model_type", model_type, names)
    return names[model_type]


def model_section(hf_config: dict[str, Any], source: str | Path = "config.json") -> dict[str, Any]:
    """Returns the ``[model]`` section of the model that a config.json describes, with every field of its config.

    Raises ``ConfigError``, which names ``source`` and the entry, if an entry is missing or not valid.
    """
    try:
        name = model_name(hf_config)
        adapter, kind = adapter_for(name), registry.config_type(name)
        fields = adapter.from_hf(hf_config, get_type_hints(kind))
        scalings = {field: key for keys in ROPE_SCALINGS.values() for field, key in keys.items()}
        keys = adapter.config_keys
        resolved = {value: keys[field] for field, value in RESOLVED.items() if field in fields and field in keys}
        entries = {**scalings, **adapter.config_keys, **resolved, "rope_theta": "rope_theta"}
        try:
            kind(**fields)
        except ConfigError as error:  # a value out of range, by the name of its field
            message = re.sub(r"model\.(\w+)", lambda field: entries.get(field[1], field[0]), str(error))
            raise ConfigError(message) from None
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None
    return {"name": name, "flavor": "", **fields}


def sliding_window(hf_config: dict[str, Any]) -> int | None:
    """Returns the window of a config.json in tokens, None for full attention."""
    return adapter_for(model_name(hf_config)).sliding_window(hf_config)


def check_compatible(section: dict[str, Any], config: Any, source: str) -> None:
    """Raises ``ConfigError`` if a model's config is not that of a config.json (``section``, from ``model_section``).

    Initialization may differ, and the model's vocabulary may be larger. The error names ``source``.
    """
    fields = {key: value for key, value in section.items() if key not in ("name", "flavor")}
    expected = registry.config_type(section["name"])(**fields)
    if type(expected) is not type(config):
        raise ConfigError(f"{source} describes a {section['name']}, the settings describe another model.")
    for key in vars(expected):
        if key in ("initialization", "init_std"):
            continue
        wanted, found = (getattr(one, RESOLVED.get(key, key)) for one in (expected, config))
        if found != wanted and not (key == "vocab_size" and found > wanted):
            hint = " To continue training at another RoPE theta, set it in [[phases]]." if key == "rope_theta" else ""
            raise ConfigError(f"{source} has model.{key} = {wanted}, the settings have {found}.{hint}")

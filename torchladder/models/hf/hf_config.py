"""Finds the adapter for a model or a config.json, and checks that the two describe the same model."""

from __future__ import annotations

from typing import Any

from torchladder.models.hf.adapter import HFAdapter
from torchladder.models.model import registry
from torchladder.registry import ConfigError, unknown_name

RESOLVED = {"n_kv_heads": "kv_heads", "head_dim": "head_size"}
"""Fields that may be None -> the property that has their value."""


def adapter_for(name: str) -> HFAdapter:
    """Returns the adapter of a registered model.

    Raises:
        ConfigError: the model is unknown or has no adapter.
    """
    adapter: HFAdapter | None = getattr(registry.get(name), "hf_adapter", None)
    if adapter is None:
        raise ConfigError(f"the model {name!r} does not support Hugging Face: its class sets no hf_adapter.")
    return adapter


def model_name(hf_config: dict[str, Any]) -> str:
    """Returns the name of the registered model that a config.json describes.

    Raises:
        ConfigError: its ``model_type`` is not supported.
    """
    names = {}
    for name in registry.names():
        adapter = getattr(registry.get(name), "hf_adapter", None)
        names.update(dict.fromkeys(adapter.architectures if adapter else (), name))
    model_type = str(hf_config.get("model_type"))
    if model_type not in names:
        raise unknown_name("model_type in config.json", model_type, names)
    return names[model_type]


def model_section(hf_config: dict[str, Any]) -> dict[str, Any]:
    """Returns the ``[model]`` section of the model that a config.json describes, with every field of its config.

    Raises:
        ConfigError: as ``model_name`` and ``HFAdapter.from_hf``.
    """
    name = model_name(hf_config)
    return {"name": name, "flavor": "", **adapter_for(name).from_hf(hf_config)}


def sliding_window(hf_config: dict[str, Any]) -> int | None:
    """Returns the window of a config.json in tokens, None for full attention."""
    return adapter_for(model_name(hf_config)).sliding_window(hf_config)


def check_compatible(section: dict[str, Any], config: Any, source: str) -> None:
    """Checks that a model's config is that of a config.json; initialization may differ, and the vocabulary be larger.

    Args:
        section: what ``model_section`` returns.
        config: the model's config.
        source: what the error names.

    Raises:
        ConfigError: they differ.
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

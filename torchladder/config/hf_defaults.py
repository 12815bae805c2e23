"""Settings from a Hugging Face folder (``model.hf_assets_path``): defaults below the file and the command line."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from torchladder import models
from torchladder.config.sections import Config
from torchladder.config.toml_files import Origins, RawSettings
from torchladder.config.values import cli_value, cli_values
from torchladder.data.tokenizer import tokenizer_registry
from torchladder.models.hf import hf_config
from torchladder.models.hf.hf_folder import HFFolder
from torchladder.registry import ConfigError, require


def apply_hf_defaults(settings: RawSettings, origins: Origins, argv: list[str]) -> None:
    """Adds the folder's model, tokenizer and sliding window to the settings that do not set them.

    Raises:
        ConfigError: the folder has no config.json, or its model is not supported or is not model.name.
    """
    given = cli_values(argv, "model.hf_assets_path")
    path = given[-1] if given else settings.get("model", {}).get("hf_assets_path", "")
    if not path:
        return
    folder = HFFolder(path)
    model = hf_config.model_section(folder.config, folder.config_file)
    name = cli_value(argv, "model.name") or settings.get("model", {}).get("name", model["name"])
    if name != model["name"]:
        raise ConfigError(f"model.name = {name!r}: the model in {path} is {model['name']!r}.")
    sections: dict[str, dict[str, Any]] = {"model": model}
    kind = cli_value(argv, "tokenizer.name") or settings.get("tokenizer", {}).get("name")
    tokenizer = tokenizer_section(folder.path, kind)
    if kind in (None, tokenizer.get("name")):
        sections["tokenizer"] = tokenizer
    window = hf_config.sliding_window(folder.config)
    if window is not None and "layer_types" in model:
        own = settings.get("attention", {}).get("sliding_attention", {})
        table = sliding_window_sections(window, mixed=True)["attention"]["sliding_attention"]
        if "curriculum" in own:
            del table["window"]
        sections["attention"] = {"sliding_attention": {**table, **own}}
        settings.get("attention", {}).pop("sliding_attention", None)
    elif window is not None:
        sections |= _sliding_window_defaults(window, settings, argv)
    for name, section in sections.items():
        own = settings.get(name, {})
        origins.update({(name, key): folder.config_file for key in section.keys() - own.keys()})
        settings[name] = {**section, **own}


def check_hf_settings(config: Config) -> None:
    """Checks that the final settings agree with the folder.

    Raises:
        ConfigError: the model differs, or ``checkpoint.initial_load_in_hf`` has no folder to load.
    """
    path = config.model.hf_assets_path
    if config.checkpoint.initial_load_in_hf and not (path or config.checkpoint.initial_load_path):
        raise ConfigError("checkpoint.initial_load_in_hf: set model.hf_assets_path or checkpoint.initial_load_path.")
    if path:
        folder = HFFolder(path)
        section, source = hf_config.model_section(folder.config, folder.config_file), str(folder.config_file)
        hf_config.check_compatible(section, models.resolve(config.model), source)
        if config.model.flavor:
            flavor = models.registry.flavors(config.model.name)[config.model.flavor]
            hf_config.check_compatible(section, flavor, source)


def tokenizer_section(folder: Path, kind: str | None = None) -> dict[str, str]:
    """Returns the ``[tokenizer]`` section of a folder's tokenizer, preferably of that kind; empty if it has none."""
    files = [folder / name for name in tokenizer_registry.file_names() if (folder / name).is_file()]
    found = [{"name": tokenizer_registry.recognize_kind(file.read_bytes()), "path": str(file)} for file in files]
    chosen = next((section for section in found if section["name"] == kind), found[0] if found else {})
    known = ", ".join(sorted(tokenizer_registry.tokenizer_formats))
    require(chosen.get("name") != "", f"{chosen.get('path')} is not a tokenizer of a known kind. Known: {known}.")
    return chosen


def sliding_window_sections(window: int, mixed: bool = False) -> dict[str, dict[str, Any]]:
    """Returns the sections of a run with a constant sliding window, in some layers (``mixed``) or in all of them."""
    if mixed:
        return {"attention": {"sliding_attention": {"masks": ["sliding"], "window": window}}}
    return {"attention": {"masks": ["sliding"]}, "curriculum": {"name": "constant", "window": window}}


def _sliding_window_defaults(window: int, settings: RawSettings, argv: list[str]) -> dict[str, Any]:
    """Returns the sections that keep the model's window; empty if rows fit into it or masks and curriculum are set."""
    try:
        seq_len = int(cli_value(argv, "training.seq_len") or settings.get("training", {}).get("seq_len", 2048))
    except (TypeError, ValueError):
        return {}  # the checks of all settings report it
    if seq_len <= window:
        return {}
    masks = cli_values(argv, "attention.masks") or settings.get("attention", {}).get("masks")
    if masks is None and "curriculum" not in settings and not cli_value(argv, "curriculum.name"):
        return sliding_window_sections(window)
    if "sliding" not in (masks or []):
        notice = f"the model has a sliding window of {window} tokens, but attention.masks has no 'sliding'."
        print(f"torchladder: {notice}", file=sys.stderr)
    return {}

"""A run on a Hugging Face folder: what the folder says comes below the file and the command line, and must hold."""

from __future__ import annotations

from typing import Any

from torchladder import models
from torchladder.config.sections import Config
from torchladder.config.toml_files import Origins, RawSettings
from torchladder.config.values import flag, flags
from torchladder.data.tokenizer import tokenizer_files
from torchladder.models.hf import hf_config as form
from torchladder.models.hf.hf_folder import CONFIG, Folder
from torchladder.registry import ConfigError


def apply(settings: RawSettings, origins: Origins, argv: list[str]) -> None:
    """Adds what the folder says of the model, its tokenizer and its window to the settings that do not say it.

    Raises:
        ConfigError: the folder is none, or holds a model that is not known or not the one that is named.
    """
    path = _path(settings, argv)
    if not path:
        return
    folder = Folder(path)
    fields = form.read(folder.config)
    named = flag(argv, "model.name") or settings.get("model", {}).get("name", fields["name"])
    if named != fields["name"]:
        raise ConfigError(f"model.name = {named!r}: the model in {path} is a {fields['name']!r}.")
    added: dict[str, dict[str, Any]] = {"model": fields}
    tokenizer = _tokenizer(folder)
    if tokenizer.get("name") == (flag(argv, "tokenizer.name") or settings.get("tokenizer", tokenizer).get("name")):
        added["tokenizer"] = tokenizer
    window = form.window_of(folder.config)
    if window is not None:
        added |= _sliding(window, settings, argv)
    for name, section in added.items():
        origins.update({(name, key): folder.path / CONFIG for key in section.keys() - settings.get(name, {}).keys()})
        settings[name] = {**section, **settings.get(name, {})}


def check(config: Config) -> None:
    """Compares the settings as they came out with what the folder says.

    Raises:
        ConfigError: they contradict each other, or there is no folder to start from.
    """
    path, first = config.model.hf_assets_path, config.checkpoint
    if first.initial_load_in_hf and not (path or first.initial_load_path):
        raise ConfigError("checkpoint.initial_load_in_hf: set model.hf_assets_path or checkpoint.initial_load_path.")
    if path:
        fields, what = form.read(Folder(path).config), f"{path}/{CONFIG}"
        form.check_compatible(fields, models.resolve(config.model), what)
        if config.model.flavor:
            form.check_compatible(fields, models.registry.flavors(config.model.name)[config.model.flavor], what)


def _path(settings: RawSettings, argv: list[str]) -> str:
    given = flags(argv, "model.hf_assets_path")
    return given[-1] if given else settings.get("model", {}).get("hf_assets_path", "")


def _tokenizer(folder: Folder) -> dict[str, Any]:
    """Returns the section of the folder's tokenizer, empty where it has none."""
    found = [folder.path / name for name in tokenizer_files.file_names() if (folder.path / name).is_file()]
    return {"name": tokenizer_files.recognize_kind(found[0].read_bytes()), "path": str(found[0])} if found else {}


def _sliding(window: int, settings: RawSettings, argv: list[str]) -> dict[str, Any]:
    """Returns the sections that keep a sliding window, or says that the run's own do not."""
    try:
        length = int(flag(argv, "training.seq_len") or settings.get("training", {}).get("seq_len", 2048))
    except (TypeError, ValueError):
        return {}  # what it is instead is refused where all settings are
    masks = flags(argv, "attention.masks") or settings.get("attention", {}).get("masks")
    if length <= window:
        return {}
    if masks is None and "curriculum" not in settings and not flag(argv, "curriculum.name"):
        return {"attention": {"masks": ["sliding"]}, "curriculum": {"name": "constant", "window": window}}
    if "sliding" not in (masks or []):
        print(f"torchladder: the model was made with a sliding window of {window}; attention.masks leave it out.")
    return {}

"""A run's model in Hugging Face's form: what its settings say of it, and the files that go along."""

from __future__ import annotations

import shutil
from ast import literal_eval
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torchladder import checkpoint, curriculum, data
from torchladder import config as settings
from torchladder.checkpoint import folders
from torchladder.config import Config
from torchladder.data.tokenizer import files
from torchladder.models.interchange.folder import ASSETS
from torchladder.models.interchange.settings import Facts
from torchladder.registry import ConfigError

NAMES = {"huggingface": "tokenizer.json", "sentencepiece": "tokenizer.model", "tiktoken": "tokenizer.model"}
"""What a tokenizer file is called there, by the kind of its content."""


def facts(config: Config, tokenizer: data.Tokenizer | None) -> Facts:
    """Returns what a config.json says of a run beside the shape of its model."""
    ids = {} if tokenizer is None else {"bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.eos}
    return Facts(
        config.training.seq_len,
        window=window(config) if "sliding" in config.attention.masks else None,
        rope_theta=_last_phase(config, "rope_theta"),
        tokens={key: token for key, token in ids.items() if token is not None},
    )


def window(config: Config) -> int | None:
    """Returns the window at the end of a run, None for the whole row."""
    training = config.training
    ladder = curriculum.registry.build(config.curriculum, steps=max(training.steps, 1), seq_len=training.seq_len)
    last = _last_phase(config, "window") or ladder(max(training.steps, 1) - 1)
    return None if last >= training.seq_len else last


def rope_theta(config: Config, path: Path) -> float | None:
    """Returns the RoPE theta that weights were last trained at, where it is not that of the model's settings.

    Args:
        config: settings of the run.
        path: the weights, a checkpoint of the run or a Hugging Face folder.
    """
    run = folders.read_run(path) if checkpoint.complete(path) else {"fingerprints": {}}
    phases = run["fingerprints"].get("phases.rope_theta")
    if phases is None:
        return _last_phase(config, "rope_theta")
    values = [theta for first, theta in literal_eval(phases).items() if first < run["step"]]
    return values[-1] if values else None


def _last_phase(config: Config, key: str) -> Any:
    values = [getattr(phase, key) for phase in getattr(config.data, "phases", [])]
    return next((value for value in reversed(values) if value is not None), None)


def tokenizer_files(config: Config) -> dict[str, Path]:
    """Returns the files of a run's tokenizer, by the names that they have in a Hugging Face folder."""
    path = getattr(config.tokenizer, "path", "")
    return files_of(path) if path else {}


def files_of(path: str) -> dict[str, Path]:
    """Returns a tokenizer's files and those that lie beside it, by the names that they have in a Hugging Face folder.

    Raises:
        ConfigError: there is no tokenizer.
    """
    file = files.find(path)
    beside = {name: file.parent / name for name in ASSETS if (file.parent / name).is_file()}
    return beside if file.name in beside else {NAMES[files.kind(file.read_bytes())]: file}


@contextmanager
def folder(path: Path, assets: dict[str, Path], first: bool = True) -> Iterator[Path]:
    """Gives a folder to fill that gets its name, and the assets, once it is filled; of an old one nothing stays.

    Args:
        path: the name.
        assets: file name -> the file to copy.
        first: whether this rank has the folder; the others fill nothing.
    """
    partial = path.with_name(f"{path.name}.partial")
    if first:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    yield partial
    if first:
        for name, file in assets.items():
            shutil.copyfile(file, partial / name)
        shutil.rmtree(path, ignore_errors=True)
        partial.rename(path)


def run_of(path: Path) -> Config:
    """Returns the settings of the run that a checkpoint is of: the config.toml in it, or in its run's folder.

    Raises:
        ConfigError: there is none.
    """
    for place in (path, *path.resolve().parents[:2]):
        if (place / "config.toml").is_file():
            # What the folder said of the model is in the settings, and it may be gone since.
            without = ["--model.hf_assets_path", "", "--checkpoint.no_initial_load_in_hf"]
            return settings.load(["--job.config_file", str(place / "config.toml"), *without])
    raise ConfigError(f"{path} is of no run that is here: there is no config.toml in it or two folders above.")

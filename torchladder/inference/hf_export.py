"""A run's model in Hugging Face's form: what its settings say of it, and the files that go along."""

from __future__ import annotations

import logging
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from torchladder import checkpoint, curriculum, data
from torchladder import config as settings
from torchladder.checkpoint import CONFIG_FILE
from torchladder.config import Config
from torchladder.data.tokenizer import tokenizer_files
from torchladder.models import Model
from torchladder.models.hf import conversion, hf_weights
from torchladder.models.hf.hf_config import HFMetadata
from torchladder.models.hf.hf_folder import ASSETS, CONFIG
from torchladder.registry import ConfigError

logger = logging.getLogger(__name__)

TOKENIZER = "tokenizer"
"""The folder of a checkpoint in which its tokenizer is."""


def hf_metadata(config: Config, tokenizer: data.Tokenizer | None) -> HFMetadata:
    """Returns what a config.json says of a run beside the shape of its model."""
    ids = {} if tokenizer is None else {"bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.eos}
    return HFMetadata(
        config.training.seq_len,
        window=final_window(config) if "sliding" in config.attention.masks else None,
        rope_theta=_last_phase(config, "rope_theta"),
        tokens={key: token for key, token in ids.items() if token is not None},
    )


def final_window(config: Config) -> int | None:
    """Returns the window at the end of a run, None for the whole row."""
    training = config.training
    ladder = curriculum.registry.build(config.curriculum, steps=max(training.steps, 1), seq_len=training.seq_len)
    last = _last_phase(config, "window") or ladder(max(training.steps, 1) - 1)
    return None if last >= training.seq_len else last


def trained_rope_theta(config: Config, path: Path) -> float | None:
    """Returns the RoPE theta that weights were last trained at, where it is not that of the model's settings.

    Args:
        config: settings of the run.
        path: the weights, a checkpoint of the run or a Hugging Face folder.
    """
    if checkpoint.is_complete(path):
        return checkpoint.RunState.read(path).rope_theta
    return _last_phase(config, "rope_theta")


def _last_phase(config: Config, key: str) -> Any:
    values = [getattr(phase, key) for phase in config.phases]
    return next((value for value in reversed(values) if value is not None), None)


def exported_tokenizer_files(tokenizer: data.Tokenizer | None, path: str) -> dict[str, bytes]:
    """Returns a tokenizer's files, by the names that they have in a Hugging Face folder.

    Args:
        tokenizer: any, also one that a run has trained.
        path: where it was read from, and other files of it may lie; empty for nowhere.

    Raises:
        ConfigError: nothing is there.
    """
    own = {} if tokenizer is None else tokenizer.file()
    file = tokenizer_files.find(path) if path else None
    if file is None or file.name not in tokenizer_files.NAMES:
        return own
    before = tokenizer_files.NAMES[
        : tokenizer_files.NAMES.index(file.name)
    ]  # would be found in its place, and is of another tokenizer
    names = [name for name in ASSETS if name not in before and (file.parent / name).is_file()]
    return {name: (file.parent / name).read_bytes() for name in names}


def checkpoint_assets(config: Config, tokenizer: Mapping[str, bytes]) -> dict[str, bytes]:
    """Returns what a checkpoint needs to be read without its run, by file name: the settings and the tokenizer.

    A plugin's tokenizer goes along if it can be told by ``tokenizer.path`` where its files are.
    """
    files = tokenizer if hasattr(config.tokenizer, "path") else {}
    return {CONFIG_FILE: config.to_toml().encode()} | {f"{TOKENIZER}/{name}": file for name, file in files.items()}


@contextmanager
def replace_directory(path: Path, assets: Mapping[str, bytes], first: bool = True) -> Iterator[Path]:
    """Gives a folder to fill that gets its name, and the assets, once it is filled; of an old one nothing stays.

    Args:
        path: the name.
        assets: file name -> what is in it.
        first: whether this rank has the folder; the others fill nothing.
    """
    partial = path.with_name(f"{path.name}.partial")
    if first:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    yield partial
    if first:
        for name, content in assets.items():
            (partial / name).write_bytes(content)
        shutil.rmtree(path, ignore_errors=True)
        partial.rename(path)


def export_checkpoint(
    source: Path,
    path: Path,
    model: tuple[str, Any],
    facts: HFMetadata,
    assets: Mapping[str, bytes],
    dtype: torch.dtype | None,
) -> None:
    """Makes a folder of a checkpoint, from file to file; as ``conversion.from_checkpoint``.

    Raises:
        ConfigError: the checkpoint is damaged, or of another model.
    """
    wrong = checkpoint.find_corruption(source)
    if wrong is not None:
        raise ConfigError(f"{source} is damaged: {wrong}.")
    with replace_directory(path, assets) as partial, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process is what is meant
        conversion.from_checkpoint(source, partial, model, facts, dtype)


@dataclass(frozen=True)
class LastSave:
    """The Hugging Face folder beside the last checkpoint of a run, ``step-N-hf`` beside ``step-N``.

    Attributes:
        config: settings of the run.
        tokenizer: of the run.
        files: the tokenizer's, as they were when the run began.
    """

    config: Config
    tokenizer: data.Tokenizer | None
    files: Mapping[str, bytes]

    def write(self, model: Model, first: bool) -> None:
        """Writes the folder from the model in memory; every rank takes part, and ``first`` has the folder."""
        with replace_directory(self._path, self.files, first) as partial:
            hf_weights.save(model, partial, hf_metadata(self.config, self.tokenizer), self._dtype, first)
        logger.info("saved %s", self._path)

    def convert(self, model: Any) -> None:
        """Makes the folder of the checkpoint, for a run that was killed before it had one; weights are not loaded.

        Args:
            model: the model's config.
        """
        if not checkpoint.is_complete(self._checkpoint) or self._newer():
            return
        named = self.config.model.name, model
        export_checkpoint(
            self._checkpoint, self._path, named, hf_metadata(self.config, self.tokenizer), self.files, self._dtype
        )
        logger.info("saved %s", self._path)

    def _newer(self) -> bool:
        """Whether the folder is of this checkpoint, not of one of the same step that a run has saved before."""
        ours, theirs = self._checkpoint / checkpoint.CHECKSUM_FILE, self._path / CONFIG
        return theirs.is_file() and theirs.stat().st_mtime_ns >= ours.stat().st_mtime_ns

    @property
    def _path(self) -> Path:
        return self._checkpoint.with_name(f"{self._checkpoint.name}-hf")

    @property
    def _checkpoint(self) -> Path:
        saves = Path(self.config.job.dump_folder) / self.config.checkpoint.folder
        return saves / f"step-{self.config.training.steps}"

    @property
    def _dtype(self) -> torch.dtype:
        return getattr(torch, self.config.checkpoint.export_dtype)


def run_config(path: Path) -> Config:
    """Returns the settings of the run that a checkpoint is of: the config.toml in it, or in its run's folder.

    The tokenizer is the one in the checkpoint, where there is one.

    Raises:
        ConfigError: there is none.
    """
    for place in (path, *path.resolve().parents[:2]):
        if (place / CONFIG_FILE).is_file():
            # What the folder said of the model is in the settings, and it may be gone since.
            own = ["--model.hf_assets_path", "", "--checkpoint.no_initial_load_in_hf"]
            own += ["--tokenizer.path", str(path / TOKENIZER)] if (path / TOKENIZER).is_dir() else []
            return settings.load(["--job.config_file", str(place / CONFIG_FILE), *own])
    raise ConfigError(f"{path} is of no run that is here: there is no config.toml in it or two folders above.")

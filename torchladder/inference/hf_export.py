"""Exports a run's model as a Hugging Face folder, with its tokenizer."""

from __future__ import annotations

import logging
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from torchladder import checkpoint, data, models
from torchladder.config import Config
from torchladder.data.extras import import_extra
from torchladder.data.tokenizer import hf_tokenizer, tokenizer_registry
from torchladder.disk_errors import naming_path
from torchladder.inference.trained_model import TOKENIZER_FOLDER, TrainedModel
from torchladder.models import Model
from torchladder.models.hf import conversion, hf_config, hf_weights
from torchladder.models.hf.adapter import HFMetadata
from torchladder.models.hf.hf_folder import ASSET_FILES, HF_CONFIG_FILE
from torchladder.registry import ConfigError, require
from torchladder.schedule import StepSettings

logger = logging.getLogger(__name__)


def hf_metadata(
    config: Config,
    token_ids: Mapping[str, Any],
    window: int,
    rope_theta: float | None,
    layer_windows: Mapping[str, int] = MappingProxyType({}),
) -> HFMetadata:
    """Returns the values of config.json that are not the model's shape.

    Args:
        token_ids: of the exported tokenizer.
        window: tokens a query may attend to, itself included; exported only under a sliding mask.
        rope_theta: RoPE base of the weights, None for that of the model's config.
        layer_windows: layer type -> window, of the types that are not full_attention.

    Raises:
        ConfigError: full_attention layers slide beside others that do, which Hugging Face does not have.
    """
    seq_len, sliding = config.training.seq_len, layer_windows.get("sliding_attention")
    slides = "sliding" in config.attention.masks and window < seq_len
    if layer_windows:
        message = f"Hugging Face's full_attention layers do not slide, and attention.masks do ({window} tokens)."
        require(not slides, message)
        slides, window = "sliding" in config.attention.sliding_attention.masks and sliding is not None, sliding or 0
    return HFMetadata(seq_len, window=window if slides else None, rope_theta=rope_theta, token_ids=token_ids)


def lost_masks(config: Config, window: int, layer_windows: Mapping[str, int]) -> list[str]:
    """Returns a line on the masks of each layer type that Hugging Face does not have, under the windows of a step."""
    lines, mixed = [], len(config.layer_masks) > 1
    for layer_type, masks in config.layer_masks.items():
        is_full = layer_windows.get(layer_type, window) >= config.training.seq_len  # then chunk is causal
        if lost := {*masks} - {"causal", "sliding", *(["chunk"] if is_full else [])}:
            subject = f"the {layer_type} layers of the exported model attend" if mixed else "the exported model attends"
            reach = "all tokens of their window" if "sliding" in masks else "all tokens before each token"
            lines.append(f"Hugging Face has no mask {' or '.join(map(repr, sorted(lost)))}: {subject} to {reach}.")
    return lines


def check_exportable(config: Config, final: StepSettings) -> None:
    """Raises ``ConfigError`` if Hugging Face has no such model, or a package is missing that its export needs."""
    model = config.model
    try:
        import_extra("safetensors.torch", "hf", "the export")
        adapter = hf_config.adapter_for(model.name)
        metadata = hf_metadata(config, {}, final.window, final.rope_theta, final.layer_windows)
        adapter.to_hf(models.resolve(model), metadata, torch.float32)
    except ConfigError as error:
        raise ConfigError(f"checkpoint.last_save_in_hf: {error}") from None


def exported_tokenizer_files(tokenizer: data.Tokenizer | None, path: str) -> dict[str, bytes]:
    """Returns the files of a tokenizer by their names in a folder.

    Args:
        tokenizer: the tokenizer, read from files or trained by the run.
        path: its file or folder; empty if it was not read from files.

    Raises:
        ConfigError: there is no tokenizer at the path.
    """
    file, known = tokenizer_registry.find_tokenizer_file(path) if path else None, tokenizer_registry.file_names()
    if file is None or file.name not in known:
        return {} if tokenizer is None else tokenizer.files()
    # A folder's first known file is its tokenizer: one before this file would replace it.
    others = known[: known.index(file.name)]
    names = [name for name in ASSET_FILES if name not in others and (file.parent / name).is_file()]
    return {name: (file.parent / name).read_bytes() for name in names}


def checkpoint_assets(config: Config, tokenizer: Mapping[str, bytes]) -> dict[str, bytes]:
    """Returns path -> content of the files that make a checkpoint usable without its run: settings and tokenizer.

    A plugin's tokenizer is included if it has a setting ``path``.
    """
    files = tokenizer if hasattr(config.tokenizer, "path") else {}
    return {checkpoint.CONFIG_FILE: config.to_toml().encode()} | {
        f"{TOKENIZER_FOLDER}/{name}": file for name, file in files.items()
    }


@contextmanager
def replace_directory(path: Path, assets: Mapping[str, bytes], is_writer: bool = True) -> Iterator[Path]:
    """Yields a temporary directory and replaces ``path`` with it on success.

    Args:
        assets: file name -> content, added at the end.
        is_writer: whether this rank writes; the other ranks do nothing.
    """
    partial = path.with_name(f"{path.name}.partial")
    if is_writer:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    try:
        with naming_path(path):
            yield partial
            for name, content in assets.items() if is_writer else ():
                (partial / name).write_bytes(content)
    except BaseException:
        if is_writer:
            shutil.rmtree(partial, ignore_errors=True)  # what is left may be what fills the disk
        raise
    if is_writer:
        shutil.rmtree(path, ignore_errors=True)
        partial.rename(path)


def export_checkpoint(
    trained: TrainedModel,
    path: Path,
    metadata: HFMetadata,
    assets: Mapping[str, bytes],
    dtype: torch.dtype | None = None,
    vocab_size: int | None = None,
) -> None:
    """Exports a checkpoint as a Hugging Face folder from file to file.

    Args:
        path: the folder to create or replace.
        assets: file name -> content of the tokenizer.
        dtype: of the exported weights; None: as stored.
        vocab_size: rows of the vocabulary to keep; None: all.

    Raises:
        ConfigError: the checkpoint is damaged, or Hugging Face has no such model.
    """
    trained.verify()
    config = models.resolve(trained.config.model)
    if vocab_size is not None:
        config = replace(config, vocab_size=vocab_size)
    with replace_directory(path, assets) as partial, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # a single process is intended
        model, prefix = (trained.config.model.name, config), f"{trained.choice.kind}."
        conversion.checkpoint_to_hf(trained.path, partial, model, metadata, dtype, prefix, trained.averaged)


class FinalHFExport:
    """Saves ``step-N-hf`` next to the last checkpoint ``step-N`` of a run (``checkpoint.last_save_in_hf``).

    Args:
        tokenizer_files: file name -> content.
        final: the settings of the last step.
    """

    def __init__(
        self,
        config: Config,
        tokenizer: data.Tokenizer | None,
        tokenizer_files: Mapping[str, bytes],
        final: StepSettings,
    ) -> None:
        self.config = config
        self.checkpoint = Path(config.job.dump_folder, config.checkpoint.folder, f"step-{config.training.steps}")
        self.path = self.checkpoint.with_name(f"{self.checkpoint.name}-hf")
        if config.checkpoint.last_save_in_hf:  # at the start of the run: its warnings come in time
            self.tokenizer_files, token_ids = hf_tokenizer.export_tokenizer(tokenizer, tokenizer_files)
            self.metadata = hf_metadata(config, token_ids, final.window, final.rope_theta, final.layer_windows)
            for line in lost_masks(config, final.window, final.layer_windows):
                logger.warning("checkpoint.last_save_in_hf: %s", line)
        self.dtype = getattr(torch, config.checkpoint.export_dtype)

    def write(self, model: Model, is_writer: bool) -> None:
        """Saves the model in memory; a collective call, and one rank writes."""
        with replace_directory(self.path, self.tokenizer_files, is_writer) as partial:
            hf_weights.save_hf_weights(model, partial, self.metadata, self.dtype, is_writer)
        logger.info("saved %s", self.path)

    def convert(self) -> None:
        """Converts the last checkpoint if its export is missing or older: the run was killed between the two."""
        if not checkpoint.is_complete(self.checkpoint):
            return
        exported, saved = self.path / HF_CONFIG_FILE, self.checkpoint / checkpoint.CHECKSUM_FILE
        if exported.is_file() and exported.stat().st_mtime_ns >= saved.stat().st_mtime_ns:
            return
        trained = TrainedModel(self.checkpoint, self.config, checkpoint.RunState.read(self.checkpoint))
        export_checkpoint(trained, self.path, self.metadata, self.tokenizer_files, self.dtype)
        logger.info("saved %s", self.path)

"""A trained model, whole on one device: under the mask with which its run ends, at the RoPE theta of its step."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_model_state_dict

from torchladder import checkpoint, data, mask, models
from torchladder import config as settings
from torchladder.config import Config
from torchladder.data.tokenizer import tokenizer_files
from torchladder.inference import hf_export
from torchladder.models import Attend, Model
from torchladder.models.attention import kv_cache
from torchladder.models.hf import hf_weights
from torchladder.models.hf.hf_folder import CONFIG
from torchladder.registry import ConfigError


def settings_of(path: Path, seq_len: int | None = None) -> Config:
    """Returns the settings that belong to weights: those of a checkpoint's run, or what a Hugging Face folder says.

    Args:
        path: the checkpoint or the folder.
        seq_len: tokens of the longest row that will be read, for a Hugging Face folder, which may have a window.

    Raises:
        ConfigError: it is neither.
    """
    if (path / CONFIG).is_file():
        own = [] if seq_len is None else ["--training.seq_len", str(seq_len)]
        if not any((path / name).is_file() for name in tokenizer_files.NAMES):
            own += ["--tokenizer.name", "none"]
        return settings.load(["--model.hf_assets_path", str(path), *own])
    if not checkpoint.is_complete(path):
        raise ConfigError(f"{str(path)!r} is neither a complete checkpoint (step-N) nor a Hugging Face folder.")
    return hf_export.run_config(path)


def tokenizer_of(path: Path, config: Config) -> data.Tokenizer | None:
    """Returns the tokenizer that weights know, None where there is none.

    Raises:
        ConfigError: it is not here, or no longer the one that they were trained with.
    """
    try:
        found = data.build_tokenizer(config.tokenizer, config.data)
    except ConfigError as error:
        raise ConfigError(f"the tokenizer of {path}: {error}") from error
    known = checkpoint.RunState.read(path).fingerprints.get("data.tokenizer") if checkpoint.is_complete(path) else None
    if found is not None and known not in (None, found.fingerprint):
        raise ConfigError(
            f"{path} was trained with the tokenizer {known}, and its settings give {found.fingerprint} now."
        )
    return found


@dataclass(frozen=True)
class LoadedModel:
    """A trained model.

    Attributes:
        model: it, for reading rows.
        start: (T) int32 on its device, the mask of one document that fills the longest row.
        device: where it is.
    """

    model: Model
    start: Tensor
    device: torch.device

    @classmethod
    def load(
        cls, config: Config, path: Path, attend: Attend, seq_len: int, dtype: torch.dtype = torch.float32
    ) -> LoadedModel:
        """Returns the model of a run with the weights of a checkpoint or a Hugging Face folder.

        Args:
            config: settings of the run.
            path: the weights.
            attend: what attention is computed with.
            seq_len: tokens in the longest row that will be read, whatever the run's own were.
            dtype: of the weights.
        """
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        with torch.device("meta"):
            model = models.build(config.model, attend=attend, seq_len=seq_len)
        model.to_empty(device=device)
        model.init_weights(config.debug.seed)  # buffers too, which no checkpoint holds
        if (path / CONFIG).is_file():
            hf_weights.load(model, path)
        else:
            dcp.load({"model": get_model_state_dict(model)}, checkpoint_id=path, no_dist=True)
        theta = hf_export.trained_rope_theta(config, path)
        if theta is not None:
            model.set_rope_theta(theta)
        masks = [mask.registry.get(name) for name in config.attention.masks]
        window = hf_export.final_window(config) or max(seq_len, config.training.seq_len)
        positions = torch.arange(seq_len, dtype=torch.int32)[None]
        start = mask.compose(*(allow(positions, window) for allow in masks))[0]
        return cls(model.to(dtype), start.to(device), device)


class IncrementalDecoder:
    """Says what may follow each of some rows; rows that go on by one token cost that token alone.

    Args:
        config: settings of a run.
        path: its weights, a checkpoint or a Hugging Face folder.
        dtype: of the weights.
    """

    def __init__(self, config: Config, path: Path, dtype: torch.dtype = torch.float32) -> None:
        self.seq_len = config.training.seq_len
        self._cache = kv_cache.KVCache()
        self._restored = LoadedModel.load(config, path, self._cache.attend, self.seq_len, dtype)
        self._read: list[list[int]] = []

    def forget(self) -> None:
        """Reads the rows that come from their beginning."""
        self._read = []

    @torch.no_grad()
    def __call__(self, rows: list[list[int]]) -> Tensor:
        """Returns the logits (B, V) of the token after each row, in the type of the weights.

        Rows are at least 1 and at most ``seq_len`` tokens long.
        """
        known = len(rows) == len(self._read) and all(
            row == old or row[:-1] == old for row, old in zip(rows, self._read, strict=True)
        )
        self._read = [list(row) for row in rows]
        ends = [len(row) - 1 for row in rows]
        if known:  # one that has ended is given its last token again
            return self._step(ends, [row[-1:] for row in rows])[:, 0]
        self._cache.clear()
        found: dict[int, Tensor] = {}
        for begin in range(0, max(ends) + 1, kv_cache.PREFILL_CHUNK):
            part = [row[begin : begin + kv_cache.PREFILL_CHUNK] for row in rows]
            logits = self._step([begin] * len(rows), part)
            found |= {
                b: logits[b, end - begin] for b, end in enumerate(ends) if begin <= end < begin + kv_cache.PREFILL_CHUNK
            }
        return torch.stack([found[b] for b in range(len(rows))])

    def _step(self, begin: list[int], parts: list[list[int]]) -> Tensor:
        """Returns the logits (B, t, V) of the next tokens of each row, which begin at ``begin``."""
        longest, device = max(map(len, parts)), self._restored.device
        tokens = torch.tensor([part + [0] * (longest - len(part)) for part in parts], device=device)
        first = torch.tensor(begin, device=device)
        self._restored.model.set_position_offset(first)
        return self._restored.model(tokens, kv_cache.decode_mask(self._restored.start, first, longest))

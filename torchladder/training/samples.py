"""Text samples during training."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from torchladder import data
from torchladder.config import Config
from torchladder.disk_errors import tolerating
from torchladder.inference.decoding import generate
from torchladder.registry import ConfigError

logger = logging.getLogger(__name__)

MIN_ROW_TOKENS = 128
"""Rows are padded to this length times a power of two, so that a compiled kernel sees few lengths."""


class Samples:
    """Completes the prompts, on all ranks alike, and appends the texts to samples.txt.

    Args:
        logits: tokens (1, T) int64 on the CPU, position -> logits (1, V) of the token after it.
        multiple_of: divides the length of a row (tensor-parallel ranks share its tokens).

    Raises:
        ConfigError: there are prompts but no tokenizer.
    """

    def __init__(
        self,
        config: Config,
        tokenizer: data.Tokenizer | None,
        logits: Callable[[Tensor, int], Tensor],
        multiple_of: int = 1,
    ) -> None:
        self.config, self.tokenizer, self.logits = config, tokenizer, logits
        self.multiple_of = multiple_of
        self.file = Path(config.job.dump_folder) / "samples.txt"
        if tokenizer is None and config.samples.prompts:
            raise ConfigError("samples.prompts needs a tokenizer, and tokenizer.name is 'none'.")

    @torch.no_grad()
    def sample(self, step: int, is_writer: bool) -> None:
        """Completes each prompt after ``step`` steps; only the rank with ``is_writer`` writes."""
        config, tokenizer = self.config.samples, self.tokenizer
        assert tokenizer is not None
        texts = []
        for prompt in config.prompts:
            ids = tokenizer.encode(prompt) or [tokenizer.eos]
            seed = self.config.debug.seed + step
            (new,) = generate(self._next_logits, [ids], config, self.config.training.seq_len, seed, tokenizer.eos)
            texts.append(f"{prompt}{tokenizer.decode(new)}")
        for text in texts if is_writer else []:  # all or none: interrupted samples are repeated
            logger.info("sample after step %d:\n%s", step, text)
            with tolerating(self.file), self.file.open("a", encoding="utf-8") as file:
                file.write(f"--- step {step}\n{text}\n")

    def rewind(self, step: int) -> None:
        """Deletes the samples of later steps, which the resumed run repeats."""
        if self.file.exists():
            head, *parts = re.split(rb"(?m)^(?=--- step \d+\n)", self.file.read_bytes())
            kept = [part for part in parts if int(part.split(maxsplit=3)[2]) <= step]
            partial = self.file.with_suffix(".partial")
            partial.write_bytes(head + b"".join(kept))
            partial.replace(self.file)

    def _next_logits(self, rows: list[list[int]]) -> Tensor:
        """Returns the logits (1, V) of the token after the row."""
        (row,) = rows
        padded = MIN_ROW_TOKENS << max((len(row) - 1) // MIN_ROW_TOKENS, 0).bit_length()
        length = min(padded, self.config.training.seq_len)
        length = -(-length // self.multiple_of) * self.multiple_of
        tokens = F.pad(torch.tensor([row]), (0, length - len(row)))  # causal: padding changes nothing before it
        return self.logits(tokens, len(row) - 1)

"""Text samples while a model trains."""

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
from torchladder.inference.decoding import generate
from torchladder.registry import ConfigError

logger = logging.getLogger(__name__)

SHORTEST = 128
"""Tokens of the shortest row; longer ones double, so that a compiled kernel meets few lengths."""


class Samples:
    """Continues the prompts, on every rank alike, and adds the texts to samples.txt.

    Args:
        config: the settings of the run.
        tokenizer: of the run.
        forward: tokens (1, T) on the CPU → logits (1, T, V).
        multiple: rows have to be as long as a multiple of this, as the ranks share them.

    Raises:
        ConfigError: prompts, and no tokenizer.
    """

    def __init__(
        self,
        config: Config,
        tokenizer: data.Tokenizer | None,
        forward: Callable[[Tensor], Tensor],
        multiple: int = 1,
    ) -> None:
        self.config, self.tokenizer, self.forward = config, tokenizer, forward
        self.multiple = multiple
        self.file = Path(config.job.dump_folder) / "samples.txt"
        if tokenizer is None and config.samples.prompts:
            raise ConfigError("samples.prompts needs a tokenizer, and tokenizer.name is 'none'.")

    @torch.no_grad()
    def draw(self, step: int, write: bool) -> None:
        """Draws a sample for each prompt after that many steps; ``write`` on one rank."""
        config, tokenizer = self.config.samples, self.tokenizer
        assert tokenizer is not None
        texts = []
        for prompt in config.prompts:
            ids = tokenizer.encode(prompt) or [tokenizer.eos]
            seed = self.config.debug.seed + step
            (new,) = generate(self._read, [ids], config, self.config.training.seq_len, seed, tokenizer.eos)
            texts.append(f"{prompt}{tokenizer.decode(new)}")
        for text in texts if write else []:  # all or none: what is broken off is done again
            logger.info("sample after step %d:\n%s", step, text)
            with self.file.open("a", encoding="utf-8") as file:
                file.write(f"--- step {step}\n{text}\n")

    def rewind(self, step: int) -> None:
        """Drops what was drawn after more steps than that: those will be taken again."""
        if self.file.exists():
            head, *parts = re.split(rb"(?m)^(?=--- step \d+\n)", self.file.read_bytes())
            kept = [part for part in parts if int(part.split(maxsplit=3)[2]) <= step]
            partial = self.file.with_suffix(".partial")
            partial.write_bytes(head + b"".join(kept))
            partial.replace(self.file)

    def _read(self, rows: list[list[int]]) -> Tensor:
        """Returns the logits (1, V) of the token after a row."""
        (row,) = rows
        doubled = SHORTEST << max((len(row) - 1) // SHORTEST, 0).bit_length()
        length = min(doubled, self.config.training.seq_len)
        length = -(-length // self.multiple) * self.multiple
        tokens = F.pad(torch.tensor([row]), (0, length - len(row)))  # later tokens change nothing before them
        return self.forward(tokens)[:, len(row) - 1]

"""Whether tokens on disk were written with the tokenizer of the run: what their ``PREFIX.json`` says."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torchladder.data.formats.indexed import IndexedTokens
from torchladder.data.prepare.metadata import read_metadata
from torchladder.data.tokenizer import Tokenizer
from torchladder.registry import ConfigError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ReaderVocabulary:
    """The vocabulary that tokens are read with.

    Attributes:
        tokenizer: of the run; None if it has none.
        model_size: ``vocab_size`` of the model; None if it is unknown.
        fingerprint: of the model's tokenizer, if that cannot be built.
    """

    tokenizer: Tokenizer | None
    model_size: int | None = None
    fingerprint: str | None = None

    def mismatch(self, written: dict[str, Any]) -> str:
        """Returns how the tokenizer in a dataset's metadata differs, and what to do; empty if it does not."""
        expected = self.tokenizer.fingerprint if self.tokenizer else self.fingerprint
        theirs = f"{written.get('name') or 'a tokenizer'} ({_describe(written['fingerprint'], written['vocab_size'])})"
        if expected not in (None, "none", written["fingerprint"]):
            size = self.tokenizer.vocab_size if self.tokenizer else None
            return (
                f"was written with the tokenizer {theirs}, not with the run's ({_describe(expected, size)}), so its "
                "ids mean other text. Set [tokenizer] to the one that wrote the tokens, or prepare them again"
            )
        if self.model_size is not None and written["vocab_size"] > self.model_size:
            return (
                f"was written with the tokenizer {theirs}, and the model's vocab_size is {self.model_size:,}. Set "
                f"model.vocab_size to {written['vocab_size']} or more"
            )
        return ""


def check_source_tokenizer(shards: Sequence[Any], reader: ReaderVocabulary, accept: bool) -> bool:
    """Compares the tokenizer of each shard with the reader's; returns whether all of them are known.

    Args:
        shards: of one source.
        reader: the vocabulary to read them with.
        accept: warn of another tokenizer instead of refusing it.

    Raises:
        ConfigError: a shard was written with another tokenizer.
    """
    known = True
    for shard in shards:
        about = read_metadata(shard.prefix) if isinstance(shard, IndexedTokens) else None
        written = about.tokenizer if about else {}
        if not {"fingerprint", "vocab_size"} <= written.keys():
            known = False
        elif difference := reader.mismatch(written):
            message = f"{shard.prefix}.bin {difference}"
            if not accept:
                raise ConfigError(f"{message}. To accept it: data.check_tokenizer = false, or --no-check-tokenizer.")
            logger.warning("%s; accepted, since data.check_tokenizer is false.", message)
    return known


def _describe(fingerprint: str | None, size: int | None) -> str:
    """Returns a size and a fingerprint whose hashes are shortened."""
    short = re.sub(r"\b([0-9a-f]{12})[0-9a-f]{52}\b", r"\1", str(fingerprint))
    return short if size is None else f"{size:,} tokens, {short}"

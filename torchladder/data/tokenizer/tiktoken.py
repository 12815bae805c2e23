"""tiktoken rank files in Llama 3's form: a token and its rank per line, then the special tokens above all ranks."""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from torchladder.data.dataloader import Tokenizer
from torchladder.data.extras import missing
from torchladder.data.tokenizer import tokenizer_files
from torchladder.data.tokenizer.byte_tokenizer import register
from torchladder.registry import ConfigError

PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How Llama 3 cuts a text into words before it merges bytes (its reference tokenizer.py)."""
SPECIAL = 256
"""Special tokens above the ranks; Llama 3's first two begin and end a text."""
WHOLE, RUN = 400_000, 25_000
"""Characters encoded at once, and of a run with or without white space, as in Llama 3: more overflows the matcher."""
LONG = re.compile(rf"\s{{{RUN + 1},}}|\S{{{RUN + 1},}}")


@register("tiktoken")
def tiktoken(path: str = "", pattern: str = PATTERN) -> Tokenizer:
    """A tiktoken rank file in Llama 3's form: ``tokenizer.model`` of its original weights.

    Args:
        path: the rank file, or a folder with it as tokenizer.model.
        pattern: regular expression that cuts a text into words.

    Raises:
        ConfigError: the file is missing or holds no ranks.
    """
    return Tiktoken(tokenizer_files.content(path), pattern, path)


class Tiktoken(Tokenizer):
    """Ranks in memory, with 256 special tokens above them: the first begins, the second ends a document.

    Args:
        ranks: content of a rank file.
        pattern: regular expression that cuts a text into words.
        name: what errors call the file.
    """

    def __init__(self, ranks: bytes, pattern: str = PATTERN, name: str = "the rank file") -> None:
        try:
            from tiktoken import Encoding
        except ImportError:
            raise missing("tiktoken", "tiktoken", f"reading {name}") from None
        tokens = _ranks(ranks, name)
        self.bos, self.eos = len(tokens), len(tokens) + 1
        self._ranks = len(tokens)
        self.vocab_size = len(tokens) + SPECIAL
        self.fingerprint = f"tiktoken {hashlib.sha256(ranks + pattern.encode()).hexdigest()}"
        self._encoding = Encoding("ranks", pat_str=pattern, mergeable_ranks=tokens, special_tokens={})
        self._content = ranks, pattern, name

    def __reduce__(self) -> tuple[type[Tiktoken], tuple[bytes, str, str]]:
        return Tiktoken, self._content

    def encode(self, text: str) -> list[int]:
        return [token for part in _parts(text) for token in self._encoding.encode_ordinary(part)]

    def decode(self, ids: list[int]) -> str:
        return self._encoding.decode([token for token in ids if 0 <= token < self._ranks])

    def file(self) -> dict[str, bytes]:
        return {"tokenizer.model": self._content[0]}

    def encode_batch(self, texts: list[str], threads: int = 1) -> list[np.ndarray]:
        if threads == 1:
            return [self._array(text) for text in texts]
        with ThreadPoolExecutor(threads) as pool:  # the encoder works outside of Python's lock
            return list(pool.map(self._array, texts))

    def _array(self, text: str) -> np.ndarray:
        parts = [self._encoding.encode_to_numpy(part, disallowed_special=()) for part in _parts(text)]
        return parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, np.uint32), *parts])


def _parts(text: str) -> list[str]:
    """Cuts a text where Llama 3 does; most texts are one part."""
    parts = []
    for begin in range(0, len(text), WHOLE):
        whole = text[begin : begin + WHOLE]
        cuts = [at for run in LONG.finditer(whole) for at in range(run.start() + RUN, run.end(), RUN)]
        parts += [whole[a:b] for a, b in zip([0, *cuts], [*cuts, len(whole)], strict=True)]
    return parts


def _ranks(data: bytes, name: str) -> dict[bytes, int]:
    """Returns the rank of each token; ranks count from 0 without gaps."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(data.splitlines(), start=1):
        if not line:
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise ConfigError(f"{name}:{number} is no token and its rank.{tokenizer_files.hint(data)}") from error
    if sorted(ranks.values()) != list(range(len(ranks))) or not ranks:
        raise ConfigError(f"{name} is no whole rank file: its {len(ranks)} ranks do not count from 0 without gaps.")
    if not all(bytes([byte]) in ranks for byte in range(256)):
        raise ConfigError(f"{name} lacks some single bytes, so it cannot encode every text.")
    return ranks

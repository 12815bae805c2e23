"""tiktoken rank files in Llama 3's format: a token and its rank per line; special tokens are above all ranks."""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from torchladder.data.extras import import_extra
from torchladder.data.tokenizer import tokenizer_json
from torchladder.data.tokenizer.tokenizer_registry import Tokenizer, find_tokenizer_file, kind_hint, register
from torchladder.registry import ConfigError

LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How Llama 3 splits a text into words before it merges bytes (its reference tokenizer.py)."""
NUM_SPECIAL_TOKENS = 256
"""Special tokens above the ranks; Llama 3's first two begin and end a text."""
MAX_CHARS, MAX_RUN_CHARS = 400_000, 25_000
"""Characters encoded at once, and of a run with or without white space, as in Llama 3: more overflows the matcher."""
LONG_RUN = re.compile(rf"\s{{{MAX_RUN_CHARS + 1},}}|\S{{{MAX_RUN_CHARS + 1},}}")


@register("tiktoken", "tokenizer.model", lambda content: bool(re.match(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n", content)))
def tiktoken(path: str = "", pattern: str = LLAMA3_PATTERN) -> Tokenizer:
    """A tiktoken rank file in Llama 3's format: ``tokenizer.model`` of its original weights.

    Args:
        path: The rank file, or a folder that contains it as tokenizer.model.
        pattern: Regular expression that splits a text into words.

    Raises:
        ConfigError: the file is missing or holds no ranks.
    """
    return Tiktoken(find_tokenizer_file(path).read_bytes(), pattern, path)


class Tiktoken(Tokenizer):
    """Ranks in memory, with 256 special tokens above them: the first begins, the second ends a document.

    Args:
        ranks: content of a rank file.
        pattern: regular expression that splits a text into words.
        name: what errors call the file.
    """

    def __init__(self, ranks: bytes, pattern: str = LLAMA3_PATTERN, name: str = "the rank file") -> None:
        library = import_extra("tiktoken", "tiktoken", f"reading {name}")
        tokens = _ranks(ranks, name)
        self.bos, self.eos = len(tokens), len(tokens) + 1
        self._ranks = len(tokens)
        self.vocab_size = len(tokens) + NUM_SPECIAL_TOKENS
        self.fingerprint = f"tiktoken {hashlib.sha256(ranks + pattern.encode()).hexdigest()}"
        self._encoding = library.Encoding("ranks", pat_str=pattern, mergeable_ranks=tokens, special_tokens={})
        self._content = ranks, pattern, name

    def __reduce__(self) -> tuple[type[Tiktoken], tuple[bytes, str, str]]:
        return Tiktoken, self._content

    def encode(self, text: str) -> list[int]:
        return [token for piece in _split_long(text) for token in self._encoding.encode_ordinary(piece)]

    def decode(self, ids: list[int]) -> str:
        return self._encoding.decode([token for token in ids if 0 <= token < self._ranks])

    def files(self) -> dict[str, bytes]:
        return {"tokenizer.model": self._content[0]}

    def tokenizer_json(self) -> bytes:
        ranks, pattern, name = self._content
        reserved = (f"<|reserved_special_token_{number}|>" for number in range(NUM_SPECIAL_TOKENS - 2))
        special = ["<|begin_of_text|>", "<|end_of_text|>", *reserved]
        return tokenizer_json.from_ranks(_ranks(ranks, name), pattern, special)

    def encode_batch(self, texts: list[str], threads: int = 1) -> list[np.ndarray]:
        if threads == 1:
            return [self._array(text) for text in texts]
        with ThreadPoolExecutor(threads) as pool:  # the encoder releases the GIL
            return list(pool.map(self._array, texts))

    def _array(self, text: str) -> np.ndarray:
        pieces = [self._encoding.encode_to_numpy(piece, disallowed_special=()) for piece in _split_long(text)]
        return pieces[0] if len(pieces) == 1 else np.concatenate([np.empty(0, np.uint32), *pieces])


def _split_long(text: str) -> list[str]:
    """Splits a text where Llama 3 does; most texts are one piece."""
    pieces = []
    for begin in range(0, len(text), MAX_CHARS):
        piece = text[begin : begin + MAX_CHARS]
        runs = LONG_RUN.finditer(piece)
        cuts = [at for run in runs for at in range(run.start() + MAX_RUN_CHARS, run.end(), MAX_RUN_CHARS)]
        pieces += [piece[a:b] for a, b in zip([0, *cuts], [*cuts, len(piece)], strict=True)]
    return pieces


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
            raise ConfigError(f"{name}:{number} is not a token and its rank.{kind_hint(data, 'tiktoken')}") from error
    if sorted(ranks.values()) != list(range(len(ranks))) or not ranks:
        raise ConfigError(
            f"{name} is not a complete rank file: its {len(ranks)} ranks do not count from 0 without gaps."
        )
    if not all(bytes([byte]) in ranks for byte in range(256)):
        raise ConfigError(f"{name} lacks tokens of single bytes, so it cannot encode every text.")
    return ranks

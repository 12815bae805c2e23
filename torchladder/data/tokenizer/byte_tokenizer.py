"""The tokenizer of bytes, which needs no file."""

from __future__ import annotations

import numpy as np

from torchladder.data.tokenizer import tokenizer_json
from torchladder.data.tokenizer.tokenizer_registry import Tokenizer, register


@register("bytes")
class ByteTokenizer(Tokenizer):
    """UTF-8 bytes as tokens 0 to 255, and 256 to end a document."""

    bos = None
    eos = 256
    vocab_size = 257
    fingerprint = "bytes"

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8", errors="replace"))

    def decode(self, ids: list[int]) -> str:
        return bytes(token for token in ids if 0 <= token < 256).decode("utf-8", errors="replace")

    def tokenizer_json(self) -> bytes:
        return tokenizer_json.from_ranks({bytes([byte]): byte for byte in range(256)}, "", ["<|end_of_text|>"])

    def encode_batch(self, texts: list[str], threads: int = 1) -> list[np.ndarray]:
        return [np.frombuffer(text.encode("utf-8", errors="replace"), dtype=np.uint8) for text in texts]

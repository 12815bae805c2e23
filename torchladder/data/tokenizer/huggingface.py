"""Hugging Face's ``tokenizer.json``, read by the library ``tokenizers``."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from torchladder.data.dataloader import Tokenizer
from torchladder.data.extras import missing
from torchladder.data.tokenizer import tokenizer_files
from torchladder.data.tokenizer.byte_tokenizer import register
from torchladder.registry import ConfigError, unknown_name

BOS = ("<|begin_of_text|>", "<s>", "<bos>", "<|startoftext|>", "[BOS]")
EOS = ("<|end_of_text|>", "</s>", "<eos>", "<|endoftext|>", "[EOS]")
"""Names by which the ends of a document are known where no tokenizer_config.json names them."""


@register("huggingface")
def huggingface(path: str = "", bos_token: str = "", eos_token: str = "") -> Tokenizer:
    """A ``tokenizer.json``, with the ``tokenizer_config.json`` beside it where there is one.

    Args:
        path: the file, or a folder with it as tokenizer.json.
        bos_token: the special token that may begin a document; empty: the one that the config or its name tells.
        eos_token: the special token that ends a document; empty: the one that the config or its name tells.

    Raises:
        ConfigError: the file is missing or damaged, or no token ends a document.
    """
    file = tokenizer_files.find(path)
    beside = file.with_name("tokenizer_config.json")
    config = _load(beside.read_bytes(), beside) if beside.is_file() else {}
    named = {key: _name(config.get(key)) for key in ("bos_token", "eos_token")}
    return HuggingFace(file.read_bytes(), bos_token or named["bos_token"], eos_token or named["eos_token"], str(file))


class HuggingFace(Tokenizer):
    """A ``tokenizer.json`` in memory. Special tokens written out in a text are text.

    Args:
        content: of the file.
        bos_token: the token that may begin a document; empty is told from its name.
        eos_token: the token that ends a document; empty is told from its name.
        name: what errors call the file.
    """

    def __init__(self, content: bytes, bos_token: str = "", eos_token: str = "", name: str = "tokenizer.json") -> None:
        try:
            import tokenizers
        except ImportError:
            raise missing("tokenizers", "hf", f"reading {name}") from None
        _load(content, name)
        try:
            self._part = tokenizers.Tokenizer.from_str(content.decode())
        except Exception as error:  # the library knows no narrower type
            raise ConfigError(f"{name} is no tokenizer.json: {error}.{tokenizer_files.hint(content)}") from error
        self._part.no_truncation()
        self._part.no_padding()
        self._part.encode_special_tokens = True  # "</s>" in a text is four letters, not the end of a document
        self._vocabulary = self._part.get_vocab(with_added_tokens=True)
        self.vocab_size = max(self._vocabulary.values()) + 1
        self.bos = self._id("bos_token", bos_token, BOS, name)
        eos = self._id("eos_token", eos_token, EOS, name)
        if eos is None:
            raise ConfigError(
                f"{name} does not tell which token ends a document: set eos_token. Often: {', '.join(EOS)}."
            )
        self.eos = eos
        ends = f"bos {self.bos} eos {self.eos}"
        self.fingerprint = f"huggingface {hashlib.sha256(content).hexdigest()} {ends}"
        self._content = content, bos_token, eos_token, name

    def __reduce__(self) -> tuple[type[HuggingFace], tuple[bytes, str, str, str]]:
        return HuggingFace, self._content

    def encode(self, text: str) -> list[int]:
        return self._part.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        return self._part.decode([token for token in ids if 0 <= token < self.vocab_size], skip_special_tokens=True)

    def file(self) -> dict[str, bytes]:
        content, bos_token, eos_token, _ = self._content
        named = {key: token for key, token in (("bos_token", bos_token), ("eos_token", eos_token)) if token}
        config = json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **named}, indent=2).encode()
        return {"tokenizer.json": content} | ({"tokenizer_config.json": config} if named else {})

    def encode_batch(self, texts: list[str], threads: int = 1) -> list[np.ndarray]:
        # The library uses every core for a batch of many; a batch of one stays on one.
        batches = [texts] if threads > 1 else [[text] for text in texts]
        encode = self._part.encode_batch_fast
        encoded = [part for batch in batches for part in encode(batch, add_special_tokens=False)]
        return [np.asarray(part.ids, dtype=np.int32) for part in encoded]

    def _id(self, key: str, token: str, usual: tuple[str, ...], name: str) -> int | None:
        if token and token not in self._vocabulary:
            raise ConfigError(f"{key}: {unknown_name('token of ' + name, token, self._special())}")
        known = [token] if token else [usual_name for usual_name in usual if usual_name in self._vocabulary]
        return self._vocabulary[known[0]] if known else None

    def _special(self) -> list[str]:
        return [token.content for token in self._part.get_added_tokens_decoder().values()]


def _load(content: bytes, name: str | Path) -> dict[str, Any]:
    try:
        loaded = json.loads(content)
    except ValueError as error:
        raise ConfigError(f"{name} is not JSON ({error}).{tokenizer_files.hint(content)}") from error
    if not isinstance(loaded, dict):
        raise ConfigError(f"{name} holds no JSON object.")
    return loaded


def _name(token: Any) -> str:
    """Returns a token's text, which a config writes plainly or as an object."""
    return token.get("content", "") if isinstance(token, dict) else token or ""

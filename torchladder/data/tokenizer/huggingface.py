"""Hugging Face's ``tokenizer.json``, read by the library ``tokenizers``."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from torchladder.data.extras import import_extra
from torchladder.data.tokenizer.dropped_characters import DroppedCharacters
from torchladder.data.tokenizer.tokenizer_registry import Tokenizer, find_tokenizer_file, kind_hint, register
from torchladder.registry import ConfigError, require, unknown_name

BOS = ("<|begin_of_text|>", "<s>", "<bos>", "<|startoftext|>", "[BOS]")
EOS = ("<|end_of_text|>", "</s>", "<eos>", "<|endoftext|>", "[EOS]")
UNK = ("<unk>", "<|unk|>", "<UNK>", "[UNK]")
PAD = ("<pad>", "<|pad|>", "<PAD>", "[PAD]", "<|finetune_right_pad_id|>")
"""Usual names of the tokens that begin and end a document, stand for unknown text and fill rows up."""


@register("huggingface", "tokenizer.json", lambda content: content.lstrip().startswith(b"{"))
def huggingface(path: str = "", bos_token: str = "", eos_token: str = "") -> Tokenizer:
    """A ``tokenizer.json``, with the ``tokenizer_config.json`` in the same folder if there is one.

    Args:
        path: The file, or a folder that contains it.
        bos_token: Special token that may begin a document; empty: the one of the config, or one with a usual name.
        eos_token: Special token that ends a document; empty: the one of the config, or one with a usual name.

    Raises:
        ConfigError: the file is missing or damaged, or no token ends a document.
    """
    file = find_tokenizer_file(path)
    config_file = file.with_name("tokenizer_config.json")
    config = load_json(config_file.read_bytes(), config_file) if config_file.is_file() else {}
    bos_token = bos_token or token_text(config, "bos_token", config_file)
    eos_token = eos_token or token_text(config, "eos_token", config_file)
    return HuggingFace(file.read_bytes(), bos_token, eos_token, str(file))


class HuggingFace(Tokenizer):
    """A ``tokenizer.json`` in memory. Special tokens spelled out in a text are encoded as text.

    Args:
        content: of the file.
        bos_token: the token that may begin a document; empty for one with a usual name.
        eos_token: the token that ends a document; empty for one with a usual name.
        name: what errors call the file.
    """

    def __init__(self, content: bytes, bos_token: str = "", eos_token: str = "", name: str = "tokenizer.json") -> None:
        tokenizers = import_extra("tokenizers", "hf", f"reading {name}")
        loaded = load_json(content, name)
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(content.decode())
        except Exception as error:  # the library raises no narrower type
            raise ConfigError(f"{name} is not a tokenizer.json: {error}.{kind_hint(content, 'huggingface')}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True  # "</s>" in a text is four letters, not the end of a document
        self._vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        require(bool(self._vocabulary), f"{name} has no tokens: its vocabulary is empty.")
        self.vocab_size = max(self._vocabulary.values()) + 1
        self.bos = self._id("bos_token", bos_token, BOS, name)
        eos = self._id("eos_token", eos_token, EOS, name)
        if eos is None:
            raise ConfigError(
                f"{name} does not say which token ends a document: set eos_token. Usual names: {', '.join(EOS)}."
            )
        self.eos = eos
        ends = f"bos {self.bos} eos {self.eos}"
        self.fingerprint = f"huggingface {hashlib.sha256(content).hexdigest()} {ends}"
        model = loaded["model"]  # a Unigram has the id, the others the text
        self.unk = model.get("unk_id", self._vocabulary.get(model.get("unk_token")))
        self._dropped_characters = DroppedCharacters(self._tokenizer, tokenizers.pre_tokenizers.ByteLevel.alphabet())
        self._content = content, bos_token, eos_token, name

    def __reduce__(self) -> tuple[type[HuggingFace], tuple[bytes, str, str, str]]:
        return HuggingFace, self._content

    def encode(self, text: str) -> list[int]:
        try:
            ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        except Exception as error:  # the library raises no narrower type
            raise self._cannot_encode(text, error) from error
        return ids

    def decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(
            [token for token in ids if 0 <= token < self.vocab_size], skip_special_tokens=True
        )

    def files(self) -> dict[str, bytes]:
        content, bos_token, eos_token, _ = self._content
        named = {key: token for key, token in (("bos_token", bos_token), ("eos_token", eos_token)) if token}
        config = json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **named}, indent=2).encode()
        return {"tokenizer.json": content} | ({"tokenizer_config.json": config} if named else {})

    def dropped(self, text: str) -> str:
        return self._dropped_characters(text) if self.unk is None else ""

    def encode_batch(self, texts: list[str], threads: int = 1) -> list[np.ndarray]:
        # The library uses all cores for a batch of several texts, and one core for a batch of one.
        batches = [texts] if threads > 1 else [[text] for text in texts]
        encode = self._tokenizer.encode_batch_fast
        try:
            encoded = [one for batch in batches for one in encode(batch, add_special_tokens=False)]
        except Exception:  # the library raises no narrower type
            for text in texts:
                self.encode(text)  # raises with the text that is not encoded
            raise
        return [np.asarray(one.ids, dtype=np.int32) for one in encoded]

    def _cannot_encode(self, text: str, error: Exception) -> ConfigError:
        def fails(word: str) -> bool:
            try:
                self._tokenizer.encode(word, add_special_tokens=False)
            except Exception:  # the library raises no narrower type
                return True
            return False

        word = next(filter(fails, text.split()), text)
        return ConfigError(
            f"{self._content[-1]} cannot encode {word[:40]!r}: {error}. Use a tokenizer that has an unknown token, or "
            "one that covers the text."
        )

    def _id(self, key: str, token: str, usual: tuple[str, ...], name: str) -> int | None:
        if token and token not in self._vocabulary:
            special = [known.content for known in self._tokenizer.get_added_tokens_decoder().values()]
            raise ConfigError(f"{key}: {unknown_name('token of ' + name, token, special)}")
        found = [token] if token else [known for known in usual if known in self._vocabulary]
        return self._vocabulary[found[0]] if found else None


def load_json(content: bytes, name: str | Path) -> dict[str, Any]:
    """Returns the JSON object in a file; raises ``ConfigError`` if there is none."""
    try:
        loaded = json.loads(content)
    except ValueError as error:
        raise ConfigError(f"{name} is not JSON ({error}).{kind_hint(content, 'huggingface')}") from error
    if not isinstance(loaded, dict):
        raise ConfigError(f"{name} is not a JSON object.")
    return loaded


def token_text(config: dict[str, Any], key: str, file: str | Path) -> str:
    """Returns a token's text, which a config stores as a string or as an object; empty if it has none."""
    token = config.get(key)
    text = token.get("content") if isinstance(token, dict) else token
    if not isinstance(text, str | None):
        remedy = f": set tokenizer.{key} to one" if key in ("bos_token", "eos_token") else ""
        raise ConfigError(f"{file}: {key} is {token!r}, not the text of one token{remedy}.")
    return text or ""

"""Characters that a ``tokenizer.json`` without an unknown token drops."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


class DroppedCharacters:
    """Finds the characters that become no token, which happens only in a BPE model without an unknown token.

    BPE merges the symbols of a word, one per character or byte, and drops a symbol that is not in the vocabulary. So a
    character is dropped, in whole or in part, if one of its symbols is missing. White space does not count.

    Args:
        tokenizer: of the library ``tokenizers``.
        byte_alphabet: the library's symbols of all bytes.
    """

    def __init__(self, tokenizer: Any, byte_alphabet: Iterable[str]) -> None:
        self._model = tokenizer.model
        self._normalizer, self._pre_tokenizer = tokenizer.normalizer, tokenizer.pre_tokenizer
        self._vocabulary = tokenizer.get_vocab(with_added_tokens=False)
        self._is_dropped: dict[str, bool] = {}
        self._may_drop = type(self._model).__name__ == "BPE" and not (
            self._symbols("\U0001f600") <= set(byte_alphabet) <= self._vocabulary.keys()  # words are bytes, all known
        )

    def __call__(self, text: str) -> str:
        if not self._may_drop:
            return ""
        characters, known = set(text), self._is_dropped
        known |= {character: self._check(character) for character in characters - known.keys()}
        dropped = {character for character in characters if known[character]}
        return "".join(character for character in text if character in dropped) if dropped else ""

    def _check(self, character: str) -> bool:
        spaces = {"▁", "Ġ"} - {character}  # how the beginning of a word is marked
        return not character.isspace() and not all(map(self._is_known, self._symbols(character) - spaces))

    def _symbols(self, text: str) -> set[str]:
        text = self._normalizer.normalize_str(text) if self._normalizer else text
        words = self._pre_tokenizer.pre_tokenize_str(text) if self._pre_tokenizer else [(text, None)]
        return {symbol for word, _ in words for symbol in word}

    def _is_known(self, symbol: str) -> bool:
        if self._model.byte_fallback and all(f"<0x{byte:02X}>" in self._vocabulary for byte in symbol.encode()):
            return True
        prefix, suffix = self._model.continuing_subword_prefix or "", self._model.end_of_word_suffix or ""
        return not {symbol, prefix + symbol, symbol + suffix, prefix + symbol + suffix}.isdisjoint(self._vocabulary)

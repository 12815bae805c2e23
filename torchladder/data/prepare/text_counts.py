"""How well a tokenizer expresses its texts: bytes per token, and what it has no token for."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from torchladder.data.tokenizer import Tokenizer
from torchladder.registry import ConfigError, require

MAX_UNKNOWN_FRACTION = 0.01
"""Tokens of a text that may be unknown, unless a setting allows more."""
MAX_EXAMPLES, MAX_EXAMPLE_CHARS = 5, 24


@dataclass(frozen=True)
class TextCounts:
    """What texts became, without the tokens that begin and end a document.

    Attributes:
        text_bytes: of the texts in UTF-8.
        text_tokens: number of their tokens.
        unknown_tokens: how many of these are the tokenizer's ``unk``.
        dropped_characters: characters that became no token at all.
        unknown_words: the first words with either.
    """

    text_bytes: int = 0
    text_tokens: int = 0
    unknown_tokens: int = 0
    dropped_characters: int = 0
    unknown_words: list[str] = field(default_factory=list)

    def __add__(self, other: TextCounts) -> TextCounts:
        words = dict.fromkeys([*self.unknown_words, *other.unknown_words])
        return TextCounts(
            self.text_bytes + other.text_bytes,
            self.text_tokens + other.text_tokens,
            self.unknown_tokens + other.unknown_tokens,
            self.dropped_characters + other.dropped_characters,
            list(words)[:MAX_EXAMPLES],
        )

    @property
    def unknown_fraction(self) -> float:
        """The fraction of unknown tokens; a dropped character counts as one."""
        unknown = self.unknown_tokens + self.dropped_characters
        return unknown / max(self.text_tokens + self.dropped_characters, 1)

    def describe(self) -> str:
        return f"{self.text_bytes / max(self.text_tokens, 1):.2f} bytes per token, {self.unknown_fraction:.2%} unknown"

    def check(self, name: str, limit: float, setting: str, done: float = 1.0) -> None:
        """Raises ``ConfigError`` if more than ``limit`` of the tokens are unknown.

        Args:
            name: what errors call the texts.
            limit: the largest fraction that is accepted.
            setting: the setting with the limit.
            done: the fraction of the texts that has been counted; the rest is taken to have no unknown token.
        """
        if self.unknown_fraction * done <= limit:
            return
        dropped = f" and {self.dropped_characters:,} characters became no token" if self.dropped_characters else ""
        words = ", ".join(map(repr, self.unknown_words))
        raise ConfigError(
            f"{name}: the tokenizer does not know {self.unknown_fraction:.1%} of the text: {self.unknown_tokens:,} of "
            f"{self.text_tokens:,} tokens are its unknown token{dropped}, for example in {words}. Use a tokenizer "
            f"that covers the text, or accept this with {setting} (now {limit:g})."
        )


def check_max_unknown_fraction(fraction: float, setting: str) -> None:
    """Raises ``ConfigError`` unless the fraction is in [0, 1]."""
    require(0 <= fraction <= 1, f"{setting} = {fraction}: must be from 0 to 1.")


def find_unknown_words(tokenizer: Tokenizer, text: str) -> list[str]:
    """Returns the first words, or white space, of a text that have an unknown token or a dropped character."""
    found: dict[str, None] = {}
    for word in re.findall(r"\S+|\s", text):
        if tokenizer.unk in tokenizer.encode(word) or tokenizer.dropped(word):
            found[word if len(word) <= MAX_EXAMPLE_CHARS else f"{word[:MAX_EXAMPLE_CHARS]}..."] = None
            if len(found) == MAX_EXAMPLES:
                break
    return list(found)

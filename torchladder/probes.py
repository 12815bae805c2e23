"""Long-context probes: rows that end with a question whose answer stands earlier in the row.

A row is filler in which a *cue* and the *answer* that follows it occur twice, the second time at the row's end::

    filler ... cue answer ... filler ... cue answer
               first occurrence          second occurrence

A model that uses its context predicts the second answer from the first one, however far away it is. A row is a pure
function of the probe, the seed, the context, the place of the first occurrence, its own number, and the tokens that
rows are made of. A plugin registers a probe under a name::

    @probes.register("mine")
    class Mine(Probe): ...
"""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from torchladder.registry import ConfigError, Registry, require

DEPTHS = tuple(step / 10 for step in range(11))
"""Where a needle is, from the start of the row (0) to the question at its end (1)."""

MAX_DRAWS = 100
"""Attempts to draw a row whose cue occurs nowhere else in it."""


@dataclass(frozen=True)
class ProbePoint:
    """A measurement: where rows of one context have the answer.

    Attributes:
        context: tokens that the model reads; a row has one more, which is only predicted.
        first: place in the row of the answer's first token at its first occurrence.
        second: the same at its second occurrence.
        depth: of the first occurrence in the row, 0 to 1; None for a probe that is measured by distance.
    """

    context: int
    first: int
    second: int
    depth: float | None = None

    @property
    def distance(self) -> int:
        """Tokens from each token of the answer to its repetition."""
        return self.second - self.first


@dataclass(frozen=True, eq=False)
class ProbeTokens:
    """The tokens that rows are made of.

    Attributes:
        vocabulary: (n,) int64, ids to draw random tokens from, without those of special tokens.
        text: (n,) int64, the user's own text, without special tokens; None without one.
    """

    vocabulary: np.ndarray
    text: np.ndarray | None = None

    @classmethod
    def from_text(cls, vocabulary: np.ndarray, text: np.ndarray) -> ProbeTokens:
        """Returns a text without the ids that ``vocabulary`` lacks; random tokens are drawn from those in the text."""
        text = text[np.isin(text, vocabulary)].astype(np.int64)
        return cls(np.unique(text), text)

    def random(self, size: int, generator: np.random.Generator) -> np.ndarray:
        """Returns random tokens (size,) int64."""
        return generator.choice(self.vocabulary, size)

    def filler(self, size: int, generator: np.random.Generator) -> np.ndarray:
        """Returns a random piece of the text (size,) int64; without a text, random tokens."""
        if self.text is None:
            return self.random(size, generator)
        begin = int(generator.integers(len(self.text) - size + 1))
        return self.text[begin : begin + size].copy()


class Probe(ABC):
    """A kind of row.

    Attributes:
        cue: number of tokens that tell which answer follows.
        answer: number of tokens of the answer.
        min_context: the shortest context that holds a row.
        needs_text: whether rows are made of the user's own text.
        unique_cue: whether the cue occurs nowhere else in the row.
    """

    cue: ClassVar[int] = 4
    answer: ClassVar[int]
    min_context: ClassVar[int]
    needs_text: ClassVar[bool] = False
    unique_cue: ClassVar[bool] = True

    @abstractmethod
    def points(self, context: int) -> list[ProbePoint]:
        """Returns what is measured at a context of ``min_context`` or more."""

    @abstractmethod
    def fill(self, point: ProbePoint, tokens: ProbeTokens, generator: np.random.Generator) -> np.ndarray:
        """Returns a row (context + 1,) int64 with the first occurrence of cue and answer in place."""

    def row(self, point: ProbePoint, tokens: ProbeTokens, generator: np.random.Generator) -> np.ndarray:
        """Returns a row (context + 1,) int64.

        Raises:
            ConfigError: there are too few different tokens for a cue that occurs nowhere else.
        """
        first, second = (slice(place - self.cue, place + self.answer) for place in (point.first, point.second))
        for _ in range(MAX_DRAWS):
            row = self.fill(point, tokens, generator)
            row[second] = row[first]
            cue = row[point.second - self.cue : point.second]
            if not self.unique_cue or (sliding_window_view(row, self.cue) == cue).all(1).sum() == 2:
                return row
        raise ConfigError(
            f"{len(tokens.vocabulary)} different tokens are too few for a probe of {point.context} tokens: a cue of "
            f"{self.cue} tokens that occurs nowhere else was not found. Use a longer text or a shorter context."
        )


class _ProbeRegistry(Registry[Probe]):
    def build_all(self, names: Sequence[str], contexts: Sequence[int]) -> dict[str, Probe]:
        """Returns the probes by name, in the given order, each once.

        Raises:
            ConfigError: a name is unknown, or a context too short for a probe.
        """
        built = {name: self.get(name)() for name in names}
        for name, probe in built.items():
            for context in contexts:
                require(
                    context >= probe.min_context,
                    f"a context of {context} tokens is too short for the probe {name!r}: it takes {probe.min_context} "
                    "or more.",
                )
        return built


registry = _ProbeRegistry("probe")
register = registry.register


def make_row(name: str, point: ProbePoint, tokens: ProbeTokens, number: int, seed: int) -> np.ndarray:
    """Returns row ``number`` (context + 1,) int64 of a probe at a point."""
    key = [seed, zlib.crc32(name.encode()), point.context, point.first, number]
    return registry.get(name)().row(point, tokens, np.random.default_rng(key))


@register("needle")
class Needle(Probe):
    """A random key and its value, hidden in text or in random tokens: the value after the key, by depth and length."""

    answer = 4
    min_context = 32

    def points(self, context: int) -> list[ProbePoint]:
        second = context + 1 - self.answer
        last = second - self.cue - self.answer  # the question follows at once
        return [ProbePoint(context, self.cue + round(depth * (last - self.cue)), second, depth) for depth in DEPTHS]

    def fill(self, point: ProbePoint, tokens: ProbeTokens, generator: np.random.Generator) -> np.ndarray:
        row = tokens.filler(point.context + 1, generator)
        row[point.first - self.cue : point.first + self.answer] = tokens.random(self.cue + self.answer, generator)
        return row


@register("copy")
class Copy(Probe):
    """Random tokens whose end repeats a span of them: how well it is copied, by distance."""

    answer = 28
    min_context = 64

    def points(self, context: int) -> list[ProbePoint]:
        second, shortest = context + 1 - self.answer, self.cue + self.answer
        doublings = ((second - self.cue) // shortest).bit_length()  # as long as the cue is in the row
        return [ProbePoint(context, second - (shortest << power), second) for power in range(doublings)]

    def fill(self, point: ProbePoint, tokens: ProbeTokens, generator: np.random.Generator) -> np.ndarray:
        return tokens.random(point.context + 1, generator)


@register("repeat")
class Repeat(Copy):
    """The user's own text, whose end repeats a span of it: first against second occurrence, by distance."""

    needs_text = True
    unique_cue = False  # text repeats itself

    def fill(self, point: ProbePoint, tokens: ProbeTokens, generator: np.random.Generator) -> np.ndarray:
        return tokens.filler(point.context + 1, generator)

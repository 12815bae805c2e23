"""Scores of long-context probes (``torchladder.probes``): loss and greedy accuracy of the answers, by point."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from torchladder import probes
from torchladder.data.tokenizer import Tokenizer
from torchladder.models.loss import logits_cross_entropy
from torchladder.probes import ProbePoint, ProbeTokens
from torchladder.registry import require

MAX_TEXT_TOKENS = 1 << 22
"""Tokens of a text that rows are made of, whatever the context, so that contexts can be measured one at a time."""

LogitsAt = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""``(tokens (B, T), positions (B, n)) -> logits (B, n, V), own (B, n)``: whether this rank has computed each."""


def ordinary_ids(tokenizer: Tokenizer | None, vocab_size: int) -> np.ndarray:
    """Returns the ids (n,) int64 of all tokens but special ones; without a tokenizer all ids.

    Args:
        tokenizer: of the model.
        vocab_size: of the model, which may have more ids than the tokenizer.
    """
    if tokenizer is None:
        return np.arange(vocab_size)
    special = {tokenizer.bos, tokenizer.eos, tokenizer.unk}
    ids = range(min(tokenizer.vocab_size, vocab_size))
    return np.array([token for token in ids if token not in special and tokenizer.decode([token])], dtype=np.int64)


def probe_tokens(
    tokenizer: Tokenizer | None, vocab_size: int, pieces: Iterable[np.ndarray], max_context: int
) -> ProbeTokens:
    """Returns the tokens that rows are made of.

    Args:
        tokenizer: of the model, None if it is unknown.
        vocab_size: of the model.
        pieces: the text as tokens, of which the first ``MAX_TEXT_TOKENS`` or so are read; empty for random tokens.
        max_context: the longest context of a row.

    Raises:
        ConfigError: the text is shorter than a row.
    """
    ids, read, size = ordinary_ids(tokenizer, vocab_size), [], 0
    for piece in pieces:
        read.append(piece)
        size += len(piece)
        if size >= MAX_TEXT_TOKENS:
            break
    if not read:
        return ProbeTokens(ids)
    tokens = ProbeTokens.from_text(ids, np.concatenate(read))
    available = 0 if tokens.text is None else len(tokens.text)
    require(
        available > max_context,
        f"the text has {available} tokens without special ones, too few for a probe of {max_context}: use a longer "
        "text or a shorter context.",
    )
    return tokens


@dataclass(frozen=True)
class ProbeScore:
    """The result of a probe at a point.

    Attributes:
        rows: number of rows.
        loss: mean loss of the answer's tokens at their second occurrence, in nats.
        first_loss: the same at their first occurrence.
        accuracy: fraction of the answer's tokens that greedy decoding predicts, after the correct ones before.
        exact_match: fraction of the answers whose tokens are all predicted: greedy decoding generates them.
    """

    point: ProbePoint
    rows: int
    loss: float
    first_loss: float
    accuracy: float
    exact_match: float


class _ProbeBatch(NamedTuple):
    """Rows of several points.

    Attributes:
        numbers: (b,) index of each row among all rows; b may be less than B, then the last rows only fill the batch.
        content: (B, context + 1) int64.
        targets: (B, 2 * answer) int64, places of the answer's tokens: both occurrences.
    """

    numbers: np.ndarray
    content: np.ndarray
    targets: np.ndarray


@dataclass(frozen=True, eq=False)
class ProbeRun:
    """The rows of a probe at a context, in batches of one shape, the same number of them on every rank.

    Attributes:
        name: of the probe.
        context: tokens that the model reads.
        rows: number of rows of each point.
        tokens: what rows are made of.
        seed: of the rows.
    """

    name: str
    context: int
    rows: int
    tokens: ProbeTokens
    seed: int = 0

    @property
    def points(self) -> list[ProbePoint]:
        return probes.registry.get(self.name)().points(self.context)

    @property
    def answer(self) -> int:
        """Tokens of an answer."""
        return probes.registry.get(self.name)().answer

    @torch.no_grad()
    def losses(
        self, logits_at: LogitsAt, batch_rows: int, on_batch: Callable[[int], None], rank: int = 0, degree: int = 1
    ) -> np.ndarray:
        """Returns (points, rows, 3) float64: of each row the summed losses of the first and of the second answer, and
        the number of tokens in the second one that are predicted. Rows of other ranks are 0.

        Args:
            logits_at: the model.
            batch_rows: rows in a batch.
            on_batch: called with the tokens of each batch before it is read; may raise.
            rank: this data-parallel rank, which reads each ``degree``-th row.
            degree: number of data-parallel ranks.
        """
        sums = np.zeros((len(self.points) * self.rows, 3))
        for numbers, content, targets in self._batches(batch_rows, rank, degree):
            on_batch(content[:, 1:].size)
            rows = torch.from_numpy(content)
            places = torch.from_numpy(targets)
            logits, own = logits_at(rows[:, :-1], places - 1)
            labels = rows.take_along_dim(places, 1).to(logits.device)
            losses = logits_cross_entropy(logits.flatten(0, 1), labels.flatten()).view(labels.shape).double()
            correct = (logits.argmax(-1) == labels).double()
            first, second = (losses * own).chunk(2, dim=1)
            values = [first, second, (correct * own).chunk(2, dim=1)[1]]
            sums[numbers] = torch.stack([value.sum(1) for value in values], dim=1)[: len(numbers)].cpu().numpy()
        return sums.reshape(len(self.points), self.rows, 3)

    def scores(self, losses: np.ndarray) -> list[ProbeScore]:
        """Returns the score of each point from what ``losses`` returns, summed over ranks."""
        answer, scores = self.answer, []
        for point, (first, second, correct) in zip(self.points, losses.transpose(0, 2, 1), strict=True):
            means = second.mean() / answer, first.mean() / answer, correct.mean() / answer, (correct == answer).mean()
            scores.append(ProbeScore(point, self.rows, *map(float, means)))
        return scores

    def _batches(self, batch_rows: int, rank: int, degree: int) -> Iterator[_ProbeBatch]:
        points, answer = self.points, self.answer
        total = len(points) * self.rows
        for begin in range(0, total, batch_rows * degree):
            numbers = np.arange(begin, min(begin + batch_rows * degree, total))[rank::degree]
            chosen = [(points[i // self.rows], i % self.rows) for i in numbers] or [(points[0], 0)]
            chosen += chosen[-1:] * (batch_rows - len(chosen))
            content = [probes.make_row(self.name, point, self.tokens, row, self.seed) for point, row in chosen]
            places = np.array([(point.first, point.second) for point, _ in chosen])
            targets = (places[:, :, None] + np.arange(answer)).reshape(batch_rows, 2 * answer)
            yield _ProbeBatch(numbers, np.stack(content), targets)

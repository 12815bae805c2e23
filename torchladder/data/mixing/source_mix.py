"""What the sources of a run have, and what the run takes of it: epochs, tokens by phase, what is missing."""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial

from torchladder.data.corpus import Corpus
from torchladder.data.dataloader import SourceUsage
from torchladder.data.mixing.interleave import PhasedInterleave
from torchladder.data.packing.spans import Packing
from torchladder.registry import ConfigError


@dataclass(frozen=True, eq=False)
class SourceMix:
    """Sources, opened and packed, and which of them every row is of.

    Attributes:
        corpora: tokens of each source.
        packings: rows of each source.
        repeats: whether each source begins anew when it has been read.
        interleave: the source of every row.
        seq_len: tokens in a row.
        batch: rows in a step.
    """

    corpora: Sequence[Corpus]
    packings: Sequence[Packing]
    repeats: Sequence[bool]
    interleave: PhasedInterleave
    seq_len: int
    batch: int

    def check(self, steps: int) -> None:
        """Refuses a run that reads more of a source than there is.

        Raises:
            ConfigError: a source that does not repeat runs out.
        """
        for i, (corpus, packed) in enumerate(zip(self.corpora, self.packings, strict=True)):
            rows = math.ceil(packed.epoch_rows)  # padding completes the last one
            needed = self._rows(i, steps)
            if self.repeats[i] or needed <= rows:
                continue
            missing = math.ceil((needed - packed.epoch_rows) * self.seq_len * Fraction(packed.efficiency))
            # The rows up to and with a step never become fewer, so the first one that is short is found by halving.
            step = bisect.bisect_right(range(1, steps + 1), rows, key=partial(self._rows, i))
            raise ConfigError(
                f"the source {corpus.label} runs out at step {step:,} of {steps:,}, {missing:,} tokens are missing: "
                "take fewer steps, give it a smaller weight, or let it repeat."
            )

    def steps_for(self, epochs: float) -> int:
        """Returns the steps that read as much as all sources hold, ``epochs`` times.

        The last step is completed from the next epoch; where a source does not repeat, it is left out instead.
        """
        rows = Fraction(str(epochs)) * sum(packed.epoch_rows for packed in self.packings)
        return max(math.ceil(rows / self.batch) if all(self.repeats) else math.floor(rows / self.batch), 1)

    def usage(self, starts: Sequence[int], steps: int) -> list[SourceUsage]:
        """Returns what each phase reads of each source, phase after phase.

        Args:
            starts: the first step of each phase, from 0.
            steps: steps of the run.
        """
        found = []
        for step, until in zip(starts, [*starts[1:], steps], strict=True):
            for i, (corpus, packed) in enumerate(zip(self.corpora, self.packings, strict=True)):
                before, after = (Fraction(self._rows(i, at)) / packed.epoch_rows for at in (step, until))
                tokens = round((after - before) * corpus.tokens)
                found.append(
                    SourceUsage(step, until - step, corpus.label, tokens, float(after - before), float(before))
                )
        return found

    def describe(self) -> list[str]:
        """Returns a line on each source, and one on each later mixture."""
        shares, *later = self.interleave.shares
        lines = []
        for corpus, packed, share in zip(self.corpora, self.packings, shares, strict=True):
            line = f"{corpus.label}: {float(share):.1%} of the rows, {len(corpus.lengths):,} documents"
            line += f", {corpus.tokens:,} tokens"
            if packed.rows is None and share:
                line += f", an epoch every {float(packed.epoch_rows / (share * self.batch)):,.1f} steps"
            if packed.efficiency < 1:
                cut = float((corpus.lengths > self.seq_len).mean())
                line += f", rows {packed.efficiency:.1%} full, {cut:.1%} of the documents cut"
            lines.append(line)
        for first, shares in zip(self.interleave.firsts[1:], later, strict=True):
            named = (f"{corpus.label} {float(share):.1%}" for corpus, share in zip(self.corpora, shares, strict=True))
            lines.append(f"from step {first // self.batch:,}: {', '.join(named)}")
        return lines

    def epochs(self, starts: Sequence[int], steps: int) -> list[str]:
        """Returns a line on each phase: up to which epoch it reads every source."""
        lines = []
        for step, until in zip(starts, [*starts[1:], steps], strict=True):
            read = [one for one in self.usage(starts, steps) if one.step == step and one.epochs]
            named = (f"{one.source} {one.epochs_before:.2f} to {one.epochs_before + one.epochs:.2f}" for one in read)
            lines.append(f"epochs of steps {step:,} to {until - 1:,}: {', '.join(named)}")
        return lines

    def _rows(self, source: int, steps: int) -> int:
        """Returns the rows that the first steps take of a source."""
        return self.interleave.counts(steps * self.batch)[source]

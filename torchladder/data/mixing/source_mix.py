"""What a run reads of its sources: steps, tokens and epochs by phase, and whether there is enough."""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from itertools import pairwise

from torchladder.batch_schedule import BatchSchedule
from torchladder.data.corpus import Corpus
from torchladder.data.dataloader import SourceUsage
from torchladder.data.mixing.interleave import PhasedInterleave
from torchladder.data.packing.spans import Packing
from torchladder.registry import ConfigError, require, unknown_name

SAMPLED_ROWS = 1024
"""Rows of each source that are searched for the beginnings of documents."""


@dataclass(frozen=True, eq=False)
class SourceMix:
    """The sources of a run, packed into rows and interleaved.

    Attributes:
        corpora: tokens of each source.
        packings: rows of each source.
        repeats: whether each source starts over when all of it has been read.
        interleave: source of every row.
        phase_starts: first step of each phase; the first one is that of the data, or of the run if that is later.
        seq_len: tokens in a row.
        batch: rows in every step.
        first_step: the step that reads the first rows.
    """

    corpora: Sequence[Corpus]
    packings: Sequence[Packing]
    repeats: Sequence[bool]
    interleave: PhasedInterleave
    phase_starts: Sequence[int]
    seq_len: int
    batch: BatchSchedule
    first_step: int = 0

    def check_enough_data(self, steps: int) -> None:
        """Checks that no source runs out.

        Raises:
            ConfigError: the run reads more of a source than it has, and the source does not repeat.
        """
        for i, (corpus, packed) in enumerate(zip(self.corpora, self.packings, strict=True)):
            rows = math.ceil(packed.rows_per_epoch)  # the last one is padded
            needed = self._rows(i, steps)
            if self.repeats[i] or needed <= rows:
                continue
            missing = math.ceil((needed - packed.rows_per_epoch) * self.seq_len * Fraction(packed.efficiency))
            # The rows read up to a step never decrease, so bisection finds the first step without enough.
            step = bisect.bisect_right(range(1, steps + 1), rows, key=partial(self._rows, i))
            raise ConfigError(
                f"the source {corpus.label} runs out at step {step:,} of {steps:,}, {missing:,} tokens are missing: "
                "train for fewer steps, lower its weight, or set repeat = true."
            )

    def steps_for(self, epochs: float) -> int:
        """Returns the steps of a run that reads as many rows as all sources have together, ``epochs`` times.

        Rounds up, so the last step reads into the next epoch; rounds down if a source does not repeat.
        """
        rows = Fraction(str(epochs)) * sum(packed.rows_per_epoch for packed in self.packings)
        end = self.batch.rows_before(self.first_step) + rows
        steps = self.batch.steps_for(end) if all(self.repeats) else self.batch.step_at(math.floor(end))
        return max(steps, self.first_step + 1)

    def usage(self, steps: int) -> list[SourceUsage]:
        """Returns what each phase of a run of ``steps`` steps reads of each source, phase by phase."""
        found = []
        for step, until in pairwise([*self.phase_starts, steps]):
            for i, (corpus, packed) in enumerate(zip(self.corpora, self.packings, strict=True)):
                before, after = (Fraction(self._rows(i, at)) / packed.rows_per_epoch for at in (step, until))
                tokens = round((after - before) * corpus.num_tokens)
                found.append(
                    SourceUsage(step, until - step, corpus.label, tokens, float(after - before), float(before))
                )
        return found

    def boundary_shares(self) -> dict[str, float]:
        """Returns the share of each source's rows inside which a document begins, in a fixed sample of them."""
        shares = {}
        for corpus, packed in zip(self.corpora, self.packings, strict=True):
            rows = math.ceil(packed.rows_per_epoch)
            sample = sorted({number * rows // SAMPLED_ROWS for number in range(SAMPLED_ROWS)})
            spans = [packed(row) for row in sample]
            begins = [(of_row.ends - of_row.begins)[:-1].cumsum() for of_row in spans]
            inside = [((at > 0) & (at < self.seq_len)).any() for at in begins]
            shares[corpus.label] = sum(inside) / len(inside)
        return shares

    def sources_without_rows(self, steps: int) -> list[str]:
        """Returns a sentence on each source of which the run reads nothing, since its weight is too small."""
        rows = self.batch.rows_before(steps) - self.batch.rows_before(self.first_step)
        return [
            f"the source {corpus.label} gets none of the run's {rows:,} rows: its proportion is at most {share:.3g}"
            for number, corpus in enumerate(self.corpora)
            if (share := float(max(phase[number] for phase in self.interleave.proportions)))
            and not self._rows(number, steps)
        ]

    def describe(self) -> list[str]:
        """Returns a line for each source, and one for each later phase that changes the weights."""
        proportions, *later = self.interleave.proportions
        lines = []
        for corpus, packed, proportion in zip(self.corpora, self.packings, proportions, strict=True):
            line = f"{corpus.label}: {float(proportion):.1%} of the rows, {len(corpus.lengths):,} documents"
            line += f", {corpus.num_tokens:,} tokens"
            if packed.num_rows is None and proportion:
                rows = packed.rows_per_epoch / proportion
                steps = f"{float(rows / self.batch(0)):,.1f} steps"
                line += f", an epoch every {f'{float(rows):,.0f} rows' if self.batch.varies else steps}"
            if packed.efficiency < 1:
                cut = float((corpus.lengths > self.seq_len).mean())
                line += f", rows {packed.efficiency:.1%} full, {cut:.1%} of the documents cut"
            lines.append(line)
        for first, proportions in zip(self.interleave.first_rows[1:], later, strict=True):
            named = [f"{corpus.label} {float(p):.1%}" for corpus, p in zip(self.corpora, proportions, strict=True)]
            step = self.batch.step_at(self.batch.rows_before(self.first_step) + first)
            lines.append(f"from step {step:,}: {', '.join(named)}")
        return lines

    def describe_epochs(self, steps: int) -> list[str]:
        """Returns a line for each phase with the epochs of each source at its beginning and end."""
        lines: dict[str, list[str]] = {}
        for one in self.usage(steps):
            named = lines.setdefault(f"epochs of steps {one.step:,} to {one.step + one.steps - 1:,}: ", [])
            if one.epochs:
                named.append(f"{one.source} {one.epochs_before:.2f} to {one.epochs_before + one.epochs:.2f}")
        return [title + ", ".join(named) for title, named in lines.items()]

    def _rows(self, source: int, steps: int) -> int:
        """Returns the rows of a source that the first ``steps`` steps of the run read."""
        rows = self.batch.rows_before(steps) - self.batch.rows_before(self.first_step)
        return self.interleave.counts(max(rows, 0))[source]


def in_order(weights: list[float] | dict[str, float], labels: Sequence[str]) -> list[float]:
    """Returns the weights of a phase as a list in the order of the sources.

    Raises:
        ConfigError: a source is missing, unknown or ambiguous, or the list has another length.
    """
    if not isinstance(weights, dict):
        equal = len(weights) == len(labels)
        require(equal, f"phases: source_weights = {weights}: there are {len(labels)} sources.")
        return weights
    for label in weights:
        if label not in labels:
            raise unknown_name("source", label, labels, "phases.source_weights")
    missing = [label for label in labels if label not in weights]
    require(not missing, f"phases: source_weights lacks {', '.join(missing)}; a weight of 0 leaves a source out.")
    unique = len(set(labels)) == len(labels)
    require(unique, "phases: source_weights by label: two sources have the same label; set data.sources.label.")
    return [weights[label] for label in labels]

"""Whether a changed run continues every source where it was: what it has read must follow from its new settings, too.

The sources, their weights and phases say which rows of each source come before a row of the run. A resumed run may
change what comes after its row, but nothing before it: otherwise it would read some rows again and others never.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torchladder.batch_schedule import BatchSchedule
from torchladder.registry import ConfigError, require

ORDER_SETTINGS = ("seed", "shuffle", "packing", "seq_len")
"""Settings that decide which tokens the rows of a source hold."""
ACCEPT = "--checkpoint.accept_changes"


@dataclass(frozen=True)
class SourceHistory:
    """What a resumed run has read.

    Attributes:
        saved: the loader's fingerprints when the checkpoint was saved.
        current: those of this run.
        step: optimizer steps taken.
        row: the next row of the data.
        batch: rows in every step.
    """

    saved: Mapping[str, str]
    current: Mapping[str, str]
    step: int
    row: int
    batch: BatchSchedule

    def check_first_step(self, moved: bool) -> None:
        """Checks that the row is the one that the step reads, if the data has been placed at another step.

        Args:
            moved: whether the step or the row is not that of the checkpoint.

        Raises:
            ConfigError: ``data.first_step`` does not fit.
        """
        if not moved and self.saved.get("first_step", "0") == self.current["first_step"]:
            return
        before = self.batch.rows_before(self.step) - self.row
        first_step = self.batch.step_at(before)  # from which on as many rows have been read
        exact = self.batch.rows_before(first_step) == before
        continued = f", or {first_step} to continue at row {self.row:,}" if self.row and exact else ""
        require(
            exact and str(first_step) == self.current["first_step"],
            f"data.first_step = {self.current['first_step']}, but step {self.step} reads row {self.row:,} of the data: "
            f"set data.first_step = {self.step} to begin at the first row{continued}.",
        )

    def check(self, titles: Sequence[str], counts: Sequence[int], weights: Sequence[float]) -> None:
        """Checks that every source continues where it was.

        Args:
            titles: of the sources.
            counts: rows of each source before ``row``.
            weights: of each source in this run, for the phase that the error suggests.

        Raises:
            ConfigError: a source would read rows again or never; the message has the settings to use instead.
        """
        for name in ORDER_SETTINGS:
            if self.row and self.saved.get(name) != self.current[name]:
                raise self._error(
                    f"data.{name} has changed since the checkpoint was saved (it was {self.saved.get(name)}, it is "
                    f"{self.current[name]}), so what was read is not the beginning of the new order."
                )
        if _phases_before(self.saved, self.row) != _phases_before(self.current, self.row):
            from_step = self.batch.steps_for(self.batch.rows_before(int(self.current["first_step"])) + self.row)
            shares = ", ".join(f"{weight:.6g}" for weight in weights)
            phases = f" and phases: {self.saved['phases']}" if self.saved.get("phases") else ""
            raise self._error(
                f"data.weights has changed for rows that have been read, at {self.saved.get('weights')}{phases}. "
                "Restore those weights (0 for new sources, at the end of data.sources), and let a phase change them:"
                f"\n\n    [[phases]]\n    from_step = {from_step}\n    source_weights = [{shares}]\n\n"
                f"with {ACCEPT} phases.source_weights, and with new sources also data.sources data.weights data.repeat."
            )
        old, new = (prints["sources"].split(", ") for prints in (self.saved, self.current))
        for number, (title, count) in enumerate(zip(titles, counts, strict=True)):
            if count and old[number : number + 1] != new[number : number + 1]:
                raise self._error(
                    f"data.sources: {title} has other content than when the checkpoint was saved, after {count:,} of "
                    "its rows. Restore it, add the new content as a source at the end of data.sources with weight 0, "
                    f"and let a phase from step {self.step} on read that."
                )

    def _error(self, problem: str) -> ConfigError:
        changed = [name for name, value in self.current.items() if self.saved.get(name) != value]
        accepted = " ".join(
            "phases.source_weights" if name == "phases" else f"data.{name}"
            for name in dict.fromkeys([*changed, "first_step"])
        )
        return ConfigError(
            f"{problem} Or start the data over at this step: --data.first_step {self.step} {ACCEPT} {accepted}"
        )


def _phases_before(prints: Mapping[str, str], row: int) -> list[tuple[int, str]]:
    """Returns (first row, proportions) of each phase that begins before a row, without sources at the end with 0."""
    found = [(0, prints.get("weights", ""))]
    for phase in filter(None, prints.get("phases", "").split("; ")):
        first, proportions = phase.removeprefix("row ").split(": ")
        found.append((int(first), proportions))
    return [(first, _without_last_zeros(proportions)) for first, proportions in found if first < row]


def _without_last_zeros(proportions: str) -> str:
    while proportions.endswith(", 0"):
        proportions = proportions.removesuffix(", 0")
    return proportions

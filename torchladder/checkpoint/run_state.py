"""``run.json``: what a run needs, beside model and optimizer, to continue where it stopped."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from torchladder.registry import ConfigError, unknown_name

RUN_STATE_FILE = "run.json"


@dataclass(frozen=True, kw_only=True)
class RunState:
    """Where a run stands.

    Attributes:
        step: optimizer steps taken.
        row: the next global row of the training data.
        fingerprints: name -> value of all that must be unchanged to continue (data, tokenizer, settings); empty in a
            checkpoint of weights alone.
        window: tokens a query could attend to in the last step; None if unknown.
        final_window: the same of the run's last step.
        rope_theta: RoPE base of the last step, None for the model's own.
        post_step_pending: whether validation, samples or saving after the step are still to be done.
        validated_step: the step of the last validation, -1 for none.
        bad_steps: the state of the bad-step detector.
        skipped_rows: ranges of rows, first to last, that roll-backs leave out.
        excluded: ``checkpoint.exclude_from_loading`` of the run that saved this.
        versions: package -> version that saved this.
    """

    step: int
    row: int
    fingerprints: dict[str, str] = field(default_factory=dict)
    window: int | None = None
    final_window: int | None = None
    rope_theta: float | None = None
    post_step_pending: bool = False
    validated_step: int = -1
    bad_steps: dict[str, Any] = field(default_factory=dict)
    skipped_rows: list[tuple[int, int]] = field(default_factory=list)
    excluded: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, checkpoint: Path) -> RunState:
        """Reads the run state of a checkpoint folder.

        Raises:
            OSError, ValueError: the file cannot be read.
            ConfigError: the file was written by another version of torchladder.
        """
        values = json.loads((checkpoint / RUN_STATE_FILE).read_text(encoding="utf-8"))
        known = {one.name for one in fields(cls)}
        if not isinstance(values, dict) or not {"step", "row"} <= values.keys() <= known:
            raise ConfigError(
                f"{checkpoint / RUN_STATE_FILE} was written by another version of torchladder, so the run cannot "
                "continue from it. Its weights can: set checkpoint.initial_load_path in a new run."
            )
        values["skipped_rows"] = [tuple(rows) for rows in values.get("skipped_rows", [])]
        return cls(**values)

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"


def check_fingerprints(saved: Mapping[str, str], now: Mapping[str, str], accepted: Sequence[str]) -> None:
    """Compares the fingerprints of a checkpoint with the run's.

    Args:
        saved: of the checkpoint.
        now: of this run.
        accepted: names that may differ (``checkpoint.accept_changes``).

    Raises:
        ConfigError: another one differs, an accepted name does not exist, or the checkpoint has none.
    """
    if not saved:
        raise ConfigError(
            "the checkpoint holds only weights, no state of a run: load it with "
            "checkpoint.initial_load_model_only = true."
        )
    for name in accepted:
        if name not in now:
            raise unknown_name("entry of checkpoint.accept_changes", name, now)
    for name, value in now.items():
        if saved.get(name) != value and name not in accepted:
            raise ConfigError(
                f"{name} has changed since the checkpoint was saved (it was {saved.get(name)}, it is {value}). "
                f"To continue anyway: --checkpoint.accept_changes {name}"
            )

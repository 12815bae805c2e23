"""``run.json``: what a run needs to continue, apart from model and optimizer."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

from torchladder.checkpoint.storage import get_storage
from torchladder.registry import ConfigError

RUN_STATE_FILE = "run.json"


@dataclass(frozen=True, kw_only=True)
class RunState:
    """The state of a run, apart from model and optimizer.

    Attributes:
        step: optimizer steps taken.
        row: the next global row of the training data.
        fingerprints: name -> value of what must be unchanged to continue, except the schedule (data, tokenizer, model,
            batch); empty in a checkpoint of weights alone.
        window: tokens a query could attend to in the last step; None if unknown.
        final_window: the same for the last step of the run.
        layer_windows: layer type -> window in the last step, of the types that are not full_attention.
        final_layer_windows: the same for the last step of the run.
        rope_theta: RoPE base of the last step; None for that of the model config.
        post_step_pending: whether validation, samples or saving after the step are still to be done.
        validated_step: the step of the last validation; -1 for none.
        bad_steps: the state of the bad-step detector.
        skipped_rows: ranges of rows, first to last, that rollbacks have removed from the run.
        totals: tokens, FLOPs and seconds since the start of the run, as metrics count them; empty if unknown.
        excluded: ``checkpoint.exclude_from_loading`` of the run that saved this.
        versions: package -> version that saved this.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    step: int
    row: int
    fingerprints: dict[str, str] = field(default_factory=dict)
    window: int | None = None
    final_window: int | None = None
    layer_windows: dict[str, int] = field(default_factory=dict)
    final_layer_windows: dict[str, int] = field(default_factory=dict)
    rope_theta: float | None = None
    post_step_pending: bool = False
    validated_step: int = -1
    bad_steps: dict[str, Any] = field(default_factory=dict)
    skipped_rows: list[tuple[int, int]] = field(default_factory=list)
    totals: dict[str, int | float] = field(default_factory=dict)
    excluded: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, checkpoint: str | Path) -> RunState:
        """Reads the run state of a checkpoint, a local path or a URL.

        Raises:
            OSError: the file cannot be read.
            ConfigError: the file does not hold the run state of this version of torchladder.
        """
        path = f"{checkpoint}/{RUN_STATE_FILE}"
        try:
            return TypeAdapter(cls).validate_json(get_storage(checkpoint).read(path))
        except ValidationError as error:
            first = error.errors()[0]
            reason = ": ".join(filter(None, (".".join(map(str, first["loc"])), first["msg"])))
            raise ConfigError(
                f"{path} was written by another version of torchladder ({reason}), so the run cannot continue from it. "
                "Its weights can be used: set checkpoint.initial_load_path in a new run."
            ) from error

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"

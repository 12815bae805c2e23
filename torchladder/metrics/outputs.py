"""Outputs of reports: metrics.jsonl, TensorBoard, Weights & Biases, Trackio and the terminal."""

from __future__ import annotations

import json
import logging
import math
import os
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text
from torch.utils.tensorboard import SummaryWriter

from torchladder.metrics.console import console
from torchladder.metrics.energy import ENERGY_KEYS
from torchladder.metrics.metric_table import Report, RunInfo
from torchladder.metrics.output_config import MetricsConfig, register_output
from torchladder.registry import ConfigError

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"


class JsonlOutput:
    """Appends one JSON object per report to metrics.jsonl and flushes it."""

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        self.file = path.open("a", encoding="utf-8")

    def write(self, report: Report) -> None:
        # JSON has no NaN and no infinity: null.
        finite = {key: value if math.isfinite(value or 0) else None for key, value in report.record.items()}
        self.file.write(json.dumps(finite) + "\n")
        self.file.flush()

    def close(self) -> None:
        self.file.close()


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Returns the records of a metrics.jsonl; skips a line that is still being written.

    Raises:
        ConfigError: the file does not exist.
    """
    if not path.is_file():
        raise ConfigError(f"{path}: no such file; a run writes its metrics.jsonl to job.dump_folder.")
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        with suppress(json.JSONDecodeError):
            records.append(json.loads(line))
    return records


def rewind_jsonl(path: Path, step: int) -> dict[str, float]:
    """Deletes the records after ``step``; returns the totals of the last training record kept."""
    found = read_jsonl(path) if path.exists() else []
    kept = [record for record in found if step > 0 and record["step"] <= step]
    if found and step == 0:
        logger.warning("%s: %d records of an earlier run are replaced", path, len(found))
    partial = path.with_suffix(".partial")
    partial.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
    partial.replace(path)
    trained = [record for record in kept if "loss" in record]
    last = trained[-1] if trained else {}
    return {key: last[key] for key in ("tokens", "flops", "seconds", *ENERGY_KEYS) if key in last}


@register_output("tensorboard")
class TensorBoardOutput:
    """Writes TensorBoard events; events of an earlier process after ``step`` are hidden by ``purge_step``."""

    def __init__(self, run: RunInfo, config: MetricsConfig, step: int) -> None:
        folder = run.folder / config.save_tb_folder
        self.name = str(folder)
        self.writer = SummaryWriter(str(folder), purge_step=step + 1)

    def write(self, report: Report) -> None:
        for tag, value in report.scalars.items():
            self.writer.add_scalar(tag, value, report.step)
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


@register_output("wandb")
class WandBOutput:
    """Logs to Weights & Biases, under the tags of TensorBoard."""

    name = "wandb"

    def __init__(self, run: RunInfo, config: MetricsConfig) -> None:
        try:
            import wandb  # an optional package
        except ImportError:
            raise ConfigError(
                "metrics.enable_wandb needs the package wandb: pip install wandb, or set --metrics.no_enable_wandb."
            ) from None
        project = config.project or os.environ.get("WANDB_PROJECT", "torchladder")
        named = {"name": config.run_name, "group": config.group, "tags": config.tags}
        named = {key: value for key, value in named.items() if value}  # W&B's variables set the others
        self.session = wandb.init(project=project, dir=str(run.folder), config=run.settings, **named)

    def write(self, report: Report) -> None:
        self.session.log(report.scalars, step=report.step)

    def close(self) -> None:
        self.session.finish()


@register_output("trackio")
class TrackioOutput:
    """Logs to Trackio, under the tags of TensorBoard; a run that resumes continues the Trackio run of its name."""

    name = "trackio"

    def __init__(self, run: RunInfo, config: MetricsConfig, step: int) -> None:
        try:
            import trackio  # an optional package
        except ImportError:
            raise ConfigError(
                "the metrics output 'trackio' needs the package trackio: pip install 'torchladder[trackio]', or remove "
                "it from metrics.outputs."
            ) from None
        settings = json.loads(json.dumps(run.settings, default=str))  # Trackio keeps JSON
        self.session = trackio.init(
            project=config.project or "torchladder",
            name=config.run_name or run.folder.resolve().name,
            group=config.group or None,
            config=settings | ({"tags": config.tags} if config.tags else {}),  # it has no tags
            resume="allow" if step else "never",
            embed=False,
        )

    def write(self, report: Report) -> None:
        self.session.log(report.scalars, step=report.step)

    def close(self) -> None:
        self.session.finish()


class TerminalOutput:
    """Logs a line per report; a terminal also shows a progress bar below the lines.

    The bar, or without one the lines of training steps, have the time left.
    """

    name = "log"

    def __init__(self, steps: int, step: int, colors: bool, bar: bool) -> None:
        self.colors = colors
        self.bar: Progress | None = None
        if console.is_terminal and bar:
            left = TextColumn("{task.fields[left]}")
            self.bar = Progress(
                "step", BarColumn(bar_width=None), MofNCompleteColumn(), TimeElapsedColumn(), left, console=console
            )
            self.task = self.bar.add_task("", total=steps, completed=step, left="")
            self.bar.start()

    def write(self, report: Report) -> None:
        texts = list(report.console)
        left = None if report.seconds_left is None else timedelta(seconds=round(report.seconds_left))
        if self.bar is not None:
            self.bar.update(self.task, completed=report.step)
            if left is not None:
                self.bar.update(self.task, left=f"left {left}")
        elif left is not None:
            texts.append((f"eta: {left}", "dim"))
        fields = [Text(text, style if self.colors else "") for text, style in texts]
        logger.info("  ".join(text for text, _ in texts), extra={"fields": fields})

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()

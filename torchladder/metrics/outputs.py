"""Where reports go: metrics.jsonl, TensorBoard, Weights & Biases, the terminal."""

from __future__ import annotations

import json
import logging
import math
import os
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text
from torch.utils.tensorboard import SummaryWriter

from torchladder.metrics.console import console
from torchladder.registry import ConfigError

logger = logging.getLogger(__name__)

Line = dict[str, Any]
"""What one step reports, by the keys of metrics.jsonl and a few more for people."""

TRAIN_KEYS = (
    "step",
    "loss",
    "grad_norm",
    "lr",
    "window",
    "tokens",
    "tps",
    "flops",
    "mfu",
    "mfu_palm",
    "attention_saved",
    "memory_gib",
    "seconds",
)

TAGS = {
    "loss": ("loss_metrics/global_avg_loss", 1),
    "grad_norm": ("grad_norm", 1),
    "lr": ("lr", 1),
    "tps": ("throughput(tps)", 1),
    "tflops": ("tflops", 1),
    "mfu": ("mfu(%)", 100),
    "mfu_palm": ("mfu_palm(%)", 100),
    "memory_gib": ("memory/max_reserved(GiB)", 1),
    "window": ("curriculum/window", 1),
    "attention_saved": ("curriculum/attention_saved", 1),
}
"""TensorBoard and W&B: the tag of each value, torchtitan's where it has one, and what the value is multiplied by."""


class Output(Protocol):
    """Somewhere that lines go."""

    def write(self, line: Line) -> None: ...

    def close(self) -> None: ...


class JsonlOutput:
    """metrics.jsonl: one JSON object per line, on disk as soon as it is written."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("a", encoding="utf-8")

    def write(self, line: Line) -> None:
        kept = {key: line[key] for key in TRAIN_KEYS} if "loss" in line else line
        # JSON has no NaN and no infinity: null.
        numbers = {key: value if value is None or math.isfinite(value) else None for key, value in kept.items()}
        self.file.write(json.dumps(numbers) + "\n")
        self.file.flush()

    def close(self) -> None:
        self.file.close()


class TensorBoardOutput:
    """TensorBoard events under torchtitan's tags; what the folder has of steps to be taken (again) is purged."""

    def __init__(self, folder: Path, seq_len: int, step: int) -> None:
        self.seq_len = seq_len
        self.writer = SummaryWriter(str(folder), purge_step=step + 1)

    def write(self, line: Line) -> None:
        for tag, value in _tagged(line, self.seq_len).items():
            self.writer.add_scalar(tag, value, line["step"])
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class WandBOutput:
    """Weights & Biases, under the tags of TensorBoard."""

    def __init__(self, folder: Path, seq_len: int, settings: dict[str, Any]) -> None:
        try:
            import wandb  # an optional package
        except ImportError:
            raise ConfigError(
                "metrics.enable_wandb: wandb is not installed; pip install 'torchladder[wandb]', or turn it off."
            ) from None
        self.seq_len = seq_len
        project = os.environ.get("WANDB_PROJECT", "torchladder")
        self.session = wandb.init(project=project, dir=str(folder), config=settings)

    def write(self, line: Line) -> None:
        self.session.log(_tagged(line, self.seq_len), step=line["step"])

    def close(self) -> None:
        self.session.finish()


def _tagged(line: Line, seq_len: int) -> dict[str, float]:
    if "validation_loss" in line:
        at = "global_avg_loss" if line["window"] == seq_len else f"loss_at_window_{line['window']}"
        return {f"validation_metrics/{at}": line["validation_loss"]}
    return {tag: line[key] * scale for key, (tag, scale) in TAGS.items() if line[key] is not None}


class TerminalOutput:
    """A line per report, and on a terminal a progress bar below the lines."""

    def __init__(self, steps: int, step: int, colors: bool, bar: bool) -> None:
        self.colors = colors
        self.bar: Progress | None = None
        if console.is_terminal and bar:
            self.bar = Progress(
                TextColumn("step"),
                BarColumn(bar_width=None),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=console,
            )
            self.task = self.bar.add_task("", total=steps, completed=step)
            self.bar.start()

    def write(self, line: Line) -> None:
        pieces = _pieces(line)
        if self.bar is not None:
            self.bar.update(self.task, completed=line["step"])
        elif "seconds_left" in line:
            pieces.append((f"eta: {timedelta(seconds=round(line['seconds_left']))}", "dim"))
        styled = Text("  ").join([Text(text, style if self.colors else "") for text, style in pieces])
        logger.info(styled.plain, extra={"styled": styled})

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()


def _pieces(line: Line) -> list[tuple[str, str]]:
    """Returns what a line says to people, each piece with its colour: torchtitan's line, then the ladder's."""
    step, window = line["step"], line["window"]
    if "validation_loss" in line:
        loss = line["validation_loss"]
        return [(f"validate step: {step:2}", "green"), (f"loss: {loss:.4f}", "green"), (f"window: {window}", "yellow")]
    mfu = "n/a" if line["mfu"] is None else f"{line['mfu']:.2%}"
    return [
        (f"step: {step:2}", "red"),
        (f"loss: {line['loss']:.4f}", "green"),
        (f"grad_norm: {line['grad_norm']:.4f}", "orange3"),
        (f"memory: {line['memory_gib']:.2f}GiB({line['memory_share']:.2%})", "turquoise2"),
        (f"tps: {line['tps']:,.0f}", "blue"),
        (f"tflops: {line['tflops']:,.2f}", "cyan"),
        (f"mfu: {mfu}", "magenta"),
        (f"window: {window}", "yellow"),
        (f"saved: {line['attention_saved']:.1%}", "yellow"),
    ]


# --- metrics.jsonl, read ------------------------------------------------------------------------------------------


def read(path: Path) -> list[Line]:
    """Returns the lines of a metrics.jsonl; one that was cut off while being written is left out."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return lines


def rewind(path: Path, step: int) -> dict[str, float]:
    """Drops a file's lines of steps that will be taken again; returns tokens, FLOPs and seconds until then."""
    kept = [line for line in read(path) if 0 < step >= line["step"]] if path.exists() else []
    partial = path.with_suffix(".partial")
    partial.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
    partial.replace(path)
    trained = [line for line in kept if "loss" in line]
    return {key: trained[-1][key] for key in ("tokens", "flops", "seconds")} if trained else {}

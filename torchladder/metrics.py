"""What a run reports: console, progress, metrics.jsonl, TensorBoard, W&B.

The trainer counts tokens and attended pairs, and hands over the loss of the steps that are due. Speed, FLOPs and MFU
follow from the pairs, so they are right under every mask. Nothing here waits for the GPU: all values are numbers already.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text
from torch.utils.tensorboard import SummaryWriter

from torchladder.registry import ConfigError

logger = logging.getLogger(__name__)

console = Console(soft_wrap=True, highlight=False, markup=False, emoji=False)
"""Where a run speaks. Everything goes through this one, so that lines appear above the progress bar, not inside it."""

Line = dict[str, Any]
"""What one step reports, by the keys of metrics.jsonl and a few more for people."""

FILE = "metrics.jsonl"

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

PEAKS = {
    "A100": 312e12,
    "A10G": 125e12,
    "A10": 125e12,
    "A40": 149.7e12,
    "A6000": 154.8e12,
    "B200": 2250e12,
    "GB200": 2500e12,
    "GH200": 989e12,
    "H100": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H200": 989e12,
    "L4": 121e12,
    "L40S": 362e12,
    "MI250X": 191.5e12,
    "MI300X": 1307e12,
    "RTX 4090": 165.2e12,
    "T4": 65e12,
    "V100": 125e12,
}
"""Dense bf16 peak in FLOP/s by data sheet (fp16 where a device has no bf16), by a phrase of the device's name."""


@dataclass(frozen=True, kw_only=True)
class MetricsConfig:
    """What a run reports, and where."""

    log_freq: int = 10
    """Steps between two reports; the first and the last step report always."""

    enable_tensorboard: bool = False
    """Write TensorBoard events."""

    save_tb_folder: str = "tb"
    """Folder of the TensorBoard events, inside job.dump_folder."""

    enable_wandb: bool = False
    """Report to Weights & Biases; its own variables (WANDB_PROJECT, WANDB_RUN_ID, ...) say where to."""

    disable_color_printing: bool = False
    """Print the console's lines without colours."""

    disable_progress_bar: bool = False
    """Print the time left in each line instead of showing a bar; a file or a pipe never gets a bar."""

    peak_flops: float | None = None
    """Peak FLOP/s of one device, for MFU; left out: from the device's name."""

    def __post_init__(self) -> None:
        if self.log_freq < 1:
            raise ConfigError(f"metrics.log_freq = {self.log_freq}: must be 1 or more.")
        if self.peak_flops is not None and not 0 < self.peak_flops < math.inf:
            raise ConfigError(f"metrics.peak_flops = {self.peak_flops}: must be above 0, for example 989e12.")


@dataclass(frozen=True, kw_only=True)
class Run:
    """What reporting needs to know of a run.

    Attributes:
        folder: where metrics.jsonl lies; made if it is missing.
        steps: optimizer steps of the whole run.
        seq_len: tokens in a row.
        flops: ``(tokens, pairs) -> FLOPs`` of forward and backward, the model's.
        device: where the model runs.
        rank: this process; only rank 0 reports.
        ranks: devices of the run.
        settings: what W&B shows as the run's config.
    """

    folder: Path
    steps: int
    seq_len: int
    flops: Callable[[int, int], int]
    device: torch.device
    rank: int = 0
    ranks: int = 1
    settings: dict[str, Any] = field(default_factory=dict)


class Metrics:
    """Reports a run, from a step on. Every rank has one; those after the first report nothing.

    Args:
        config: the section ``[metrics]``.
        run: the run's facts.
        step: steps already taken; what an earlier process reported of later ones is dropped, its totals go on.

    Raises:
        ConfigError: W&B is asked for and not installed.
    """

    def __init__(self, config: MetricsConfig, run: Run, step: int = 0) -> None:
        self.config = config
        self.run = run
        self.peak = config.peak_flops or peak_flops(run.device)
        self.outputs: list[Output] = []
        self.step = step
        self.total = {"tokens": 0, "flops": 0, "seconds": 0.0}
        if run.rank == 0:
            run.folder.mkdir(parents=True, exist_ok=True)
            self.total = resume(run.folder / FILE, step)
            self.outputs = _outputs(config, run, step)
        self.tokens = self.pairs = 0
        self.began = self.since = time.perf_counter()
        self.seconds_before = self.total["seconds"]

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def due(self, step: int) -> bool:
        """Returns whether a step, counted from 1, reports: the first, the last and every log_freq-th."""
        return step % self.config.log_freq == 0 or step in (1, self.run.steps)

    def count(self, tokens: int, pairs: int) -> None:
        """Adds tokens trained on and (query, key) pairs attended, of all ranks, to the next report."""
        self.tokens += tokens
        self.pairs += pairs

    def log(self, step: int, *, loss: float, grad_norm: float, lr: float, window: int) -> None:
        """Reports a training step, counted from 1, with the speed since the last report."""
        now = time.perf_counter()
        seconds = max(now - self.since, 1e-9)
        flops = self.run.flops(self.tokens, self.pairs)
        # PaLM (arXiv 2204.02311, appendix B): every query sees the whole row, later keys too.
        flops_palm = self.run.flops(self.tokens, self.tokens * self.run.seq_len)
        causal_pairs = self.tokens * (self.run.seq_len + 1) / 2
        self.total["tokens"] += self.tokens
        self.total["flops"] += flops
        self.total["seconds"] = self.seconds_before + now - self.began

        per_device = 1 / (seconds * self.run.ranks)
        memory, memory_share = _memory(self.run.device)
        line: Line = {"step": step, "loss": loss, "grad_norm": grad_norm, "lr": lr, "window": window, **self.total}
        line |= {
            "tps": self.tokens * per_device,
            "tflops": flops * per_device / 1e12,
            "mfu": flops * per_device / self.peak if self.peak else None,
            "mfu_palm": flops_palm * per_device / self.peak if self.peak else None,
            "attention_saved": 1 - self.pairs / causal_pairs if self.tokens else 0.0,
            "memory_gib": memory,
            "memory_share": memory_share,
            "seconds_left": (self.run.steps - step) * seconds / max(step - self.step, 1),
        }
        self._write(line)
        self.step, self.since, self.tokens, self.pairs = step, now, 0, 0

    def validation(self, step: int, loss: float, window: int) -> None:
        """Reports a validation loss after ``step`` steps, with ``window`` tokens visible."""
        self._write({"step": step, "validation_loss": loss, "window": window})

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Keeps the time spent inside (validation, samples, saving) out of the speed; it stays in ``seconds``."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.since += time.perf_counter() - begin

    def close(self) -> None:
        """Ends every output; a second time does nothing."""
        for output in self.outputs:
            output.close()
        self.outputs = []

    def _write(self, line: Line) -> None:
        for output in self.outputs:
            output.write(line)


# --- outputs ---------------------------------------------------------------------------------------------------------


class Output(Protocol):
    """Somewhere that lines go."""

    def write(self, line: Line) -> None: ...

    def close(self) -> None: ...


def _outputs(config: MetricsConfig, run: Run, step: int) -> list[Output]:
    outputs: list[Output] = [WandB(run)] if config.enable_wandb else []  # first: it may be missing
    outputs.append(File(run.folder / FILE))
    if config.enable_tensorboard:
        outputs.append(TensorBoard(run, run.folder / config.save_tb_folder, step))
    outputs.append(Terminal(config, run, step))
    return outputs


class File:
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


class TensorBoard:
    """TensorBoard events under torchtitan's tags; events of steps to be taken again are purged."""

    def __init__(self, run: Run, folder: Path, step: int) -> None:
        self.run = run
        self.writer = SummaryWriter(str(folder), purge_step=step + 1 if step else None)

    def write(self, line: Line) -> None:
        for tag, value in _tagged(line, self.run.seq_len).items():
            self.writer.add_scalar(tag, value, line["step"])
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class WandB:
    """Weights & Biases, under the tags of TensorBoard."""

    def __init__(self, run: Run) -> None:
        try:
            import wandb  # an optional package
        except ImportError:
            raise ConfigError(
                "metrics.enable_wandb: wandb is not installed; pip install 'torchladder[wandb]', or turn it off."
            ) from None
        self.seq_len = run.seq_len
        project = os.environ.get("WANDB_PROJECT", "torchladder")
        self.session = wandb.init(project=project, dir=str(run.folder), config=run.settings)

    def write(self, line: Line) -> None:
        self.session.log(_tagged(line, self.seq_len), step=line["step"])

    def close(self) -> None:
        self.session.finish()


def _tagged(line: Line, seq_len: int) -> dict[str, float]:
    if "validation_loss" in line:
        at = "global_avg_loss" if line["window"] == seq_len else f"loss_at_window_{line['window']}"
        return {f"validation_metrics/{at}": line["validation_loss"]}
    return {tag: line[key] * scale for key, (tag, scale) in TAGS.items() if line[key] is not None}


class Terminal:
    """A line per report, and on a terminal a progress bar below the lines."""

    def __init__(self, config: MetricsConfig, run: Run, step: int) -> None:
        self.colors = not config.disable_color_printing
        self.bar: Progress | None = None
        if console.is_terminal and not config.disable_progress_bar:
            self.bar = Progress(
                TextColumn("step"),
                BarColumn(bar_width=None),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=console,
            )
            self.task = self.bar.add_task("", total=run.steps, completed=step)
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


# --- continuing a run ------------------------------------------------------------------------------------------------


def read(path: Path) -> list[Line]:
    """Returns the lines of a metrics.jsonl; one that was cut off while being written is left out."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return lines


def resume(path: Path, step: int) -> dict[str, Any]:
    """Drops a file's lines of steps that will be taken again; returns tokens, FLOPs and seconds until then."""
    total = {"tokens": 0, "flops": 0, "seconds": 0.0}
    if not path.exists():
        return total
    kept = [line for line in read(path) if 0 < step >= line["step"]]
    partial = path.with_suffix(".partial")
    partial.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
    partial.replace(path)
    trained = [line for line in kept if "loss" in line]
    return {key: trained[-1][key] for key in total} if trained else total


# --- the device ------------------------------------------------------------------------------------------------------


def peak_flops(device: torch.device) -> float | None:
    """Returns the dense bf16 peak of a device in FLOP/s; None where it is not known, as for a CPU."""
    return _peak(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def _peak(name: str) -> float | None:
    # The longest phrase wins: "H100 PCIe" before "H100".
    known = [phrase for phrase in PEAKS if re.search(rf"\b{phrase}\b", name)]
    return PEAKS[max(known, key=len)] if known else None


def _memory(device: torch.device) -> tuple[float, float]:
    """Returns the most memory in use since the last call, in GiB and as a share: CUDA's reserve, or this process's."""
    if device.type == "cuda":
        used = torch.cuda.max_memory_reserved(device)
        whole = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.reset_peak_memory_stats(device)
    else:
        # The system counts the peak since the process began, in bytes on a Mac and in KiB elsewhere.
        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return used / 2**30, used / whole


# --- logging ---------------------------------------------------------------------------------------------------------


def init_logger(rank: int = 0) -> None:
    """Sends this package's log to the console: all of it from rank 0, from other ranks only what went wrong."""
    package = logging.getLogger("torchladder")
    package.handlers = [handler for handler in package.handlers if not isinstance(handler, _Handler)]
    package.addHandler(_Handler(rank))
    package.setLevel(logging.INFO if rank == 0 else logging.WARNING)


class _Handler(logging.Handler):
    """Prints records: the time, the rank where it is not the first, the message."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank = rank

    def emit(self, record: logging.LogRecord) -> None:
        # People at a terminal know the day; a log file is read later.
        clock = time.strftime(
            "%H:%M:%S" if console.is_terminal else "%Y-%m-%d %H:%M:%S", time.localtime(record.created)
        )
        rank = f"[rank {self.rank}] " if self.rank else ""
        level = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        style = "bold red" if record.levelno >= logging.ERROR else "yellow" if level else ""
        message = getattr(record, "styled", None) or Text(level + self.format(record), style)
        console.print(Text.assemble((f"[{clock}] ", "dim"), rank, message))

"""What a step reports: counts in, speed, FLOPs, MFU and the curriculum's saving out."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from torchladder.metrics.device import memory, peak_flops
from torchladder.metrics.outputs import (
    JsonlOutput,
    Line,
    Output,
    TensorBoardOutput,
    TerminalOutput,
    WandBOutput,
    rewind,
)
from torchladder.registry import ConfigError

logger = logging.getLogger(__name__)

FILE = "metrics.jsonl"


@dataclass(frozen=True, kw_only=True)
class MetricsConfig:
    """What a run reports, and where."""

    log_freq: int = 10
    """Steps between two reports; the first and the last step report always."""

    enable_tensorboard: bool = True
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
class RunInfo:
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


class MetricsProcessor:
    """Reports a run, from a step on. Every rank has one; those after the first report nothing.

    Args:
        config: the section ``[metrics]``.
        run: the run's facts.
        step: steps already taken; what an earlier process reported of later ones is dropped, its totals go on.

    Raises:
        ConfigError: W&B is asked for and not installed.
    """

    def __init__(self, config: MetricsConfig, run: RunInfo, step: int = 0) -> None:
        self.config = config
        self.run = run
        self.peak = config.peak_flops or peak_flops(run.device)
        self.outputs: list[Output] = []
        self.rewind(step)

    def rewind(self, step: int) -> None:
        """Goes on after ``step`` steps: drops what is reported of later ones."""
        self.close()
        self.total: dict[str, float] = {"tokens": 0, "flops": 0, "seconds": 0.0}
        if self.run.rank == 0:
            self._open(step)
        self.step = step
        self.tokens = self.pairs = 0
        self.began = self.since = time.perf_counter()
        self.seconds_before = self.total["seconds"]

    def __enter__(self) -> MetricsProcessor:
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
        memory_gib, memory_share = memory(self.run.device)
        line: Line = {"step": step, "loss": loss, "grad_norm": grad_norm, "lr": lr, "window": window, **self.total}
        line |= {
            "tps": self.tokens * per_device,
            "tflops": flops * per_device / 1e12,
            "mfu": flops * per_device / self.peak if self.peak else None,
            "mfu_palm": flops_palm * per_device / self.peak if self.peak else None,
            "attention_saved": 1 - self.pairs / causal_pairs if self.tokens else 0.0,
            "memory_gib": memory_gib,
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

    def _open(self, step: int) -> None:
        config, run = self.config, self.run
        run.folder.mkdir(parents=True, exist_ok=True)
        if config.enable_wandb:  # the first, before any file is touched: it may be missing
            self.outputs.append(WandBOutput(run.folder, run.seq_len, run.settings))
        self.total |= rewind(run.folder / FILE, step)
        self.outputs.append(JsonlOutput(run.folder / FILE))
        if config.enable_tensorboard:
            self.outputs.append(TensorBoardOutput(run.folder / config.save_tb_folder, run.seq_len, step))
        colors, bar = not config.disable_color_printing, not config.disable_progress_bar
        self.outputs.append(TerminalOutput(run.steps, step, colors, bar))

    def _write(self, line: Line) -> None:
        for output in self.outputs:
            try:
                output.write(line)
            except OSError as error:  # a full disk is no reason to stop training
                logger.warning("metrics: step %d is not reported in full: %s", line["step"], error)

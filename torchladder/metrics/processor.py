"""The metrics processor: counts tokens and pairs, and reports every ``log_freq`` steps."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torchladder.disk_errors import tolerating
from torchladder.metrics.device import get_peak_flops, peak_memory
from torchladder.metrics.energy import EnergyMeter
from torchladder.metrics.metric_table import (
    Interval,
    Report,
    RunInfo,
    Value,
    probe_report,
    training_report,
    validation_report,
)
from torchladder.metrics.output_config import MetricsConfig, Output, registry
from torchladder.metrics.outputs import METRICS_FILE, JsonlOutput, TerminalOutput, rewind_jsonl

PACE_WEIGHT = 0.2
"""Weight of the last interval in the seconds per step, from which the time left follows."""


class MetricsProcessor:
    """Reports a run. Every rank has a processor; only the one of rank 0 has outputs.

    Args:
        config: the section ``[metrics]``.
        run: constants of the run.
        step: optimizer steps already taken; later records of an earlier process are deleted.
        totals: as ``progress`` was after that step; None continues those of the last record.

    Raises:
        ConfigError: an output cannot be built, such as W&B if it is not installed.
    """

    def __init__(
        self, config: MetricsConfig, run: RunInfo, step: int = 0, totals: Mapping[str, float] | None = None
    ) -> None:
        self.config = config
        self.run = run
        self.peak_flops = config.peak_flops or get_peak_flops(run.device)
        self.outputs: list[Output] = []
        self._warned: set[str] = set()
        measures = config.energy_country and run.rank == 0
        self.energy = EnergyMeter(config.energy_country, run.machines) if measures else None
        self.rewind(step, totals)

    def __enter__(self) -> MetricsProcessor:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def rewind(self, step: int, totals: Mapping[str, float] | None = None) -> None:
        """Deletes the reports after ``step`` and continues there, with ``totals`` or those of the last report."""
        self._close_outputs()
        self.totals: dict[str, float] = {"tokens": 0, "flops": 0, "seconds": 0.0}
        if self.run.rank == 0:
            config, folder = self.config, self.run.folder
            folder.mkdir(parents=True, exist_ok=True)
            for output in config.chosen_outputs():  # first: if a package is not installed, no record is touched
                self.outputs.append(registry.build(output, run=self.run, config=config, step=step))
            self.totals |= rewind_jsonl(folder / METRICS_FILE, step)
            self.outputs.append(JsonlOutput(folder / METRICS_FILE))
            colors, bar = not config.disable_color_printing, not config.disable_progress_bar
            self.outputs.append(TerminalOutput(self.run.steps, step, colors, bar))
        self.totals |= totals or {}
        if self.energy:
            self.energy.restart(self.totals)
        self.last_step = step
        self.reports = 0
        self.step_seconds = 0.0
        self.tokens = self.pairs = 0
        self.last_time = time.perf_counter()
        self.start_time = self.last_time - self.totals["seconds"]

    @property
    def progress(self) -> dict[str, float]:
        """Tokens, FLOPs, seconds and energy since the start of the run, those since the last report included."""
        energy = self.energy.totals(measure_now=True) if self.energy else {}
        return {
            **(self.totals | energy),
            "tokens": self.totals["tokens"] + self.tokens,
            "flops": self.totals["flops"] + self.run.flops(self.tokens, self.pairs),
            "seconds": time.perf_counter() - self.start_time,
        }

    def should_log(self, step: int) -> bool:
        """Returns whether a step, counted from 1, reports: the first, the last and every ``log_freq``-th."""
        return step % self.config.log_freq == 0 or step in (1, self.run.steps)

    def count(self, tokens: int, pairs: int) -> None:
        """Adds tokens trained on and (query, key) pairs attended, both summed over ranks, pairs also over layers."""
        self.tokens += tokens
        self.pairs += pairs

    def log(self, step: int, layer_windows: Mapping[str, int] | None = None, **values: Value) -> None:
        """Reports a training step, counted from 1, with speed and MFU since the previous report.

        Args:
            step: optimizer steps taken.
            layer_windows: layer type -> window, of the types that are not full_attention.
            **values: the metrics of the table that are passed in: loss, grad_norm, lr, window; z_loss and
                global_batch_size are optional.

        Raises:
            ConfigError: a value is missing, or its name is not in the table.
        """
        now = time.perf_counter()
        self.totals["tokens"] += self.tokens
        self.totals["flops"] += self.run.flops(self.tokens, self.pairs)
        self.totals["seconds"] = now - self.start_time
        energy = self.energy.totals(measure_now=step == self.run.steps) if self.energy else {}
        self.totals |= energy
        memory_gib, memory_fraction = peak_memory(self.run.device)
        seconds, steps = max(now - self.last_time, 1e-9), step - self.last_step
        self._average_pace(seconds / max(steps, 1))
        interval = Interval(
            run=self.run,
            peak_flops=self.peak_flops,
            step=step,
            steps=steps,
            tokens=self.tokens,
            pairs=self.pairs,
            seconds=seconds,
            step_seconds=self.step_seconds,
            totals=self.totals,
            memory_gib=memory_gib,
            memory_fraction=memory_fraction,
        )
        self._write(training_report(interval, {**values, **energy}, layer_windows or {}))
        self.last_step, self.last_time, self.tokens, self.pairs = step, now, 0, 0

    def log_validation(
        self, step: int, loss: float, window: int, ema_loss: float | None = None, masks: str = ""
    ) -> None:
        """Reports a validation loss after ``step`` steps, and that of the averaged weights, if there are any.

        Each query sees ``window`` tokens, under ``masks`` if they are not those of the run.
        """
        self._write(validation_report(step, loss, window, self.run.seq_len, ema_loss, masks))

    def log_probes(self, step: int, scores: Mapping[str, float]) -> None:
        """Reports the scores of long-context probes after ``step`` steps."""
        self._write(probe_report(step, scores))

    def _average_pace(self, step_seconds: float) -> None:
        """Updates the moving average of the seconds per step; that of the first report, of cold steps, is replaced."""
        weight = PACE_WEIGHT if self.reports > 1 else 1.0
        self.step_seconds += weight * (step_seconds - self.step_seconds)
        self.reports += 1

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Excludes the time inside (validation, samples, checkpoints) from tps and MFU; ``seconds`` includes it."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.last_time += time.perf_counter() - begin

    def close(self) -> None:
        """Closes every output and ends the measurement of energy; may be called twice."""
        self._close_outputs()
        if self.energy:
            self.energy.close()

    def _close_outputs(self) -> None:
        for output in self.outputs:
            with tolerating(output.name, self._warned):
                output.close()
        self.outputs = []

    def _write(self, report: Report) -> None:
        for output in self.outputs:
            with tolerating(output.name, self._warned):  # training continues on a full disk
                output.write(report)

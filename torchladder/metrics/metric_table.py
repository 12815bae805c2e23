"""The table of metrics: one entry defines a number, and metrics.jsonl, TensorBoard, W&B and the console show it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from torchladder.registry import ConfigError, unknown_name

Value = float | None
"""None is null in metrics.jsonl, and omitted on the console, in TensorBoard and W&B."""


@dataclass(frozen=True, kw_only=True)
class RunInfo:
    """Constants of a run that reporting needs."""

    folder: Path  #: directory of metrics.jsonl, created if missing
    steps: int  #: optimizer steps of the whole run
    seq_len: int  #: tokens in a row
    flops: Callable[[int, int], int]  #: (tokens, pairs) -> FLOPs of the model's forward and backward pass
    layers: int = 1  #: pairs are summed over them
    device: torch.device
    rank: int = 0  #: only rank 0 reports
    ranks: int = 1
    machines: int = 1
    settings: dict[str, Any] = field(default_factory=dict)  #: the run's config, as Weights & Biases shows it


@dataclass(frozen=True, kw_only=True)
class Interval:
    """Measurements since the previous report; tokens and attended (query, key) pairs are summed over ranks.

    Pairs are also summed over layers.
    """

    run: RunInfo
    peak_flops: float | None  #: FLOP/s of one device
    step: int  #: optimizer steps since the start of the run
    steps: int  #: optimizer steps since the previous report
    tokens: int
    pairs: int
    seconds: float  #: wall-clock time without pauses
    step_seconds: float  #: wall-clock time of a step without pauses, a mean that favors the last intervals
    totals: Mapping[str, float]  #: tokens, flops and seconds since the start of the run
    memory_gib: float  #: peak of this rank's device
    memory_fraction: float

    def per_device(self, amount: float) -> float:
        """Returns an amount per second and device."""
        return amount / (self.seconds * self.run.ranks)

    def flop_rate(self, pairs: int) -> float:
        """Returns FLOP/s per device for a number of attended pairs."""
        return self.per_device(self.run.flops(self.tokens, pairs))

    def mfu(self, pairs: int) -> float | None:
        """Returns the model FLOPs utilization, 0 to 1, for a number of attended pairs; None if the peak is unknown."""
        return self.flop_rate(pairs) / self.peak_flops if self.peak_flops else None

    def attention_saved(self) -> float:
        """Returns the fraction of full causal attention that was not computed."""
        causal_pairs = self.run.layers * self.tokens * (self.run.seq_len + 1) / 2
        return 1 - self.pairs / causal_pairs if self.tokens else 0.0

    def effective_context(self) -> float:
        """Returns the mean number of keys that a query attended to, itself included: of a full causal row, half."""
        return (1 - self.attention_saved()) * (self.run.seq_len + 1) / 2


@dataclass(frozen=True)
class Metric:
    """A number that training steps report."""

    key: str  #: name in metrics.jsonl
    compute: Callable[[Interval], Value] | None = None  #: None: the caller passes it, MetricsProcessor.log(key=value)
    tag: str = ""  #: name in TensorBoard and W&B; empty: not there
    console: str = ""  #: format string over the values of all metrics, such as "loss: {loss:.4f}"; empty: not there
    color: str = ""  #: of the console text, a rich style
    tag_scale: float = 1  #: factor of the value in TensorBoard and W&B
    jsonl: bool = True  #: whether metrics.jsonl has it
    optional: bool = False  #: whether outputs omit it in reports that do not pass it


METRICS: dict[str, Metric] = {
    metric.key: metric
    for metric in (
        Metric("step", lambda i: i.step, console="step: {step:2}", color="red"),
        Metric("loss", tag="loss_metrics/global_avg_loss", console="loss: {loss:.4f}", color="green"),
        Metric("z_loss", tag="loss_metrics/z_loss", console="z_loss: {z_loss:.2e}", color="green", optional=True),
        Metric("grad_norm", tag="grad_norm", console="grad_norm: {grad_norm:.4f}", color="orange3"),
        Metric("lr", tag="lr", console="lr: {lr:.2e}", color="orange3"),
        Metric(
            "memory_fraction",
            lambda i: i.memory_fraction,
            console="memory: {memory_gib:.2f}GiB({memory_fraction:.2%})",
            color="turquoise2",
            jsonl=False,
        ),
        Metric("window", tag="curriculum/window"),  # on the console with attention_saved
        Metric("global_batch_size", tag="global_batch_size", console="batch: {global_batch_size}", optional=True),
        Metric("tokens", lambda i: i.totals["tokens"]),
        Metric("tps", lambda i: i.per_device(i.tokens), "throughput(tps)", "tps: {tps:,.0f}", "blue"),
        Metric("flops", lambda i: i.totals["flops"]),
        Metric("tflops", lambda i: i.flop_rate(i.pairs) / 1e12, "tflops", "tflops: {tflops:,.2f}", "cyan", jsonl=False),
        Metric("mfu", lambda i: i.mfu(i.pairs), "mfu(%)", "mfu: {mfu:.2%}", "magenta", tag_scale=100),
        # PaLM (arXiv 2204.02311, appendix B): every query attends to the whole row, future keys included.
        Metric("mfu_palm", lambda i: i.mfu(i.run.layers * i.tokens * i.run.seq_len), "mfu_palm(%)", tag_scale=100),
        Metric(
            "attention_saved",
            lambda i: i.attention_saved(),
            tag="curriculum/attention_saved",
            console="window: {window}  saved: {attention_saved:.1%}",
            color="yellow",
        ),
        Metric("effective_context", lambda i: i.effective_context(), "curriculum/effective_context"),
        Metric("memory_gib", lambda i: i.memory_gib, "memory/max_reserved(GiB)"),
        Metric("seconds", lambda i: i.totals["seconds"]),
        Metric("energy_kwh", tag="energy/kwh", console="energy: {energy_kwh:.4g}kWh", color="cyan", optional=True),
        Metric("co2_kg", tag="energy/co2_kg", optional=True),
    )
}
"""All metrics by key, in the order of metrics.jsonl and of the console line; tags are torchtitan's where it has one."""


def register(metric: Metric) -> None:
    """Adds a metric to every output.

    Raises:
        ConfigError: another metric has that key.
    """
    if metric.key in METRICS:
        raise ConfigError(f"metric {metric.key!r} is registered twice: choose another key.")
    METRICS[metric.key] = metric


@dataclass(frozen=True)
class Report:
    """One report, as each output shows it."""

    step: int
    record: dict[str, Value]  #: a line of metrics.jsonl
    scalars: dict[str, float]  #: TensorBoard and W&B: tag → value
    console: list[tuple[str, str]]  #: texts with their colors
    seconds_left: float | None = None  #: estimated time until the last step


def training_report(interval: Interval, passed: dict[str, Value], layer_windows: Mapping[str, int]) -> Report:
    """Returns the report of a training step from the computed metrics and the passed ones.

    Each of ``layer_windows``, the windows by layer type, is reported as ``window_<type>``.

    Raises:
        ConfigError: a passed value has no entry in the table, or an entry has no value.
    """
    table = [metric for metric in METRICS.values() if metric.key in passed or not metric.optional]
    expected = {metric.key for metric in METRICS.values() if metric.compute is None}
    for key in passed.keys() - expected:
        raise unknown_name("metric passed to log()", key, expected)
    values = {metric.key: metric.compute(interval) if metric.compute else passed.get(metric.key) for metric in table}
    for key in expected & values.keys() - passed.keys():
        raise ConfigError(f"metric {key!r} has no value: pass {key}= to log(), or register it with compute=.")
    windows = {f"window_{name}": window for name, window in layer_windows.items()}
    tagged = [(metric, value) for metric in table if metric.tag and (value := values[metric.key]) is not None]
    return Report(
        interval.step,
        record={metric.key: values[metric.key] for metric in table if metric.jsonl} | windows,
        scalars={metric.tag: value * metric.tag_scale for metric, value in tagged}
        | {f"curriculum/{key}": window for key, window in windows.items()},
        console=[
            (metric.console.format(**values), metric.color)
            for metric in table
            if metric.console and values[metric.key] is not None
        ]
        + [(f"{name}: {window}", "yellow") for name, window in layer_windows.items()],
        seconds_left=(interval.run.steps - interval.step) * interval.step_seconds,
    )


def validation_report(
    step: int, loss: float, window: int, seq_len: int, ema_loss: float | None = None, masks: str = ""
) -> Report:
    """Returns the report of a validation loss under a window, and of that of the averaged weights, if there are any.

    The full row's has torchtitan's tag; ``masks`` other than the run's are part of every name.
    """
    key = f"validation_loss_{masks}" if masks else "validation_loss"
    tag = "global_avg_loss" if window == seq_len else f"loss_at_window_{window}"
    tag = f"loss_under_{masks}" if masks else tag
    report = Report(
        step,
        record={"step": step, key: loss, "window": window},
        scalars={f"validation_metrics/{tag}": loss},
        console=[(f"validate step: {step:2}  loss: {loss:.4f}", "green"), (f"window: {window}", "yellow")],
    )
    if masks:
        report.console.append((f"masks: {masks}", "yellow"))
    if ema_loss is not None:
        report.record[f"ema_{key}"] = ema_loss
        report.scalars[f"validation_metrics/ema_{tag}"] = ema_loss
        report.console.insert(1, (f"ema_loss: {ema_loss:.4f}", "green"))
    return report


def probe_report(step: int, scores: Mapping[str, float]) -> Report:
    """Returns the report of long-context probes, from ``<probe>_accuracy``, ``<probe>_loss`` and the like."""
    return Report(
        step,
        record={"step": step, **scores},
        scalars={f"validation_metrics/{name}": score for name, score in scores.items()},
        console=[(f"validate step: {step:2}", "green")]
        + [
            (f"{name}: {score:.2%}" if name.endswith("accuracy") else f"{name}: {score:.4f}", "green")
            for name, score in scores.items()
        ],
    )

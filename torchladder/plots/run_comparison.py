"""What a report says in words and numbers: runs against the first one, spread over seeds, settings that differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

from torchladder.plots.run_curves import RunCurves, smooth

PLACES = ("job.config_file", "job.description", "job.dump_folder", "job.extends")
"""Settings that say where a run is, not what it computes."""


@dataclass(frozen=True)
class ReportedRun:
    """A run in a report.

    Attributes:
        curves: its metrics.
        settings: ``section.key`` -> value of its config.toml; empty if that is missing.
        samples: step and text of each sample, in order.
    """

    curves: RunCurves
    settings: Mapping[str, Any] = field(default_factory=dict)
    samples: Sequence[tuple[int, str]] = ()

    @property
    def name(self) -> str:
        return self.curves.name

    @property
    def final_loss(self) -> float:
        """The last validation loss at full context; NaN if there is none."""
        losses = self.curves.validation_loss
        return float(losses[-1]) if len(losses) else np.nan

    def at_tokens(self, kind: str, tokens: float) -> float:
        """Returns the seconds or FLOPs that the run had taken after a number of tokens."""
        curves = self.curves
        return float(np.interp(tokens, np.r_[0, curves.tokens], np.r_[0, getattr(curves, kind)]))

    def saved(self, kind: str, first: ReportedRun) -> float:
        """Returns the fraction of the first run's seconds or FLOPs that this run saves, at the tokens of both."""
        tokens = min(self.curves.tokens[-1], first.curves.tokens[-1])
        spent = first.at_tokens(kind, tokens)
        return 1 - self.at_tokens(kind, tokens) / spent if spent else np.nan

    def cost_to_reach(self, loss: float, kind: str) -> float:
        """Returns the tokens, seconds or FLOPs at which the validation loss first is at most ``loss``; NaN if never.

        Between two validations the loss is taken as linear.
        """
        points = list(zip(self.curves.at_validation(kind), self.curves.validation_loss, strict=True))
        if points and points[0][1] <= loss:
            return float(points[0][0])
        for (before, above), (after, below) in pairwise(points):
            if below <= loss:
                share = (above - loss) / (above - below) if np.isfinite(above) else 1.0
                return float(before + share * (after - before))
        return np.nan

    def weighted_mean(self, key: str) -> float:
        """Returns the mean over all tokens of a metric that holds since the report before."""
        values, tokens = self.column(key), np.diff(self.curves.tokens, prepend=0)
        known = np.isfinite(values)
        return float(np.average(values[known], weights=tokens[known])) if tokens[known].sum() else np.nan

    def column(self, key: str) -> np.ndarray:
        """Returns a metric at each reported training step; NaN where it is missing."""
        values = [record.get(key) for record in self.curves.records if "loss" in record]
        return np.array([np.nan if value is None else value for value in values], dtype=float)

    def other_validation(self) -> dict[str, tuple[int, float]]:
        """Returns step and value, the last ones, of every scalar in validation records but the loss at full context."""
        found: dict[str, tuple[int, float]] = {}
        records = [record for record in self.curves.records if "loss" not in record]
        full = max((record["window"] for record in records if "validation_loss" in record), default=None)
        for record in records:
            window = record.get("window", full)
            for key, value in record.items():
                if key in ("step", "window") or (key == "validation_loss" and window == full):
                    continue
                if isinstance(value, int | float):
                    found[key if window == full else f"{key}, window {window:,}"] = (record["step"], value)
        return found


def finals(run: ReportedRun, first: ReportedRun) -> dict[str, str]:
    """Returns the last values of a run and how they differ from the first run's, as text: column -> cell."""
    curves, is_first = run.curves, run is first
    reach = np.nan if is_first else run.cost_to_reach(first.final_loss, "flops")
    share = f" ({reach / first.curves.flops[-1]:.0%})" if first.curves.flops[-1] else ""
    return {
        "validation loss": number(run.final_loss) or ("nan" if len(curves.validation_loss) else ""),
        "difference": "" if is_first else number(run.final_loss - first.final_loss, "+.4f"),
        "training loss": number(smooth(curves.loss)[-1]),
        "steps": f"{curves.step[-1]:,.0f}",
        "tokens": f"{curves.tokens[-1]:,.0f}",
        "minutes": number(curves.seconds[-1] / 60, ",.1f"),
        "time saved": "" if is_first else number(run.saved("seconds", first), ".1%"),
        "FLOPs": f"{curves.flops[-1]:.3e}",
        "FLOPs saved": "" if is_first else number(run.saved("flops", first), ".1%"),
        "FLOPs to the first run's loss": f"{reach:.3e}{share}" if np.isfinite(reach) else "",
        "kWh": number(run.column("energy_kwh")[-1], ".4g"),
        "kg CO2": number(run.column("co2_kg")[-1], ".4g"),
    }


def speeds(run: ReportedRun) -> dict[str, str]:
    """Returns throughput and memory of a run as text: column -> cell. The first report, which compiles, is left out."""

    def median(key: str) -> float:
        values = run.column(key)
        values = values[1:] if len(values) > 1 else values
        return float(np.median(values[np.isfinite(values)])) if np.isfinite(values).any() else np.nan

    memory = run.column("memory_gib")
    return {
        "tokens/s per device, median": number(median("tps"), ",.0f"),
        "MFU, median": number(median("mfu"), ".1%"),
        "attention saved": number(run.weighted_mean("attention_saved"), ".1%"),
        "peak memory (GiB)": number(np.nanmax(memory) if np.isfinite(memory).any() else np.nan, ".2f"),
    }


def seed_groups(runs: Sequence[ReportedRun]) -> list[list[ReportedRun]]:
    """Returns the runs that differ only in seeds and have taken the same number of steps, together; others alone."""
    groups: list[tuple[Any, list[ReportedRun]]] = []
    for run in runs:
        kept = {key: value for key, value in run.settings.items() if key not in PLACES and not key.endswith(".seed")}
        same = (kept, run.curves.step[-1])
        group = next((members for other, members in groups if other == same and kept), None)
        if group is None:
            groups.append((same, [run]))
        else:
            group.append(run)
    return [members for _, members in groups]


def spread(losses: Sequence[float]) -> str:
    """Returns the mean and the sample standard deviation of losses, as text."""
    mean = number(float(np.mean(losses)))
    return f"{mean} ± {np.std(losses, ddof=1):.4f}" if len(losses) > 1 else mean


def differing_settings(runs: Sequence[ReportedRun]) -> dict[str, list[str]]:
    """Returns the settings that differ between the runs whose settings are known: key -> the value of each run."""
    known = [run.settings for run in runs if run.settings]
    keys = dict.fromkeys(key for settings in known for key in settings if key not in PLACES)
    missing = object()
    return {
        key: [_setting(run.settings.get(key, "")) for run in runs]
        for key in keys
        if any(settings.get(key, missing) != known[0].get(key, missing) for settings in known)
    }


def _setting(value: Any) -> str:
    """Returns a value as text, as in a TOML file."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def number(value: float, spec: str = ".4f") -> str:
    """Returns a number as text, with a true minus sign; nothing for NaN."""
    return format(value, spec).replace("-", "−") if np.isfinite(value) else ""

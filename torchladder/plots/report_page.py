"""A report of several runs as one HTML file, which fetches nothing when it is viewed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from itertools import cycle
from pathlib import Path

import numpy as np

from torchladder.disk_errors import naming_path
from torchladder.plots import run_comparison
from torchladder.plots.report_figure import PAGE_COLORS, comparison_figure
from torchladder.plots.run_comparison import ReportedRun, number
from torchladder.registry import ConfigError

SAMPLED_STEPS = 10
"""Steps whose samples are shown, the last ones of each run."""

FIGURE_CONFIG = {
    "responsive": True,
    "displaylogo": False,
    "modeBarButtons": [["toImage", "zoom2d", "pan2d", "resetScale2d"]],
    "toImageButtonOptions": {"filename": "report", "scale": 3},
}


@dataclass(frozen=True)
class PageTable:
    """A table: its heading, a sentence below it, the heads of the columns, and the cells."""

    title: str
    note: str
    head: list[str]
    rows: list[list[str]]


def write_report_page(path: Path, runs: Sequence[ReportedRun]) -> None:
    """Writes the page: curves, and tables of losses, seeds, settings, throughput, validation metrics, and samples.

    Differences and savings are against the first run.

    Raises:
        ConfigError: there is no run, the suffix is not .html, or plotly or jinja2 is not installed.
    """
    check_page_path(path)
    if not runs:
        raise ConfigError("no runs to report: pass at least one.")
    import jinja2
    from plotly.offline import get_plotlyjs

    template = resources.files("torchladder.plots").joinpath("report_page.html.jinja").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    groups = run_comparison.seed_groups(runs)
    figure = comparison_figure(runs).to_html(
        full_html=False, include_plotlyjs=False, div_id="curves", config=FIGURE_CONFIG, default_height="auto"
    )
    page = environment.from_string(template).render(
        title=" · ".join(run.name for run in runs) if len(runs) <= 4 else f"{len(runs)} runs",
        colors=dict(zip((run.name for run in runs), cycle(PAGE_COLORS))),
        headlines=[(one[0].name, _group_name(one), text) for one in groups[1:] if (text := _headline(one, groups[0]))],
        plotly_js=get_plotlyjs(),
        figure=figure,
        tables=[table for table in _tables(runs, groups) if table.rows],
        samples={run.name: _sampled(run) for run in runs if run.samples},
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    with naming_path(path):
        path.write_text(page, encoding="utf-8")


def check_page_path(path: Path) -> None:
    """Raises ConfigError if the suffix is not .html, or a package that writes the page is missing."""
    if path.suffix != ".html":
        raise ConfigError(f"{path}: the file name of a page must end in .html.")
    try:
        import jinja2  # noqa: F401
        import plotly  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"--html: {error.name} is not installed; pip install 'torchladder[report]'.") from None


def _headline(group: Sequence[ReportedRun], first: Sequence[ReportedRun]) -> str:
    """Returns a sentence on runs that differ only in seeds against those of the first run, after their name."""
    loss = _mean([run.final_loss for run in first])
    difference = _mean([run.final_loss for run in group]) - loss
    parts = []
    if np.isfinite(difference):
        side = "higher" if difference > 0 else "lower"
        parts.append(f"ends {abs(difference):.3f} nats {side} than {_group_name(first)}")
    costs = []
    tokens = _mean([run.curves.tokens[-1] for run in group]) / first[0].curves.tokens[-1]
    if abs(tokens - 1) >= 0.0005:
        parts.append(f"after {tokens:.0%} of its tokens")
    for kind, noun, less in (("flops", "FLOPs", "fewer"), ("seconds", "time", "less")):
        saved = _mean([run.saved(kind, first[0]) for run in group])
        amount = f"{abs(saved):.1%} {less if saved > 0 else 'more'}" if abs(saved) >= 0.0005 else "the same"
        costs += [f"{amount} {noun}"] if np.isfinite(saved) else []
    same = " at equal tokens" if abs(tokens - 1) >= 0.0005 else ""
    parts += [f"with {' and '.join(costs)}{same}"] if costs else []
    reach = _mean([run.cost_to_reach(loss, "flops") for run in group]) / first[0].curves.flops[-1]
    if difference < 0 and reach < 1:
        parts.append(f"and reaches that loss with {reach:.0%} of the FLOPs")
    return ", ".join(parts)


def _group_name(group: Sequence[ReportedRun]) -> str:
    return group[0].name if len(group) == 1 else f"{group[0].name} (mean of {len(group)} seeds)"


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))


def _tables(runs: Sequence[ReportedRun], groups: Sequence[Sequence[ReportedRun]]) -> list[PageTable]:
    names = [run.name for run in runs]
    settings = run_comparison.differing_settings(runs)
    return [
        _run_table("Final losses", _losses_note(runs), runs, lambda run: run_comparison.finals(run, runs[0])),
        _seed_table(groups),
        PageTable(
            "Settings that differ",
            _settings_note(runs),
            ["setting", *names],
            [[key, *values] for key, values in settings.items()] if len(runs) > 1 else [],
        ),
        _run_table(
            "Throughput and memory",
            "Medians leave out the first report, which compiles; attention saved is the share of full causal rows.",
            runs,
            run_comparison.speeds,
        ),
        _validation_table(runs),
    ]


def _run_table(
    title: str, note: str, runs: Sequence[ReportedRun], cells: Callable[[ReportedRun], dict[str, str]]
) -> PageTable:
    """Returns a table with a row for each run; columns without a value are left out."""
    rows = {run.name: cells(run) for run in runs}
    head = [key for key in next(iter(rows.values())) if any(row[key] for row in rows.values())]
    return PageTable(title, note, ["run", *head], [[name, *(row[key] for key in head)] for name, row in rows.items()])


def _losses_note(runs: Sequence[ReportedRun]) -> str:
    note = "Nats per token; validation at full context."
    if len(runs) > 1:
        note += " Differences and savings are against the first run."
        if len({run.curves.tokens[-1] for run in runs}) > 1:
            note += " The runs have read different numbers of tokens; savings are at the tokens that both have read."
    return note


def _seed_table(groups: Sequence[Sequence[ReportedRun]]) -> PageTable:
    """Returns mean and spread of runs that differ only in seeds; no rows if there are none."""
    rows = []
    for group in groups:
        losses, first = [run.final_loss for run in group], [run.final_loss for run in groups[0]]
        difference = "" if group is groups[0] else number(_mean(losses) - _mean(first), "+.4f")
        names = ", ".join(run.name for run in group)
        rows.append([names, str(len(group)), run_comparison.spread(losses), difference])
    note = "Mean and sample standard deviation of the final validation loss over runs that differ only in seeds."
    head = ["runs", "seeds", "validation loss", "difference"]
    return PageTable("Spread over seeds", note, head, rows if any(len(group) > 1 for group in groups) else [])


def _settings_note(runs: Sequence[ReportedRun]) -> str:
    unknown = [run.name for run in runs if not run.settings]
    return f"Without a config.toml: {', '.join(unknown)}." if unknown else ""


def _validation_table(runs: Sequence[ReportedRun]) -> PageTable:
    values = [run.other_validation() for run in runs]
    keys = dict.fromkeys(key for one in values for key in one)
    last = [max((step for step, _ in one.values()), default=0) for one in values]
    rows = [[key, *(_last_value(one.get(key), step) for one, step in zip(values, last, strict=True))] for key in keys]
    head = ["metric", *(run.name for run in runs)]
    return PageTable("Other validation metrics", "At the last validation.", head, rows)


def _last_value(found: tuple[int, float] | None, last_step: int) -> str:
    """Returns a value as text, with its step if other metrics are newer."""
    if found is None:
        return ""
    step, value = found
    return f"{value:.4g}".replace("-", "−") if step == last_step else f"{value:.4g} (step {step:,})"


def _sampled(run: ReportedRun) -> list[tuple[int, list[str]]]:
    """Returns step and texts of the last sampled steps, newest first."""
    texts: dict[int, list[str]] = {}
    for step, text in run.samples:
        texts.setdefault(step, []).append(text)
    return list(texts.items())[::-1][:SAMPLED_STEPS]

"""The interactive figure of a report: loss above, windows below, against tokens, time or FLOPs."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import numpy as np

from torchladder.plots.run_comparison import ReportedRun
from torchladder.plots.run_curves import UNITS, RunCurves, loss_range, smooth, unit
from torchladder.plots.style import COLORS

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

PAGE_COLORS = [*COLORS[:-1], "#8c959f"]
"""Colors of runs on a light and on a dark page: the palette of the plots with gray in the place of black."""

DASHES = ["solid", "dash", "dashdot"]
"""Lines of the runs of one color."""

MAX_POINTS = 4000
"""Points of a curve; of longer ones every n-th is drawn, and the last."""

PLACE = "step %{customdata[0]:,} · %{customdata[1]:,} tokens<br>%{customdata[2]} · %{customdata[3]:.3e} FLOPs"
"""Where in its run a point is, in the text under the pointer."""


def comparison_figure(runs: Sequence[ReportedRun]) -> Figure:
    """Returns the figure: buttons choose what the losses and windows are drawn against."""
    from plotly.subplots import make_subplots

    units = {kind: unit(kind, max(getattr(run.curves, kind)[-1] for run in runs)) for kind in UNITS}
    traces: list[dict[str, Any]] = []
    for number, run in enumerate(runs):
        rounds, color = divmod(number, len(PAGE_COLORS))
        traces += _traces(run.curves, PAGE_COLORS[color], DASHES[rounds % len(DASHES)])
    figure = make_subplots(rows=2, cols=1, shared_xaxes=True, row_heights=[0.72, 0.28], vertical_spacing=0.05)
    positions = [trace.pop("positions") for trace in traces]
    columns = {kind: [one[kind] / scale for one in positions] for kind, (_, scale) in units.items()}
    for trace, x in zip(traces, columns["tokens"], strict=True):
        row = trace.pop("row")
        figure.add_scatter(row=row, col=1, x=x.tolist(), **trace)
    buttons = [
        {
            "label": {"tokens": "tokens", "seconds": "time", "flops": "FLOPs"}[kind],
            "method": "update",
            "args": [
                {"x": [x.tolist() for x in columns[kind]]},
                {"xaxis2.title.text": _html(label), "xaxis.autorange": True, "xaxis2.autorange": True},
            ],
        }
        for kind, (label, _) in units.items()
    ]
    figure.update_layout(
        template="none",
        height=600 + 24 * len(runs),
        margin={"l": 58, "r": 12, "t": 56, "b": 48},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": "system-ui, sans-serif", "size": 13},
        hovermode="closest",
        hoverlabel={"align": "left"},
        legend={"orientation": "h", "x": 0, "y": -0.11, "yanchor": "top", "bgcolor": "rgba(0,0,0,0)"},
        updatemenus=[
            {"type": "buttons", "direction": "right", "buttons": buttons, "showactive": True}
            | {"x": 0, "xanchor": "left", "y": 1.02, "yanchor": "bottom", "pad": {"l": 0, "t": 0}}
        ],
    )
    figure.update_xaxes(zeroline=False, rangemode="tozero")
    figure.update_xaxes(title_text=_html(units["tokens"][0]), title_standoff=4, row=2, col=1)
    figure.update_yaxes(zeroline=False, title_standoff=6)
    figure.update_yaxes(
        title_text="loss (nats per token)", range=loss_range([run.curves for run in runs]), row=1, col=1
    )
    longest = max(float(np.nanmax(window)) for run in runs for window in run.curves.windows.values())
    ticks = np.linspace(0, longest, 5).tolist()
    figure.update_yaxes(title_text="window", range=[0, longest * 1.1], tickvals=ticks, tickformat=",.2~f", row=2, col=1)
    return figure


def _traces(run: RunCurves, color: str, dash: str) -> list[dict[str, Any]]:
    """Returns the curves of a run; ``row`` and ``positions`` are not plotly's."""
    shown = _thinned(len(run.step))
    train = {kind: getattr(run, kind)[shown] for kind in UNITS}
    validation = {kind: run.at_validation(kind) for kind in UNITS}
    validated = len(run.validation_step) > 0
    common = {"name": run.name, "legendgroup": run.name}
    data = np.column_stack([run.loss[shown], smooth(run.loss)[shown]])
    name = "<b>%{fullData.name}</b><br>"
    loss = "training loss %{customdata[4]:.4f}, smoothed %{y:.4f}"
    traces: list[dict[str, Any]] = [
        common
        | {
            "row": 1,
            "positions": train,
            "y": data[:, 1].tolist(),
            "mode": "lines",
            "line": {"color": color, "width": 1.2, "dash": dash},
            "opacity": 0.6 if validated else 1.0,
            "showlegend": not validated,
            "customdata": _places(run.step[shown], train, data[:, 0]),
            "hovertemplate": f"{name}{loss}<br>{PLACE}<extra></extra>",
        }
    ]
    if validated:
        traces.append(
            common
            | {
                "row": 1,
                "positions": validation,
                "y": run.validation_loss.tolist(),
                "mode": "lines+markers",
                "line": {"color": color, "width": 2.2, "dash": dash},
                "marker": {"size": 7},
                "customdata": _places(run.validation_step, validation, run.validation_loss),
                "hovertemplate": f"{name}validation loss %{{y:.4f}}<br>{PLACE}<extra></extra>",
            }
        )
    for layer_type, window in run.windows.items():
        several = f" of {layer_type}" if run.layer_windows else ""
        stair_dash = dash if layer_type == "full_attention" else "dot"
        traces.append(
            common
            | {
                "row": 2,
                "positions": train,
                "y": window[shown].tolist(),
                "mode": "lines",
                "line": {"color": color, "width": 2, "shape": "hv", "dash": stair_dash},
                "showlegend": False,
                "customdata": _places(run.step[shown], train, window[shown]),
                "hovertemplate": f"{name}window{several} %{{y:,}}<br>{PLACE}<extra></extra>",
            }
        )
    return traces


def _thinned(count: int) -> np.ndarray:
    """Returns the indices of the points to draw."""
    return np.unique(np.r_[np.arange(0, count, -(-count // MAX_POINTS)), count - 1])


def _places(step: np.ndarray, positions: dict[str, np.ndarray], value: np.ndarray) -> list[list[Any]]:
    """Returns step, tokens, time, FLOPs and value of each point."""
    tokens, seconds, flops = (positions[kind].tolist() for kind in UNITS)
    times = [str(timedelta(seconds=round(one))) if np.isfinite(one) else "" for one in seconds]
    rows = zip(step.tolist(), tokens, times, flops, value.tolist(), strict=True)
    return [list(row) for row in rows]


def _html(label: str) -> str:
    """Returns an axis label of matplotlib for plotly."""
    return label.replace("$10^{", "10<sup>").replace("}$", "</sup>")

"""Plots: each is written, shows the right values, and refuses what it cannot draw."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from torchladder import curriculum, plots
from torchladder.commands import report
from torchladder.metrics import read_jsonl
from torchladder.plots import RunCurves
from torchladder.plots.run_curves import smooth
from torchladder.plots.style import GRID, short_names
from torchladder.registry import ConfigError

SEQ_LEN = 64


@pytest.fixture
def run(tmp_path):
    """Writes a metrics.jsonl and returns the run's folder."""

    def write(name="run", steps=200, windows=None, validation=True, **changes):
        windows = windows or curriculum.Linear(steps=steps, seq_len=SEQ_LEN, initial_window=8)
        lines = []
        for step in range(1, steps + 1):
            line = {"step": step, "loss": 2 + 6 / step, "window": windows(step - 1), "tokens": 1000 * step}
            lines.append(line | {"seconds": 0.5 * step, "flops": 10**9 * step, "mfu": None} | changes)
            if validation and step % 50 == 0:
                lines.append({"step": step, "validation_loss": 2.5 + 6 / step, "window": SEQ_LEN})
                lines.append({"step": step, "validation_loss": 9.0, "window": 8})
        path = tmp_path / name / "metrics.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return path.parent

    return write


def curves(folder):
    return RunCurves(folder.name, read_jsonl(folder / "metrics.jsonl"))


def ladders(windows, masks):
    return [plots.Ladder("full_attention", 2, masks, windows)]


@pytest.fixture
def drawn(monkeypatch):
    """Collects the figures instead of writing them."""
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path: figures.append(figure))
    return figures


def chunk_fraction(window):
    """Pairs within chunks, as a fraction of those of a full causal row."""
    whole, rest = divmod(SEQ_LEN, window)
    return (whole * window * (window + 1) + rest * (rest + 1)) / (SEQ_LEN * (SEQ_LEN + 1))


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_every_plot_is_written(tmp_path, run, suffix):
    ladder = curriculum.Linear(steps=500, seq_len=SEQ_LEN, initial_window=8)
    folder = tmp_path / "new"
    plots.plot_run(folder / f"ladder.{suffix}", curves(run()))
    two = [curves(run()), curves(run("two", validation=False))]
    plots.compare_runs(folder / f"report.{suffix}", two)
    plots.plot_curriculum(folder / f"plan.{suffix}", 500, ladders(ladder, ["document", "sliding"]), SEQ_LEN)
    plots.plot_masks(folder / f"masks.{suffix}")
    begins = {"png": b"\x89PNG", "svg": b"<?xml"}[suffix]
    assert sorted(path.stem for path in folder.iterdir()) == ["ladder", "masks", "plan", "report"]
    assert all(path.read_bytes().startswith(begins) for path in folder.iterdir())


@pytest.mark.parametrize("steps", [1, 2])
def test_the_shortest_runs(tmp_path, run, steps):
    plots.plot_run(tmp_path / "a.svg", curves(run(steps=steps)))
    plots.compare_runs(tmp_path / "b.svg", [curves(run(steps=steps))])
    plots.plot_curriculum(tmp_path / "c.svg", steps, ladders(lambda step: SEQ_LEN, ["causal"]), SEQ_LEN)


def test_a_run_is_plotted_with_its_window(run, drawn):
    plots.plot_run(Path("ladder.png"), curves(run()))
    top, bottom = drawn[0].axes
    losses, _, validation = (line.get_ydata() for line in top.get_lines())
    assert losses == pytest.approx([2 + 6 / step for step in range(1, 201)])
    assert validation == pytest.approx([2.5 + 6 / step for step in (50, 100, 150, 200)])
    assert top.get_title(loc="left") == "run"
    assert top.get_legend().get_texts()[1].get_text() == "validation, full context: 2.530 at the end"
    assert bottom.get_lines()[0].get_ydata()[[0, -1]] == pytest.approx([8, SEQ_LEN])
    assert bottom.get_xlabel() == "step"


def test_a_run_is_plotted_with_the_windows_of_its_curriculum(run, drawn):
    stairs = curriculum.Stages(seq_len=SEQ_LEN, stages=[(0, 16), (7, 32), (123, SEQ_LEN)])
    plots.plot_run(Path("ladder.png"), curves(run()), {"full_attention": stairs, "sliding_attention": lambda step: 4})
    full, sliding = drawn[0].axes[1].get_lines()
    assert full.get_xdata().tolist() == list(range(201))
    assert full.get_ydata().tolist() == [16] * 7 + [32] * 116 + [SEQ_LEN] * 78
    assert set(sliding.get_ydata()) == {4}


def test_ticks_say_where_they_are(run, drawn):
    plots.plot_run(Path("ladder.png"), curves(run(steps=20, windows=lambda step: 10)))
    drawn[0].draw_without_rendering()
    steps, windows = drawn[0].axes[1].xaxis, drawn[0].axes[1].yaxis
    assert [float(label.get_text()) for label in steps.get_ticklabels()] == steps.get_majorticklocs().tolist()
    assert [label.get_text() for label in windows.get_ticklabels()] == ["0", "2.5", "5", "7.5", "10"]
    assert all(tick == int(tick) for tick in steps.get_majorticklocs())


@pytest.mark.parametrize("length", [8, 40, 300])
def test_a_legend_fits_its_figure(run, drawn, length):
    runs = [RunCurves(f"{number} " + "run " * (length // 4), curves(run()).records) for number in range(6)]
    plots.compare_runs(Path("report.png"), runs)
    figure = drawn[0]
    figure.draw_without_rendering()
    box, whole = figure.legends[0].get_window_extent(), figure.bbox
    assert whole.x0 <= box.x0
    assert box.x1 <= whole.x1


def test_runs_are_compared_by_tokens_time_and_flops(run, drawn):
    plots.compare_runs(Path("report.png"), [curves(run("a")), curves(run("b", windows=lambda step: SEQ_LEN))])
    tops, bottoms = drawn[0].axes[:3], drawn[0].axes[3:]
    labels = [axes.get_xlabel() for axes in bottoms]
    assert labels == ["thousand tokens", "time (seconds)", "compute ($10^{9}$ FLOPs)"]
    ends = [axes.get_lines()[1].get_xdata()[-1] for axes in tops]
    assert ends == pytest.approx([200, 100, 200])
    assert [text.get_text() for text in drawn[0].legends[0].get_texts()] == ["a: 2.530", "b: 2.530"]
    assert len({line.get_color() for line in tops[0].get_lines()}) == 2


def test_what_no_run_has_recorded_has_no_column(run, drawn, capsys):
    report.run([str(run("a", seconds=None)), str(run("b", seconds=None))])
    assert [axes.get_xlabel() for axes in drawn[0].axes[2:]] == ["thousand tokens", "compute ($10^{9}$ FLOPs)"]
    assert "minutes" not in capsys.readouterr().out


def test_short_names():
    names = ["a/full/run", "a/ladder/run", "a/other", "ladder/run"]
    assert short_names(list(map(Path, names))) == ["full/run", "a/ladder/run", "other", "ladder/run"]
    assert short_names([Path("/tmp"), Path("/tmp")]) == ["tmp", "tmp"]


def test_report_labels_runs_of_the_same_name_by_their_path(run, drawn, capsys):
    report.run([str(run("x/run")), str(run("y/run") / "metrics.jsonl"), str(run("other"))])
    assert "2.530" in capsys.readouterr().out
    one, two, other = [text.get_text() for text in drawn[0].legends[0].get_texts()]
    assert (one, two) == ("x/run: 2.530", "y/run: 2.530")
    assert other == "other: 2.530"


def test_a_curriculum_is_plotted_with_the_attention_saved(drawn):
    stages = curriculum.Stages(seq_len=SEQ_LEN, stages=[(0, 16), (300, SEQ_LEN)])
    plots.plot_curriculum(Path("plan.png"), 400, ladders(stages, ["chunk"]), SEQ_LEN, 300, 0.1234)
    top, bottom = drawn[0].axes
    assert top.texts[0].get_text() == "full row, 64, from step 300"
    assert [axes.collections[-1].get_segments()[0][:, 0].tolist() for axes in (top, bottom)] == [[300, 300]] * 2
    assert bottom.get_lines()[0].get_ydata() == pytest.approx([100 * chunk_fraction(16)] * 300 + [100] * 100)
    assert bottom.texts[0].get_text() == f"{75 * (1 - chunk_fraction(16)):.0f}% of attention saved, 12.3% of all FLOPs"


def test_the_windows_of_all_layer_types_are_plotted(run, drawn):
    folder = run(steps=20, window_sliding_attention=16)
    plots.plot_run(Path("ladder.png"), curves(folder))
    _, bottom = drawn[0].axes
    assert [line.get_ydata()[-1] for line in bottom.get_lines()] == [SEQ_LEN, 16]
    assert [text.get_text() for text in bottom.get_legend().get_texts()] == ["full_attention", "sliding_attention"]
    plots.compare_runs(Path("report.png"), [curves(folder)])
    both = [*ladders(lambda step: SEQ_LEN, ["chunk"]), plots.Ladder("sliding_attention", 6, ["chunk"], lambda step: 16)]
    plots.plot_curriculum(Path("plan.png"), 20, both, SEQ_LEN)
    saved = drawn[2].axes[1].texts[0].get_text()
    assert saved == f"{100 * 0.75 * (1 - chunk_fraction(16)):.0f}% of attention saved"


def test_the_masks_of_layers_are_drawn_at_three_steps(drawn):
    plots.plot_layer_masks(Path("masks.png"))
    shown = [
        sum(to_hex(color) != GRID for color in axes.collections[0].get_facecolors()) for axes in drawn[0].get_axes()
    ]
    sliding, *others = [sum(min(i + 1, width) for length in (7, 12, 5) for i in range(length)) for width in (4, 24)]
    assert [shown[i] for i in (0, 4, 6, 10, 12, 16)] == [sliding] * 6
    assert shown[17] == others[0]  # whole documents at the end
    assert shown[5] < shown[11] < shown[17]


def test_masks_show_every_pair_and_every_start(drawn):
    plots.plot_masks(Path("masks.png"))
    sizes = {"causal": (24,), "document": (7, 12, 5), "chunk": (6, 6, 6, 6), "document + chunk": (6, 1, 5, 6, 1, 5)}
    seen, starts = {}, {}
    for axes in drawn[0].axes:
        colors = axes.collections[0].get_facecolors()
        assert len(colors) == 24 * 25 // 2
        seen[axes.get_title()] = sum(to_hex(color) != GRID for color in colors)
        starts[axes.get_title()] = axes.get_lines()[0].get_xdata()
    for name, parts in sizes.items():
        assert seen[name] == sum(size * (size + 1) // 2 for size in parts)
        assert list(starts[name][:-1]) == [sum(parts[:k]) for k, size in enumerate(parts) for _ in range(size)]
    assert list(starts["sliding"][:-1]) == [max(0, i - 5) for i in range(24)]
    both = np.maximum(starts["document"], starts["sliding"])
    assert list(starts["document + sliding"]) == list(both)


def test_smooth():
    values = np.array([1.0, 2.0, 6.0, np.nan, 4.0])
    assert smooth(values, fraction=0.4) == pytest.approx([1.5, 3, 4, 5, 4])
    assert smooth(values, fraction=0) == pytest.approx(values, nan_ok=True)


def test_null_values_are_gaps(run, drawn):
    plots.plot_run(Path("ladder.png"), curves(run(loss=None)))
    assert np.isnan(drawn[0].axes[0].get_lines()[0].get_ydata()).all()


def test_invalid_input_is_refused(tmp_path, run):
    with pytest.raises(ConfigError, match=r"none\.jsonl: no such file"):
        report.run([str(tmp_path / "none.jsonl")])
    (tmp_path / "empty.jsonl").write_text('{"step": 0, "validation_loss": 1.0, "window": 8}\n')
    with pytest.raises(ConfigError, match=r"empty: metrics\.jsonl has no training step yet"):
        report.run([str(tmp_path / "empty.jsonl")])
    with pytest.raises(ConfigError, match=r"must end in \.png, \.svg or \.pdf"):
        plots.plot_run(tmp_path / "a.jpeg", curves(run()))
    with pytest.raises(ConfigError, match="no runs to compare"):
        plots.compare_runs(tmp_path / "a.png", [])


def test_starting_a_run_does_not_load_plotting_libraries():
    code = "import sys; import torchladder.plots; sys.exit(bool({'matplotlib', 'plotly', 'jinja2'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

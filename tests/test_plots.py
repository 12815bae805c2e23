"""Pictures: that each can be drawn, that what it shows is right, and what it needs."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from torchladder import curriculum, plots
from torchladder.plots.curves import smooth
from torchladder.plots.style import GRID
from torchladder.registry import ConfigError

SEQ_LEN = 64


@pytest.fixture
def run(tmp_path):
    """Writes a metrics.jsonl and returns its path."""

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
        return path

    return write


@pytest.fixture
def drawn(monkeypatch):
    """Catches the figures instead of writing them."""
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path: figures.append(figure))
    return figures


def share(window):
    """Pairs within chunks, as a share of those of a full causal row."""
    whole, rest = divmod(SEQ_LEN, window)
    return (whole * window * (window + 1) + rest * (rest + 1)) / (SEQ_LEN * (SEQ_LEN + 1))


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_every_picture_is_written(tmp_path, run, suffix):
    ladder = curriculum.Linear(steps=500, seq_len=SEQ_LEN, initial_window=8)
    folder = tmp_path / "new"
    plots.ladder(folder / f"ladder.{suffix}", run())
    plots.report([run(), run("two", validation=False)], folder / f"report.{suffix}")
    plots.plan(folder / f"plan.{suffix}", 500, ladder, SEQ_LEN, ["document", "sliding"])
    plots.masks(folder / f"masks.{suffix}")
    begins = {"png": b"\x89PNG", "svg": b"<?xml"}[suffix]
    assert sorted(path.stem for path in folder.iterdir()) == ["ladder", "masks", "plan", "report"]
    assert all(path.read_bytes().startswith(begins) for path in folder.iterdir())


@pytest.mark.parametrize("steps", [1, 2])
def test_the_shortest_runs(tmp_path, run, steps):
    plots.ladder(tmp_path / "a.svg", run(steps=steps))
    plots.report([run(steps=steps)], tmp_path / "b.svg")
    plots.plan(tmp_path / "c.svg", steps, lambda step: SEQ_LEN, SEQ_LEN, ["causal"])


def test_ladder_shows_the_run(run, drawn):
    plots.ladder(Path("ladder.png"), run())
    top, bottom = drawn[0].axes
    losses, _, validation = (line.get_ydata() for line in top.get_lines())
    assert losses == pytest.approx([2 + 6 / step for step in range(1, 201)])
    assert validation == pytest.approx([2.5 + 6 / step for step in (50, 100, 150, 200)])
    assert top.get_legend().get_texts()[1].get_text() == "validation, full context: 2.530 at the end"
    assert bottom.get_lines()[0].get_ydata()[[0, -1]] == pytest.approx([8, SEQ_LEN])
    assert bottom.get_xlabel() == "step"


def test_report_against_tokens_time_and_flops(run, drawn):
    plots.report([run("a").parent, run("b", windows=lambda step: SEQ_LEN)], Path("report.png"))
    tops, bottoms = drawn[0].axes[:3], drawn[0].axes[3:]
    labels = [axes.get_xlabel() for axes in bottoms]
    assert labels == ["thousand tokens", "time (seconds)", "compute ($10^{9}$ FLOPs)"]
    ends = [axes.get_lines()[1].get_xdata()[-1] for axes in tops]
    assert ends == pytest.approx([200, 100, 200])
    assert [text.get_text() for text in drawn[0].legends[0].get_texts()] == ["a: 2.530", "b: 2.530"]
    assert len({line.get_color() for line in tops[0].get_lines()}) == 2


def test_report_tells_runs_of_one_name_apart(run, drawn):
    plots.report([run("x/run"), run("y/run"), run("other")], Path("report.png"))
    one, two, other = [text.get_text() for text in drawn[0].legends[0].get_texts()]
    assert one.endswith("x/run: 2.530")
    assert two.endswith("y/run: 2.530")
    assert other == "other: 2.530"


def test_plan_shades_what_is_saved(drawn):
    stages = curriculum.Stages(seq_len=SEQ_LEN, stages=[(0, 16), (300, SEQ_LEN)])
    plots.plan(Path("plan.png"), 400, stages, SEQ_LEN, ["chunk"])
    _, bottom = drawn[0].axes
    assert bottom.get_lines()[0].get_ydata() == pytest.approx([100 * share(16)] * 300 + [100] * 100)
    assert bottom.texts[0].get_text() == f"{75 * (1 - share(16)):.0f}% of attention saved"


def test_masks_show_every_pair_and_every_start(drawn):
    plots.masks(Path("masks.png"))
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
    assert smooth(values, share=0.4) == pytest.approx([1.5, 3, 4, 5, 4])
    assert smooth(values, share=0) == pytest.approx(values, nan_ok=True)


def test_lost_values_and_a_line_being_written(run, drawn):
    path = run(loss=None)
    path.write_text(path.read_text() + '{"step": 3, "lo')
    plots.ladder(Path("ladder.png"), path)
    assert np.isnan(drawn[0].axes[0].get_lines()[0].get_ydata()).all()


def test_what_pictures_need(tmp_path, run):
    with pytest.raises(ConfigError, match=r"none\.jsonl: no such file"):
        plots.ladder(tmp_path / "a.png", tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text('{"step": 0, "validation_loss": 1.0, "window": 8}\n')
    with pytest.raises(ConfigError, match="no training step in it yet"):
        plots.report([tmp_path / "empty.jsonl"], tmp_path / "a.png")
    with pytest.raises(ConfigError, match=r"ends in \.png, \.svg or \.pdf"):
        plots.ladder(tmp_path / "a.jpeg", run())
    with pytest.raises(ConfigError, match="no runs to draw"):
        plots.report([], tmp_path / "a.png")


def test_starting_a_run_does_not_load_matplotlib():
    code = "import sys; import torchladder.plots; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

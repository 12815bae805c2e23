"""The report as one HTML page: its numbers are those of metrics.jsonl, it fetches nothing, and a browser draws it."""

import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from torchladder.commands import report
from torchladder.plots import ReportedRun, RunCurves
from torchladder.plots.report_figure import MAX_POINTS, comparison_figure
from torchladder.plots.run_comparison import differing_settings, seed_groups
from torchladder.plots.run_curves import loss_range
from torchladder.registry import ConfigError

plotly = pytest.importorskip("plotly")
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
SAMPLES = "--- step 10\nearly </pre><script>alert(1)</script>\n--- step 40\nlate one\n--- step 40\nlate two\n"


@pytest.fixture
def run(tmp_path):
    """Writes a run and returns its folder."""

    def write(name, slope=1.0, flops=1e9, curriculum="constant", seed=0, steps=40, samples="", **more):
        lines = []
        for step in range(1, steps + 1):
            line = {
                "step": step,
                "loss": 8 - slope * step / 10,
                "window": 64 if curriculum == "constant" else 2 * step + 1,
            }
            line |= {"tokens": 1000 * step, "seconds": 3.0 * step, "flops": flops * step, "mfu": None}
            lines.append(line | {"tps": 100.0 + step, "attention_saved": 0.25, "memory_gib": 1.5} | more)
            if step % 10 == 0:
                lines.append({"step": step, "validation_loss": 8.5 - slope * step / 10, "window": 64})
                lines.append({"step": step, "validation_loss": 9.0, "window": 16})
        lines[-2]["validation/needle"] = 0.875
        folder = tmp_path / name
        folder.mkdir(parents=True)
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        config = f'[job]\ndump_folder = "{folder}"\n[curriculum]\nname = "{curriculum}"\n[debug]\nseed = {seed}\n'
        (folder / "config.toml").write_text(
            config + "[attention]\nmasks = []\n[attention.sliding_attention]\nwindow = 4\n"
        )
        if samples:
            (folder / "samples.txt").write_text(samples)
        return folder

    return write


@pytest.fixture
def pair(run):
    return [str(run("full")), str(run("ladder", 1.5, 8e8, "linear", samples=SAMPLES))]


def page(folder, runs):
    """Writes a report and returns its text without plotly's own code."""
    assert report.run([*runs, "--html", str(folder / "report.html")]) == 0
    text = (folder / "report.html").read_text()
    return re.sub(r"<script>.*?</script>", "", text, count=1, flags=re.S)


class Tables(HTMLParser):
    """The cells of all tables: heading -> rows."""

    def __init__(self, text):
        super().__init__()
        self.tables, self.title, self.data = {}, "", ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        if tag == "tr":
            self.tables.setdefault(self.title, []).append([])
        if tag in ("h2", "th", "td"):
            self.data = ""

    def handle_data(self, data):
        self.data += data

    def handle_endtag(self, tag):
        if tag == "h2":
            self.title = self.data
        if tag in ("th", "td"):
            self.tables[self.title][-1].append(self.data)

    def __getitem__(self, title):
        """Returns first cell -> column -> cell."""
        head, *rows = self.tables[title]
        return {row[0]: dict(zip(head[1:], row[1:], strict=True)) for row in rows}


def curves(text):
    """Returns the curves that the page embeds, and its layout."""
    decoder, begin = json.JSONDecoder(), text.index("[", text.index("Plotly.newPlot("))
    traces, end = decoder.raw_decode(text, begin)
    return traces, decoder.raw_decode(text, text.index("{", end))[0]


def records(folder, key):
    lines = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if key in line and line["window"] != 16]


def test_the_curves_are_those_of_the_metrics(tmp_path, pair):
    traces, layout = curves(page(tmp_path, pair))
    buttons = layout["updatemenus"][0]["buttons"]
    assert [button["label"] for button in buttons] == ["tokens", "time", "FLOPs"]
    titles = [button["args"][1]["xaxis2.title.text"] for button in buttons]
    assert titles == ["thousand tokens", "time (seconds)", "compute (10<sup>9</sup> FLOPs)"]
    for number, folder in enumerate(pair):
        train, validation, window = traces[3 * number : 3 * number + 3]
        steps, validated = records(folder, "loss"), records(folder, "validation_loss")
        assert [point[4] for point in train["customdata"]] == [line["loss"] for line in steps]
        assert [point[:2] + point[3:4] for point in train["customdata"]] == [
            [line["step"], line["tokens"], line["flops"]] for line in steps
        ]
        assert train["y"][9] == pytest.approx(np.mean([line["loss"] for line in steps[7:12]]))  # smoothed over 5
        assert train["customdata"][-1][2] == "0:02:00"
        assert validation["y"] == [line["validation_loss"] for line in validated]
        assert window["y"] == [line["window"] for line in steps]
        for button, key, scale in zip(buttons, ("tokens", "seconds", "flops"), (1e3, 1, 1e9), strict=True):
            x = button["args"][0]["x"][3 * number : 3 * number + 2]
            assert x[0] == pytest.approx([line[key] / scale for line in steps])
            assert x[1] == pytest.approx([x[0][line["step"] - 1] for line in validated])


def test_the_tables_say_what_the_runs_differ_in(tmp_path, pair):
    text = page(tmp_path, pair)
    tables = Tables(text)
    assert tables["Final losses"]["full"]["validation loss"] == "4.5000"
    ladder = tables["Final losses"]["ladder"]
    assert (ladder["validation loss"], ladder["difference"]) == ("2.5000", "−2.0000")
    assert (ladder["FLOPs saved"], ladder["time saved"]) == ("20.0%", "0.0%")
    # 4.5 is reached between steps 20 (5.5) and 30 (4.0), at step 26 2/3.
    assert ladder["FLOPs to the first run's loss"] == f"{8e8 * 80 / 3:.3e} (53%)"
    assert "ends 2.000 nats lower than full, with 20.0% fewer FLOPs and the same time, and reaches that" in text
    assert tables["Settings that differ"] == {"curriculum.name": {"full": "constant", "ladder": "linear"}}
    speed = tables["Throughput and memory"]["full"]
    assert speed == {"tokens/s per device, median": "121", "attention saved": "25.0%", "peak memory (GiB)": "1.50"}
    assert tables["Other validation metrics"] == {
        "validation/needle": {"full": "0.875", "ladder": "0.875"},
        "validation_loss, window 16": {"full": "9", "ladder": "9"},
    }


def test_samples_are_last_and_text(tmp_path, pair):
    text = page(tmp_path, pair)
    samples = text[text.index("<h2>Samples</h2>") :]
    assert re.findall(r"<summary>(.*)</summary>", samples) == ["step 40", "step 10"]
    assert re.findall(r"<pre>(.*)</pre>", samples) == [
        "late one",
        "late two",
        "early &lt;/pre&gt;&lt;script&gt;alert(1)&lt;/script&gt;",
    ]


def test_runs_that_differ_in_seeds_have_a_mean_and_a_spread(tmp_path, run):
    runs = [run("a0", 1.0), run("a1", 1.1, seed=1), run("b0", 2.0, curriculum="linear"), run("short", 1.0, steps=20)]
    text = page(tmp_path, map(str, runs))
    spread = Tables(text)["Spread over seeds"]
    losses = 4.5, 8.5 - 1.1 * 4
    assert spread["a0, a1"]["validation loss"] == f"{np.mean(losses):.4f} ± {np.std(losses, ddof=1):.4f}"
    assert spread["b0"] == {"seeds": "1", "validation loss": "0.5000", "difference": "−3.8000"}
    assert "b0 ends 3.800 nats lower than a0 (mean of 2 seeds)" in text
    assert spread["short"]["seeds"] == "1"  # its last loss is of another step
    assert "savings are at the tokens that both have read" in text


def test_settings_that_are_missing_or_unknown():
    known = ReportedRun(
        RunCurves("a", [{"step": 1, "loss": 1.0, "window": 1}]), {"a.x": 1, "a.y": True, "job.dump_folder": 1}
    )
    other = ReportedRun(known.curves, {"a.x": 1, "job.dump_folder": 2})
    unknown = ReportedRun(known.curves)
    assert differing_settings([known, other, unknown]) == {"a.y": ["true", "", ""]}
    assert [len(group) for group in seed_groups([unknown, unknown, known])] == [1, 1, 1]


def test_files_of_one_folder_are_named_after_themselves(tmp_path, run):
    folder = run("run")
    for name in ("one", "two"):
        shutil.copy(folder / "metrics.jsonl", tmp_path / f"{name}.jsonl")
    (tmp_path / "two.toml").write_text("[debug]\nseed = 7\n")
    one, two = report.read_runs([tmp_path / "one.jsonl", tmp_path / "two.jsonl"])
    assert (one.name, one.settings, two.name, two.settings) == ("one", {}, "two", {"debug.seed": 7})
    with pytest.raises(ConfigError, match="the run is given twice"):
        report.run([str(folder), str(folder / "metrics.jsonl")])


def test_the_printed_table_has_whole_names_and_numbers(tmp_path, run, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    name = "a_name_that_is_as_long_as_names_of_runs_are_in_a_large_sweep_of_settings_number"
    report.run([str(run(f"{name}_{number}")) for number in (1, 2)] + ["--html", str(tmp_path / "report.html")])
    printed = capsys.readouterr().out
    assert f"{name}_1" in printed
    assert f"{name}_2" in printed
    assert "…" not in printed
    assert not (tmp_path / "report.png").exists()


def test_a_run_without_validation_or_with_gaps_is_drawn(tmp_path, run):
    folder = run("run", loss=None)
    records = [{"step": 1, "loss": 2.5, "window": 8}, {"step": 2, "loss": None, "window": 8}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    text = page(tmp_path, [str(folder), str(run("other"))])
    assert curves(text)[0][0]["y"] == [2.5, None]
    assert curves(text)[0][0]["showlegend"]
    assert Tables(text)["Final losses"]["run"]["training loss"] == ""
    assert "NaN" not in text
    assert "nan%" not in text


def test_many_runs_have_different_lines():
    line = {"step": 1, "loss": 2.0, "window": 8, "tokens": 1, "seconds": 1, "flops": 1}
    figure = comparison_figure([ReportedRun(RunCurves(str(number), [line])) for number in range(15)])
    assert len({(trace.line.color, trace.line.dash) for trace in figure.data if trace.yaxis == "y"}) == 15


def test_long_runs_are_thinned_and_keep_their_last_step():
    lines = [
        {"step": step, "loss": 2.0, "window": 8, "tokens": step, "seconds": step, "flops": step}
        for step in range(1, 10002)
    ]
    train, window = comparison_figure([ReportedRun(RunCurves("long", lines))]).data
    assert len(train.x) <= MAX_POINTS + 1
    assert train.customdata[-1][0] == window.customdata[-1][0] == 10001


def test_the_range_of_losses_leaves_out_the_first_steps():
    lines = [{"step": step, "loss": 9.0 if step < 3 else 4 - step / 100, "window": 8} for step in range(1, 101)]
    low, high = loss_range([RunCurves("run", lines)])
    assert (low, high) == pytest.approx((3 - 0.05 * 0.95, 3.95 + 0.05 * 0.95))
    assert loss_range([RunCurves("run", lines[:1])]) is None


def test_nothing_is_fetched(tmp_path, pair):
    text = page(tmp_path, pair)
    assert re.findall(r"""(?:src|href)\s*=\s*["'](?!data:)|url\(|@import|<link(?! rel="icon")|<iframe""", text) == []
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]+)"', text)[1]
    assert policy.startswith("default-src 'none'")  # a browser refuses what is not in the file
    assert not re.search(r"https?:", policy)


@pytest.mark.skipif(not BROWSER, reason="no chromium")
def test_a_browser_draws_the_page_without_errors(tmp_path, pair):
    page(tmp_path, pair)
    click = "document.querySelectorAll('.updatemenu-button')[2].dispatchEvent(new MouseEvent('click'))"
    clicked = (tmp_path / "report.html").read_text().replace("</body>", f"<script>{click}</script></body>")
    (tmp_path / "clicked.html").write_text(clicked)
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--virtual-time-budget=5000"]
    command = [BROWSER, *flags, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
    for name, axis in (("report", "thousand tokens"), ("clicked", "FLOPs)")):
        shown = subprocess.run(
            [*command, f"file://{tmp_path / name}.html"], capture_output=True, text=True, timeout=120
        )
        body = shown.stdout[shown.stdout.index("<body") :]
        assert len(re.findall(r'<g class="trace scatter', body)) == 6
        assert re.search(r'class="x2title"[^>]*>(.*?)</text>', body)[1].endswith(axis)
        assert "CONSOLE" not in shown.stderr


def test_a_missing_package_and_a_wrong_name_are_refused_first(tmp_path, monkeypatch, run):
    with pytest.raises(ConfigError, match=r"report\.htm: the file name of a page must end in \.html"):
        report.run(["missing", "--html", str(tmp_path / "report.htm")])
    monkeypatch.setitem(sys.modules, "plotly", None)
    with pytest.raises(ConfigError, match=r"--html: plotly is not installed; pip install 'torchladder\[report\]'"):
        report.run(["missing", "--html", str(tmp_path / "report.html")])

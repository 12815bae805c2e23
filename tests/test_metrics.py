"""Metrics: values computed by hand, the keys of metrics.jsonl, resumed runs, new metrics, every output."""

import json
import logging
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from torchladder import config, metrics
from torchladder.metrics import (
    Metric,
    MetricsConfig,
    MetricsProcessor,
    OutputConfig,
    RunInfo,
    device,
    metric_table,
    output_config,
    processor,
)
from torchladder.registry import ConfigError
from torchladder.training import start_checks

KEYS = ["step", "loss", "grad_norm", "lr", "window", "tokens", "tps", "flops", "mfu", "mfu_palm"]
KEYS += ["attention_saved", "effective_context", "memory_gib", "seconds"]
SEQ_LEN = 16


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test moves."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(processor.time, "perf_counter", lambda: clock.now)
    return clock


def flops(tokens, pairs):
    return 60 * tokens + 12 * pairs


def make(folder, step=0, config=None, **changes):
    defaults = {"folder": folder, "steps": 100, "seq_len": SEQ_LEN, "flops": flops, "device": torch.device("cpu")}
    return MetricsProcessor(config or MetricsConfig(enable_tensorboard=False), RunInfo(**defaults | changes), step)


def train_step(reporter, step, tokens=64, pairs=128, **values):
    reporter.count(tokens, pairs)
    reporter.log(step, **{"loss": 2.0, "grad_norm": 0.5, "lr": 1e-3, "window": 4} | values)


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# --- values ---------------------------------------------------------------------------------------------------------


def test_numbers_by_hand(tmp_path, clock):
    with make(tmp_path, config=MetricsConfig(peak_flops=1e4), ranks=2) as reporter:
        clock.now += 1
        reporter.count(32, 64)
        clock.now += 1
        train_step(reporter, 1, tokens=32, pairs=64, loss=3.5, grad_norm=1.25, lr=1e-3, window=4)
        clock.now += 4
        train_step(reporter, 10, tokens=64, pairs=64 * 17 // 2, window=16)
    first, second = records(tmp_path)
    assert list(first) == list(second) == KEYS
    # 64 tokens in 2 s on 2 devices; 60 * 64 + 12 * 128 FLOPs; PaLM counts 64 * 16 pairs, causal rows have 64 * 17 / 2.
    assert first == pytest.approx(
        {
            "step": 1,
            "loss": 3.5,
            "grad_norm": 1.25,
            "lr": 1e-3,
            "window": 4,
            "tokens": 64,
            "tps": 16.0,
            "flops": 5376,
            "mfu": 5376 / (2 * 2 * 1e4),
            "mfu_palm": (60 * 64 + 12 * 64 * 16) / (2 * 2 * 1e4),
            "attention_saved": 1 - 128 / 544,
            "effective_context": 128 / 64,
            "memory_gib": first["memory_gib"],
            "seconds": 2.0,
        }
    )
    assert second["tokens"] == 128
    assert second["flops"] == 5376 + 60 * 64 + 12 * 544
    assert second["tps"] == 8.0
    assert second["attention_saved"] == 0.0
    assert second["seconds"] == 6.0


def test_memory_is_of_this_process(tmp_path):
    with make(tmp_path) as reporter:
        train_step(reporter, 1)
    assert 0.05 < records(tmp_path)[0]["memory_gib"] < 1000


def test_paused_time_is_not_training_time(tmp_path, clock):
    with make(tmp_path) as reporter:
        clock.now += 2
        with reporter.pause():
            clock.now += 100
        train_step(reporter, 1, tokens=64)
    assert records(tmp_path)[0]["tps"] == 32.0
    assert records(tmp_path)[0]["seconds"] == 102.0


def test_should_log():
    reporter = SimpleNamespace(config=MetricsConfig(log_freq=10), run=SimpleNamespace(steps=25))
    assert [step for step in range(1, 26) if MetricsProcessor.should_log(reporter, step)] == [1, 10, 20, 25]


def test_an_unknown_peak_and_non_finite_values_are_null(tmp_path):
    with make(tmp_path) as reporter:
        train_step(reporter, 1, loss=float("nan"), grad_norm=float("inf"))
    text = (tmp_path / "metrics.jsonl").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    line = json.loads(text)
    assert [line[key] for key in ("loss", "grad_norm", "mfu", "mfu_palm")] == [None] * 4


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA GB200", 2500e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA L40S", 362e12),
        ("Tesla V100-SXM2-16GB", 125e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("NVIDIA TITAN X", None),
    ],
)
def test_peak_flops_by_name(name, peak):
    assert device.peak_flops_by_name(name) == peak


def test_a_cpu_has_no_known_peak():
    assert metrics.get_peak_flops(torch.device("cpu")) is None


@pytest.mark.parametrize("settings", [{"log_freq": 0}, {"peak_flops": 0.0}, {"peak_flops": -1.0}])
def test_invalid_settings(settings):
    with pytest.raises(ConfigError, match=rf"metrics\.{next(iter(settings))}"):
        MetricsConfig(**settings)


# --- resuming --------------------------------------------------------------------------------------------------------


def test_a_resumed_run_has_one_record_per_step_and_continues_its_totals(tmp_path, clock):
    with make(tmp_path) as reporter:
        reporter.log_validation(0, 5.0, SEQ_LEN)
        for step in (1, 10, 20, 30):
            clock.now += 1
            train_step(reporter, step)
        reporter.log_validation(20, 3.0, SEQ_LEN)
        reporter.log_validation(30, 2.0, SEQ_LEN)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 40, "loss": 1.')  # killed while writing

    clock.now += 1000
    with make(tmp_path, step=20) as reporter:
        for step in (30, 40):
            clock.now += 5
            train_step(reporter, step)
    seen = records(tmp_path)
    assert [line["step"] for line in seen if "loss" in line] == [1, 10, 20, 30, 40]
    assert [line["step"] for line in seen if "validation_loss" in line] == [0, 20]
    assert [line["tokens"] for line in seen if "loss" in line] == [64, 128, 192, 256, 320]
    assert [line["flops"] for line in seen if "loss" in line] == [5376 * n for n in range(1, 6)]
    assert [line["seconds"] for line in seen if "loss" in line] == [1, 2, 3, 8, 13]


def test_a_new_run_starts_a_new_file(tmp_path):
    with make(tmp_path) as reporter:
        reporter.log_validation(0, 5.0, SEQ_LEN)
        train_step(reporter, 1)
    with make(tmp_path) as reporter:
        reporter.log_validation(0, 4.0, SEQ_LEN)
    assert records(tmp_path) == [{"step": 0, "validation_loss": 4.0, "window": SEQ_LEN}]


def test_resuming_without_a_file(tmp_path):
    with make(tmp_path / "new" / "folder", step=20) as reporter:
        train_step(reporter, 30)
    assert records(tmp_path / "new" / "folder")[0]["tokens"] == 64


def test_other_ranks_are_silent(tmp_path, caplog):
    with caplog.at_level(logging.INFO), make(tmp_path, rank=1) as reporter:
        assert reporter.should_log(10)
        train_step(reporter, 10)
        reporter.log_validation(10, 1.0, SEQ_LEN)
    assert list(tmp_path.iterdir()) == []
    assert caplog.text == ""


# --- new metrics -----------------------------------------------------------------------------------------------------


@pytest.fixture
def table(monkeypatch):
    """Restores the table of metrics afterwards."""
    monkeypatch.setattr(metric_table, "METRICS", dict(metric_table.METRICS))


def test_the_metric_of_the_docs_reaches_every_output(tmp_path, caplog, clock, table):
    page = (Path(__file__).parents[1] / "docs" / "metrics.md").read_text()
    exec(re.search(r"```python\n(.*?)```", page, flags=re.DOTALL)[1], {})
    with caplog.at_level(logging.INFO), make(tmp_path, config=MetricsConfig()) as reporter:
        clock.now += 5 * 3600
        train_step(reporter, 10, tokens=64, pairs=160)
    assert list(records(tmp_path)[0]) == [*KEYS, "device_hours"]
    assert records(tmp_path)[0]["device_hours"] == 5.0
    assert events(tmp_path / "tb")["cost/device_hours"] == [(10, 5.0)]
    assert "  device-hours: 5.00  eta: " in caplog.text


def test_a_metric_may_be_passed_in(tmp_path, caplog, table):
    metrics.register(Metric("aux_loss", tag="loss_metrics/aux_loss", tag_scale=10, console="aux_loss: {aux_loss:.2f}"))
    with caplog.at_level(logging.INFO), make(tmp_path, config=MetricsConfig()) as reporter:
        train_step(reporter, 10, aux_loss=0.25)
        train_step(reporter, 20, aux_loss=None)
        with pytest.raises(ConfigError, match=r"metric 'aux_loss' has no value: pass aux_loss= to log"):
            train_step(reporter, 30)
    assert [record["aux_loss"] for record in records(tmp_path)] == [0.25, None]
    assert events(tmp_path / "tb")["loss_metrics/aux_loss"] == [(10, 2.5)]
    assert "aux_loss: 0.25" in caplog.messages[0]
    assert "aux_loss" not in caplog.messages[1]


def test_an_optional_metric_is_only_where_it_is_passed(tmp_path, caplog):
    with caplog.at_level(logging.INFO), make(tmp_path, config=MetricsConfig()) as reporter:
        train_step(reporter, 10)
        train_step(reporter, 20, z_loss=0.25)
    assert ["z_loss" in record for record in records(tmp_path)] == [False, True]
    assert events(tmp_path / "tb")["loss_metrics/z_loss"] == [(20, 0.25)]
    assert ["z_loss: 2.50e-01" in message for message in caplog.messages] == [False, True]


def test_no_value_is_dropped_silently(tmp_path, table):
    with make(tmp_path) as reporter, pytest.raises(ConfigError, match=r"'gradnorm'\. Did you mean 'grad_norm'"):
        train_step(reporter, 10, gradnorm=1.0)
    with pytest.raises(ConfigError, match="metric 'loss' is registered twice"):
        metrics.register(Metric("loss"))


def test_reading_metrics_skips_a_line_that_is_still_being_written(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert metrics.read_jsonl(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 2.0}]
    with pytest.raises(ConfigError, match=r"none\.jsonl: no such file"):
        metrics.read_jsonl(tmp_path / "none.jsonl")


# --- outputs ---------------------------------------------------------------------------------------------------------


def events(folder):
    accumulator = EventAccumulator(str(folder))
    accumulator.Reload()
    return {
        tag: [(event.step, pytest.approx(event.value)) for event in accumulator.Scalars(tag)]
        for tag in accumulator.Tags()["scalars"]
    }


def test_tensorboard(tmp_path, clock):
    config = MetricsConfig(enable_tensorboard=True, peak_flops=1e6, save_tb_folder="events")
    with make(tmp_path, config=config) as reporter:
        for step in (10, 20, 30):
            clock.now += 1
            train_step(reporter, step, loss=step / 10)
        reporter.log_validation(30, 2.5, SEQ_LEN)
        reporter.log_validation(30, 2.75, 4)
    (file,) = (tmp_path / "events").rglob("events.out.*")
    file.rename(file.with_name("events.out.tfevents.0000000001"))  # readers order files by the time in their name
    with make(tmp_path, step=20, config=config) as reporter:
        clock.now += 1
        train_step(reporter, 30, loss=7.0)
    seen = events(tmp_path / "events")
    assert seen["loss_metrics/global_avg_loss"] == [(10, 1.0), (20, 2.0), (30, 7.0)]
    assert seen["curriculum/window"] == [(10, 4), (20, 4), (30, 4)]
    assert seen["mfu(%)"][0] == (10, 100 * 5376 / 1e6)
    expected = {"grad_norm", "lr", "throughput(tps)", "tflops", "mfu_palm(%)", "memory/max_reserved(GiB)"}
    assert expected | {"curriculum/attention_saved"} <= set(seen)


def test_validation_has_a_tag_per_window(tmp_path):
    with make(tmp_path, config=MetricsConfig(enable_tensorboard=True)) as reporter:
        reporter.log_validation(30, 2.5, SEQ_LEN)
        reporter.log_validation(30, 2.75, 4)
    assert events(tmp_path / "tb") == {
        "validation_metrics/global_avg_loss": [(30, 2.5)],
        "validation_metrics/loss_at_window_4": [(30, 2.75)],
    }


def test_wandb(tmp_path, monkeypatch, clock):
    logged = []
    session = SimpleNamespace(
        log=lambda values, step: logged.append((step, values)), finish=lambda: logged.append("finished")
    )
    init = []
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **settings: init.append(settings) or session))
    monkeypatch.setenv("WANDB_PROJECT", "ladders")
    with make(tmp_path, config=MetricsConfig(enable_wandb=True), settings={"lr": 1}) as reporter:
        clock.now += 1
        train_step(reporter, 10)
    assert init == [{"project": "ladders", "dir": str(tmp_path), "config": {"lr": 1}}]
    assert logged[0][0] == 10
    assert logged[0][1]["loss_metrics/global_avg_loss"] == 2.0
    assert "mfu(%)" not in logged[0][1]
    assert logged[1] == "finished"


def test_the_run_is_named_in_wandb(tmp_path, monkeypatch):
    init = []
    session = SimpleNamespace(finish=lambda: None)
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **settings: init.append(settings) or session))
    monkeypatch.setenv("WANDB_PROJECT", "ladders")
    named = {"project": "mine", "run_name": "first", "group": "windows", "tags": ["a", "b"]}
    make(tmp_path, config=MetricsConfig(enable_wandb=True, **named)).close()
    assert init == [
        {"project": "mine", "name": "first", "group": "windows", "tags": ["a", "b"], "dir": str(tmp_path), "config": {}}
    ]


@pytest.fixture
def csv_output(tmp_path, monkeypatch):
    """The output and the config of the docs, in a folder of their own."""
    page = (Path(__file__).parents[1] / "docs" / "metrics.md").read_text()
    (tmp_path / "my_output.py").write_text(re.search(r"```python\n(# my_output.py.*?)```", page, flags=re.DOTALL)[1])
    (tmp_path / "run.toml").write_text(re.search(r"```toml\n(.*?)```", page, flags=re.DOTALL)[1])
    monkeypatch.setattr(output_config.registry, "_components", dict(output_config.registry._components))
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield tmp_path / "run.toml"
    sys.modules.pop("my_output", None)


def test_the_output_of_the_docs_has_settings(csv_output, tmp_path):
    loaded = config.load_file(csv_output)
    assert config.load_text(loaded.to_toml(), "config.toml").metrics == loaded.metrics
    with make(tmp_path, config=loaded.metrics) as reporter:
        train_step(reporter, 10, lr=0.5)
    assert "10,lr,0.5" in (tmp_path / "run.csv").read_text().splitlines()
    assert events(tmp_path / "tb")["lr"] == [(10, 0.5)]

    argv = ["--job.config_file", str(csv_output), "--metrics.outputs", '{ name = "csv" }', '{ name = "tensorboard" }']
    outputs = config.load(argv).metrics.chosen_outputs()
    assert [output.name for output in outputs] == ["csv", "tensorboard"]  # the flag adds no second one
    assert outputs[0].file == "scalars.csv"


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ('{ name = "csv", fle = "a" }', "unknown key 'fle'. Did you mean 'file'"),
        ('{ name = "csv", file = 3 }', "file = 3: must be a valid string"),
        (
            '{ name = "cvs" }',
            "unknown metrics output 'cvs'. Did you mean 'csv'? Known: csv, tensorboard, trackio, wandb.",
        ),
        ('{ file = "a" }', "an output needs a name. Known: csv, tensorboard, trackio, wandb."),
    ],
)
def test_outputs_that_are_none(csv_output, table, message):
    csv_output.write_text(re.sub(r"\{.*\}", table, csv_output.read_text()))
    with pytest.raises(ConfigError, match=re.escape(message)) as error:
        config.load_file(csv_output)
    assert "run.toml: metrics.outputs" in str(error.value)


def test_wandb_missing(tmp_path, monkeypatch):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match="pip install wandb"):
        make(tmp_path, config=MetricsConfig(enable_wandb=True))
    assert len(records(tmp_path)) == 1


def test_trackio_continues_the_run_that_resumes(tmp_path, monkeypatch):
    trackio = pytest.importorskip("trackio")
    monkeypatch.setattr("trackio.utils.TRACKIO_DIR", tmp_path / "db")
    monkeypatch.setattr("trackio.sqlite_storage.TRACKIO_DIR", tmp_path / "db")
    named = MetricsConfig(
        project="mine", run_name="first", group="windows", tags=["a"], outputs=[OutputConfig(name="trackio")]
    )
    for step in 10, 20, 10:  # the last one is another run from its start
        with make(tmp_path / "run", config=named, step=step - 10, settings={"lr": 1, "folder": Path("x")}) as reporter:
            train_step(reporter, step)
    storage = sys.modules["trackio.sqlite_storage"].SQLiteStorage
    logs = [storage.get_logs("mine", run.name, run_id=run.id) for run in trackio.Api().runs("mine")]
    assert [[record["step"] for record in log] for log in logs] == [[10, 20], [10]]
    assert logs[0][0]["loss_metrics/global_avg_loss"] == 2.0
    first = trackio.Api().runs("mine")[0]
    assert (first.name, first.config["_Group"]) == ("first", "windows")
    assert (first.config["tags"], first.config["lr"], first.config["folder"]) == (["a"], 1, "x")


def test_trackio_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "trackio", None)
    outputs = [OutputConfig(name="trackio")]
    with pytest.raises(ConfigError, match=r"needs the package trackio: pip install 'torchladder\[trackio\]'"):
        make(tmp_path, config=MetricsConfig(outputs=outputs))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="needs the package trackio"):  # before the data is read
        start_checks.check_start(config.load(["--metrics.outputs", '{ name = "trackio" }']))


def test_console_line(tmp_path, clock, caplog):
    with caplog.at_level(logging.INFO), make(tmp_path) as reporter:
        clock.now += 2
        train_step(reporter, 10, tokens=24_690, pairs=24_690, loss=3.65329, grad_norm=1.2, window=1)
        reporter.log_validation(10, 3.5, SEQ_LEN)
    train, validation = caplog.messages
    assert train.startswith("step: 10  loss: 3.6533  grad_norm: 1.2000  lr: 1.00e-03  memory: ")
    assert train.endswith("tps: 12,345  tflops: 0.00  window: 1  saved: 88.2%  eta: 0:00:18")
    assert validation == "validate step: 10  loss: 3.5000  window: 16"


def test_the_time_left_is_steady_and_ignores_cold_steps_and_pauses(tmp_path, clock, caplog):
    with caplog.at_level(logging.INFO), make(tmp_path) as reporter:
        for step, seconds in ((1, 50), (11, 10), (21, 10), (31, 20), (41, 10)):  # the first step compiles
            clock.now += seconds
            train_step(reporter, step)
            with reporter.pause():
                clock.now += 100
    left = [message.rpartition("eta: ")[2] for message in caplog.messages]
    assert left == ["1:22:30", "0:01:29", "0:01:19", "0:01:23", "0:01:08"]


@pytest.mark.parametrize("width", [60, 100, 200])
def test_lines_of_a_terminal_break_between_fields(tmp_path, clock, monkeypatch, log, capsys, width):
    on_a_terminal(monkeypatch, sys.stdout, width)
    log()
    with make(tmp_path, config=MetricsConfig(disable_color_printing=True, disable_progress_bar=True)) as reporter:
        train_step(reporter, 10)
    logging.getLogger("torchladder").info("data  " + "word " * 50)
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in capsys.readouterr().out.splitlines()]
    assert max(map(len, lines)) <= width
    assert all(line.startswith(("[", " " * 11)) for line in lines)
    fields = [field for line in lines for field in line[11:].split("  ") if ":" in field]
    assert [field.partition(":")[0] for field in fields] == [
        "step",
        "loss",
        "grad_norm",
        "lr",
        "memory",
        "tps",
        "tflops",
        "window",
        "saved",
        "eta",
    ]


def test_console_shows_mfu_in_percent(tmp_path, clock, caplog):
    with caplog.at_level(logging.INFO), make(tmp_path, config=MetricsConfig(peak_flops=5376 / 0.031)) as reporter:
        clock.now += 1
        train_step(reporter, 10)
    assert "mfu: 3.10%" in caplog.text


def on_a_terminal(monkeypatch, stream, width=200):
    """Makes the console a terminal."""
    console = Console(file=stream, force_terminal=True, width=width, highlight=False)
    for module in (sys.modules["torchladder.metrics.outputs"], sys.modules["torchladder.metrics.console"]):
        monkeypatch.setattr(module, "console", console)


@pytest.fixture
def log():
    """Logs this package to the console, and restores its handlers afterwards."""
    package = logging.getLogger("torchladder")
    before = package.handlers, package.level
    yield metrics.init_logger
    package.handlers, package.level = before


def test_terminal_has_colors_and_a_bar(tmp_path, clock, monkeypatch, log, capsys):
    on_a_terminal(monkeypatch, sys.stdout)
    log()
    with make(tmp_path) as reporter:
        train_step(reporter, 10)
    out = capsys.readouterr().out
    assert "\x1b[31mstep: 10\x1b[0m" in out
    assert "10/100" in out
    assert "left 0:" in out
    assert "-:--:--" not in out
    assert "eta:" not in out


def test_terminal_without_colors_and_bar(tmp_path, clock, monkeypatch, log, capsys):
    on_a_terminal(monkeypatch, sys.stdout)
    log()
    config = MetricsConfig(disable_color_printing=True, disable_progress_bar=True)
    with make(tmp_path, config=config) as reporter:
        train_step(reporter, 10)
    out = capsys.readouterr().out
    assert "step: 10  loss: 2.0000" in out
    assert "eta:" in out
    assert "10/100" not in out


# --- logging ---------------------------------------------------------------------------------------------------------


def test_rank_0_logs_info(log, capsys):
    log()
    log()  # a second call does not print twice
    logging.getLogger("torchladder.data").info("hello %s", "there [red]")
    assert capsys.readouterr().out.strip().endswith("] hello there [red]")


def test_other_ranks_only_warn(log, capsys):
    log(3)
    logging.getLogger("torchladder.data").info("hello")
    logging.getLogger("torchladder.data").warning("oh")
    out = capsys.readouterr().out
    assert "hello" not in out
    assert out.strip().endswith("[rank 3] warning: oh")


def test_errors_come_with_their_traceback(log, capsys):
    log()
    try:
        raise ValueError("no")
    except ValueError:
        logging.getLogger("torchladder").exception("failed")
    assert "ValueError: no" in capsys.readouterr().out

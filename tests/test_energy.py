"""Energy and CO2 of a run: codecarbon itself, and a stand-in whose machine uses what the test says."""

import json
import logging
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import runs
import torch

from torchladder import plots, train
from torchladder.metrics import MetricsConfig, MetricsProcessor, RunInfo, read_jsonl
from torchladder.metrics.energy import EnergyMeter

codecarbon = pytest.importorskip("codecarbon")
cpuinfo = pytest.importorskip("cpuinfo")  # which it needs


@pytest.fixture
def machine(monkeypatch):
    """A machine whose energy the test sets; a measurement costs nothing."""
    machine = SimpleNamespace(kwh=5.0, measured=0.0, running=False)

    class Tracker:
        def __init__(self, country_iso_code, output_handlers, **_):
            (self.handler,) = output_handlers
            self.intensity = {"BRA": 0.1, "DEU": 0.4}[country_iso_code]

        def start(self):
            self.begin, machine.running = machine.kwh, True
            self.flush()

        def flush(self):
            used = machine.kwh - self.begin
            self.handler.out(SimpleNamespace(energy_consumed=used, emissions=used * self.intensity), None)

        def stop(self):
            machine.running = False

    monkeypatch.setattr(codecarbon, "OfflineEmissionsTracker", Tracker)
    return machine


def processor(folder, step=0, totals=None, country="BRA", **run):
    run = {"folder": folder, "steps": 9, "seq_len": 16, "flops": lambda tokens, pairs: 0} | run
    config = MetricsConfig(enable_tensorboard=False, energy_country=country)
    return MetricsProcessor(config, RunInfo(device=torch.device("cpu"), **run), step, totals)


def log(reporter, step):
    reporter.log(step, loss=2.0, grad_norm=0.5, lr=1e-3, window=4)


def energy(folder):
    return [(line["step"], line.get("energy_kwh"), line.get("co2_kg")) for line in read_jsonl(folder / "metrics.jsonl")]


def test_totals_cover_all_processes_of_a_run(machine, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    with processor(tmp_path, machines=2) as reporter:
        machine.kwh += 1
        assert reporter.progress["energy_kwh"] == 2  # of two machines, measured now
        log(reporter, 3)
        machine.kwh += 1
        saved = reporter.progress
        log(reporter, 6)
        assert "energy: 4kWh" in caplog.messages[-1]
    assert not machine.running
    machine.kwh += 50  # between two processes
    with processor(tmp_path, 3, saved, machines=2) as reporter:
        machine.kwh += 3
        log(reporter, 9)  # the last step: measured now
        reporter.rewind(3, saved)
        assert machine.running
        assert reporter.progress["energy_kwh"] == 4
        machine.kwh += 0.5
        log(reporter, 9)
    expected = [(3, 2, 0.2), (9, 5, 0.5)]
    assert [pytest.approx(line) for line in expected] == energy(tmp_path)
    with processor(tmp_path, 9) as reporter:  # without a checkpoint's totals, those of the last report
        assert reporter.progress["energy_kwh"] == pytest.approx(5)
    run = plots.ReportedRun(plots.RunCurves("run", read_jsonl(tmp_path / "metrics.jsonl")))
    assert (plots.finals(run, run)["kWh"], plots.finals(run, run)["kg CO2"]) == ("5", "0.5")


def test_only_runs_that_ask_for_it_and_only_rank_0_measure(machine, tmp_path):
    for changes in {"country": ""}, {"rank": 1, "ranks": 2}:
        with processor(tmp_path, **changes) as reporter:
            log(reporter, 9)
            assert set(reporter.progress) == {"tokens", "flops", "seconds"}
    assert not machine.running
    assert energy(tmp_path) == [(9, None, None)]


def test_what_a_process_without_a_meter_does_not_measure_is_kept(machine, tmp_path):
    with processor(tmp_path, 3, {"tokens": 1, "flops": 1, "seconds": 1.0, "energy_kwh": 2.0}, country="") as reporter:
        log(reporter, 9)
        assert reporter.progress["energy_kwh"] == 2


def test_codecarbon_measures_a_run(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("CODECARBON_FORCE_CPU_POWER", "100")
    monkeypatch.setattr(cpuinfo, "get_cpu_info", lambda: {"brand_raw": "CPU"})  # it takes a second or more
    # Longer than the 0.05 seconds within which codecarbon does not measure again.
    short = ["--training.steps", "16", "--validation.no_enable"]
    found = runs.run(tmp_path, *short, "--metrics.energy_country", "BRA", "--metrics.no_enable_tensorboard")
    last = found[-1]
    assert 0 < last["energy_kwh"] < 1
    assert 0 < last["co2_kg"] < last["energy_kwh"]
    end = re.search(r"energy +(\S+) kWh, (\S+) kg of CO2 equivalents", "\n".join(caplog.messages))
    assert [float(x) for x in end.groups()] == pytest.approx([last["energy_kwh"], last["co2_kg"]], rel=1e-3)
    assert not list(tmp_path.glob("**/emissions*"))
    intensity = json.loads(
        (Path(codecarbon.__file__).parent / "data/private_infra/global_energy_mix.json").read_text()
    )["BRA"]["carbon_intensity"]
    assert 1000 * last["co2_kg"] / last["energy_kwh"] == pytest.approx(intensity, rel=1e-3)


def test_refusals_come_first(tmp_path, monkeypatch, capsys):
    words = [*runs.DEBUG, "--job.dump_folder", str(tmp_path / "run"), "--metrics.energy_country"]
    assert train.main([*words, "BRB1"]) == 2
    assert "unknown country 'BRB1' in metrics.energy_country. Did you mean 'BRB'?" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "codecarbon.input", None)
    assert train.main([*words, "BRA"]) == 2
    assert "pip install codecarbon, of the extra torchladder[energy]" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run").exists()


def test_a_meter_may_be_closed_twice(machine):
    meter = EnergyMeter("DEU", 1)
    machine.kwh += 2
    assert meter.totals() == {"energy_kwh": 0, "co2_kg": 0}  # as of the last measurement
    assert meter.totals(measure_now=True) == pytest.approx({"energy_kwh": 2, "co2_kg": 0.8})
    meter.close()
    meter.close()

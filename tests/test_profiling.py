"""Profiling: which steps are traced, where files are written, and invalid settings."""

import json

import pytest
import torch

from torchladder.profiling import ProfilingConfig, profile
from torchladder.registry import ConfigError


def work(steps, step_profilers):
    for step in range(steps):
        with torch.profiler.record_function(f"step {step}"):
            torch.ones(8, 8) @ torch.ones(8, 8)
        step_profilers()


def names(path):
    return {event.get("name") for event in json.loads(path.read_text())["traceEvents"]}


def test_nothing_is_written_by_default(tmp_path):
    with profile(ProfilingConfig(), tmp_path) as step_profilers:
        work(20, step_profilers)
    assert list(tmp_path.iterdir()) == []


def test_traces_are_written_by_iteration_and_rank(tmp_path):
    config = ProfilingConfig(enable_profiling=True, profile_freq=4, profiler_warmup=1, profiler_active=2)
    with profile(config, tmp_path, rank=3) as step_profilers:
        work(9, step_profilers)
    traces = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*.json"))
    assert [str(trace) for trace in traces] == [
        "profile_traces/iteration_4/rank3_trace.json",
        "profile_traces/iteration_8/rank3_trace.json",
    ]
    seen = names(tmp_path / traces[0])
    assert {"step 2", "step 3", "aten::mm"} <= seen
    assert not {"step 0", "step 1", "step 4"} & seen


def test_a_resumed_run_continues_the_iteration_count(tmp_path):
    config = ProfilingConfig(
        enable_profiling=True, profile_freq=2, profiler_warmup=0, profiler_active=1, save_traces_folder="traces"
    )
    with profile(config, tmp_path, step=100) as step_profilers:
        work(2, step_profilers)
    assert [path.parent.name for path in tmp_path.glob("traces/*/rank0_trace.json")] == ["iteration_102"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU takes snapshots")
def test_memory_snapshots_need_cuda(tmp_path):
    with (
        pytest.raises(ConfigError, match="enable_memory_snapshot: snapshots record CUDA memory"),
        profile(ProfilingConfig(enable_memory_snapshot=True), tmp_path),
    ):
        pass


@pytest.fixture
def snapshots(monkeypatch):
    """Replaces CUDA's memory history; returns the settings it was called with."""
    calls = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", lambda **settings: calls.append(settings))
    monkeypatch.setattr(torch.cuda.memory, "_snapshot", lambda: {"segments": []})
    return calls


def test_memory_snapshots_are_written_by_iteration_and_rank(tmp_path, snapshots):
    config = ProfilingConfig(enable_memory_snapshot=True, profile_freq=5)
    with profile(config, tmp_path, rank=1) as step_profilers:
        work(11, step_profilers)
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.pickle")) == [
        "memory_snapshot/iteration_10/rank1_memory_snapshot.pickle",
        "memory_snapshot/iteration_5/rank1_memory_snapshot.pickle",
    ]
    assert snapshots == [{"max_entries": 100_000}, {"enabled": None}]


def test_running_out_of_memory_writes_a_snapshot(tmp_path, snapshots):
    config = ProfilingConfig(enable_memory_snapshot=True)

    def fill():
        with profile(config, tmp_path, step=7) as step_profilers:
            work(1, step_profilers)
            raise torch.cuda.OutOfMemoryError

    with pytest.raises(torch.cuda.OutOfMemoryError):
        fill()
    assert (tmp_path / "memory_snapshot/iteration_8_exit/rank0_memory_snapshot.pickle").exists()
    assert snapshots[-1] == {"enabled": None}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"profile_freq": 0}, "profile_freq = 0"),
        ({"profiler_active": 0}, "profiler_active = 0: must be 1 or more"),
        ({"profiler_warmup": -1}, "profiler_warmup = -1"),
        ({"profile_freq": 3}, r"profile_freq = 3: must be at least profiler_warmup \+ profiler_active = 3 \+ 1"),
    ],
)
def test_invalid_settings(settings, message):
    with pytest.raises(ConfigError, match=message):
        ProfilingConfig(**settings)

"""The launcher of run_train.sh: one line and exit code 2 where torchrun has a traceback."""

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.rendezvous import RendezvousConnectionError

from torchladder.distributed import launch


def failing(exit_code, message):
    failure = ProcessFailure(local_rank=1, pid=1, exitcode=exit_code, error_file="none")
    failure.message = message
    return ChildFailedError("train", {1: failure})


def launch_with(monkeypatch, error):
    def raises():
        raise error

    monkeypatch.setattr(launch.run, "main", raises)
    monkeypatch.setenv(launch.LAUNCHED, "")
    return launch.main()


def test_refused_settings_are_one_line(monkeypatch, capsys):
    recorded = {"message": "ConfigError: training.steps = 0: must be 1 or more.", "extraInfo": {"timestamp": "0"}}
    assert launch_with(monkeypatch, failing(2, recorded)) == 2
    assert capsys.readouterr().err == "torchladder: training.steps = 0: must be 1 or more.\n"


@pytest.mark.parametrize(("code", "message"), [(1, {"message": "RuntimeError: x"}), (2, "no record"), (-9, "killed")])
def test_other_failures_are_those_of_torchrun(monkeypatch, code, message):
    with pytest.raises(ChildFailedError):
        launch_with(monkeypatch, failing(code, message))


def test_nodes_that_do_not_meet(monkeypatch, capsys):
    monkeypatch.setenv("RDZV_ENDPOINT", "node1:29500")
    assert launch_with(monkeypatch, RendezvousConnectionError("no connection")) == 2
    said = capsys.readouterr().err
    assert "the nodes did not meet at RDZV_ENDPOINT=node1:29500 (no connection)" in said
    assert len(said.splitlines()) == 1

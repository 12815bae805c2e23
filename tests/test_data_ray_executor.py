"""The same preparation on a real Ray of this machine; skipped where Ray is not installed."""

import json
import os
import random
import sys
from pathlib import Path

import pytest

from torchladder.data.prepare import dataset_builder, executor
from torchladder.data.prepare.document_encoder import DocumentEncoder
from torchladder.data.prepare.executor import LocalExecutor
from torchladder.data.prepare.tasks import PrepareConfig
from torchladder.data.tokenizer import ByteTokenizer
from torchladder.registry import ConfigError


@pytest.fixture(scope="module")
def cluster():
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield ray
    ray.shutdown()


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    rng = random.Random(0)
    for number in range(3):
        lines = [json.dumps({"text": f"{number} {i} " + "x" * rng.randrange(200)}) + "\n" for i in range(100)]
        (folder / f"{number}.jsonl").write_text("".join(lines))
    return folder


def prepare(folder, output, run):
    preparation = PrepareConfig(
        inputs=[str(folder)], output=str(output), encoder=DocumentEncoder(ByteTokenizer()), part_bytes=2000
    )
    dataset_builder.prepare_dataset(preparation, run)
    return [Path(f"{output}.{suffix}").read_bytes() for suffix in ("bin", "idx", "json")]


@pytest.mark.timeout(240)
def test_a_cluster_gives_the_same_output(cluster, folder, tmp_path):
    run = executor.registry.get("ray")(workers=2)
    assert prepare(folder, tmp_path / "cluster", run) == prepare(folder, tmp_path / "here", LocalExecutor(1))

    def pid(task):
        return os.getpid()

    pids = set(run(pid, range(6)))
    assert len(pids) == 2
    assert os.getpid() not in pids
    assert list(run(pid, [])) == []

    def die_once(path):
        if not os.path.exists(path):
            Path(path).touch()
            os.kill(os.getpid(), 9)
        return "done"

    # A worker that is lost comes up again and does its task again.
    assert list(run(die_once, [str(tmp_path / "died")])) == ["done"]

    (folder / "1.jsonl").write_text("{broken\n")
    with pytest.raises(ConfigError, match=r"1\.jsonl:1: not JSON"):
        prepare(folder, tmp_path / "broken", run)


def test_a_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"needs the package ray: .*torchladder\[ray\]"):
        executor.registry.get("ray")(workers=1)


def test_zero_workers_are_an_error():
    pytest.importorskip("ray")
    with pytest.raises(ConfigError, match="--workers 0: must be 1 or more"):
        executor.registry.get("ray")(workers=0)

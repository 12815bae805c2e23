"""The benchmark of a GPU: what a CPU can check of it, so that a typing error costs no time on a GPU."""

import pytest

from tests.benchmarks.gpu import kernels, peer, speed, stepping, warm
from torchladder import config, mask, models
from torchladder.models import attention


@pytest.mark.parametrize("flash4", [True, False])
def test_the_runs_on_a_gpu_have_settings_masks_and_kernels_that_exist(monkeypatch, flash4):
    for module in (speed, peer):
        monkeypatch.setattr(module, "CUDA", True)
        monkeypatch.setattr(module, "FLASH4", flash4)
    monkeypatch.setattr(peer, "is_here", lambda: True)
    chosen = warm.jobs()
    assert {job.kernel for job in chosen} >= ({"flash", "flash_mask"} if flash4 else {"varlen"})
    for job in chosen:
        assert job.shape.flavor in models.registry.flavors("llama")
        if isinstance(job, peer.Contestant) and job.who == peer.THEM:
            continue
        kernel = attention.registry.get(job.kernel)
        assert set(job.masks) <= (kernel.masks or set(mask.registry.names()))
        given = getattr(job, "settings", ())
        arguments = stepping.settings_of(job.shape, "outputs", *given, masks=job.masks, kernel=job.kernel)
        assert config.load(arguments).attention.kernel == job.kernel


def test_only_what_is_asked_for_is_measured(monkeypatch, capsys):
    monkeypatch.setattr(speed, "CUDA", True)
    monkeypatch.setattr(speed, "FLASH4", True)
    some = stepping.Clock(only=("1b, 8,192 tokens, flash, document", "tensorwise"))
    assert [str(run) for run in speed.runs() if some.allows(f"speed of {run}")] == [
        "1b, 8,192 tokens, flash, document+chunk", "1b, 8,192 tokens, fold tensorwise, chunk"
    ]  # fmt: skip
    over = stepping.Clock(end=0)
    assert not over.allows("speed of everything")
    assert capsys.readouterr().out == "no time left: speed of everything\n"


def test_the_kernels_alone_run_on_a_cpu(capsys):
    results = kernels.run()["results"]
    assert [(r["mask"], r["kernel"]) for r in results] == [
        ("chunk 256", "fold"), ("chunk 100", "fold"), ("documents", "sdpa")
    ]  # fmt: skip
    assert all(r["tflops"] > 0 for r in results)
    assert "TFLOP/s" in capsys.readouterr().out

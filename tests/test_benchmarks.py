"""The benchmark of a GPU: what a CPU can check of it, so that a typing error costs no time on a GPU."""

import pytest

from tests.benchmarks.gpu import kernels, speed, stepping, warm
from torchladder import config, mask, models
from torchladder.models import attention


@pytest.mark.parametrize("flash4", [True, False])
def test_the_runs_on_a_gpu_have_settings_masks_and_kernels_that_exist(monkeypatch, flash4):
    for module in (speed, warm):
        monkeypatch.setattr(module, "CUDA", True)
    monkeypatch.setattr(speed, "FLASH4", flash4)
    chosen = warm._distinct()
    assert {run.kernel for run in chosen} >= ({"flash", "flash_mask"} if flash4 else {"varlen"})
    for run in chosen:
        assert run.shape.flavor in models.registry.flavors("llama")
        kernel = attention.registry.get(run.kernel)
        assert set(run.masks) <= (kernel.masks or set(mask.registry.names()))
        arguments = stepping.settings_of(run.shape, "outputs", *run.settings, masks=run.masks, kernel=run.kernel)
        assert config.load(arguments).attention.kernel == run.kernel


def test_the_kernels_alone_run_on_a_cpu(capsys):
    results = kernels.run()["results"]
    assert [(r["mask"], r["kernel"]) for r in results] == [
        ("chunk 256", "fold"), ("chunk 100", "fold"), ("documents", "sdpa")
    ]  # fmt: skip
    assert all(r["tflops"] > 0 for r in results)
    assert "TFLOP/s" in capsys.readouterr().out

"""Muon against torch.optim.Muon and the formula of the paper; sharded in every layout; saved, resumed, resharded."""

import math
import shutil
from pathlib import Path

import layouts
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from runs import losses, run
from test_layouts import CONFIG, TIED, parallelized
from torch.distributed.tensor import DTensor, distribute_tensor

from torchladder import config, models, optim
from torchladder.distributed.mesh import ParallelismConfig
from torchladder.optim import LRScheduler, Muon
from torchladder.optim.muon import newton_schulz
from torchladder.registry import ConfigError
from torchladder.training import run_plan as plans

COEFFICIENTS = (3.4445, -4.775, 2.0315)


def llama(shape=CONFIG):
    model = models.Llama(shape, seq_len=16)
    model.init_weights(0)
    return model


def gradient(name, parameter, step):
    """Returns the same gradient of a parameter on every rank and in every layout."""
    generator = torch.Generator().manual_seed(sum(map(ord, name)) + 1000 * step)
    return torch.randn(parameter.shape, generator=generator)


def set_gradients(model, step):
    for name, parameter in model.named_parameters():
        grad = gradient(name, parameter, step)
        if isinstance(parameter, DTensor):
            grad = distribute_tensor(grad, parameter.device_mesh, parameter.placements, src_data_rank=None)
        parameter.grad = grad


# --- the update ------------------------------------------------------------------------------------------------------


@given(st.integers(1, 24), st.integers(1, 24), st.integers(1, 7), st.integers(0, 99))
def test_newton_schulz_is_the_polynomial_of_the_singular_values(rows, columns, steps, seed):
    matrix = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    u, s, v = torch.linalg.svd(matrix.double() / matrix.double().norm(), full_matrices=False)
    a, b, c = COEFFICIENTS
    for _ in range(steps):
        s = a * s + b * s**3 + c * s**5
    expected = u @ torch.diag(s) @ v
    found = newton_schulz(matrix, COEFFICIENTS, steps)
    assert found.dtype == torch.bfloat16
    assert (found.double() - expected).norm() <= 0.08 * expected.norm() + 0.02


def test_every_direction_of_an_update_is_about_equally_long():
    found = newton_schulz(torch.randn(64, 96, generator=torch.Generator().manual_seed(0)), COEFFICIENTS, 5)
    lengths = torch.linalg.svdvals(found.float())
    assert 0.6 < lengths.min() < lengths.max() < 1.3
    assert newton_schulz(torch.zeros(3, 2), COEFFICIENTS, 5).eq(0).all()


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("adjust_lr_fn", ["original", "match_rms_adamw"])
def test_one_rank_does_what_torch_does(nesterov, adjust_lr_fn):
    settings = {"lr": 0.02, "weight_decay": 0.2, "momentum": 0.8, "nesterov": nesterov, "adjust_lr_fn": adjust_lr_fn}
    one, other = llama(), llama()
    made = Muon(**settings, adamw_lr=0.01, eps=1e-6)(one)
    matrices = [p for name, p in other.named_parameters() if name.startswith("layers") and p.ndim == 2]
    tables = [other.embedding.weight, other.head.weight]
    vectors = [p for p in other.parameters() if p.ndim == 1]
    adamw = torch.optim.AdamW(
        [{"params": tables, "weight_decay": 0.2}, {"params": vectors, "weight_decay": 0.0}],
        lr=0.01, betas=(0.9, 0.95), eps=1e-6, fused=True,
    )  # fmt: skip
    muon = torch.optim.Muon(matrices, **settings)
    for step in range(3):
        set_gradients(one, step)
        set_gradients(other, step)
        for each in (made, adamw, muon):
            each.step()
        for name, parameter in one.named_parameters():
            assert torch.equal(parameter, other.get_parameter(name)), name


def test_matrices_of_blocks_get_muon_and_all_others_adamw():
    made = Muon(lr=0.02, adamw_lr=0.01)(llama(TIED))
    muon, decayed, vectors = made.param_groups
    assert [len(group["params"]) for group in made.param_groups] == [14, 1, 5]
    assert [group["weight_decay"] for group in made.param_groups] == [0.1, 0.1, 0.0]
    assert (muon["momentum"], muon["nesterov"], muon["ns_steps"]) == (0.95, True, 5)
    assert decayed["betas"] == vectors["betas"] == (0.9, 0.95)
    scheduler = LRScheduler(made)
    assert scheduler.set_factor(0.5) == 0.01
    assert [group["lr"] for group in made.param_groups] == [0.01, 0.005, 0.005]


def test_a_bad_step_changes_nothing():
    one, other = llama(), llama()
    made, reference = Muon()(one), Muon()(other)
    assert optim.is_fused(made)
    for step, bad in enumerate((0, 1, 0)):
        set_gradients(one, step)
        if bad:
            for parameter in one.parameters():
                parameter.grad.fill_(math.nan)
        else:
            set_gradients(other, step)
            reference.step()
        assert optim.should_step(made, torch.tensor(float(bad)))
        made.step()
        for name, parameter in one.named_parameters():
            assert torch.equal(parameter, other.get_parameter(name)), name
    for parameter, expected in zip(one.parameters(), other.parameters(), strict=True):
        for key, value in made.state[parameter].items():
            assert torch.equal(value, reference.state[expected][key])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"momentum": 1.0}, r"optimizer\.momentum = 1\.0: must be 0 or more and below 1"),
        ({"ns_steps": 0}, r"optimizer\.ns_steps = 0: must be 1 or more and below 100"),
        ({"adamw_lr": -1.0}, r"optimizer\.adamw_lr = -1\.0"),
        ({"ns_coefficients": (1.0, math.nan, 2.0)}, r"ns_coefficients = \[1\.0, nan, 2\.0\]: must be three finite"),
    ],
)
def test_impossible_settings(settings, message):
    with pytest.raises(ConfigError, match=message):
        Muon(**settings)


def test_a_model_without_blocks_is_refused():
    with pytest.raises(ConfigError, match="no trainable matrices in its blocks"):
        Muon()(torch.nn.Linear(2, 2))


def test_offload_is_refused_before_the_run():
    settings = config.load([*layouts.CONFIG, "--optimizer.name", "Muon", "--training.enable_cpu_offload"])
    with pytest.raises(ConfigError, match=r"enable_cpu_offload: not with optimizer.name = 'Muon'.*use AdamW"):
        plans.make_plan(settings, ranks=2)


# --- several ranks ---------------------------------------------------------------------------------------------------


def step_as_one_rank(ranks, cases):
    for shape, settings in cases:
        model, _, _ = parallelized(ranks, shape, ParallelismConfig(**settings))
        one = llama(shape)
        for each in (model, one):
            optimizer = Muon(lr=0.02)(each)
            for step in range(2):
                set_gradients(each, step)
                optimizer.step()
        for name, parameter in model.named_parameters():
            found, expected = parameter.full_tensor(), one.get_parameter(name)
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)  # AdamW's kernel rounds by shard
            if name.startswith("layers.") and found.ndim == 2:
                assert torch.equal(found, expected), f"{name} under {settings}"


def test_any_layout_takes_muons_step_of_one_rank_bit_for_bit():
    tensor, replicate = {"tensor_parallel_degree": 2}, {"data_parallel_replicate_degree": 2}
    cases = [(CONFIG, tensor), (TIED, {**tensor, **replicate}), (CONFIG, replicate), (TIED, {})]
    layouts.launch(step_as_one_rank, 4, [*cases, (CONFIG, {"context_parallel_degree": 2})])


MUON = ["--optimizer.name", "Muon", "--optimizer.lr", "2e-3", "--training.steps", "10"]
MUON += ["--optimizer.groups", '{ pattern = "embedding|head", lr_factor = 0.3, weight_decay = 0.0 }']
SAVING = ["--checkpoint.enable", "--checkpoint.interval", "5"]
TWO = {
    "FSDP2": ["--training.local_batch_size", "2", *SAVING],
    "TP2": ["--parallelism.tensor_parallel_degree", "2"],
    "CP2": ["--parallelism.context_parallel_degree", "2"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("muon")
    layouts.launch(layouts.train, 2, folder, {name: [*MUON, *argv] for name, argv in TWO.items()})
    run(folder / "one", *MUON, *SAVING, "--validation.no_enable")
    return folder


@pytest.mark.parametrize("layout", TWO)
def test_the_losses_of_a_layout_are_those_of_one_rank(folder, layout):
    one, other = losses(folder / "one"), losses(folder / layout)
    apart = [abs(other[step] / one[step] - 1) for step in one]
    assert max(apart) <= 1e-4


def test_a_run_resumes_bit_for_bit(folder, tmp_path):
    shutil.copytree(folder / "one", tmp_path / "resumed")
    load = ["--validation.no_enable", "--checkpoint.load_step", "5"]
    run(tmp_path / "resumed", *MUON, *SAVING, *load)
    assert losses(tmp_path / "resumed") == losses(folder / "one")


def test_two_ranks_save_what_one_resumes(folder, tmp_path):
    shutil.copytree(folder / "FSDP2", tmp_path / "resumed")
    argv = [*MUON, *SAVING, "--validation.no_enable", "--checkpoint.load_step", "5"]
    run(tmp_path / "resumed", *argv)
    one, other = losses(folder / "one"), losses(tmp_path / "resumed")
    assert list(one) == list(other)
    assert max(abs(other[step] / one[step] - 1) for step in one) <= 1e-4


def test_another_optimizer_is_refused_when_resuming(folder, tmp_path, capsys):
    shutil.copytree(folder / "one", tmp_path / "resumed")
    argv = ["--checkpoint.enable", "--checkpoint.load_step", "5", "--training.steps", "10"]
    run(Path(tmp_path / "resumed"), *argv, code=2)
    message = capsys.readouterr().err
    assert "was saved by another optimizer: of layers.0.attention.q_proj.weight it has momentum_buffer, not" in message
    run(Path(tmp_path / "resumed"), *argv, "--checkpoint.exclude_from_loading", "optimizer")

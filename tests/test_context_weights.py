"""Losses weighted by context: the weights, and that runs with them do not depend on the layout."""

import layouts
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from runs import DEBUG, run
from test_layouts import CAPPED, CONFIG, TIED, parallelized, rows

from torchladder import mask, models, train
from torchladder.data import IGNORE_INDEX
from torchladder.distributed.mesh import ParallelismConfig
from torchladder.models import attention
from torchladder.training.context_weights import ContextWeights

WEIGHTED = ["--training.context_weight_exponent", "0.5", "--training.steps", "5"]
TENSOR, CONTEXT = "--parallelism.tensor_parallel_degree", "--parallelism.context_parallel_degree"
ROWS = "--training.local_batch_size"


@given(st.integers(1, 200), st.integers(1, 200), st.sampled_from([0.5, 1.0, 2.0, 3.7]), st.integers(0, 1000))
def test_weights_are_the_formula(tokens, window, exponent, seed):
    generator = torch.Generator().manual_seed(seed)
    begins = torch.rand(2, tokens, generator=generator) < 0.1
    index = torch.arange(tokens, dtype=torch.int32).expand(2, tokens)
    positions = index - index.where(begins, 0).cummax(1).values
    start = mask.from_names(["document", "chunk"], positions, window)
    labels = torch.randint(50, (2, tokens), generator=generator)
    labels[torch.rand(2, tokens, generator=generator) < 0.3] = IGNORE_INDEX
    found = ContextWeights(exponent)(labels, {"full_attention": start, "sliding_attention": index})
    expected = [
        [(2 ** ((i - first + 1).bit_length() - 1)) ** exponent for i, first in enumerate(row)] for row in start.tolist()
    ]
    rounded = torch.tensor(expected).to(torch.bfloat16)
    assert torch.equal(found.weights.to(torch.bfloat16), rounded)
    assert torch.equal(found.weights, rounded.float())
    assert found.total == pytest.approx(rounded.double()[labels != IGNORE_INDEX].sum().item())


def test_an_exponent_of_0_has_no_weights():
    assert ContextWeights(0.0)(torch.zeros(1, 4), {"full_attention": torch.zeros(1, 4, dtype=torch.int32)}) is None


@pytest.mark.parametrize("value", ["-1", "4.5"])
def test_an_exponent_out_of_range_is_refused(value, tmp_path, capsys):
    argv = [*DEBUG, "--job.dump_folder", str(tmp_path), f"--training.context_weight_exponent={value}"]
    assert train.main(argv) == 2
    assert "training.context_weight_exponent" in capsys.readouterr().err


def test_a_model_without_weights_is_refused(monkeypatch, tmp_path, capsys):
    def forward(self, tokens, attn_mask, labels=None, z_loss_multiplier=0.0):
        raise AssertionError

    monkeypatch.setattr(models.Llama, "forward", forward)
    assert train.main([*DEBUG, "--job.dump_folder", str(tmp_path), *WEIGHTED]) == 2
    assert "context_weight_exponent: Llama.forward has no argument label_weights" in capsys.readouterr().err


# --- runs ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weighted")
    plain = ["--training.steps", "5"]
    micro = [ROWS, "1", "--training.global_batch_size", "4"]
    layouts.launch(layouts.train, 1, folder, {"plain": plain, "one": WEIGHTED, "micro-batches": [*WEIGHTED, *micro]})
    two = {"FSDP2": [ROWS, "2"], "TP2": [TENSOR, "2"], "CP2": [CONTEXT, "2"]}
    layouts.launch(layouts.train, 2, folder, {name: [*WEIGHTED, *argv] for name, argv in two.items()})
    return folder


@pytest.mark.parametrize("layout", ["micro-batches", "FSDP2", "TP2", "CP2"])
def test_weighted_losses_of_a_layout_are_those_of_one_rank(folder, layout):
    for key, first, later in (("loss", 1e-6, 1e-5), ("grad_norm", 1e-5, 1e-4)):
        one, many = (layouts.losses(folder / name, key) for name in ("one", layout))
        assert many[1] == pytest.approx(one[1], rel=first)
        assert many == pytest.approx(one, rel=later)


def test_the_reported_loss_has_no_weights(folder):
    plain, weighted = (layouts.losses(folder / name) for name in ("plain", "one"))
    assert weighted[1] == pytest.approx(plain[1], rel=1e-6)
    assert weighted[5] != pytest.approx(plain[5], rel=1e-4)


def test_z_loss_is_reported_without_weights(tmp_path):
    argv = ["--training.steps", "1", "--validation.no_enable", "--training.z_loss_multiplier", "0.01"]
    (plain,), (weighted,) = run(tmp_path / "plain", *argv), run(tmp_path / "weighted", *WEIGHTED, *argv)
    for key in ("loss", "z_loss"):
        assert weighted[key] == pytest.approx(plain[key], rel=1e-6)
    assert weighted["grad_norm"] != pytest.approx(plain["grad_norm"], rel=1e-4)


# --- gradients -------------------------------------------------------------------------------------------------------


def compare(ranks, cases):
    tokens, labels = rows()
    label_weights = 2.0 ** (torch.arange(16).expand(4, 16) % 5)
    kernel = attention.build_kernel("sdpa", ["causal"], "cpu")
    for config, settings in cases:
        multiplier = 0.1 if config.logit_softcap else 0.0
        one = models.Llama(config, seq_len=16)
        one.init_weights(0)
        expected = one(tokens, None, labels, multiplier, None, label_weights)
        (expected[0] / 100).backward()
        model, found, here = parallelized(ranks, config, ParallelismConfig(**settings))
        share = len(tokens) // found.degrees.dp
        mine = slice(found.dp_rank * share, (found.dp_rank + 1) * share)
        attn_mask = here.prepare_mask(kernel.prepare, torch.zeros(share, 16, dtype=torch.int32), torch.device("cpu"))
        batch = here(tokens[mine]), attn_mask, here(labels[mine]), multiplier, None, here(label_weights[mine])
        own = model(*batch)
        (own[0] / 100).backward()
        for value, reference in zip(own, expected, strict=True):
            assert ranks.sum(value.item(), found.degrees.tp) == pytest.approx(reference.item(), rel=1e-6)
        for parameter, reference in zip(model.parameters(), one.parameters(), strict=True):
            torch.testing.assert_close(parameter.grad.full_tensor(), reference.grad, atol=1e-6, rtol=1e-4)


def test_weighted_gradients_are_those_of_one_rank():
    tensor = {"tensor_parallel_degree": 2}
    off = {**tensor, "disable_loss_parallel": True}
    cases = [(config, settings) for config in (CONFIG, CAPPED) for settings in (tensor, off)]
    layouts.launch(compare, 2, [*cases, (TIED, {}), (CONFIG, {"context_parallel_degree": 2})])

"""Kernels on a GPU: outputs and gradients against the dense reference, and one compiled graph for all windows.

python -m pytest tests/gpu
"""

import importlib.util

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters

from torchladder import mask, models
from torchladder.models import attention
from torchladder.models.attention import flash4
from torchladder.models.loss import cross_entropy

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")

CUDA = torch.device("cuda")
LENGTH = 1000  # not a multiple of a block
MIXES = [("causal",), ("chunk",), ("document",), ("sliding",), ("document", "chunk"), ("document", "sliding")]
WINDOWS = [1, 32, 100, 128, 500, 999]
FLASH4 = flash4.unavailable() is None
KERNELS = ["flex", "fold", "varlen", "sdpa"] + ["flash"] * (importlib.util.find_spec("flash_attn") is not None)
KERNELS += ["flash_mask"] * FLASH4


def positions(batch=2):
    rows = torch.arange(LENGTH, dtype=torch.int32).repeat(batch, 1)
    rows[1, 300:] -= 300
    rows[1, 850:] -= 550
    return rows


def start_of(mix, window):
    return mask.from_names(mix, positions(), window)


def run(kernel, start, dtype, heads, size):
    generator = torch.Generator(CUDA).manual_seed(0)
    shapes = [(2, LENGTH, h, size) for h in (heads[0], heads[1], heads[1], heads[0])]
    q, k, v, grad = (torch.randn(s, device=CUDA, generator=generator).to(torch.bfloat16).to(dtype) for s in shapes)
    q, k, v = (x.transpose(1, 2).detach().requires_grad_() for x in (q, k, v))
    out = kernel.attention(q, k, v, kernel.prepare(start, CUDA))
    return out, *torch.autograd.grad(out, (q, k, v), grad.transpose(1, 2))


def error(ours, reference):
    return ((ours.double() - reference.double()).norm() / reference.double().norm().clamp_min(1e-6)).item()


def assert_like_dense(name, mix, window, dtype, heads=(4, 2), size=64):
    kernel, start = attention.build_kernel(name, list(mix), CUDA), start_of(mix, window)
    reference = run(attention.build_kernel("dense", list(mix), CUDA), start, torch.float64, heads, size)
    for ours, exact in zip(run(kernel, start, dtype, heads, size), reference, strict=True):
        assert ours.dtype == dtype
        if window == 1 and not exact.any():  # a query that sees only itself: its score does not matter
            assert ours.abs().max() < 0.05
        else:
            assert error(ours, exact) < (0.02 if dtype == torch.bfloat16 else 0.005)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("mix", MIXES, ids="+".join)
@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_agrees_with_dense_in_bfloat16(name, mix, window):
    if name == "fold" and not {"causal", "chunk"}.issuperset(mix):
        pytest.skip("not a uniform chunk")
    assert_like_dense(name, mix, window, torch.bfloat16)


@pytest.mark.parametrize("name", ["flex", "fold", "sdpa"])
@pytest.mark.parametrize("window", [32, 999])
def test_a_kernel_agrees_with_dense_in_fp32(name, window):
    assert_like_dense(name, ("chunk",), window, torch.float32)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize(("heads", "size"), [((4, 4), 128), ((8, 1), 64), ((4, 2), 16), ((4, 2), 80), ((4, 2), 100)])
def test_other_heads(name, heads, size):
    if size % 8 and (name == "varlen" or (name == "flash" and not FLASH4)):
        pytest.skip("takes heads of a multiple of 8 features")
    assert_like_dense(name, ("chunk",), 300, torch.bfloat16, heads, size)


@pytest.mark.parametrize(("name", "masks"), [("flex", ["document", "chunk"]), ("fold", ["chunk"])])
def test_one_compiled_graph_trains_all_windows(name, masks):
    assert graphs_over_windows(name, masks) == 1


@pytest.mark.skipif(not FLASH4, reason="needs FlashAttention 4")
@pytest.mark.parametrize("name", ["flash", "flash_mask"])
def test_one_compiled_graph_of_flash_attention_4_trains_all_windows(name):
    assert graphs_over_windows(name, ["document", "chunk"]) == 1


@pytest.mark.parametrize("window", [100, 128, 999])
def test_fold_without_flash_attention_4(window, monkeypatch):
    monkeypatch.setattr(flash4, "supports", lambda q: False)
    assert_like_dense("fold", ("chunk",), window, torch.bfloat16)


def test_varlen_compiles_for_any_window_at_once():
    # Its window and longest segment are integers: the first graph is specialized, the second dynamic.
    assert graphs_over_windows("varlen", ["document", "chunk"]) <= 3


def graphs_over_windows(name, masks):
    config = models.LlamaConfig(dim=256, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=512, vocab_size=512)
    losses = {}
    for compiled in (False, True):
        torch._dynamo.reset()
        counters.clear()
        kernel = attention.build_kernel(name, masks, CUDA)
        with CUDA:
            model = models.Llama(config, kernel.attention, LENGTH)
        model.init_weights(0)
        if compiled:
            for block in model.layers.values():
                block.compile(fullgraph=True)
        tokens = torch.randint(512, (2, LENGTH), generator=torch.Generator().manual_seed(0)).to(CUDA)
        for window in [8, 32, 33, 64, 100, 128, 256, 500, 501, 999, 1000]:
            attn_mask = kernel.prepare(start_of(masks, window), CUDA)
            with torch.autocast("cuda", torch.bfloat16):
                loss = model(tokens, attn_mask, tokens)
            loss.backward()
            losses[compiled, window] = loss.item()
            if compiled:
                assert loss.item() == pytest.approx(losses[False, window], rel=0.01)
    return counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("name", [name for name in KERNELS if name != "varlen"])
def test_attention_sinks(name):
    kernel, start = attention.build_kernel(name, ["chunk"], CUDA, attention_sinks=True), start_of(("chunk",), 300)
    reference = attention.build_kernel("dense", ["chunk"], CUDA)
    found = []
    for one, dtype in ((kernel, torch.bfloat16), (reference, torch.float64)):
        generator = torch.Generator(CUDA).manual_seed(0)
        made = [torch.randn(2, LENGTH, h, 64, device=CUDA, generator=generator).bfloat16() for h in (4, 2, 2, 4)]
        q, k, v, grad = (x.to(dtype).transpose(1, 2).detach().requires_grad_() for x in made)
        sinks = torch.tensor([0.5, -3.0, 2.0, 6.0], device=CUDA, requires_grad=True)
        out = one.attention(q, k, v, one.prepare(start, CUDA), sinks)
        found.append([out, *torch.autograd.grad(out, (q, k, v, sinks), grad)])
    for ours, exact in zip(*found, strict=True):
        assert error(ours, exact) < 0.02


def test_the_block_mask_is_the_same_on_either_device():
    start = start_of(("document", "chunk"), 100)
    here, there = mask.block_mask(start), mask.block_mask(start.to(CUDA))
    for which in ("kv", "full_kv", "q", "full_q"):
        for part in ("num_blocks", "indices"):
            assert torch.equal(getattr(here, f"{which}_{part}"), getattr(there, f"{which}_{part}").cpu())


@pytest.mark.parametrize("autocast", [False, True])
def test_the_loss_equals_plain_cross_entropy(autocast):
    generator = torch.Generator(CUDA).manual_seed(0)
    hidden = torch.randn(5000, 256, device=CUDA, generator=generator, requires_grad=True)
    weight = (torch.randn(32000, 256, device=CUDA, generator=generator) / 16).requires_grad_()
    labels = torch.randint(32000, (5000,), device=CUDA, generator=generator)
    labels[::7] = -100
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        ours = cross_entropy(hidden, weight, labels)
        plain = F.cross_entropy(F.linear(hidden, weight).float(), labels, reduction="sum")
    got, expected = torch.autograd.grad(ours, (hidden, weight)), torch.autograd.grad(plain, (hidden, weight))
    assert ours.item() == pytest.approx(plain.item(), rel=1e-3)
    for one, other in zip(got, expected, strict=True):
        assert error(one, other) < (0.02 if autocast else 1e-3)

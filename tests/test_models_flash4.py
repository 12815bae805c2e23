"""FlashAttention 4 with a stand-in for its GPU kernels; if the package is installed, its compiler runs without a GPU."""

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_mask import positions
from test_models_attention import CPU, MIXES, climb, heads, inputs, make, run, seen_by_hand
from torch._dynamo.utils import counters

from torchladder import mask
from torchladder.models import attention
from torchladder.models.attention import flash4
from torchladder.registry import ConfigError


def attend(qkv, cu_seqlens, left, grad=None):
    """Attention from the package's arguments: flat (N * T, H, K) with cu_seqlens, else (N, T, H, K); or its gradients.

    Autograd does not record inside of an operator, so the gradients are the plain formulas.
    """
    if cu_seqlens is None:
        whole = torch.tensor([0, qkv[0].shape[1]])
        rows = zip(*qkv, *([] if grad is None else [grad]), strict=True)
        results = [attend(row[:3], whole, left, *row[3:]) for row in rows]
        return torch.stack(results) if grad is None else [torch.stack(x) for x in zip(*results, strict=True)]
    q, k, v = qkv
    heads, scale = k.shape[1], q.shape[-1] ** -0.5
    seen = seen_by_hand(len(q), cu_seqlens, -1 if left is None else left)
    q = q.unflatten(1, (heads, -1))  # (N * T, G, H / G, K)
    p = (torch.einsum("qghd,kgd->ghqk", q, k) * scale).masked_fill(~seen, -torch.inf).softmax(-1)
    out = torch.einsum("ghqk,kgd->qghd", p, v)
    if grad is None:
        return out.flatten(1, 2)
    grad = grad.unflatten(1, (heads, -1))
    dp = torch.einsum("qghd,kgd->ghqk", grad, v)
    ds = p * (dp - torch.einsum("qghd,qghd->ghq", grad, out)[..., None]) * scale
    dq = torch.einsum("ghqk,kgd->qghd", ds, k).flatten(1, 2)
    return dq, torch.einsum("ghqk,qghd->kgd", ds, q), torch.einsum("ghqk,qghd->kgd", p, grad)


def check_arguments(q, cu_seqlens, longest, window):
    assert q.stride(-1) == 1
    if cu_seqlens[0] is None:
        assert q.dim() == 4
        assert longest == (None, None)
    else:
        assert q.dim() == 3
        assert cu_seqlens[0] is cu_seqlens[1]
        assert cu_seqlens[0].dtype == torch.int32
        assert cu_seqlens[0][-1] == len(q)
        assert longest == (cu_seqlens[0].diff().max(),) * 2
    assert window in ((None, None), (window[0], 0))


def _flash_attn_fwd(
    q, k, v, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None, causal=False,
    window_size_left=None, window_size_right=None, return_lse=False,
):  # fmt: skip
    check_arguments(
        q, (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k), (window_size_left, window_size_right)
    )
    assert causal
    assert return_lse
    out = attend((q, k, v), cu_seqlens_q, window_size_left).contiguous()
    lse = out.sum(-1).movedim(-1, -2).float().contiguous()  # the stand-in's backward only checks where it arrives
    return out, lse, None, None, None


def _flash_attn_bwd(
    q, k, v, out, dout, lse, softmax_scale=None, causal=False, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None,
    max_seqlen_k=None, window_size_left=None, window_size_right=None,
):  # fmt: skip
    check_arguments(
        q, (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k), (window_size_left, window_size_right)
    )
    torch.testing.assert_close(lse, out.sum(-1).movedim(-1, -2).float())
    assert causal
    return attend((q, k, v), cu_seqlens_q, window_size_left, dout)


PACKAGE = SimpleNamespace(_flash_attn_fwd=_flash_attn_fwd, _flash_attn_bwd=_flash_attn_bwd)


@pytest.fixture(autouse=True)
def stand_in(monkeypatch):
    """Puts the stand-in in place of the package, on a CPU."""
    monkeypatch.setattr(flash4, "_interface", lambda: PACKAGE)
    monkeypatch.setattr(flash4, "unavailable", lambda: None)
    monkeypatch.setattr(flash4, "supports", lambda q: True)


def assert_like_dense(name, start, heads):
    given = inputs(*start.shape, heads)
    for ours, exact in zip(run(make(name), start, *given), run(make("dense"), start, *given), strict=True):
        torch.testing.assert_close(ours, exact, atol=2e-5, rtol=1e-4)


@settings(max_examples=40)
@given(positions=positions(80), window=st.integers(1, 90), mix=st.sampled_from(MIXES), heads=heads)
def test_flash_computes_all_masks(positions, window, mix, heads):
    assert_like_dense("flash", mask.from_names(mix, positions, window), heads)


@settings(max_examples=40)
@given(batch=st.integers(1, 3), length=st.integers(1, 100), window=st.integers(1, 110), heads=heads)
def test_fold_runs_on_it(batch, length, window, heads):
    assert_like_dense("fold", mask.chunk(torch.arange(length, dtype=torch.int32).repeat(batch, 1), window), heads)


@pytest.mark.parametrize(("name", "masks"), [("fold", ["chunk"]), ("flash", ["document", "chunk"])])
def test_one_graph_trains_the_whole_ladder(name, masks):
    eager = climb(make(name), masks, compiled=False)
    compiled = climb(make(name), masks, compiled=True)
    assert counters["stats"]["unique_graphs"] == 1
    for one, other in zip(eager, compiled, strict=True):
        torch.testing.assert_close(one, other)


def test_the_operator_keeps_its_promises():
    start = mask.chunk(torch.arange(30, dtype=torch.int32).repeat(2, 1), 7)
    q, k, v, _ = inputs(2, 30, (4, 2))
    torch.library.opcheck(torch.ops.torchladder.flash4.default, (q, k, v, make("flash").prepare(start, CPU)))


def test_auto_takes_it_for_documents_and_windows():
    for masks in (["document", "chunk"], ["sliding"], ["document", "sliding"]):
        chosen = attention.build_kernel("auto", masks, "cuda")
        assert (chosen.name, "FlashAttention 4" in chosen.reason) == ("flash", True)
    chosen = attention.build_kernel("auto", ["chunk"], "cuda")
    assert (chosen.name, "FlashAttention 4" in chosen.reason) == ("fold", True)
    assert attention.build_kernel("auto", ["document", "chunk"], "cuda", dtype=torch.float32).name == "flex"
    assert attention.build_kernel("auto", ["document"], "cuda", tokens_per_rank=128).name == "flex"
    with pytest.raises(ConfigError, match=r"not in float32 \(training.mixed_precision_param\)"):
        attention.build_kernel("flash", ["document"], "cuda", dtype=torch.float32)


def test_the_reason_why_it_is_not_used(monkeypatch):
    monkeypatch.undo()
    flash4.missing.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    assert "NVIDIA A100 has compute capability 8.x" in flash4.unavailable.__wrapped__()

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))

    def version(name, installed="4.0.0"):
        if installed is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed

    monkeypatch.setattr(importlib.metadata, "version", lambda name: version(name, None))
    assert "pip install --pre 'torchladder[fa4]'" in flash4.missing.__wrapped__()
    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(flash4, "_interface", lambda: PACKAGE)
    assert flash4.missing.__wrapped__() is None
    older = SimpleNamespace(_flash_attn_fwd=lambda q, k, v, causal: None, _flash_attn_bwd=_flash_attn_bwd)
    monkeypatch.setattr(flash4, "_interface", lambda: older)
    message = flash4.missing.__wrapped__()
    assert message == f"flash-attn-4 4.0.0 has another interface (no cu_seqlens_q); tested with {flash4.TESTED_VERSION}"

    def broken():
        raise OSError("libcuda.so.1: cannot open shared object file")

    monkeypatch.setattr(flash4, "_interface", broken)
    assert "cannot be imported (OSError: libcuda.so.1" in flash4.missing.__wrapped__()


def test_flash_says_why_neither_version_serves(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    monkeypatch.setattr(flash4, "unavailable", lambda: "no GPU is visible")
    with pytest.raises(ConfigError, match=r"FlashAttention 4: no GPU is visible.*torchladder\[flash\]"):
        attention.build_kernel("flash", ["causal"], "cuda")


COMPILE_FOR_HOPPER = """
import json, torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torchladder.models.attention import flash4

package, compiled = flash4._interface(), []
with FakeTensorMode():
    def heads(*shape):
        return [torch.empty(*shape, h, 64, dtype=torch.bfloat16, device="cuda") for h in (32, 4, 4)]
    def train(qkv, segments=None):
        out, lse = flash4.forward(*qkv, segments)
        flash4.backward(torch.empty_like(out), qkv, out, lse, segments)
    def kernels():
        return sum(len(getattr(package, name).compile_cache.cache) for name in ("_flash_attn_fwd", "_flash_attn_bwd"))
    def climb(widths, longest):
        for width in widths:
            train(heads(32768 // width, width))
        for tokens in longest:
            for left in (None, tokens // 4, tokens - 2):
                cu_seqlens = torch.empty(32768 // tokens + 1, dtype=torch.int32, device="cuda")
                train(heads(32768), flash4.Segments(cu_seqlens, tokens, left))
        compiled.append(kernels())
    climb((32, 8192), (32, 200, 8192))
    climb((33, 100, 127, 130, 500, 512, 4096, 7000), (40, 100, 129, 300, 511, 1000, 7000))
print(json.dumps(compiled))
"""


@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is None, reason="needs the package flash-attn-4")
def test_lengths_and_windows_compile_nothing_again():
    target = {"FLASH_ATTENTION_ARCH": "sm_90", "CUTE_DSL_ARCH": "sm_90a", "FLASH_ATTENTION_NUM_SMS": "132"}
    job = [sys.executable, "-W", "ignore", "-c", COMPILE_FOR_HOPPER]
    done = subprocess.run(job, env={**os.environ, **target}, capture_output=True, text=True, check=True)
    first, after = json.loads(done.stdout.splitlines()[-1])
    assert first == after < 16

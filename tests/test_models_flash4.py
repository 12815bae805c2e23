"""FlashAttention 4 with a stand-in for its GPU kernels; the package's own compiler, if installed, needs no GPU."""

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_mask import positions, starts
from test_models_attention import CPU, MIXES, climb, heads, inputs, make, run, seen_by_hand
from torch._dynamo.utils import counters

from torchladder import mask
from torchladder.models import attention
from torchladder.models.attention import flash4, flash_mask
from torchladder.registry import ConfigError


def attend(qkv, seen, scale, grad=None):
    """Attention of flat (T, H, K) under seen (T, T), or of (N, T, H, K) under (N, T, T); or its gradients.

    Autograd does not record inside of an operator, so the gradients are the plain formulas.
    """
    if seen.dim() == 3:
        rows = zip(*qkv, seen, *([] if grad is None else [grad]), strict=True)
        results = [attend(row[:3], row[3], scale, *row[4:]) for row in rows]
        return torch.stack(results) if grad is None else [torch.stack(x) for x in zip(*results, strict=True)]
    q, k, v = qkv
    heads = k.shape[1]
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


def seen_by_arguments(q, by_key, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None,
    causal=False, window_size_left=None, window_size_right=None, mask_mod=None, aux_tensors=None,
    block_sparse_tensors=None,
):  # fmt: skip
    """Which keys queries see, from the package's arguments."""
    assert q.stride(-1) == 1
    assert q.shape[-1] % 32 == 0  # at other sizes the package computes wrong gradients
    assert (window_size_left, window_size_right) in ((None, None), (window_size_left, 0))
    left = -1 if window_size_left is None else window_size_left
    if mask_mod is not None:
        assert not causal
        batch, tokens = q.shape[:2]
        seen = torch.zeros(batch, tokens, tokens, dtype=torch.bool)
        partial_counts, partial, full_counts, full = block_sparse_tensors[:4]
        assert block_sparse_tensors.block_size == (128, 128)
        for b in range(batch):
            for counts, lists in ((partial_counts, partial), (full_counts, full)):
                for i, count in enumerate(counts[b, 0].tolist()):
                    for j in lists[b, 0, i, :count].tolist():
                        query, key = (j, i) if by_key else (i, j)
                        part = slice(query * 128, (query + 1) * 128), slice(key * 128, (key + 1) * 128)
                        queries, keys = torch.arange(tokens)[part[0], None], torch.arange(tokens)[part[1]]
                        assert not seen[b][part].any()  # no block twice
                        seen[b][part] = mask_mod(b, queries, keys, aux_tensors) if lists is partial else True
        return seen
    assert causal
    if cu_seqlens_q is None:
        assert q.dim() == 4
        return seen_by_hand(q.shape[1], torch.tensor([0, q.shape[1]]), left).expand(len(q), -1, -1)
    assert q.dim() == 3
    assert cu_seqlens_q is cu_seqlens_k
    assert cu_seqlens_q.dtype == torch.int32
    assert cu_seqlens_q[-1] == len(q)
    assert max_seqlen_q == max_seqlen_k == cu_seqlens_q.diff().max()
    return seen_by_hand(len(q), cu_seqlens_q, left)


def _flash_attn_fwd(
    q, k, v, softmax_scale, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None, causal=False,
    window_size_left=None, window_size_right=None, mask_mod=None, aux_tensors=None, block_sparse_tensors=None,
    return_lse=False,
):  # fmt: skip
    assert return_lse
    seen = seen_by_arguments(
        q, False, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal, window_size_left, window_size_right,
        mask_mod, aux_tensors, block_sparse_tensors,
    )  # fmt: skip
    out = attend((q, k, v), seen, softmax_scale).contiguous()
    lse = out.sum(-1).movedim(-1, -2).float().contiguous()  # backward only checks that it arrives
    return out, lse, None, None, None


def _flash_attn_bwd(
    q, k, v, out, dout, lse, softmax_scale, causal=False, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None,
    max_seqlen_k=None, window_size_left=None, window_size_right=None, mask_mod=None, aux_tensors=None,
    block_sparse_tensors=None,
):  # fmt: skip
    torch.testing.assert_close(lse, out.sum(-1).movedim(-1, -2).float())
    seen = seen_by_arguments(
        q, True, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal, window_size_left, window_size_right,
        mask_mod, aux_tensors, block_sparse_tensors,
    )  # fmt: skip
    return attend((q, k, v), seen, softmax_scale, dout)


class BlockSparseTensorsTorch(NamedTuple):
    mask_block_cnt: torch.Tensor
    mask_block_idx: torch.Tensor
    full_block_cnt: torch.Tensor
    full_block_idx: torch.Tensor
    block_size: tuple


PACKAGE = SimpleNamespace(_flash_attn_fwd=_flash_attn_fwd, _flash_attn_bwd=_flash_attn_bwd)


@pytest.fixture(autouse=True)
def stand_in(monkeypatch):
    """Puts the stand-in in place of the package, on a CPU."""
    monkeypatch.setattr(flash4, "_interface", lambda: PACKAGE)
    monkeypatch.setattr(flash4, "unavailable", lambda: None)
    monkeypatch.setattr(flash4, "generation", lambda: "Hopper")
    monkeypatch.setattr(flash4, "supports", lambda q: True)
    blocks = SimpleNamespace(BlockSparseTensorsTorch=BlockSparseTensorsTorch)
    for name in ("flash_attn", "flash_attn.cute", "flash_attn.cute.block_sparsity"):
        monkeypatch.setitem(sys.modules, name, blocks)
    monkeypatch.setattr(flash_mask, "_mask_mod", lambda: lambda b, q, k, aux: (aux[0][b][q] <= k) & (k <= q))


sizes = st.sampled_from([8, 32])


def assert_like_dense(name, start, heads, size):
    given = inputs(*start.shape, heads, size)
    for ours, exact in zip(run(make(name), start, *given), run(make("dense"), start, *given), strict=True):
        torch.testing.assert_close(ours, exact, atol=2e-5, rtol=1e-4)


@settings(max_examples=40)
@given(positions=positions(80), window=st.integers(1, 90), mix=st.sampled_from(MIXES), heads=heads, size=sizes)
def test_flash_computes_all_masks(positions, window, mix, heads, size):
    assert_like_dense("flash", mask.from_names(mix, positions, window), heads, size)


@settings(max_examples=40)
@given(start=starts(longest=300), heads=heads, size=sizes)
def test_flash_mask_computes_any_mask(start, heads, size):
    assert_like_dense("flash_mask", start, heads, size)


@settings(max_examples=40)
@given(batch=st.integers(1, 3), length=st.integers(1, 100), window=st.integers(1, 110), heads=heads, size=sizes)
def test_fold_runs_on_it(batch, length, window, heads, size):
    assert_like_dense("fold", mask.chunk(torch.arange(length, dtype=torch.int32).repeat(batch, 1), window), heads, size)


@pytest.mark.parametrize(
    ("name", "masks"), [("fold", ["chunk"]), ("flash", ["document", "chunk"]), ("flash_mask", ["chunk"])]
)
def test_one_graph_trains_the_whole_ladder(name, masks):
    eager = climb(make(name), masks, compiled=False)
    compiled = climb(make(name), masks, compiled=True)
    assert counters["stats"]["unique_graphs"] == 1
    for one, other in zip(eager, compiled, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", ["flash", "flash_mask"])
def test_the_operators_keep_their_promises(name):
    start = mask.chunk(torch.arange(30, dtype=torch.int32).repeat(2, 1), 7)
    q, k, v, _ = inputs(2, 30, (4, 2))
    operator = getattr(torch.ops.torchladder, name).default
    torch.library.opcheck(operator, (q, k, v, make(name).prepare(start, CPU), None))


def test_auto_takes_it_for_documents_and_windows(monkeypatch):
    for masks in (["document", "chunk"], ["sliding"], ["document", "sliding"]):
        chosen = attention.build_kernel("auto", masks, "cuda")
        assert (chosen.name, "FlashAttention 4" in chosen.reason) == ("flash", True)
    chosen = attention.build_kernel("auto", ["chunk"], "cuda")
    assert (chosen.name, "FlashAttention 4" in chosen.reason) == ("fold", True)
    assert attention.build_kernel("auto", ["document", "chunk"], "cuda", dtype=torch.float32).name == "flex"
    assert attention.build_kernel("auto", ["document"], "cuda", tokens_per_rank=128).name == "flex"
    monkeypatch.setitem(mask.registry._components, "of a plugin", mask.causal)
    of_a_plugin = ["document", "of a plugin"]
    chosen = attention.build_kernel("auto", of_a_plugin, "cuda")
    assert (chosen.name, "FlashAttention 4 computes any mask" in chosen.reason) == ("flash_mask", True)
    assert attention.build_kernel("auto", of_a_plugin, "cuda", dtype=torch.float32).name == "flex"
    monkeypatch.setattr(flash4, "generation", lambda: "Blackwell")
    assert attention.build_kernel("auto", of_a_plugin, "cuda").name == "flex"
    for name in ("flash", "flash_mask"):
        with pytest.raises(ConfigError, match=r"not in float32 \(training.mixed_precision_param\)"):
            attention.build_kernel(name, ["document"], "cuda", dtype=torch.float32)


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
    assert "pip install --pre flash-attn-4" in flash4.missing.__wrapped__()
    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(flash4, "_interface", lambda: PACKAGE)
    assert flash4.missing.__wrapped__() is None
    older = SimpleNamespace(_flash_attn_fwd=lambda q, k, v, causal: None, _flash_attn_bwd=_flash_attn_bwd)
    monkeypatch.setattr(flash4, "_interface", lambda: older)
    message = flash4.missing.__wrapped__()
    assert message == f"flash-attn-4 4.0.0 has another interface (no aux_tensors); tested with {flash4.TESTED_VERSION}"

    def broken():
        raise OSError("libcuda.so.1: cannot open shared object file")

    monkeypatch.setattr(flash4, "_interface", broken)
    assert "cannot be imported (OSError: libcuda.so.1" in flash4.missing.__wrapped__()


def test_flash_says_why_neither_version_serves(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    monkeypatch.setattr(flash4, "unavailable", lambda: "no GPU is visible")
    with pytest.raises(ConfigError, match=r"FlashAttention 4: no GPU is visible.*pip install flash-attn"):
        attention.build_kernel("flash", ["causal"], "cuda")
    with pytest.raises(ConfigError, match="'flash_mask' needs FlashAttention 4: no GPU is visible"):
        attention.build_kernel("flash_mask", ["causal"], "cuda")


COMPILE_FOR_HOPPER = """
import json, torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torchladder.models.attention import flash4, flash_mask

cuda = torch.device("cuda")

def heads(*shape):
    return [torch.empty(*shape, h, 64, dtype=torch.bfloat16, device=cuda) for h in (32, 4, 4)]

def train(qkv, attn_mask):
    out, lse = flash4.forward(*qkv, attn_mask)
    flash4.backward(torch.empty_like(out), qkv, out, lse, attn_mask)

def kernels(lengths):
    for length in lengths:
        train(heads(32768 // length, length), flash4.CAUSAL)
        for left in (None, length // 4, length - 2):
            cu_seqlens = torch.empty(32768 // length + 1, dtype=torch.int32, device=cuda)
            train(heads(32768), flash4.segments(cu_seqlens, length, left))
        blocks = -(-length // 128)
        shapes = [(1, length)] + 2 * [(1, 1, blocks), (1, 1, blocks, blocks)]
        start, *lists = [torch.empty(shape, dtype=torch.int32, device=cuda) for shape in shapes]
        train(heads(1, length), flash_mask._mask_arguments(start, lists))
    package = flash4._interface()
    return sum(len(getattr(package, name).compile_cache.cache) for name in ("_flash_attn_fwd", "_flash_attn_bwd"))

with FakeTensorMode():
    print(json.dumps([kernels((32, 200, 8192)), kernels((33, 100, 127, 130, 300, 512, 1000, 4096, 7000, 32768))]))
"""


@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is None, reason="needs the package flash-attn-4")
def test_lengths_and_windows_compile_nothing_again():
    target = {"FLASH_ATTENTION_ARCH": "sm_90", "CUTE_DSL_ARCH": "sm_90a", "FLASH_ATTENTION_NUM_SMS": "132"}
    job = [sys.executable, "-W", "ignore", "-c", COMPILE_FOR_HOPPER]
    done = subprocess.run(job, env={**os.environ, **target}, stdout=subprocess.PIPE, text=True, check=True)
    first, after = json.loads(done.stdout.splitlines()[-1])
    assert first == after < 20

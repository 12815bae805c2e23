"""Context parallelism: attention and gradients equal those of whole rows, and only keys that a query sees are sent."""

import layouts
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_block_mask

from torchladder import mask
from torchladder.distributed import context_parallel, mesh
from torchladder.distributed.mesh import Degrees
from torchladder.models import attention
from torchladder.models.attention import attention_pieces
from torchladder.registry import ConfigError

CPU = torch.device("cpu")
LENGTH, RANKS = 64, 4
POSITIONS = torch.arange(LENGTH, dtype=torch.int32).repeat(2, 1)
POSITIONS[1, 20:] -= 20
MASKS = {
    "chunks equal to slices": (("chunk",), 16, 0),
    "chunks that divide slices": (("chunk",), 8, 0),
    "chunks of two slices": (("chunk",), 32, 16 + 16),
    "chunks across slices": (("chunk",), 24, 16 + 8 + 0),
    "causal": (("causal",), 64, 16 + 32 + 48),
    "sliding": (("sliding",), 5, 4 + 4 + 4),
    "documents": (("document",), 64, 16 + 32 + 48),
    "documents and a window": (("document", "sliding"), 9, 8 + 8 + 8),
}
"""name -> masks, window, and the keys per row that ranks 1 to 3 receive in total"""


def start_of(names, window):
    return mask.from_names(names, POSITIONS, window)


def compare_with_whole_rows(ranks):
    share = context_parallel.ContextShard(mesh.build(Degrees(1, 1, RANKS, 1), ranks.rank, "cpu"), LENGTH)
    sent, calls = [], []
    send = context_parallel.dist.all_to_all_single

    def count(come, out, get, give, group):
        calls.append(1)
        sent.append(sum(give))
        return send(come, out, get, give, group=group)

    context_parallel.dist.all_to_all_single = count
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, heads, LENGTH, 8) for heads in (4, 2, 2, 4)]
    q, k, v, grad = (torch.randn(shape, generator=generator) for shape in shapes)
    here = slice(share.offset, share.offset + share.tokens_per_rank)
    for name, (names, window, keys) in MASKS.items():
        start = start_of(names, window)
        whole = [x.clone().requires_grad_() for x in (q, k, v)]
        dense = attention.build_kernel("dense", list(names), CPU)
        expected = dense.attention(*whole, dense.prepare(start, CPU))
        expected.backward(grad)
        for kernel in ("sdpa", "dense"):
            calls.clear(), sent.clear()
            kernel = attention.build_kernel(kernel, list(names), CPU, tokens_per_rank=share.tokens_per_rank)
            own = [x[:, :, here].clone().requires_grad_() for x in (q, k, v)]
            out = share.wrap_attention(kernel.attention)(*own, share.prepare_mask(kernel.prepare, start, CPU))
            out.backward(grad[:, :, here])
            torch.testing.assert_close(out, expected[:, :, here], atol=1e-6, rtol=1e-5)
            for mine, x in zip(own, whole, strict=True):
                torch.testing.assert_close(mine.grad, x.grad[:, :, here], atol=1e-5, rtol=1e-5)
            # Keys and values in forward, their gradients in backward; no call at all if no keys are needed.
            assert len(calls) == (2 if keys else 0), name
            assert ranks.sum(sum(sent)) == 2 * keys, name


def test_context_parallel_attention_equals_attention_over_whole_rows():
    layouts.launch(compare_with_whole_rows, RANKS)


@st.composite
def starts(draw):
    length = draw(st.integers(2, 200))
    steps = draw(st.lists(st.integers(0, 4), min_size=length, max_size=length))
    row, start = 0, []
    for i, step in enumerate(steps):
        row = min(row + step, i)
        start.append(row)
    return torch.tensor([start, [0] * length], dtype=torch.int32)


@given(starts(), st.data())
def test_pieces_of_the_last_queries_cover_what_they_see(start, data):
    length = start.shape[1]
    begin = data.draw(st.integers(0, length - 1))
    seen = torch.zeros(2, length, length, dtype=torch.int32)
    for piece in attention_pieces.mask_pieces(start, begin):
        keys = piece.keys.stop - piece.keys.start
        if piece.bias is not None:
            part = piece.bias == 0
        else:
            row = torch.arange(keys, dtype=torch.int32)[None]
            part = mask.dense(mask.chunk(row, piece.width))[0]
        seen[piece.rows, piece.queries, piece.keys] += part.to(torch.int32)
    expected = mask.dense(start)
    expected[:, :begin] = False
    assert torch.equal(seen, expected.to(torch.int32))  # each pair once


@pytest.mark.parametrize("first", [0, 128, 384])
@pytest.mark.parametrize("names", [("causal",), ("document", "chunk"), ("sliding",)])
def test_the_block_mask_of_the_last_queries(names, first):
    positions = torch.arange(512, dtype=torch.int32).repeat(2, 1)
    positions[1, 200:] -= 200
    start = mask.from_names(names, positions, 100)
    ours = mask.block_mask(start, query_offset=first)

    def sees(b, h, q, k):
        return (start[b, q + first] <= k) & (k <= q + first)

    theirs = create_block_mask(sees, 2, None, 512 - first, 512, device="cpu")
    assert ours.shape == (2, 1, 512 - first, 512)
    for kind in ("kv", "full_kv", "q", "full_q"):
        numbers = [getattr(one, f"{kind}_num_blocks") for one in (ours, theirs)]
        lists = [getattr(one, f"{kind}_indices") for one in (ours, theirs)]
        for b in range(2):
            for row in range(numbers[0].shape[-1]):
                named = [set(x[b, 0, row, : n[b, 0, row]].tolist()) for x, n in zip(lists, numbers, strict=True)]
                assert named[0] == named[1]


def test_kernels_without_context_parallelism_refuse_it():
    with pytest.raises(ConfigError, match="kernel 'fold' does not support context parallelism"):
        attention.build_kernel("fold", ["chunk"], CPU, tokens_per_rank=128)
    with pytest.raises(ConfigError, match="blocks of 128 tokens, and 100"):
        attention.build_kernel("flex", ["chunk"], CPU, training=False, tokens_per_rank=100)
    assert attention.build_kernel("auto", ["chunk"], CPU, tokens_per_rank=100).name == "sdpa"
    assert attention.build_kernel("auto", ["chunk"], CPU).name == "fold"

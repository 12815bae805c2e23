"""Masks against their slow definitions, and every conversion against the dense mask."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_block_mask

from torchladder import mask
from torchladder.registry import ConfigError


def rows_of_documents(batch: int, length: int, seed: int) -> torch.Tensor:
    """Positions (B, T) of rows that are cut into documents of many lengths."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(batch):
        first = torch.rand(length, generator=generator) < torch.rand((), generator=generator) ** 3
        first[0] = True
        index = torch.arange(length)
        rows.append(index - torch.where(first, index, 0).cummax(0).values)
    return torch.stack(rows).to(torch.int32)


@st.composite
def positions(draw, longest=150):
    return rows_of_documents(draw(st.integers(1, 3)), draw(st.integers(1, longest)), draw(st.integers(0, 2**20)))


@st.composite
def starts(draw, longest=150):
    """Any mask there can be: a start that never decreases and never passes its query."""
    batch, length = draw(st.integers(1, 3)), draw(st.integers(1, longest))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    often, far = torch.rand(2, generator=generator) ** 3
    jumps = torch.rand(batch, length, generator=generator) * (1 + far * length)
    jumps *= torch.rand(batch, length, generator=generator) < often
    return torch.minimum(jumps.cumsum(1).int(), torch.arange(length, dtype=torch.int32))


def documents(positions):
    return (positions == 0).cumsum(1)


SLOW = {
    "causal": lambda p, w, q, k: torch.ones(1, 1, 1, dtype=torch.bool),
    "document": lambda p, w, q, k: documents(p)[:, :, None] == documents(p)[:, None, :],
    "chunk": lambda p, w, q, k: q // w == k // w,
    "sliding": lambda p, w, q, k: q - k < w,
}


def slow(name, positions, window):
    index = torch.arange(positions.shape[1])
    q, k = index[None, :, None], index[None, None, :]
    return (SLOW[name](positions, window, q, k) & (k <= q)).expand(len(positions), -1, -1)


@pytest.mark.parametrize("name", mask.registry.names())
@given(positions=positions(), window=st.integers(1, 200))
def test_a_mask_is_what_it_says(name, positions, window):
    start = mask.registry.get(name)(positions, window)
    assert start.shape == positions.shape
    assert start.dtype == torch.int32
    assert torch.equal(mask.dense(start), slow(name, positions, window))


@given(positions=positions(), window=st.integers(1, 200), names=st.sets(st.sampled_from(sorted(SLOW)), min_size=1))
def test_masks_compose_by_and(positions, window, names):
    start = mask.from_names(names, positions, window)
    together = torch.stack([slow(name, positions, window) for name in names]).all(0)
    assert torch.equal(mask.dense(start), together)
    index = torch.arange(positions.shape[1])
    assert (start.diff(dim=1) >= 0).all()
    assert (start >= 0).all()
    assert (start <= index).all()


def test_from_names_looks_masks_up_and_composes_them():
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2]], dtype=torch.int32)
    assert mask.from_names(["document", "chunk"], positions, 4).tolist() == [[0, 0, 0, 0, 4, 5, 5, 5]]
    assert torch.equal(mask.from_names(["sliding"], positions, 3), mask.sliding(positions, 3))
    with pytest.raises(ConfigError, match=r"unknown mask 'chunks'\. Did you mean 'chunk'"):
        mask.from_names(["document", "chunks"], positions, 4)


def test_a_window_counts_the_query_itself():
    row = torch.arange(8, dtype=torch.int32)[None]
    assert mask.sliding(row, 3)[0].tolist() == [0, 0, 0, 1, 2, 3, 4, 5]
    assert mask.chunk(row, 3)[0].tolist() == [0, 0, 0, 3, 3, 3, 6, 6]
    for name in ("sliding", "chunk"):
        assert torch.equal(mask.registry.get(name)(row, 1), row)
        assert not mask.registry.get(name)(row, 8).any()


@given(start=starts())
def test_pairs_are_counted_exactly(start):
    assert mask.pairs(start) == int(mask.dense(start).sum())


def test_pairs_of_long_rows_do_not_overflow():
    length = 2**17
    row = torch.arange(length, dtype=torch.int32)[None]
    assert mask.pairs(mask.causal(row, 1)) == length * (length + 1) // 2
    assert mask.pairs(mask.chunk(row, 1)) == length


LISTS = ("kv", "full_kv", "q", "full_q")


def blocks(block_mask, which):
    """The four lists of a BlockMask as sets: (row, block) -> blocks."""
    count = getattr(block_mask, f"{which}_num_blocks")[:, 0]
    index = getattr(block_mask, f"{which}_indices")[:, 0]
    return {
        (b, i): set(index[b, i, : count[b, i]].tolist()) for b in range(count.shape[0]) for i in range(count.shape[1])
    }


def assert_same_blocks(start, block_size):
    batch, length = start.shape
    ours = mask.block_mask(start, block_size)

    def allowed(b, h, q, k):
        return (start[b, q] <= k) & (k <= q)

    theirs = create_block_mask(allowed, batch, None, length, length, device="cpu", BLOCK_SIZE=block_size)
    for which in LISTS:
        assert blocks(ours, which) == blocks(theirs, which), which
        assert getattr(ours, f"{which}_num_blocks").dtype == torch.int32
        assert getattr(ours, f"{which}_indices").shape == getattr(theirs, f"{which}_indices").shape
    assert ours.seq_lengths == theirs.seq_lengths
    assert ours.BLOCK_SIZE == theirs.BLOCK_SIZE
    q, k = torch.meshgrid(torch.arange(length), torch.arange(length), indexing="ij")
    assert torch.equal(ours.mask_mod(0, 0, q, k), allowed(0, 0, q, k))


@pytest.mark.parametrize("block_size", [64, 128])
@settings(max_examples=40)
@given(start=starts(longest=400))
def test_block_mask_equals_create_block_mask(block_size, start):
    assert_same_blocks(start, block_size)


@pytest.mark.parametrize("block_size", [64, 128])
@settings(max_examples=25)
@given(positions=positions(400), window=st.integers(1, 450), names=st.sets(st.sampled_from(sorted(SLOW)), min_size=1))
def test_block_mask_of_the_masks_there_are(block_size, positions, window, names):
    assert_same_blocks(mask.from_names(names, positions, window), block_size)


@pytest.mark.parametrize("length", [1, 127, 128, 129, 256, 384])
def test_block_mask_at_the_edges_of_blocks(length):
    row = torch.arange(length, dtype=torch.int32).repeat(2, 1)
    for window in {1, 64, 127, 128, 129, length}:
        for name in ("causal", "chunk", "sliding"):
            assert_same_blocks(mask.registry.get(name)(row, window), 128)


def dense_of_varlen(segments, batch, length):
    segment = torch.zeros(batch * length, dtype=torch.long)
    segment[segments.cu_seqlens[:-1].long()] = 1
    segment = segment.cumsum(0).view(batch, length)
    index = torch.arange(length)
    distance = index[:, None] - index[None, :]
    return (segment[:, :, None] == segment[:, None, :]) & (distance >= 0) & (distance < segments.window)


@given(positions=positions(), window=st.integers(1, 200), names=st.sets(st.sampled_from(sorted(SLOW)), min_size=1))
def test_varlen_of_the_masks_there_are(positions, window, names):
    start = mask.from_names(names, positions, window)
    segments = mask.varlen(start)
    assert torch.equal(dense_of_varlen(segments, *start.shape), mask.dense(start))
    assert segments.cu_seqlens.dtype == torch.int32
    assert segments.cu_seqlens[0] == 0
    assert segments.cu_seqlens[-1] == start.numel()
    assert segments.max_seqlen == int(segments.cu_seqlens.diff().max())
    assert segments.window <= segments.max_seqlen


@given(start=starts(longest=40))
def test_varlen_of_any_mask_is_right_or_refused(start):
    try:
        segments = mask.varlen(start)
    except ConfigError as error:
        assert "flex" in str(error)  # noqa: PT017 - either way is right
    else:
        assert torch.equal(dense_of_varlen(segments, *start.shape), mask.dense(start))


def test_varlen_refuses_what_is_not_segments_under_one_window():
    with pytest.raises(ConfigError, match="not a set of segments"):
        mask.varlen(torch.tensor([[0, 0, 0, 1, 1, 2, 2]], dtype=torch.int32))


@given(length=st.integers(1, 200), window=st.integers(1, 250), batch=st.integers(1, 3))
def test_fold_finds_the_width(length, window, batch):
    row = torch.arange(length, dtype=torch.int32).repeat(batch, 1)
    assert mask.chunk_width(mask.chunk(row, window)) == min(window, length)
    assert mask.chunk_width(mask.causal(row, window)) == length


@given(start=starts(longest=40))
def test_fold_of_any_mask_is_right_or_refused(start):
    try:
        width = mask.chunk_width(start)
    except ConfigError as error:
        assert "varlen" in str(error)  # noqa: PT017 - either way is right
    else:
        row = torch.arange(start.shape[1], dtype=torch.int32).expand_as(start)
        assert torch.equal(mask.chunk(row, width), start)

"""Kernels against the dense reference, in output and gradients, and under the compiler."""

import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_mask import positions, starts
from torch._dynamo.utils import counters
from torch.nn.attention import SDPBackend

from torchladder import mask, models
from torchladder.distributed.activation_checkpoint import ActivationCheckpointConfig, apply_activation_checkpoint
from torchladder.models import attention
from torchladder.models.attention import attention_pieces, fused_sdpa, varlen
from torchladder.registry import ConfigError

CPU = torch.device("cpu")
MIXES = [("causal",), ("chunk",), ("document",), ("sliding",), ("document", "chunk"), ("document", "sliding")]
heads = st.sampled_from([(1, 1), (4, 4), (4, 2), (4, 1), (6, 2)])


def make(name):
    """Returns a kernel without the checks of ``build_kernel``."""
    return attention.registry.get(name)()


def inputs(batch, length, heads, size=8, dtype=torch.float32, seed=0):
    """q, k, v and a gradient for the output, laid out in several ways."""
    generator = torch.Generator().manual_seed(seed)
    q_heads, kv_heads = heads
    q = torch.randn(batch, length, q_heads, size, generator=generator).transpose(1, 2)  # as a projection makes it
    k = torch.randn(batch, kv_heads, length, size, generator=generator)
    v = torch.randn(batch, kv_heads, size, length, generator=generator).transpose(2, 3)  # nothing is contiguous
    grad = torch.randn(batch, q_heads, length, size, generator=generator)
    return *(x.to(dtype).requires_grad_() for x in (q, k, v)), grad.to(dtype)


def run(kernel, start, q, k, v, grad):
    out = kernel.attention(q, k, v, kernel.prepare(start, CPU))
    return out, *torch.autograd.grad(out, (q, k, v), grad)


def assert_like_dense(name, start, heads, size=8):
    given = inputs(*start.shape, heads, size)
    for ours, reference in zip(run(make(name), start, *given), run(make("dense"), start, *given), strict=True):
        assert ours.shape == reference.shape
        torch.testing.assert_close(ours, reference, atol=2e-5, rtol=1e-4)


# --- agreement with dense --------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(start=starts(longest=400), heads=heads)
def test_sdpa_computes_any_mask(start, heads):
    assert_like_dense("sdpa", start, heads)


@settings(max_examples=60)
@given(positions=positions(400), window=st.integers(1, 450), mix=st.sampled_from(MIXES), heads=heads)
def test_sdpa_computes_the_masks_there_are(positions, window, mix, heads):
    start = mask.from_names(mix, positions, window)
    assert_like_dense("sdpa", start, heads)


@settings(max_examples=40)
@given(batch=st.integers(1, 3), length=st.integers(1, 300), window=st.integers(1, 320), heads=heads)
def test_fold_computes_uniform_chunks(batch, length, window, heads):
    row = torch.arange(length, dtype=torch.int32).repeat(batch, 1)
    assert_like_dense("fold", mask.chunk(row, window), heads)


@pytest.mark.parametrize("name", ["fold", "sdpa"])
@pytest.mark.parametrize("window", [1, 100, 128, 300])
@pytest.mark.parametrize("size", [20, 64])
def test_heads_of_other_sizes(name, window, size):
    row = torch.arange(300, dtype=torch.int32).repeat(2, 1)
    assert_like_dense(name, mask.chunk(row, window), (4, 2), size)


@pytest.mark.parametrize("name", ["fold", "sdpa"])
def test_bfloat16_agrees_with_dense_in_fp32(name):
    row = torch.arange(300, dtype=torch.int32).repeat(2, 1)
    start = mask.chunk(row, 130)
    exact = run(make("dense"), start, *inputs(2, 300, (4, 2)))
    for ours, reference in zip(
        run(make(name), start, *inputs(2, 300, (4, 2), dtype=torch.bfloat16)), exact, strict=True
    ):
        assert ours.dtype == torch.bfloat16
        torch.testing.assert_close(ours.float(), reference, atol=0.1, rtol=0.05)


@settings(max_examples=20)
@given(start=starts(longest=60), heads=heads)
def test_the_math_backend_stands_in_where_no_fused_kernel_does(start, heads):
    q, k, v, grad = inputs(*start.shape, heads)
    bias = torch.zeros(mask.dense(start)[0].shape).masked_fill_(~mask.dense(start)[0], -torch.inf)
    for some in (bias, None):
        with torch.no_grad():
            out, lse = fused_sdpa._math_forward(q, k, v, some)
            expected, expected_lse = fused_sdpa.forward(q, k, v, some)
            torch.testing.assert_close(out, expected, atol=2e-5, rtol=1e-4)
            torch.testing.assert_close(lse, expected_lse, atol=2e-5, rtol=1e-4)
            ours = fused_sdpa._math_backward(grad, (q, k, v), out, lse, some)
            theirs = fused_sdpa.backward(grad, (q, k, v), out, expected_lse, some)
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["fold", "sdpa"])
def test_gradients_are_exact_in_fp64(name):
    start = mask.chunk(torch.arange(11, dtype=torch.int32).repeat(2, 1), 4)
    attn_mask = make(name).prepare(start, CPU)
    q, k, v, _ = inputs(2, 11, (4, 2), 4, torch.float64)
    assert torch.autograd.gradcheck(
        lambda q, k, v: make(name).attention(q, k, v, attn_mask), (q, k, v), nondet_tol=1e-9
    )


# --- cost ------------------------------------------------------------------------------------------------------------


def work(layout):
    return sum(
        (p.rows.stop - p.rows.start)
        * (p.queries.stop - p.queries.start)
        * (p.width / 2 if p.bias is None else p.keys.stop - p.keys.start)
        for p in layout
    )


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("window", [32, 100, 1000])
def test_the_cost_of_sdpa_follows_the_pairs(mix, window):
    length = 2048
    positions = torch.arange(length, dtype=torch.int32).repeat(2, 1)
    positions[1, 900:] -= 900
    start = mask.from_names(mix, positions, window)
    # A masked block computes the triangle of its own queries and keys twice over, so a narrow window costs most.
    assert work(attention_pieces.mask_pieces(start)) < 2 * mask.pairs(start) + 64 * length * 2


def test_a_causal_row_is_one_call():
    row = torch.arange(1000, dtype=torch.int32).repeat(3, 1)
    assert len(attention_pieces.mask_pieces(mask.causal(row, 1))) == 1
    assert len(attention_pieces.chunk_pieces(3, 1000, 1000)) == 1
    assert len(attention_pieces.chunk_pieces(3, 1000, 100)) == 1
    assert len(attention_pieces.chunk_pieces(3, 1000, 600)) == 2  # the chunks, then the shorter ones at the end


def test_a_call_takes_no_more_segments_than_a_grid_has_room_for(monkeypatch):
    monkeypatch.setattr(attention_pieces, "MAX_SEGMENTS", 10)
    layout = attention_pieces.chunk_pieces(5, 30, 2)
    assert all((p.rows.stop - p.rows.start) * (p.queries.stop - p.queries.start) // p.width <= 10 for p in layout)
    assert_like_dense("fold", mask.chunk(torch.arange(30, dtype=torch.int32).repeat(5, 1), 2), (4, 2))
    assert_like_dense("fold", mask.chunk(torch.arange(30, dtype=torch.int32).repeat(5, 1), 8), (4, 2))


@given(start=starts(longest=300))
def test_pieces_cover_each_query_once(start):
    seen = torch.zeros_like(start)
    for piece in attention_pieces.mask_pieces(start):
        seen[piece.rows, piece.queries] += 1
    assert (seen == 1).all()


def test_cudnn_serves_few_lengths_on_hopper(monkeypatch):
    monkeypatch.setattr(torch, "_fused_sdp_choice", lambda *of, **more: SDPBackend.CUDNN_ATTENTION.value)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    capability = (9, 0)

    def serves(length):
        device, dtype = torch.device("cuda"), torch.bfloat16
        q, k = (SimpleNamespace(shape=(2, heads, length, 64), device=device, dtype=dtype) for heads in (4, 2))
        return fused_sdpa._backend(q, k, k, None)

    assert [serves(length) for length in (127, 128, 129, 1024, 1000)] == ["flash", "cudnn", "flash", "cudnn", "flash"]
    capability = (10, 0)
    assert serves(1024) == "flash"
    monkeypatch.setattr(torch.backends.cuda, "flash_sdp_enabled", lambda: False)
    assert serves(127) == "cudnn"


# --- choosing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("masks", "device", "expected"),
    [
        (["causal"], "cpu", "fold"),
        (["causal", "chunk"], "cpu", "fold"),
        (["document", "chunk"], "cpu", "sdpa"),
        (["sliding"], "cpu", "sdpa"),
        (["chunk"], "cuda", "fold"),
        (["document", "chunk"], "cuda", "flex"),
    ],
)
def test_auto_chooses_by_device_and_masks(masks, device, expected):
    chosen = attention.build_kernel("auto", masks, device)
    assert chosen.name == expected
    assert masks[0] in chosen.reason


def test_a_kernel_refuses_what_it_cannot_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    refused = [
        ("fold", ["document"], "cpu", "does not support the mask 'document', only causal, chunk"),
        ("varlen", ["causal"], "cpu", "runs on cuda, not on cpu"),
        ("flash", ["causal"], "cuda", r"pip install flash-attn"),
        ("flex", ["causal"], "cpu", "cannot train on a CPU"),
        ("flexx", ["causal"], "cpu", "Did you mean 'flex'"),
        ("sdpa", ["chunks"], "cpu", "Did you mean 'chunk'"),
    ]
    for name, masks, device, message in refused:
        with pytest.raises(ConfigError, match=message):
            attention.build_kernel(name, masks, device)
    assert attention.build_kernel("flex", ["causal"], "cpu", training=False).name == "flex"


@torch.library.custom_op("tests::triangle", mutates_args=())
def triangle(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return attention.causal_attention(q, k, v)


def backward_of_triangle(ctx, grad):
    q, k, v = (x.detach().requires_grad_() for x in ctx.saved_tensors)
    with torch.enable_grad():
        return torch.autograd.grad(attention.causal_attention(q, k, v), (q, k, v), grad)


triangle.register_fake(lambda q, k, v: torch.empty_like(q))
triangle.register_autograd(
    backward_of_triangle, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs)
)


@attention.register("triangle")
class TriangleKernel(attention.AttentionKernel):
    """A plugin's kernel."""

    masks = frozenset({"causal"})
    devices = frozenset({"cpu"})
    saved_ops = frozenset({"tests::triangle"})
    auto_priority = 40

    @classmethod
    def auto_reason(cls, setup):
        return "fast for three tokens" if setup.tokens_per_rank == 3 else None

    def prepare(self, start, device, query_offset=0):
        return None

    @staticmethod
    def attention(q, k, v, attn_mask):
        return triangle(q, k, v)


def test_a_plugin_kernel_is_chosen_and_checked_like_any_other(monkeypatch):
    assert_like_dense("triangle", mask.causal(torch.arange(20, dtype=torch.int32).repeat(2, 1), 20), (4, 2))
    assert attention.build_kernel("auto", ["causal"], "cpu").name == "fold"  # asked first, it declines
    with pytest.raises(ConfigError, match="kernel 'triangle' does not support the mask 'chunk', only causal"):
        attention.build_kernel("triangle", ["chunk"], "cpu")
    with pytest.raises(ConfigError, match="kernel 'triangle' does not support context parallelism"):
        attention.build_kernel("triangle", ["causal"], "cpu", tokens_per_rank=3)
    monkeypatch.setattr(TriangleKernel, "context_parallel", True)
    chosen = attention.build_kernel("auto", ["causal"], "cpu", tokens_per_rank=3)
    assert (chosen.name, chosen.reason) == ("triangle", "fast for three tokens")
    for masks, device in ((["chunk"], "cpu"), (["causal"], "cuda")):  # not asked for what it does not declare
        assert attention.build_kernel("auto", masks, device, tokens_per_rank=3).name == "sdpa"


@pytest.mark.parametrize("name", ["dense", "fold", "sdpa", "triangle"])
def test_selective_checkpointing_by_op_recomputes_no_attention(name):
    kernel = make(name)
    attn_mask = kernel.prepare(mask.causal(torch.arange(200, dtype=torch.int32).repeat(2, 1), 200), CPU)
    calls = []

    class Record(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            calls.append(function.name().split(".")[0])
            return function(*args, **(kwargs or {}))

    for mode, expected in (("full", 1), ("selective", 0)):
        model = models.Llama(SHAPE, kernel.attention, seq_len=200)
        model.init_weights(0)
        config = ActivationCheckpointConfig(mode, "op")
        block = apply_activation_checkpoint(model.layers["0"], 0, config, kernel.saved_ops)
        loss = block(torch.randn(2, 200, 32, requires_grad=True), attn_mask).sum()
        calls.clear()
        with Record():
            loss.backward()
        assert sum(call in kernel.saved_ops for call in calls) == expected, mode


def test_a_plugin_mask_needs_a_kernel_for_any_mask(monkeypatch):
    monkeypatch.setitem(mask.registry._components, "stairs", mask.causal)
    assert attention.build_kernel("auto", ["stairs"], "cpu").name == "sdpa"
    with pytest.raises(ConfigError, match="stairs"):
        attention.build_kernel("varlen", ["stairs"], "cuda")


def test_the_mask_of_the_docs_works(monkeypatch):
    monkeypatch.setattr(mask.registry, "_components", dict(mask.registry._components))
    page = (Path(__file__).parent.parent / "docs" / "mask.md").read_text()
    (example,) = [code for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "@mask.register" in code]
    exec(example, {"__name__": "plugin"})
    positions = torch.arange(100, dtype=torch.int32).repeat(2, 1)
    start = mask.registry.get("neighbors")(positions, 16)
    assert start[0, [0, 31, 32, 99]].tolist() == [0, 0, 16, 80]
    assert_like_dense("sdpa", start, (4, 2))


def test_the_kernel_of_the_docs_works(monkeypatch):
    monkeypatch.setattr(attention.registry, "_components", dict(attention.registry._components))
    page = (Path(__file__).parent.parent / "docs" / "mask.md").read_text()
    (example,) = [code for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "@attention.reg" in code]
    exec(example, {"__name__": "plugin"})
    assert attention.build_kernel("auto", ["causal"], "cuda").name == "mine"
    assert attention.build_kernel("auto", ["causal"], "cuda", training=False).name == "fold"
    assert_like_dense("mine", mask.causal(torch.arange(20, dtype=torch.int32).repeat(2, 1), 20), (4, 2))


# --- under the compiler ----------------------------------------------------------------------------------------------

SHAPE = models.LlamaConfig(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=32, vocab_size=64)
LADDER = [1, 2, 3, 8, 31, 64, 100, 128, 129, 199, 200]


def climb(kernel, names, compiled):
    """The losses and the summed gradient of the embedding over a ladder of windows with documents."""
    torch._dynamo.reset()
    counters.clear()
    model = models.Llama(SHAPE, kernel.attention, seq_len=200)
    model.init_weights(0)
    if compiled:
        for block in model.layers.values():
            block.compile(backend="aot_eager", fullgraph=True)
    tokens = torch.randint(64, (2, 200), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(200, dtype=torch.int32).repeat(2, 1)
    positions[1, 70:] -= 70
    losses = []
    for window in LADDER:
        start = mask.from_names(names, positions, window)
        loss = model(tokens, kernel.prepare(start, CPU), tokens)
        if torch.is_grad_enabled():
            loss.backward()
        losses.append(loss.detach())
    grad = model.embedding.weight.grad
    return torch.stack(losses), torch.zeros(()) if grad is None else grad


@pytest.mark.parametrize(
    ("name", "masks"), [("fold", ["chunk"]), ("sdpa", ["document", "chunk"]), ("dense", ["chunk"])]
)
def test_one_graph_trains_the_whole_ladder(name, masks):
    eager = climb(make(name), masks, compiled=False)
    compiled = climb(make(name), masks, compiled=True)
    assert counters["stats"]["unique_graphs"] == 1
    for one, other in zip(eager, compiled, strict=True):
        torch.testing.assert_close(one, other)


@torch.no_grad()
def test_one_graph_of_flex_serves_the_whole_ladder():
    masks = ["document", "chunk"]
    compiled, _ = climb(make("flex"), masks, compiled=True)
    assert counters["stats"]["unique_graphs"] == 1
    reference, _ = climb(make("dense"), masks, compiled=False)
    torch.testing.assert_close(compiled, reference, atol=1e-3, rtol=1e-5)


@pytest.mark.parametrize("name", ["fold", "sdpa"])
def test_the_operators_keep_their_promises(name):
    start = mask.chunk(torch.arange(30, dtype=torch.int32).repeat(2, 1), 7)
    q, k, v, _ = inputs(2, 30, (4, 2))
    operator = getattr(torch.ops.torchladder, name).default
    torch.library.opcheck(operator, (q, k, v, [make(name).prepare(start, CPU)], None))


# --- varlen, with stand-ins for the CUDA kernels ---------------------------------------------------------------------


def seen_by_hand(tokens, bounds, left):
    """Which keys (dim 1) queries see (dim 0), from a varlen kernel's arguments: segments, keys to the left or -1."""
    index = torch.arange(tokens)
    segment = torch.bucketize(index, bounds[1:].long(), right=True)
    distance = index[:, None] - index[None, :]
    seen = (segment[:, None] == segment[None, :]) & (distance >= 0)
    return seen & (distance <= left) if left >= 0 else seen


def segments_by_hand(q, k, v, bounds, left):
    """What a varlen kernel computes, from its arguments: flat (B·T, H, K), segments, keys to the left."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * q.shape[-1] ** -0.5
    seen = seen_by_hand(len(q), bounds, left)
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)


@pytest.mark.parametrize("grouped", [True, False])
@settings(max_examples=20)
@given(positions=positions(60), window=st.integers(1, 70), mix=st.sampled_from(MIXES), heads=heads)
def test_varlen_hands_over_the_right_segments(grouped, positions, window, mix, heads):
    def stand_in(q, k, v, bounds, k_bounds, longest, k_longest, *, window_size, **more):
        assert k.shape[1] == q.shape[1] or more == {"enable_gqa": True}
        assert longest == k_longest == int(bounds.diff().max())
        assert window_size[1] == 0
        return segments_by_hand(q, k, v, bounds, window_size[0])

    start = mask.from_names(mix, positions, window)
    given = inputs(*start.shape, heads)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(varlen, "varlen_attn", stand_in)
        patch.setattr(varlen, "SUPPORTS_GQA", grouped)
        ours = run(make("varlen"), start, *given)
    for one, reference in zip(ours, run(make("dense"), start, *given), strict=True):
        torch.testing.assert_close(one, reference, atol=2e-5, rtol=1e-4)


@torch.library.custom_op("tests::varlen", mutates_args=())
def opaque_segments(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bounds: torch.Tensor, longest: int, left: int
) -> torch.Tensor:
    return segments_by_hand(q, k, v, bounds, left).contiguous()


opaque_segments.register_fake(lambda q, k, v, bounds, longest, left: q.new_empty(q.shape))


@torch.no_grad()
def test_varlen_compiles_for_any_window_at_once(monkeypatch):
    """Its window and its longest segment are integers: the first graph fits the first ones, the second all others."""

    def stand_in(q, k, v, bounds, _, longest, __, *, window_size, enable_gqa=False):
        return opaque_segments(q, k, v, bounds, longest, window_size[0])

    monkeypatch.setattr(varlen.VarlenKernel, "check", lambda *_: None)
    monkeypatch.setattr(varlen, "varlen_attn", stand_in)
    compiled, _ = climb(make("varlen"), ["document", "chunk"], compiled=True)
    assert counters["stats"]["unique_graphs"] <= 3
    reference, _ = climb(make("dense"), ["document", "chunk"], compiled=False)
    torch.testing.assert_close(compiled, reference, atol=1e-3, rtol=1e-5)


# --- attention sinks -------------------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(start=starts(longest=120), heads=heads, name=st.sampled_from(["sdpa", "fold"]))
def test_sinks_are_one_more_key_per_head(start, heads, name):
    """Against the softmax with one more column, in output and all gradients."""
    if name == "fold":
        start = mask.chunk(torch.arange(start.shape[1], dtype=torch.int32).repeat(len(start), 1), 7)
    q, k, v, grad = inputs(*start.shape, heads)
    sinks = torch.randn(heads[0], generator=torch.Generator().manual_seed(1)).mul(2).requires_grad_()
    found = []
    for kernel in (make(name), make("dense")):
        out = kernel.attention(q, k, v, kernel.prepare(start, CPU), sinks)
        found.append([out, *torch.autograd.grad(out, (q, k, v, sinks), grad)])
    for ours, reference in zip(*found, strict=True):
        torch.testing.assert_close(ours, reference, atol=3e-5, rtol=1e-4)


@torch.no_grad()
def test_sinks_of_no_weight_change_nothing():
    start = mask.chunk(torch.arange(100, dtype=torch.int32).repeat(2, 1), 30)
    q, k, v = (x.detach() for x in inputs(2, 100, (4, 2), 16)[:3])
    for name in ("dense", "fold", "sdpa"):
        kernel = make(name)
        prepared = kernel.prepare(start, CPU)
        out = kernel.attention(q, k, v, prepared, torch.full((4,), -1e9))
        torch.testing.assert_close(out, kernel.attention(q, k, v, prepared), atol=1e-5, rtol=1e-4)


def test_a_kernel_without_sinks_is_refused():
    with pytest.raises(
        ConfigError, match=r"kernel 'varlen' does not support attention sinks \(model.attention_sinks\)"
    ):
        attention.build_kernel("varlen", ["causal"], "cuda", attention_sinks=True)
    with pytest.raises(ConfigError, match="'flex' has no attention sinks on a CPU"):
        attention.build_kernel("flex", ["causal"], "cpu", training=False, attention_sinks=True)
    assert attention.build_kernel("auto", ["chunk"], "cpu", attention_sinks=True).name == "fold"

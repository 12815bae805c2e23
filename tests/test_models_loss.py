"""The chunked cross entropy against the plain one."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from torchladder import models
from torchladder.models import loss
from torchladder.models.attention.dense import DenseKernel
from torchladder.models.loss import cross_entropy, cross_entropy_with_z_loss, weighted_cross_entropy


@pytest.fixture(autouse=True, scope="module")
def small_chunks():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss, "MAX_LOGITS_CPU", 1)
        patch.setattr(loss, "MIN_CHUNK_TOKENS", 13)
        yield


def inputs(dtype=torch.float32, tokens=50, dim=16, vocab=40):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, tokens // 2, dim, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(vocab, dim, generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(vocab, (2, tokens // 2), generator=generator)
    labels[0, ::3] = loss.IGNORE_INDEX
    labels[1, :13] = loss.IGNORE_INDEX  # a chunk without a label
    return hidden, weight, labels


def plain(hidden, weight, labels):
    logits = F.linear(hidden, weight).flatten(0, 1).float()
    return F.cross_entropy(logits, labels.flatten(), ignore_index=loss.IGNORE_INDEX, reduction="sum")


def run(function, hidden, weight, labels, scale=0.5):
    value = function(hidden, weight, labels)
    return value, *torch.autograd.grad(value * scale, (hidden, weight))


@pytest.mark.parametrize("fewest", [1, 13, 50, 1000])
def test_it_equals_plain_cross_entropy(monkeypatch, fewest):
    monkeypatch.setattr(loss, "MIN_CHUNK_TOKENS", fewest)
    for ours, reference in zip(run(cross_entropy, *inputs()), run(plain, *inputs()), strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, reference, atol=1e-5, rtol=1e-5)


def test_it_is_the_same_compiled():
    compiled = torch.compile(cross_entropy, backend="eager", fullgraph=True)
    for ours, reference in zip(run(compiled, *inputs()), run(cross_entropy, *inputs()), strict=True):
        torch.testing.assert_close(ours, reference)


def test_it_equals_plain_cross_entropy_in_bfloat16():
    given = inputs(torch.bfloat16)
    for ours, reference in zip(run(cross_entropy, *given), run(plain, *given), strict=True):
        assert ours.dtype == reference.dtype
        torch.testing.assert_close(ours, reference, atol=0.05, rtol=0.03)


def test_it_equals_plain_cross_entropy_under_autocast():
    given = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        ours, reference = run(cross_entropy, *given), run(plain, *given)
    for one, other in zip(ours, reference, strict=True):
        assert one.dtype == other.dtype == torch.float32  # master weights keep fp32 gradients
        torch.testing.assert_close(one, other, atol=0.05, rtol=0.03)


def test_labels_that_are_all_ignored_give_zero():
    hidden, weight, labels = inputs()
    for value in run(cross_entropy, hidden, weight, torch.full_like(labels, loss.IGNORE_INDEX)):
        assert not value.any()


def test_states_without_a_label_do_not_matter():
    hidden, weight, labels = inputs()
    broken = hidden.detach().masked_fill((labels == loss.IGNORE_INDEX)[..., None], torch.nan).requires_grad_()
    for ours, reference in zip(run(cross_entropy, broken, weight, labels), run(plain, *inputs()), strict=True):
        torch.testing.assert_close(ours, reference, atol=1e-5, rtol=1e-5)


def test_no_gradient_is_computed_where_none_is_needed():
    hidden, weight, labels = inputs()
    with torch.no_grad():
        value = cross_entropy(hidden, weight, labels)
    assert not value.requires_grad
    torch.testing.assert_close(value, plain(hidden, weight, labels).detach())
    frozen = cross_entropy(hidden.detach(), weight.detach(), labels)
    assert not frozen.requires_grad


def test_the_logits_never_exist_as_a_whole():
    hidden, weight, labels = inputs(tokens=500, vocab=300)

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for value in out if isinstance(out, tuple) else (out,):
                self.seen = max(self.seen, value.numel() if isinstance(value, torch.Tensor) else 0)
            return out

    with Largest() as largest:
        cross_entropy(hidden, weight, labels).backward()
    assert largest.seen <= max(13 * 300, hidden.numel(), weight.numel())


def test_backward_twice_gives_the_same():
    hidden, weight, labels = inputs()
    value = cross_entropy(hidden, weight, labels)
    first = torch.autograd.grad(value, weight, retain_graph=True)
    assert torch.equal(first[0], torch.autograd.grad(value, weight)[0])


def test_gradients_are_exact_in_fp64():
    hidden, weight, labels = inputs(torch.float64, tokens=8, dim=3, vocab=5)
    assert torch.autograd.gradcheck(lambda h, w: cross_entropy(h, w, labels), (hidden, weight))


# --- z-loss and softcap ----------------------------------------------------------------------------------------------


def formula(hidden, weight, labels, softcap, z_loss_multiplier):
    """Cross entropy and z-loss as the papers write them, in the dtype of the inputs."""
    logits = (hidden @ weight.T).flatten(0, 1)
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    counts = labels.flatten() != loss.IGNORE_INDEX
    logits, labels = logits[counts], labels.flatten()[counts]
    normalizer = logits.exp().sum(-1).log()
    z_loss = z_loss_multiplier * (normalizer**2).sum()
    return (normalizer - logits.gather(1, labels[:, None])[:, 0]).sum() + z_loss, z_loss


@given(
    st.integers(1, 30),
    st.integers(1, 40),
    st.sampled_from([0.0, 0.5, 3.0, 30.0]),
    st.sampled_from([1e-4, 0.1, 2.0]),
    st.floats(0.1, 3.0),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.integers(0, 1000),
)
def test_z_loss_and_softcap_are_the_formulas(tokens, vocab, softcap, multiplier, scale, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    hidden = (torch.randn(2, tokens, 8, generator=generator) * scale).to(dtype)
    weight = torch.randn(vocab, 8, generator=generator).to(dtype)
    labels = torch.randint(vocab, (2, tokens), generator=generator)
    labels[torch.rand(2, tokens, generator=generator) < 0.3] = loss.IGNORE_INDEX

    def results(function, kind, *arguments):
        leaves = [x.detach().to(kind).requires_grad_() for x in (hidden, weight)]
        value, z_loss = function(*leaves, labels, *arguments)
        assert not (function is cross_entropy_with_z_loss and z_loss.requires_grad)
        return value, z_loss, *torch.autograd.grad(value * 0.5, leaves, allow_unused=True)

    found = results(cross_entropy_with_z_loss, dtype, multiplier, softcap)
    expected = results(formula, torch.float64, softcap, multiplier)
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.02}
    size = 1 + max(x.abs().max().item() for x in expected)
    for one, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double() / size, reference / size, **tolerance)
    assert found[0].dtype == found[1].dtype == torch.float32


@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_gradients_with_z_loss_and_softcap_are_exact_in_fp64(softcap):
    hidden, weight, labels = inputs(torch.float64, tokens=8, dim=3, vocab=5)

    def total(h, w):
        return cross_entropy_with_z_loss(h, w, labels, 0.3, softcap)[0]

    assert torch.autograd.gradcheck(total, (hidden, weight))
    assert torch.autograd.gradcheck(lambda h, w: cross_entropy(h, w, labels, softcap), (hidden, weight))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_z_loss_and_softcap_are_the_same_compiled(backend):
    def both(hidden, weight, labels):
        loss, z_loss = cross_entropy_with_z_loss(hidden, weight, labels, 0.1, 2.0)
        return loss + 0 * z_loss

    torch._dynamo.reset()
    compiled = torch.compile(both, backend=backend, fullgraph=True)
    for ours, reference in zip(run(compiled, *inputs()), run(both, *inputs()), strict=True):
        torch.testing.assert_close(ours, reference)


def test_a_model_caps_its_logits_wherever_it_makes_them():
    config = models.LlamaConfig(dim=16, n_layers=1, n_heads=2, ffn_dim=16, vocab_size=40, logit_softcap=1.0)
    capped, plain = (
        models.Llama(models.LlamaConfig(**{**vars(config), "logit_softcap": cap}), DenseKernel.attention, seq_len=9)
        for cap in (1.0, 0.0)
    )
    for model in (capped, plain):
        model.init_weights(0)
    tokens = torch.randint(40, (2, 9), generator=torch.Generator().manual_seed(0))
    form = torch.ones(9, 9, dtype=torch.bool).tril()
    logits = capped(tokens, form)
    torch.testing.assert_close(logits, torch.tanh(plain(tokens, form)))
    assert logits.abs().max() < 1 < plain(tokens, form).abs().max()
    losses = F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="none").view(2, 9)
    torch.testing.assert_close(capped.per_token_loss(tokens, form, tokens), losses.detach())
    torch.testing.assert_close(models.Model.per_token_loss(capped, tokens, form, tokens), losses.detach())
    torch.testing.assert_close(capped(tokens, form, tokens), losses.sum())
    z_loss = 0.2 * logits.logsumexp(-1).square().sum()
    for found, expected in zip(capped(tokens, form, tokens, 0.2), (losses.sum() + z_loss, z_loss), strict=True):
        torch.testing.assert_close(found, expected)


# --- weights of labels -----------------------------------------------------------------------------------------------


@given(
    st.integers(1, 30),
    st.integers(1, 40),
    st.sampled_from([0.0, 0.5, 30.0]),
    st.sampled_from([0.0, 1e-4, 0.1]),
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    st.integers(0, 1000),
)
def test_weighted_losses_are_the_formula(tokens, vocab, softcap, multiplier, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(2, tokens, 8, generator=generator).to(dtype)
    weight = torch.randn(vocab, 8, generator=generator).to(dtype)
    labels = torch.randint(vocab, (2, tokens), generator=generator)
    labels[torch.rand(2, tokens, generator=generator) < 0.3] = loss.IGNORE_INDEX
    label_weights = 2.0 ** torch.randint(-3, 6, labels.shape, generator=generator)

    def each_label(hidden, weight):
        """The formula of each label by itself, with its weight."""
        rows = zip(hidden.flatten(0, 1), labels.flatten(), label_weights.flatten(), strict=True)
        sums = [(*formula(row[None, None], weight, label[None], softcap, multiplier), w) for row, label, w in rows]
        total, z_loss = sum(one * w for one, _, w in sums), sum(z for _, z, _ in sums)
        return total, sum(one for one, _, _ in sums) - z_loss, z_loss

    def results(function, kind):
        leaves = [x.detach().to(kind).requires_grad_() for x in (hidden, weight)]
        total, *plain = function(*leaves)
        return total, *plain, *torch.autograd.grad(total * 0.5, leaves)

    found = results(lambda h, w: weighted_cross_entropy(h, w, labels, label_weights, multiplier, softcap), dtype)
    expected = results(each_label, torch.float64)
    assert not found[1].requires_grad
    assert not found[2].requires_grad
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 0.02}[dtype]
    size = 1 + max(x.abs().max().item() for x in expected)
    for one, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double() / size, reference / size, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("multiplier", [0.0, 0.1])
def test_weights_of_1_change_nothing_and_compile(multiplier):
    def weighted(hidden, weight, labels):
        return weighted_cross_entropy(hidden, weight, labels, torch.ones(labels.shape), multiplier, 2.0)[0]

    torch._dynamo.reset()
    compiled = torch.compile(weighted, backend="aot_eager", fullgraph=True)
    plain = run(lambda *batch: cross_entropy_with_z_loss(*batch, multiplier or 1e-30, 2.0)[0], *inputs())
    for function in weighted, compiled:
        for ours, reference in zip(run(function, *inputs()), plain, strict=True):
            torch.testing.assert_close(ours, reference)

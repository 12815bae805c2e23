"""The chunked cross entropy against the plain one."""

import pytest
import torch
import torch.nn.functional as F

from torchladder.models import loss
from torchladder.models.loss import cross_entropy


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(loss, "MAX_LOGITS_CPU", 1)
    monkeypatch.setattr(loss, "MIN_CHUNK_TOKENS", 13)


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

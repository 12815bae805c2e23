"""Generation from models whose logits are known."""

import pytest
import torch

from torchladder.config import SamplesConfig
from torchladder.inference.decoding import generate, sample_token
from torchladder.registry import ConfigError

V = 7


def successor(rows: list[list[int]]) -> torch.Tensor:
    """A model that is certain of the next number, modulo V."""
    return 50.0 * torch.nn.functional.one_hot(torch.tensor([row[-1] + 1 for row in rows]) % V, V).float()


def guess(rows: list[list[int]]) -> torch.Tensor:
    """A model whose logits depend on the whole row."""
    return torch.stack([torch.randn(V, generator=torch.Generator().manual_seed(hash(tuple(row)))) for row in rows])


def continued(*prompts, model=successor, max_len=64, eos=None, **settings):
    config = SamplesConfig(**{"max_new_tokens": 5} | settings)
    return generate(model, prompts, config, max_len, seed=0, eos=eos)


def test_the_prompt_is_continued():
    assert continued([1, 2]) == [[3, 4, 5, 6, 0]]
    assert continued([1, 2], temperature=0.0) == [[3, 4, 5, 6, 0]]


def test_text_ends_at_eos():
    assert continued([1], eos=4) == [[2, 3]]
    assert continued([1], [5], [3], eos=4) == [[2, 3], [6, 0, 1, 2, 3], []]


def test_a_prompt_is_continued_beside_others_as_it_is_alone():
    prompts = [[1, 2, 3], [4], [5, 6]]
    together = continued(*prompts, model=guess, eos=0, max_new_tokens=20)
    assert together == [continued(prompt, model=guess, eos=0, max_new_tokens=20)[0] for prompt in prompts]
    assert len({len(new) for new in together}) > 1


def test_rows_are_never_longer_than_the_model_reads():
    lengths = []

    def count_rows(rows):
        lengths.append(len(rows[0]))
        return successor(rows)

    (new,) = continued([0] * 10, model=count_rows, max_len=12, max_new_tokens=20)
    assert max(lengths) == 12
    assert new[:4] == [1, 2, 3, 4]
    assert len(new) == 20


def test_sampling_follows_the_distribution_within_the_nucleus():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    generator = torch.Generator().manual_seed(0)
    counts = torch.zeros(4)
    for _ in range(4000):
        counts[sample_token(logits, 1.0, 0.8, generator)] += 1
    assert counts[2] == counts[3] == 0
    assert counts[0] / 4000 == pytest.approx(0.5 / 0.8, abs=0.03)


def test_the_likeliest_token_is_always_in_the_nucleus():
    logits = torch.tensor([3.0, 0.0])
    assert sample_token(logits, 1.0, 1e-9, torch.Generator().manual_seed(0)) == 0


@pytest.mark.parametrize("settings", [{"freq": -1}, {"max_new_tokens": 0}, {"temperature": -1.0}, {"top_p": 0.0}])
def test_impossible_settings_are_refused(settings):
    with pytest.raises(ConfigError, match=next(iter(settings))):
        SamplesConfig(**settings)


def test_samples_are_due_when_asked_for():
    assert not SamplesConfig().due(10, last=True)
    config = SamplesConfig(prompts=["a"], freq=5)
    assert [step for step in range(1, 12) if config.due(step, last=step == 11)] == [5, 10, 11]

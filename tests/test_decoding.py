"""Generation from models whose logits are known."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

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
        counts[sample_token(logits, [], SamplesConfig(temperature=1.0, top_p=0.8), generator)] += 1
    assert counts[2] == counts[3] == 0
    assert counts[0] / 4000 == pytest.approx(0.5 / 0.8, abs=0.03)


def test_the_likeliest_token_is_always_in_the_nucleus():
    logits = torch.tensor([3.0, 0.0])
    assert sample_token(logits, [], SamplesConfig(temperature=1.0, top_p=1e-9), torch.Generator().manual_seed(0)) == 0


def slow_distribution(logits, text, config):
    """The probability of each token, by the definitions, in float64."""
    scores = [float(x) for x in logits]
    for token in set(text):
        worse = scores[token] < 0
        scores[token] *= config.repetition_penalty if worse else 1 / config.repetition_penalty
    order = sorted(range(len(scores)), key=lambda token: -scores[token])[: config.top_k or None]
    weights = {token: math.exp((scores[token] - scores[order[0]]) / config.temperature) for token in order}
    total, before, kept = sum(weights.values()), 0.0, {}
    for token in order:
        if before < config.top_p:
            kept[token] = weights[token]
        before += weights[token] / total
    return [kept.get(token, 0.0) / sum(kept.values()) for token in range(len(scores))]


@given(
    scores=st.lists(st.integers(-40, 40), min_size=V, max_size=V, unique=True),
    text=st.lists(st.integers(0, V - 1), max_size=5),
    settings=st.fixed_dictionaries(
        {
            "temperature": st.sampled_from([0.5, 1.0, 1.7]),
            "top_k": st.integers(0, V + 1),
            "top_p": st.sampled_from([0.1234, 0.5678, 1.0]),
            "repetition_penalty": st.sampled_from([0.7, 1.0, 1.2345]),
        }
    ),
)
def test_sampling_follows_the_definitions(scores, text, settings):
    """The distribution from which a token is drawn is that of the slow reference."""
    logits, config, drawn = torch.tensor(scores) / 10, SamplesConfig(**settings), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "multinomial", lambda weights, *_, **__: drawn.append(weights) or torch.tensor([0]))
        best = sample_token(logits, text, config, torch.Generator())
    expected = torch.tensor(slow_distribution(logits, text, config))
    found = drawn[0] / drawn[0].sum()
    torch.testing.assert_close(found, expected.sort(descending=True).values, atol=1e-6, rtol=1e-5)
    assert expected[best] == expected.max()
    greedy = SamplesConfig(temperature=0.0, repetition_penalty=config.repetition_penalty)
    assert expected[sample_token(logits, text, greedy, torch.Generator())] == expected.max()


def test_sampling_is_that_of_transformers():
    process = pytest.importorskip("transformers.generation.logits_process")
    text, generator = [0, 1, 1], torch.Generator().manual_seed(0)
    config = SamplesConfig(temperature=0.8, top_k=5, top_p=0.9, repetition_penalty=1.2)
    chain = [
        process.RepetitionPenaltyLogitsProcessor(1.2), process.TemperatureLogitsWarper(0.8),
        process.TopKLogitsWarper(5), process.TopPLogitsWarper(0.9),
    ]  # fmt: skip
    for seed in range(5):
        logits = scores = torch.randn(1, 9, generator=generator)
        for step in chain:
            scores = step(torch.tensor([text]), scores)
        allowed = set(scores[0].isfinite().nonzero().flatten().tolist())
        draws = torch.Generator().manual_seed(seed)
        assert {sample_token(logits[0], text, config, draws) for _ in range(300)} == allowed


def test_a_penalty_on_repetition_reads_the_prompt_and_the_text():
    flat = lambda rows: torch.tensor([[1.0, 0.9, 0.8, 0.7]] * len(rows))  # noqa: E731
    assert continued([2], model=flat, temperature=0.0) == [[0, 0, 0, 0, 0]]
    assert continued([0], model=flat, temperature=0.0, repetition_penalty=2.0) == [[1, 2, 3, 0, 0]]


@pytest.mark.parametrize(
    "settings",
    [
        {"freq": -1},
        {"max_new_tokens": 0},
        {"temperature": -1.0},
        {"top_p": 0.0},
        {"top_k": -1},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": math.inf},
    ],
)
def test_impossible_settings_are_refused(settings):
    with pytest.raises(ConfigError, match=next(iter(settings))):
        SamplesConfig(**settings)


def test_samples_are_due_when_asked_for():
    assert not SamplesConfig().due(10, last=True)
    config = SamplesConfig(prompts=["a"], freq=5)
    assert [step for step in range(1, 12) if config.due(step, last=step == 11)] == [5, 10, 11]

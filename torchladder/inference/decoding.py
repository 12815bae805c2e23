"""Text from a model: a prompt, continued token by token."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from torchladder.config import SamplesConfig

NextLogits = Callable[[list[list[int]]], Tensor]
"""``rows of token ids -> logits (B, V)`` of the token after each row."""


@torch.no_grad()
def generate(
    read: NextLogits,
    prompts: Sequence[Sequence[int]],
    config: SamplesConfig,
    max_len: int,
    seed: int,
    stop: int | None = None,
) -> list[list[int]]:
    """Continues prompts side by side, each as it would be continued alone.

    Args:
        read: the model. It is given all rows, those that have ended too, each time.
        prompts: token ids, one at least in each; only the last ``max_len`` of a text are read.
        config: how many tokens, and how they are drawn.
        max_len: tokens in the longest row that the model takes.
        seed: of each prompt's own generator, on the CPU, so that every rank draws the same.
        stop: the token that ends a text.

    Returns:
        The new token ids of each.
    """
    generators = [torch.Generator().manual_seed(seed) for _ in prompts]
    texts = [list(prompt) for prompt in prompts]
    growing = list(range(len(prompts)))
    for _ in range(config.max_new_tokens):
        logits = read([text[-max_len:] for text in texts]).float().cpu()
        drawn = {i: sample_token(logits[i], config.temperature, config.top_p, generators[i]) for i in growing}
        growing = [i for i in growing if drawn[i] != stop]
        for i in growing:
            texts[i].append(drawn[i])
        if not growing:
            break
    return [text[len(prompt) :] for text, prompt in zip(texts, prompts, strict=True)]


def sample_token(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    """Draws a token from logits (V,): the nucleus of probability ``top_p`` (arXiv 1904.09751)."""
    if temperature == 0:
        return int(logits.argmax())
    probabilities, tokens = (logits / temperature).softmax(-1).sort(descending=True)
    # The likeliest token always stays: what stands before it holds no probability.
    outside = probabilities.cumsum(-1) - probabilities >= top_p
    choice = torch.multinomial(probabilities.masked_fill(outside, 0.0), 1, generator=generator)
    return int(tokens[choice])

"""Text from a model: a prompt, continued token by token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from torchladder.registry import ConfigError


@dataclass(frozen=True)
class SamplesConfig:
    """Text samples while training."""

    prompts: list[str] = field(default_factory=list)
    """Texts to continue; none: no samples."""

    freq: int = 0
    """Steps between samples; 0: at the end of the run only."""

    max_new_tokens: int = 128
    """Tokens to continue each prompt by."""

    temperature: float = 0.8
    """Divides the logits; 0 takes the likeliest token each time."""

    top_p: float = 0.95
    """Draw from the likeliest tokens that hold this much probability together."""

    def __post_init__(self) -> None:
        if self.freq < 0 or self.max_new_tokens < 1:
            raise ConfigError(
                f"samples.freq = {self.freq} and samples.max_new_tokens = {self.max_new_tokens}: "
                "must be 0 or more, and 1 or more."
            )
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ConfigError(
                f"samples.temperature = {self.temperature} and samples.top_p = {self.top_p}: "
                "must be 0 or more, and above 0 up to 1."
            )

    def due(self, step: int, last: bool) -> bool:
        """Whether samples are to be drawn after that many steps."""
        return bool(self.prompts) and (last or (self.freq > 0 and step % self.freq == 0))


Read = Callable[[list[list[int]]], Tensor]
"""``rows of token ids -> logits (B, V)`` of the token after each row."""


@torch.no_grad()
def generate(
    read: Read,
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
        drawn = {i: draw(logits[i], config.temperature, config.top_p, generators[i]) for i in growing}
        growing = [i for i in growing if drawn[i] != stop]
        for i in growing:
            texts[i].append(drawn[i])
        if not growing:
            break
    return [text[len(prompt) :] for text, prompt in zip(texts, prompts, strict=True)]


def draw(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    """Draws a token from logits (V,): the nucleus of probability ``top_p`` (arXiv 1904.09751)."""
    if temperature == 0:
        return int(logits.argmax())
    probabilities, tokens = (logits / temperature).softmax(-1).sort(descending=True)
    # The likeliest token always stays: what stands before it holds no probability.
    outside = probabilities.cumsum(-1) - probabilities >= top_p
    choice = torch.multinomial(probabilities.masked_fill(outside, 0.0), 1, generator=generator)
    return int(tokens[choice])

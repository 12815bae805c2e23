"""Text from a model: a prompt, continued token by token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from torchladder.registry import ConfigError

BLOCK = 128
"""Rows grow by this many tokens, so that a compiled kernel meets few lengths."""


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


@torch.no_grad()
def generate(
    forward: Callable[[Tensor], Tensor],
    prompt: Sequence[int],
    config: SamplesConfig,
    max_len: int,
    generator: torch.Generator,
    stop: int | None = None,
) -> list[int]:
    """Continues a prompt.

    Args:
        forward: tokens (1, T) → logits (1, T, V).
        prompt: token ids, one at least; only its last ``max_len`` are used.
        config: how many tokens, and how they are drawn.
        max_len: the longest row that the model takes.
        generator: where randomness comes from, on the CPU; every rank draws the same with the same seed.
        stop: the token that ends the text.

    Returns:
        The new token ids.
    """
    tokens = list(prompt)[-max_len:]
    new: list[int] = []
    while len(new) < config.max_new_tokens:
        window = tokens[-max_len:]
        padding = min(-len(window) % BLOCK, max_len - len(window))  # later tokens change nothing before them
        logits = forward(torch.tensor([window + [0] * padding]))[0, len(window) - 1]
        token = draw(logits.float().cpu(), config.temperature, config.top_p, generator)
        if token == stop:
            break
        new.append(token)
        tokens.append(token)
    return new


def draw(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    """Draws a token from logits (V,): the nucleus of probability ``top_p`` (arXiv 1904.09751)."""
    if temperature == 0:
        return int(logits.argmax())
    probabilities, tokens = (logits / temperature).softmax(-1).sort(descending=True)
    # The likeliest token always stays: what stands before it holds no probability.
    outside = probabilities.cumsum(-1) - probabilities >= top_p
    choice = torch.multinomial(probabilities.masked_fill(outside, 0.0), 1, generator=generator)
    return int(tokens[choice])

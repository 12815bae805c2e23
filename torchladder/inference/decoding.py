"""Generates text token by token, with a cache of keys and values."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from torchladder.config import SamplesConfig
from torchladder.inference.trained_model import TrainedModel
from torchladder.models.attention import kv_cache
from torchladder.models.layer_types import collapse

NextTokenLogits = Callable[[list[list[int]]], Tensor]
"""``rows of token ids -> logits (B, V)`` of the token after each row."""


@torch.no_grad()
def generate(
    next_logits: NextTokenLogits,
    prompts: Sequence[Sequence[int]],
    config: SamplesConfig,
    max_len: int,
    seed: int,
    eos: int | None = None,
    is_finished: Callable[[list[int]], bool] | None = None,
) -> list[list[int]]:
    """Continues prompts as a batch; each text is the same as if its prompt were alone.

    Args:
        next_logits: the model. It always receives all rows, finished ones too.
        prompts: token ids, at least one each.
        config: number of new tokens, and how they are sampled.
        max_len: maximum tokens that the model reads: the last ones of longer texts.
        seed: of each prompt's generator, which is on the CPU so that all ranks sample the same tokens.
        eos: the token that ends a text.
        is_finished: called with the new tokens of a text, whether it ends with the last of them.

    Returns:
        The new token ids of each prompt, without ``eos``.
    """
    generators = [torch.Generator().manual_seed(seed) for _ in prompts]
    texts = [list(prompt) for prompt in prompts]
    unfinished = list(range(len(prompts)))
    for _ in range(config.max_new_tokens):
        logits = next_logits([text[-max_len:] for text in texts]).float().cpu()
        tokens = {i: sample_token(logits[i], texts[i], config, generators[i]) for i in unfinished}
        unfinished = [i for i in unfinished if tokens[i] != eos]
        for i in unfinished:
            texts[i].append(tokens[i])
        if is_finished:
            unfinished = [i for i in unfinished if not is_finished(texts[i][len(prompts[i]) :])]
        if not unfinished:
            break
    return [text[len(prompt) :] for text, prompt in zip(texts, prompts, strict=True)]


def sample_token(logits: Tensor, text: Sequence[int], config: SamplesConfig, generator: torch.Generator) -> int:
    """Samples a token from logits (V,) after ``text``; temperature 0 is greedy.

    In this order, as in transformers: the repetition penalty (arXiv 1909.05858) lowers the logits of all tokens of
    ``text``, the temperature divides, top-k keeps the likeliest tokens (arXiv 1805.04833), and of those top-p keeps the
    nucleus (arXiv 1904.09751), the smallest set whose probabilities reach ``top_p``: of 0.5, 0.3, 0.15 and 0.05 with
    ``top_p = 0.6`` the first two, as 0.5 precedes the second and 0.8 the third.
    """
    if config.repetition_penalty != 1:
        seen = torch.tensor(sorted(set(text)), dtype=torch.long)
        score, penalty = logits[seen], config.repetition_penalty
        logits = logits.index_copy(0, seen, torch.where(score < 0, score * penalty, score / penalty))
    if config.temperature == 0:
        return int(logits.argmax())
    logits = logits / config.temperature
    if config.top_k:
        least = logits.topk(min(config.top_k, len(logits))).values[-1]
        logits = logits.masked_fill(logits < least, -torch.inf)
    probabilities, tokens = logits.softmax(-1).sort(descending=True)
    outside = probabilities.cumsum(-1) - probabilities >= config.top_p  # never the first token: 0 precedes it
    choice = torch.multinomial(probabilities.masked_fill(outside, 0.0), 1, generator=generator)
    return int(tokens[choice])


class IncrementalDecoder:
    """Returns next-token logits; reuses the KV cache for rows that grew by one token.

    Args:
        dtype: of the weights.
        seq_len: tokens in the longest row; the run's rows if it is None.
    """

    def __init__(self, trained: TrainedModel, dtype: torch.dtype = torch.float32, seq_len: int | None = None) -> None:
        self.seq_len = seq_len or trained.config.training.seq_len
        self._caches = {name: kv_cache.KVCache() for name in trained.config.layer_masks}
        attention_fn = collapse({name: cache.attention for name, cache in self._caches.items()})
        self._loaded = trained.load(attention_fn, self.seq_len, dtype)
        self._slots = {name: kv_cache.capacity(start) for name, start in self._loaded.starts.items()}
        self._rows: list[list[int]] = []

    def reset(self) -> None:
        self._rows = []

    @torch.no_grad()
    def __call__(self, rows: list[list[int]]) -> Tensor:
        """Returns the logits (B, V) of the token after each row, in the dtype of the weights.

        Args:
            rows: token ids, from 1 to ``seq_len`` each.
        """
        is_cached = len(rows) == len(self._rows) and all(
            row == old or row[:-1] == old for row, old in zip(rows, self._rows, strict=True)
        )
        self._rows = [list(row) for row in rows]
        last = [len(row) - 1 for row in rows]
        if is_cached:  # a finished row did not grow: its last token is read again
            return self._forward(last, [row[-1:] for row in rows])[:, 0]
        for cache in self._caches.values():
            cache.clear()
        found: dict[int, Tensor] = {}
        for begin in range(0, max(last) + 1, kv_cache.PREFILL_CHUNK):
            end = begin + kv_cache.PREFILL_CHUNK
            logits = self._forward([begin] * len(rows), [row[begin:end] for row in rows])
            found |= {b: logits[b, place - begin] for b, place in enumerate(last) if begin <= place < end}
        return torch.stack([found[b] for b in range(len(rows))])

    def _forward(self, offsets: list[int], chunks: list[list[int]]) -> Tensor:
        """Returns the logits (B, t, V) after each token of the chunks, which begin at the offsets of their rows."""
        lengths, device = [len(chunk) for chunk in chunks], self._loaded.device
        tokens = torch.tensor([chunk + [0] * (max(lengths) - len(chunk)) for chunk in chunks], device=device)
        self._loaded.model.set_position_offset(torch.tensor(offsets, device=device))
        masks = {
            name: kv_cache.decode_mask(start, offsets, lengths, self._slots[name])
            for name, start in self._loaded.starts.items()
        }
        return self._loaded.model(tokens, collapse(masks))

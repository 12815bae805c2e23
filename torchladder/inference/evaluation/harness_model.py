"""A trained model behind the interface ``LM`` of EleutherAI's lm-evaluation-harness."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any

import torch

from torchladder import models
from torchladder.config import SamplesConfig
from torchladder.data import Tokenizer
from torchladder.inference.decoding import IncrementalDecoder, generate
from torchladder.inference.evaluation.harness_tasks import generation_settings
from torchladder.inference.evaluation.probe_jobs import MAX_LOGITS
from torchladder.inference.trained_model import LoadedModel, TrainedModel
from torchladder.models import attention
from torchladder.models.layer_types import collapse
from torchladder.registry import require

Continuation = tuple[list[int], list[int]]
"""Token ids of a context, at least one, and of the text after it."""


class HarnessModel:
    """Scores and continues texts under the masks of the run, each text a document at the begin of its row.

    The harness calls the three methods of its ``LM`` with its requests, whose ``args`` are texts and settings.

    Args:
        context: tokens that the model reads at once; of longer texts the last ones.
        bos: begin each text with the tokenizer's bos.
        dtype: of the weights.
        batch_tokens: tokens in a batch, with padding.
        on_requests: called with the number of finished requests.
    """

    rank, world_size = 0, 1

    def __init__(
        self,
        trained: TrainedModel,
        loaded: LoadedModel,
        tokenizer: Tokenizer,
        context: int,
        bos: bool,
        dtype: torch.dtype,
        batch_tokens: int,
        on_requests: Callable[[int], None],
    ) -> None:
        self._trained, self._loaded, self._tokenizer = trained, loaded, tokenizer
        self._context, self._dtype = context, dtype
        self._batch_tokens, self._on_requests = batch_tokens, on_requests
        self._first = tokenizer.eos if tokenizer.bos is None else tokenizer.bos
        self._prefix = [self._first] if bos else []
        self._vocab_size = models.resolve(trained.config.model).vocab_size
        self._kernels = {
            name: attention.build_kernel("sdpa", masks, loaded.device, training=False)
            for name, masks in trained.config.layer_masks.items()
        }
        self._starts = {name: start.cpu() for name, start in loaded.starts.items()}

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Returns the log-probability (nats) of each continuation, and whether greedy decoding would write it."""
        rows = [self._encode_pair(*request.args) for request in requests]
        return self._score(rows, [1] * len(rows))

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """Returns the log-probability (nats) of each whole text, read in slices of the context that do not overlap."""
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window  # an optional package

        rows: list[Continuation] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            tokens = self._prefix + self._tokenizer.encode(request.args[0])
            windows = get_rolling_token_windows(tokens, self._first, max_seq_len=self._context, context_len=1)
            rows += [make_disjoint_window(window) for window in windows]
            owners += [number] * (len(rows) - len(owners))
        ends = [int(owner != after) for owner, after in zip(owners, [*owners[1:], -1], strict=True)]
        totals = [0.0] * len(requests)
        for owner, (score, _) in zip(owners, self._score(rows, ends), strict=True):
            totals[owner] += score
        return totals

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Returns the continuation of each text, up to the first of its stop strings."""
        groups: dict[str, list[int]] = {}
        times: dict[int, int] = {}  # each repeat of a request is sampled with another seed
        for number, request in enumerate(requests):
            seed = times.get(id(request), 0)
            times[id(request)] = seed + 1
            groups.setdefault(json.dumps([request.args[1], seed], sort_keys=True), []).append(number)
        results = [""] * len(requests)
        for key, numbers in groups.items():
            settings, seed = json.loads(key)
            texts = self._generate([requests[number].args[0] for number in numbers], settings, seed)
            for number, text in zip(numbers, texts, strict=True):
                results[number] = text
        return results

    def _generate(self, contexts: Sequence[str], settings: dict[str, Any], seed: int) -> list[str]:
        from lm_eval.models.utils import postprocess_generated_text  # an optional package

        settings = generation_settings(settings)
        until, most = settings.pop("until", []), settings.pop("max_gen_toks")
        until = [stop for stop in ([until] if isinstance(until, str) else until) if stop]
        samples = settings.pop("do_sample", False)
        temperature, top_p = settings.pop("temperature", None), settings.pop("top_p", 1.0)
        temperature = (1.0 if temperature is None else temperature) if samples else 0.0
        config = SamplesConfig(max_new_tokens=most, temperature=temperature, top_p=top_p)
        prompts = [(self._prefix + self._tokenizer.encode(text))[most - self._context :] for text in contexts]
        prompts = [prompt or [self._first] for prompt in prompts]

        def is_finished(tokens: list[int]) -> bool:
            text = self._tokenizer.decode(tokens)
            return any(stop in text for stop in until)

        texts = [""] * len(prompts)
        order = sorted(range(len(prompts)), key=lambda number: -len(prompts[number]))
        while order:
            size = max(self._batch_tokens // (len(prompts[order[0]]) + most), 1)
            batch, order = order[:size], order[size:]
            self._decoder.reset()
            new = generate(
                self._decoder,
                [prompts[number] for number in batch],
                config,
                self._context,
                seed,
                self._tokenizer.eos,
                is_finished,
            )
            for number, tokens in zip(batch, new, strict=True):
                texts[number] = postprocess_generated_text(self._tokenizer.decode(tokens), until, None)
            self._on_requests(len(batch))
        return texts

    @cached_property
    def _decoder(self) -> IncrementalDecoder:
        return IncrementalDecoder(self._trained, self._dtype, self._context)

    def _encode_pair(self, context: str, continuation: str) -> Continuation:
        """Returns the tokens of both texts; they are split where the tokens of the context alone end.

        White space at the end of the context belongs to the continuation, as in the harness.
        """
        if not context:
            tokens = self._tokenizer.encode(continuation)
            return ([self._first], tokens) if tokens[:1] != [self._first] else (tokens[:1], tokens[1:])
        stripped = context.rstrip()
        both = self._prefix + self._tokenizer.encode(context + continuation)
        first = self._prefix + self._tokenizer.encode(stripped)
        return (first, both[len(first) :]) if first else ([self._first], both)

    @torch.no_grad()
    def _score(self, rows: Sequence[Continuation], finished: Sequence[int]) -> list[tuple[float, bool]]:
        """Returns the log-probability of each continuation, and whether each of its tokens is the likeliest.

        Args:
            finished: requests that are finished with each row.
        """
        longest = max((len(continuation) for _, continuation in rows), default=0)
        require(
            longest <= self._context,
            f"--context {self._context}: a text to score has {longest} tokens: use a longer --context.",
        )
        scores: list[tuple[float, bool]] = [(0.0, True)] * len(rows)
        for batch in self._batches(rows):
            inputs = [(rows[number][0] + rows[number][1])[-self._context - 1 :][:-1] for number in batch]
            targets = [rows[number][1] for number in batch]
            tokens, labels = _pad(inputs), _pad([*targets, [0]])[:-1]  # at least one column
            begins = torch.tensor([len(one) - len(target) for one, target in zip(inputs, targets, strict=True)])
            scored = torch.arange(labels.shape[1]) < torch.tensor([len(target) for target in targets])[:, None]
            positions = (begins[:, None] + torch.arange(labels.shape[1])).clamp(0, tokens.shape[1] - 1)
            attn_mask = {
                name: kernel.prepare(self._starts[name][: tokens.shape[1]].expand(tokens.shape), self._loaded.device)
                for name, kernel in self._kernels.items()
            }
            places = [one.to(self._loaded.device) for one in (tokens, positions, labels)]
            logits = self._loaded.model.logits_at(places[0], collapse(attn_mask), places[1]).float()
            losses = logits.logsumexp(-1) - logits.gather(-1, places[2][..., None])[..., 0]  # (B, n)
            totals = -(losses.cpu().double() * scored).sum(1)
            greedy = ((logits.argmax(-1) == places[2]).cpu() | ~scored).all(1)
            for number, total, is_greedy in zip(batch, totals.tolist(), greedy.tolist(), strict=True):
                scores[number] = total, is_greedy
            self._on_requests(sum(finished[number] for number in batch))
        return scores

    def _batches(self, rows: Sequence[Continuation]) -> Iterator[list[int]]:
        """Yields the numbers of rows of similar length, the longest first; a single row may exceed the limits."""
        sizes = [min(sum(map(len, row)) - 1, self._context) for row in rows]
        batch: list[int] = []
        most = 0  # tokens of the longest continuation
        for number in sorted(range(len(rows)), key=lambda number: -sizes[number]):
            most_then, count = max(most, len(rows[number][1])), len(batch) + 1
            tokens, logits = count * sizes[(batch or [number])[0]], count * most_then * self._vocab_size
            if batch and (tokens > self._batch_tokens or logits > MAX_LOGITS):
                yield batch
                batch, most_then = [], len(rows[number][1])
            batch.append(number)
            most = most_then
        if batch:
            yield batch


def _pad(rows: Sequence[Sequence[int]]) -> torch.Tensor:
    """Returns rows of ids as (B, T) int64, zeros after their ends."""
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row, dtype=torch.long) for row in rows], batch_first=True)

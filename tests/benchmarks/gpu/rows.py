"""The loader ``random``: what speed depends on (rows, documents), without a corpus."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from torchladder import data
from torchladder.data import Batch


@data.register("random")
@dataclass(kw_only=True)
class RandomRows:
    """Rows of random tokens, each cut into documents of random lengths."""

    seq_len: int
    dp_rank: int
    local_batch_size: int
    global_batch_size: int
    vocab_size: int

    document_tokens: int = 0
    """Mean tokens of a document, log-normal as in web text (sigma 1); 0: a row is one document."""

    def __post_init__(self) -> None:
        self.row = 0
        generator = torch.Generator().manual_seed(self.dp_rank)
        shape = (self.local_batch_size, self.seq_len + 1)
        tokens = torch.randint(self.vocab_size, shape, generator=generator)
        positions = torch.stack([self._positions(generator) for _ in range(self.local_batch_size)])
        self.batch = Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), positions)

    def _positions(self, generator: torch.Generator) -> torch.Tensor:
        row = torch.arange(self.seq_len, dtype=torch.int32)
        if not self.document_tokens:
            return row
        # The mean of a log-normal is exp(mu + sigma ** 2 / 2).
        count = 8 * self.seq_len // self.document_tokens + 8
        lengths = torch.randn(count, generator=generator).sub_(0.5).exp_().mul_(self.document_tokens).long() + 1
        begins = lengths.cumsum(0)
        first = torch.zeros_like(row)
        first[begins[begins < self.seq_len]] = 1
        return row - torch.where(first.bool(), row, 0).cummax(0).values

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        self.row += self.global_batch_size
        return self.batch

    def seek(self, row: int) -> None:
        self.row = row

    def fingerprints(self) -> dict[str, str]:
        return {}

    def describe(self) -> list[str]:
        return ["random tokens"]

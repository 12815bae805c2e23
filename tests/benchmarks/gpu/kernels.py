"""The attention kernels alone, forward and backward, in TFLOP/s of the attended pairs."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch

from tests.benchmarks.gpu.rows import RandomRows
from tests.benchmarks.gpu.stepping import CUDA, DEVICE, DOCUMENT_TOKENS, FLASH4, clock, seconds_by_kernel
from tests.benchmarks.timing import table
from torchladder import mask
from torchladder.models import attention
from torchladder.models.attention import flash4

SHAPES = [(4, 8192, (32, 4), 64), (1, 32768, (32, 4), 64), (4, 8192, (32, 8), 128)] if CUDA else [(2, 256, (4, 2), 16)]
"""Rows, tokens, heads of queries and of keys, features."""
WINDOWS = (0, 1000, 512, 128) if CUDA else (0, 100)
"""Chunks; 0 is the full context."""
TURNS = 5


def run() -> dict[str, Any]:
    """Prints and returns the speed of each kernel."""
    uniform = ["fold", "fold without FlashAttention 4", "flash", "flash_mask"] if FLASH4 else ["fold"]
    documents = ["flash", "flash_mask"] if FLASH4 else ["varlen"] if CUDA else ["sdpa"]
    results = []
    for batch, length, heads, features in SHAPES:
        rows = RandomRows(
            seq_len=length,
            dp_rank=0,
            local_batch_size=batch,
            global_batch_size=batch,
            vocab_size=2,
            document_tokens=DOCUMENT_TOKENS,
        )
        row = torch.arange(length, dtype=torch.int32).repeat(batch, 1)
        cases = [(f"chunk {window or length:,}", mask.chunk(row, window or length), uniform) for window in WINDOWS]
        cases.append(("documents", mask.document(rows.batch.positions, length), documents))
        for label, start, names in cases:
            for name in [*names, *(["flex"] if CUDA else [])]:
                label_of_shape = f"{batch} x {length:,}, {heads[0]}/{heads[1]} heads of {features}"
                if clock.allows(f"kernel {name}, {label_of_shape}, {label}"):
                    speed = _teraflops(name, start, heads, features)
                    results.append({"shape": label_of_shape, "mask": label, "kernel": name, "tflops": speed})
    head = ["kernel alone, forward and backward", "mask", "kernel", "TFLOP/s"]
    table(head, [[r["shape"], r["mask"], r["kernel"], f"{r['tflops']:.3g}"] for r in results])
    return {"results": results}


def _teraflops(name: str, start: torch.Tensor, heads: tuple[int, int], features: int) -> float:
    generator = torch.Generator(DEVICE).manual_seed(0)
    shapes = [(*start.shape, h, features) for h in (heads[0], heads[1], heads[1], heads[0])]
    dtype = torch.bfloat16
    made = (torch.randn(shape, device=DEVICE, generator=generator).to(dtype).transpose(1, 2) for shape in shapes)
    q, k, v, grad = (x.detach().requires_grad_(i < 3) for i, x in enumerate(made))
    name, _, without = name.partition(" ")
    with _without_flash4(bool(without)):
        kernel: Any = attention.registry.get(name)()
        prepared = kernel.prepare(start, DEVICE)

        def step() -> None:
            torch.autograd.grad(kernel.attention(q, k, v, prepared), (q, k, v), grad)

        step()
        # The device's time: Python takes longer to start the kernels of short windows than they run, which a training
        # step hides behind its other work.
        taken = sum(seconds_by_kernel(lambda: [step() for _ in range(TURNS)]).values()) / TURNS
    # Forward: 2 products; backward: 5.
    return 7 * 2 * heads[0] * features * mask.pairs(start) / taken / 1e12


@contextmanager
def _without_flash4(yes: bool) -> Iterator[None]:
    if not yes:
        yield
        return
    with patch.object(flash4, "supports", lambda q: False):
        yield

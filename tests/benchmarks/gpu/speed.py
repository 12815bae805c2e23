"""Tokens per second, MFU, memory, and where the time of a step goes."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch

from tests.benchmarks.gpu.stepping import (
    CUDA,
    DEVICE,
    FLASH4,
    Shape,
    at,
    clock,
    flops_per_step,
    seconds_by_kernel,
    seconds_per_step,
    trainer,
)
from tests.benchmarks.timing import table
from torchladder.metrics import get_peak_flops

RECOMPUTE = ("--activation_checkpoint.mode", "full")
"""Rows of 128K, and 8B parameters, do not fit without recomputing."""
BF16_STATE = ("--training.dtype", "bfloat16")
"""8B parameters, gradients and moments take 120 GiB in fp32."""
FLOAT8 = ("--float8.enable", "--float8.recipe_name", "tensorwise")
CHUNK, DOCUMENTS = ("chunk",), ("document", "chunk")


@dataclass(frozen=True)
class Run:
    """One trainer, measured at some windows; 0 is the full context."""

    shape: Shape
    kernel: str
    masks: tuple[str, ...] = CHUNK
    windows: tuple[int, ...] = (0,)
    settings: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.shape}, {self.kernel_and_values}, {'+'.join(self.masks)}"

    @property
    def kernel_and_values(self) -> str:
        """The kernel, and what is set to a value."""
        return " ".join([self.kernel, *(value for value in self.settings if not value.startswith("--"))])


def runs() -> list[Run]:
    """Returns what is measured, the most important first."""
    if not CUDA:
        return [Run(Shape("debug", 512, 2), kernel, windows=(0, 128)) for kernel in ("fold", "sdpa")]
    of_documents = ["flash", "flash_mask", "flex"] if FLASH4 else ["varlen", "flex"]
    chosen = []
    # 32,768 tokens a step: what fits beside 18 GB of weights, gradients and optimizer state.
    for shape, windows in ((Shape("1b", 8192, 4), (0, 2048, 1000, 128)), (Shape("1b", 32768, 1), (0, 8192, 1000))):
        chosen += [Run(shape, "fold", windows=windows)]
        chosen += [Run(shape, kernel, DOCUMENTS) for kernel in of_documents]
    eight = Shape("llama3-8b", 4096, 4)
    return [
        *chosen,
        *([Run(Shape("1b", 8192, 4), "flash", windows=(0, 1000, 128))] if FLASH4 else []),
        *(Run(Shape("1b", tokens, 32768 // tokens), "flex") for tokens in (8192, 32768)),
        Run(Shape("1b", 8192, 4), "fold", settings=FLOAT8),
        Run(eight, "fold", settings=(*RECOMPUTE, *BF16_STATE)),
        Run(Shape("1b", 2048, 16), "fold"),
        *(Run(Shape("120m", 8192, 8), kernel, windows=(0, 1000)) for kernel in ["fold"] + ["flash"] * FLASH4),
        Run(Shape("1b", 131072, 1), "fold", settings=RECOMPUTE),
    ]


PARTS = {
    "attention": ("flash", "flashattn", "fmha", "sdpa", "attention", "flex", "torchladder::", "cudnn_generated"),
    "optimizer": ("multi_tensor", "adam", "_foreach", "lpnorm"),
    "loss": ("softmax", "nll", "scatter", "gather", "cross_entropy"),
    "matmul": ("gemm", "nvjet", "cutlass", "xmma", "splitk", "aten::mm", "aten::addmm", "aten::bmm"),
}
"""Phrases in the names of kernels, in order: what matches none is other work."""
SHOWN = ("attention", "matmul", "loss", "optimizer", "other")


def run() -> dict[str, Any]:
    """Prints and returns the speed of every shape, kernel and window."""
    results = []
    head = ["model, rows", "kernel, masks", "window", "tokens/s", "MFU", "MFU PaLM", "GiB", *SHOWN]
    for chosen in runs():
        if clock.allows(f"speed of {chosen}"):
            measured = _measure_all(chosen)
            table(head, [_cells(result) for result in measured])
            results += measured
    return {"results": results}


def _measure_all(chosen: Run) -> list[dict[str, Any]]:
    with trainer(chosen.shape, *chosen.settings, masks=chosen.masks, kernel=chosen.kernel) as run:
        return [_measure(run, chosen, window or chosen.shape.seq_len) for window in chosen.windows]


def _measure(run: Any, chosen: Run, window: int) -> dict[str, Any]:
    shape = chosen.shape
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    seconds = seconds_per_step(at(run, window))
    exact, palm = flops_per_step(run, window)
    peak = get_peak_flops(DEVICE)
    return {
        "shape": str(shape),
        "batch": shape.batch,
        "kernel": chosen.kernel_and_values,
        "masks": "+".join(chosen.masks),
        "window": window,
        "tokens_per_second": shape.batch * shape.seq_len / seconds,
        "mfu": exact / seconds / peak if peak else None,
        "mfu_palm": palm / seconds / peak if peak else None,
        "memory_gib": torch.cuda.max_memory_allocated() / 2**30 if CUDA else None,
        "time": split(run),
    }


def split(run: Any) -> dict[str, float]:
    """Returns the share of the device's time that each part of one step takes, by the names of its kernels."""
    time: Counter[str] = Counter()
    for kernel, seconds in seconds_by_kernel(run.train_step).items():
        time[_part(kernel)] += seconds
    whole = sum(time.values())
    return {part: time[part] / whole for part in (*PARTS, "other")}


def _part(kernel: str) -> str:
    name = kernel.lower()
    return next((part for part, phrases in PARTS.items() if any(phrase in name for phrase in phrases)), "other")


def _cells(result: dict[str, Any]) -> list[str]:
    share = [f"{result['time'][part]:.0%}" for part in SHOWN]
    figures = ["-" if result[key] is None else f"{result[key]:.1%}" for key in ("mfu", "mfu_palm")]
    memory = "-" if result["memory_gib"] is None else f"{result['memory_gib']:.1f}"
    name = f"{result['kernel']}, {result['masks']}"
    return [
        result["shape"],
        name,
        f"{result['window']:,}",
        f"{result['tokens_per_second']:,.0f}",
        *figures,
        memory,
        *share,
    ]

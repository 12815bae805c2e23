"""Tokens per second, MFU, memory, and where the time of a step goes."""

from collections import Counter
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from tests.benchmarks.gpu.stepping import (
    CUDA,
    DEVICE,
    Shape,
    at,
    clock,
    flops_per_step,
    seconds_per_step,
    trainer,
    wait,
)
from tests.benchmarks.timing import table
from torchladder.metrics import get_peak_flops

# 32,768 tokens a step up to 32K: what fits beside 18 GB of weights, gradients and optimizer state.
SHAPES = [Shape("1b", 8192, 4), Shape("1b", 32768, 1)]
OTHERS = [Shape("1b", 2048, 16), Shape("120m", 8192, 8), Shape("llama3-8b", 8192, 1), Shape("1b", 131072, 1)]
SMALL = [Shape("debug", 512, 2)]
KERNELS = ["fold", "flex", "varlen"] if CUDA else ["fold", "sdpa"]
LONG = ("--activation_checkpoint.mode", "full")
"""Rows of 128K do not fit without recomputing."""
FLOAT8 = ("--float8.enable", "--float8.recipe_name", "tensorwise")

PARTS = {
    "attention": ("flash", "fmha", "sdpa", "attention", "flex", "torchladder::", "cudnn_generated"),
    "optimizer": ("multi_tensor", "adam", "_foreach", "lpnorm"),
    "loss": ("softmax", "nll", "scatter", "gather", "cross_entropy"),
    "matmul": ("gemm", "nvjet", "cutlass", "xmma", "splitk", "aten::mm", "aten::addmm", "aten::bmm"),
}
"""Phrases in the names of kernels, in order: what matches none is other work."""
SHOWN = ("attention", "matmul", "loss", "optimizer", "other")


def run() -> dict[str, Any]:
    """Prints and returns the speed of every shape, kernel and window."""
    results = []
    for shape in [*SHAPES, *OTHERS] if CUDA else SMALL:
        for kernel in KERNELS if shape in SHAPES or not CUDA else KERNELS[:1]:
            if clock.allows(f"speed of {shape}, {kernel}"):
                results += _of_kernel(shape, kernel)
    head = ["model, rows", "kernel, masks", "window", "tokens/s", "MFU", "MFU PaLM", "GiB", *SHOWN]
    table(head, [_cells(result) for result in results])
    return {"results": results}


def _of_kernel(shape: Shape, kernel: str) -> list[dict[str, Any]]:
    """Measures a shape at full context and narrower, with and without documents."""
    results = []
    recompute = LONG if shape.seq_len > 65536 or shape.flavor == "llama3-8b" else ()
    windows = sorted({shape.seq_len, shape.seq_len // 4, 128}, reverse=True)
    with trainer(shape, *recompute, kernel=kernel) as run:
        results += [_measure(run, shape, kernel, ("chunk",), window) for window in windows]
    if CUDA and shape == SHAPES[0] and kernel == KERNELS[0]:
        with trainer(shape, *FLOAT8, kernel=kernel) as run:
            results.append(_measure(run, shape, f"{kernel} float8", ("chunk",), shape.seq_len))
    if kernel != "fold":
        masks = ("document", "chunk")
        with trainer(shape, *recompute, masks=masks, kernel=kernel) as run:
            results.append(_measure(run, shape, kernel, masks, shape.seq_len))
    return results


def _measure(run: Any, shape: Shape, kernel: str, masks: tuple[str, ...], window: int) -> dict[str, Any]:
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    seconds = seconds_per_step(at(run, window))
    exact, palm = flops_per_step(run, window)
    peak = get_peak_flops(DEVICE)
    return {
        "shape": str(shape),
        "batch": shape.batch,
        "kernel": kernel,
        "masks": "+".join(masks),
        "window": window,
        "tokens_per_second": shape.batch * shape.seq_len / seconds,
        "mfu": exact / seconds / peak if peak else None,
        "mfu_palm": palm / seconds / peak if peak else None,
        "memory_gib": torch.cuda.max_memory_allocated() / 2**30 if CUDA else None,
        "time": split(run),
    }


def split(run: Any) -> dict[str, float]:
    """Returns the share of the device's time that each part of one step takes, by the names of its kernels."""
    activities = [ProfilerActivity.CUDA, ProfilerActivity.CPU] if CUDA else [ProfilerActivity.CPU]
    with profile(activities=activities) as profiler:
        run.train_step()
        wait()
    time: Counter[str] = Counter()
    for event in profiler.key_averages():
        # Annotations span kernels, which count by themselves.
        on_device = event.device_type.name != "CPU" and not event.is_user_annotation if CUDA else True
        if on_device:
            time[_part(event.key)] += event.self_device_time_total if CUDA else event.self_cpu_time_total
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

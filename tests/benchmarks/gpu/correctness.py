"""Whether the fast kernels are right: against ``dense``, over a training, over a ladder, and without waiting."""

import importlib.util
import math
from itertools import product
from typing import Any

import torch
from torch._dynamo.utils import counters

from tests.benchmarks.gpu.stepping import CUDA, DEVICE, FLASH4, Shape, at, clock, trainer
from tests.benchmarks.timing import table
from torchladder import mask
from torchladder.models import attention

FAST = ["flex", "varlen", "fold", "sdpa"] if CUDA else ["flex", "fold", "sdpa"]
if CUDA and importlib.util.find_spec("flash_attn") is not None:
    FAST += ["flash", "flash_mask"] if FLASH4 else ["flash"]
ONLY_BF16 = ("varlen", "flash", "flash_mask")
MIXES = [("chunk",), ("document", "chunk"), ("document", "sliding")]
LENGTHS = (1000, 2048)  # one that is no multiple of a block of 128
WINDOWS = (1, 32, 200, 1024)
ALLOWED = {torch.bfloat16: 0.02, torch.float32: 0.005}
"""Relative error of outputs and gradients against float64; flex multiplies fp32 as tf32."""


def run() -> dict[str, Any]:
    """Prints and returns what was compared."""
    found: dict[str, Any] = {"kernels": kernels(), "training": training()}
    for part in (ladder, waits):
        if clock.allows(part.__name__):
            found[part.__name__] = part()
            print(f"{part.__name__}: {found[part.__name__]}\n")
    return found


def kernels() -> dict[str, Any]:
    """Compares outputs and gradients of every kernel with dense attention in float64."""
    worst: dict[str, dict[str, float]] = {}
    rows = []
    for name in (name for name in FAST if clock.allows(f"{name} against dense")):
        dtypes = [torch.bfloat16] * CUDA + [torch.float32] * (name not in ONLY_BF16)
        for dtype in dtypes:
            errors = [
                _error(name, masks, window, length, dtype)
                for masks, window, length in product(MIXES, WINDOWS, LENGTHS)
                if name != "fold" or masks == ("chunk",)
            ]
            label = f"{name} {str(dtype).removeprefix('torch.')}"
            worst[label] = {"cases": len(errors), "largest_error": max(errors)}
            right = "yes" if max(errors) < ALLOWED[dtype] else "NO"
            rows.append([label, f"{len(errors)}", f"{max(errors):.1e}", right])
    table(["kernel against dense", "cases", "largest error", "right"], rows)
    return worst


def training(steps: int = 50) -> dict[str, Any]:
    """Trains a small model with every kernel on the same rows and returns its largest distance from dense."""
    shape = Shape("debug", 1000 if CUDA else 200, 2)
    mixed = ("document", "chunk")
    runs = [("dense", mixed), ("dense", ("chunk",)), ("fold", ("chunk",))]
    runs += [(name, mixed) for name in FAST if name != "fold" and (CUDA or name != "flex")]
    losses = {
        (name, masks): _losses(shape, masks, name, steps)
        for name, masks in runs
        if name == "dense" or clock.allows(f"{name} in training")
    }
    far = {
        name: max(abs(one - other) / other for one, other in zip(got, losses["dense", masks], strict=True))
        for (name, masks), got in losses.items()
        if name != "dense"
    }
    table(
        [f"losses of {steps} steps", "largest relative distance from dense"], [[n, f"{d:.1e}"] for n, d in far.items()]
    )
    return far


def ladder(windows: int = 200) -> dict[str, int]:
    """Climbs a ladder with documents and counts what the compiler made."""
    kernel = ("flash" if FLASH4 else "flex") if CUDA else "sdpa"
    shape = Shape("debug", 1024, 1)
    counters.clear()
    with trainer(shape, "--compile.enable", masks=("document", "chunk"), kernel=kernel) as run:
        graphs = []
        for step in range(windows):
            at(run, 32 + (shape.seq_len - 32) * step // (windows - 1)).train_step()
            graphs.append(counters["stats"]["unique_graphs"])
    return {"windows": windows, "graphs": graphs[0], "recompiles": graphs[-1] - graphs[0]}


def waits() -> str:
    """Takes steps in which PyTorch raises where the host waits for the device, and returns where it waits."""
    if not CUDA:
        return "not seen on a CPU"
    of_documents = ("flash", "flash_mask", "flex") if FLASH4 else ("varlen", "flex")
    for kernel, masks in [("fold", ("chunk",)), *((name, ("document", "chunk")) for name in of_documents)]:
        with trainer(Shape("debug", 1024, 2), masks=masks, kernel=kernel) as run:
            for window in (64, 100, 1024):  # compile first
                at(run, window).train_step()
            torch.cuda.set_sync_debug_mode("error")
            try:
                for window in (64, 100, 1024):
                    at(run, window).train_step()
            except RuntimeError as error:
                return f"{kernel}: {str(error).splitlines()[0]}"
            finally:
                torch.cuda.set_sync_debug_mode("default")
    return "none"


def _error(name: str, masks: tuple[str, ...], window: int, length: int, dtype: torch.dtype) -> float:
    """Returns the largest relative error of output and gradients."""
    positions = torch.arange(length, dtype=torch.int32).repeat(2, 1)
    positions[1, length // 3 :] -= length // 3
    start = mask.from_names(masks, positions, window)
    forward_only = name == "flex" and not CUDA
    kernel = attention.build_kernel(name, list(masks), DEVICE, training=not forward_only)
    ours = _attend(kernel, start, dtype, forward_only)
    exact = _attend(attention.build_kernel("dense", list(masks), DEVICE), start, torch.float64, forward_only)
    # Where every query sees itself alone, gradients of queries and keys are 0: an absolute error then.
    return max(
        ((one.double() - other).norm() / other.norm().clamp_min(1.0)).item()
        for one, other in zip(ours, exact, strict=True)
    )


def _attend(
    kernel: attention.AttentionKernel, start: torch.Tensor, dtype: torch.dtype, forward_only: bool
) -> tuple[Any, ...]:
    generator = torch.Generator(DEVICE).manual_seed(0)
    sizes = [(2, start.shape[1], heads, 64) for heads in (4, 2, 2, 4)]
    made = (torch.randn(size, device=DEVICE, generator=generator).to(torch.bfloat16).to(dtype) for size in sizes)
    q, k, v, grad = (x.transpose(1, 2).detach().requires_grad_(not forward_only) for x in made)
    out = kernel.attention(q, k, v, kernel.prepare(start, DEVICE))
    return (out,) if forward_only else (out, *torch.autograd.grad(out, (q, k, v), grad.detach()))


def _losses(shape: Shape, masks: tuple[str, ...], kernel: str, steps: int) -> list[float]:
    """Returns the loss of each step over a ladder that begins with a window of 1."""
    losses: list[float] = []
    with trainer(shape, "--compile.no-enable", masks=masks, kernel=kernel) as run:
        step_of = run.passes.forward_backward

        def keep(*arguments: Any) -> dict[str, torch.Tensor]:
            found = step_of(*arguments)
            losses.append(found["loss"].item())
            return found

        run.passes.forward_backward = keep  # type: ignore[method-assign]
        for step in range(steps):
            at(run, 1 + (shape.seq_len - 1) * step // (steps - 1)).train_step()
    if not all(map(math.isfinite, losses)):
        raise AssertionError(f"{kernel}: a loss is not a number: {losses}")
    return losses

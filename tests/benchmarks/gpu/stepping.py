"""The library's own trainer, stepped by hand: what is measured is what a run does."""

import gc
import math
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from tests.benchmarks.gpu import rows  # noqa: F401 - registers the loader "random"
from torchladder import config, mask
from torchladder.distributed.ranks import CommConfig, destroy_distributed, init_distributed
from torchladder.models.attention import flash4
from torchladder.training.run_plan import make_plan
from torchladder.training.trainer import Trainer

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
FLASH4 = flash4.unavailable() is None
DOCUMENT_TOKENS = 2000
"""Mean tokens of a document."""


@dataclass
class Clock:
    """What is measured: what begins before ``end``, by ``time.perf_counter``, and has one of ``only`` in its name."""

    end: float = math.inf
    only: tuple[str, ...] = ("",)

    def allows(self, what: str) -> bool:
        """Whether one more measurement may begin; says so where no time is left for it."""
        return any(words in what for words in self.only) and self.has_time(what)

    def has_time(self, what: str) -> bool:
        """Whether the time is not over; says so where it is."""
        if time.perf_counter() < self.end:
            return True
        print(f"no time left: {what}")
        return False


clock = Clock()


@dataclass(frozen=True)
class Shape:
    """A model and its rows."""

    flavor: str
    seq_len: int
    batch: int = 1

    def __str__(self) -> str:
        return f"{self.flavor}, {self.seq_len:,} tokens"


@contextmanager
def trainer(
    shape: Shape, *settings: str, masks: tuple[str, ...] = ("chunk",), kernel: str = "auto"
) -> Iterator[Trainer]:
    """Yields a trainer on random rows at full context, compiled on a GPU; its memory is free again afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = settings_of(shape, folder, *settings, masks=masks, kernel=kernel)
        torch._dynamo.reset()
        made = Trainer(make_plan(config.load(arguments)), init_distributed(CommConfig(), Path(folder)))
        made.step = 1  # the first step is always reported, which waits for the device
        try:
            yield made
        finally:
            made.checkpointer.close()
            made.metrics.close()
            destroy_distributed()
            vars(made).clear()  # whoever still holds the trainer holds no memory of the device
            gc.collect()
            if CUDA:
                torch.cuda.empty_cache()


def settings_of(shape: Shape, folder: str, *settings: str, masks: tuple[str, ...], kernel: str) -> list[str]:
    """Returns the arguments of a training command on random rows at full context."""
    documents = ["--data.document_tokens", str(DOCUMENT_TOKENS)] if "document" in masks else []
    return [
        *("--job.dump_folder", folder, "--model.flavor", shape.flavor, "--tokenizer.name", "none"),
        *("--data.name", "random", *documents),
        *("--attention.masks", *masks, "--attention.kernel", kernel, "--curriculum.name", "constant"),
        *("--training.steps", "1000000", "--training.seq_len", str(shape.seq_len)),
        *("--training.local_batch_size", str(shape.batch), "--validation.no-enable"),
        *("--metrics.log_freq", "1000000", "--compile.enable" if CUDA else "--compile.no-enable"),
        *("--optimizer.lr", "1e-4", "--lr_scheduler.warmup_steps", "10"),
        *settings,
    ]


def at(trainer: Trainer, window: int) -> Trainer:
    """Returns the trainer with that window from here on."""
    trainer.plan.schedule.curriculum = lambda step: window
    return trainer


def seconds_per_step(trainer: Trainer, most: int = 5, seconds: float = 4.0) -> float:
    """Returns the mean time of some steps in a row, after two that do not count; of the second where that is long."""
    seconds_of(trainer, 1)
    one = seconds_of(trainer, 1)
    steps = min(most, int(seconds / one))
    return seconds_of(trainer, steps) / steps if steps else one


def seconds_of(trainer: Trainer, steps: int) -> float:
    """Returns the seconds of that many consecutive steps."""
    wait()
    begin = time.perf_counter()
    for _ in range(steps):
        trainer.train_step()
    wait()
    return time.perf_counter() - begin


def seconds_by_kernel(step: Callable[[], object]) -> dict[str, float]:
    """Returns the device's time of each kernel in one step, by name; without a GPU, the time of each CPU operator."""
    activities = [ProfilerActivity.CUDA, ProfilerActivity.CPU] if CUDA else [ProfilerActivity.CPU]
    with profile(activities=activities) as profiler:
        step()
        wait()
    seconds: Counter[str] = Counter()
    for event in profiler.key_averages():
        # Annotations span kernels, which count by themselves.
        if not CUDA or (event.device_type.name != "CPU" and not event.is_user_annotation):
            seconds[event.key] += (event.self_device_time_total if CUDA else event.self_cpu_time_total) / 1e6
    return seconds


def flops_per_step(trainer: Trainer, window: int) -> tuple[int, int]:
    """Returns the FLOPs of a step: of the attended pairs, and by the PaLM convention (full attention)."""
    batch = next(trainer.loader)
    start = mask.from_names(trainer.config.attention.masks, batch.positions, window)
    tokens, layers = batch.tokens.numel(), len(trainer.model.layers)
    palm = layers * tokens * batch.tokens.shape[1]
    return trainer.model.flops(tokens, layers * mask.pairs(start)), trainer.model.flops(tokens, palm)


def wait() -> None:
    """Waits until the device has done all work."""
    if CUDA:
        torch.cuda.synchronize()

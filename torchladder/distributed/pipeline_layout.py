"""The layout of a pipeline: which layers each stage has, which rank each stage, and how long ranks wait for others.

A model is cut into stages of consecutive layers; the first stage also has the embedding, the last one the head and the
loss. Rows are cut into micro-batches, and a schedule says in which order each rank takes them through its stages.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from torch.distributed.pipelining._schedule_visualizer import get_schedule_ops

from torchladder.distributed.mesh import ParallelismConfig
from torchladder.registry import ConfigError, require, unknown_name

SINGLE_STAGE_SCHEDULES = ("1F1B", "GPipe")

STAGES_PER_RANK = {"1F1B": range(1, 2), "GPipe": range(1, 2), "Interleaved1F1B": range(2, 100), "ZBVZeroBubble": [2]}
"""Schedule -> numbers of stages that a rank may have."""

FORWARD, BACKWARD, INPUT_GRADIENT, WEIGHT_GRADIENT = "F", "B", "I", "W"
"""Passes of a stage over a micro-batch. A backward pass may be divided into those for inputs and for weights."""


class Pass(NamedTuple):
    """A pass of one stage over one micro-batch: from when to when, in forward passes of an average stage."""

    stage: int
    kind: str
    micro_batch: int
    begin: float
    end: float


@dataclass(frozen=True)
class PipelineLayout:
    """The stages of a model.

    Attributes:
        schedule: ``parallelism.pipeline_parallel_schedule``.
        degree: number of ranks.
        stages: the names of each stage's layers.
        num_micro_batches: micro-batches of one pass through the pipeline.
    """

    schedule: str
    degree: int
    stages: tuple[tuple[str, ...], ...]
    num_micro_batches: int

    def rank_of(self, stage: int) -> int:
        """Returns the pipeline rank of a stage: in a loop, in ZBV there and back."""
        lap, position = divmod(stage, self.degree)
        turns_back = self.schedule == "ZBVZeroBubble" and lap % 2
        return self.degree - 1 - position if turns_back else position

    def stages_of(self, rank: int) -> list[int]:
        return [stage for stage in range(len(self.stages)) if self.rank_of(stage) == rank]

    def layers_of(self, rank: int) -> list[str]:
        """Returns the names of the layers on a pipeline rank, in the order of the model."""
        return [name for stage in self.stages_of(rank) for name in self.stages[stage]]

    def part_of(self, rank: int) -> tuple[list[str], bool, bool]:
        """Returns the layers of a pipeline rank, whether it has the embedding, and whether it has the head."""
        stages = self.stages_of(rank)
        return self.layers_of(rank), 0 in stages, len(self.stages) - 1 in stages

    @property
    def last_rank(self) -> int:
        """The pipeline rank that has the head and the loss."""
        return self.rank_of(len(self.stages) - 1)

    @cached_property
    def _order(self) -> list[list[tuple[int, str, int]]]:
        """(stage, kind, micro-batch) of each rank's passes, in the order in which it runs them."""
        count = self.num_micro_batches
        if self.schedule in SINGLE_STAGE_SCHEDULES:
            order = []
            for rank in range(self.degree):  # which runs ahead of the last stage by the stages between, or by all
                ahead = min(count, self.degree - rank) if self.schedule == "1F1B" else count
                passes = [(rank, FORWARD, i) for i in range(ahead)]
                for i in range(count):
                    passes += [(rank, BACKWARD, i)] + ([(rank, FORWARD, i + ahead)] if i + ahead < count else [])
                order.append(passes)
            return order
        ranks = get_schedule_ops(self.schedule, self.degree, count, len(self.stages) // self.degree)
        return [
            [(one.stage_index, one.computation_type.value, one.microbatch_index or 0) for one in rank if one]
            for rank in ranks
        ]

    def timeline(self, costs: Sequence[float] | None = None) -> list[list[Pass]]:
        """Returns the passes of each rank when nothing but other passes delays them.

        Args:
            costs: of each stage's forward pass, by default 1. A backward pass takes twice as long, half of that for the
                gradients of inputs and half for those of weights.
        """
        costs = costs or [1.0] * len(self.stages)
        ends: dict[tuple[int, str, int], float] = {}
        timeline: list[list[Pass]] = [[] for _ in self._order]
        waiting = [list(reversed(order)) for order in self._order]
        while any(waiting):
            done = len(ends)
            for rank, left in enumerate(waiting):
                while left and (ready := self._ready(left[-1], ends)) is not None:
                    stage, kind, micro_batch = one = left.pop()
                    begin = max(ready, timeline[rank][-1].end if timeline[rank] else 0.0)
                    ends[one] = begin + costs[stage] * (2 if kind == BACKWARD else 1)
                    timeline[rank].append(Pass(stage, kind, micro_batch, begin, ends[one]))
            assert len(ends) > done, f"{self}: the passes wait for each other"
        return timeline

    def _ready(self, one: tuple[int, str, int], ends: dict[tuple[int, str, int], float]) -> float | None:
        """Returns when the inputs of a pass are there; None: not yet known."""
        stage, kind, micro_batch = one
        if kind == FORWARD:
            return ends.get((stage - 1, FORWARD, micro_batch)) if stage else 0.0
        if kind == WEIGHT_GRADIENT:
            return ends.get((stage, INPUT_GRADIENT, micro_batch))
        if stage == len(self.stages) - 1:
            return ends.get((stage, FORWARD, micro_batch))
        gradients = (ends.get((stage + 1, kind, micro_batch)) for kind in (BACKWARD, INPUT_GRADIENT))
        return next((end for end in gradients if end is not None), None)

    def bubble(self, costs: Sequence[float] | None = None) -> float:
        """Returns the fraction of the time that ranks are idle; ``costs`` as in ``timeline``."""
        timeline = self.timeline(costs)
        busy = sum(one.end - one.begin for passes in timeline for one in passes)
        return 1 - busy / (self.degree * max(one.end for passes in timeline for one in passes))

    def in_flight(self, rank: int) -> dict[int, int]:
        """Returns stage -> the most micro-batches whose activations a rank holds at once for it."""
        held, most = dict.fromkeys(self.stages_of(rank), 0), dict.fromkeys(self.stages_of(rank), 0)
        for stage, kind, _ in self._order[rank]:
            held[stage] += {FORWARD: 1, INPUT_GRADIENT: 0}.get(kind, -1)
            most[stage] = max(most[stage], held[stage])
        return most


def pipeline_layout(config: ParallelismConfig, layers: Sequence[str], local_batch_size: int) -> PipelineLayout | None:
    """Returns the stages of a model; None without pipeline parallelism.

    Args:
        config: the section [parallelism].
        layers: the names of the model's layers, in order.
        local_batch_size: rows that go through the pipeline at once.

    Raises:
        ConfigError: they do not divide; the message has what does.
    """
    degree, schedule = config.pipeline_parallel_degree, config.pipeline_parallel_schedule
    if degree == 1:
        return None
    stages = _split(config, list(layers))
    rows = config.pipeline_parallel_microbatch_size
    require(
        local_batch_size % rows == 0,
        f"parallelism.pipeline_parallel_microbatch_size = {rows} does not divide training.local_batch_size = "
        f"{local_batch_size}. These do: "
        f"{', '.join(str(n) for n in range(1, local_batch_size + 1) if local_batch_size % n == 0)}.",
    )
    number = local_batch_size // rows
    if not _fits(schedule, degree, len(stages), number):
        near = sorted(range(1, 4 * len(stages) + number), key=lambda n: abs(n - number))
        fitting = [n for n in near if _fits(schedule, degree, len(stages), n)][:2]
        raise ConfigError(
            f"parallelism.pipeline_parallel_schedule = {schedule!r} with {len(stages)} stages on {degree} ranks does "
            f"not take {number} micro-batch{'es' if number > 1 else ''} (training.local_batch_size / "
            f"pipeline_parallel_microbatch_size). Set training.local_batch_size to "
            f"{' or '.join(str(n * rows) for n in sorted(fitting))}."
        )
    return PipelineLayout(schedule, degree, stages, number)


def _fits(schedule: str, degree: int, stages: int, micro_batches: int) -> bool:
    """Whether a schedule takes so many micro-batches."""
    if schedule == "1F1B":
        return micro_batches >= stages
    if schedule == "Interleaved1F1B":  # as many in each round
        return micro_batches >= degree and micro_batches % (micro_batches // degree) == 0
    return True


def _split(config: ParallelismConfig, layers: list[str]) -> tuple[tuple[str, ...], ...]:
    """Returns the layers of each stage."""
    degree, schedule = config.pipeline_parallel_degree, config.pipeline_parallel_schedule
    points, per_stage = config.pipeline_parallel_split_points, config.pipeline_parallel_layers_per_stage
    allowed = STAGES_PER_RANK[schedule]
    key = "parallelism.pipeline_parallel"
    if points:
        require(per_stage is None, f"{key}_split_points and {key}_layers_per_stage: set one of them.")
        known = [f"layers.{name}" for name in layers]
        for point in points:
            if point not in known[1:]:
                raise unknown_name("layer", point, known[1:], f"{key}_split_points")
        firsts = [0, *(known.index(point) for point in points)]
        require(firsts == sorted({*firsts}), f"{key}_split_points: list the layers in order, each once.")
        sizes = [end - begin for begin, end in zip(firsts, [*firsts[1:], len(layers)], strict=True)]
        problem = f"{key}_split_points makes {len(sizes)} stages"
    elif per_stage is not None:
        less = config.pipeline_parallel_first_stage_less_layers + config.pipeline_parallel_last_stage_less_layers
        sizes = _sizes(config, len(layers), math.ceil((len(layers) + less) / per_stage))
        problem = f"{key}_layers_per_stage = {per_stage} makes {len(sizes)} stages of {len(layers)} layers"
    else:
        sizes = _sizes(config, len(layers), degree * min(allowed))
        problem = f"{key}_degree = {degree} makes {len(sizes)} stages of {len(layers)} layers"
    if len(sizes) % degree or len(sizes) // degree not in allowed:
        numbers = [degree * each for each in allowed if degree * each <= len(layers)]
        fits = f"{' or '.join(map(str, numbers[:4]))} stages" if numbers else "no number of stages"
        raise ConfigError(f"{problem}, and {schedule} on {degree} ranks takes {fits}.")
    require(len(sizes) <= len(layers), f"{problem}: a stage has at least one layer.")
    names = iter(layers)
    return tuple(tuple(next(names) for _ in range(size)) for size in sizes)


def _sizes(config: ParallelismConfig, layers: int, stages: int) -> list[int]:
    """Returns the number of layers of each stage: at least one, the others added to the smallest stage in turn."""
    sizes, extra = [1] * stages, [0] * stages
    extra[0] += config.pipeline_parallel_first_stage_less_layers
    extra[-1] += config.pipeline_parallel_last_stage_less_layers
    for _ in range(layers - stages):
        sizes[min(range(stages), key=lambda stage: sizes[stage] + extra[stage])] += 1
    return sizes

"""What a pipeline will do, before it starts: the size of its stages, and how long ranks wait for each other."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace

from torchladder import models
from torchladder.distributed.pipeline import build_stages
from torchladder.distributed.pipeline_layout import STAGES_PER_RANK, PipelineLayout, pipeline_layout
from torchladder.registry import ConfigError
from torchladder.training.run_plan import Plan


def stage_parameters(model: models.Model, layout: PipelineLayout) -> list[int]:
    """Returns the parameters of each stage."""
    stages = {n: stage for rank in range(layout.degree) for n, stage in build_stages(model, layout, rank).items()}
    return [sum(p.numel() for p in stages[number].parameters()) for number in range(len(layout.stages))]


def stage_costs(model: models.Model, layout: PipelineLayout) -> list[float]:
    """Returns the work of each stage, on average 1: that of its matrices, so without the embedding."""
    costs = stage_parameters(model, layout)
    costs[0] = sum(p.numel() for name in layout.stages[0] for p in model.layers[name].parameters())
    return [cost * len(costs) / sum(costs) for cost in costs]


def idle_by_schedule(plan: Plan) -> dict[str, float]:
    """Returns, for the run's own schedule and all others that take its micro-batches, the fraction of idle time."""
    own, parallelism = plan.pipeline, plan.config.parallelism
    if own is None:
        return {}
    layouts = {own.schedule: own}
    for schedule in STAGES_PER_RANK:
        if schedule != own.schedule:
            other = replace(
                parallelism,
                pipeline_parallel_schedule=schedule,  # type: ignore[arg-type]
                pipeline_parallel_split_points=[],
                pipeline_parallel_layers_per_stage=None,
            )
            with suppress(ConfigError):
                found = pipeline_layout(other, list(plan.model.layers), plan.batch.local_batch_size)
                layouts |= {schedule: found} if found else {}
    return {name: layout.bubble(stage_costs(plan.model, layout)) for name, layout in layouts.items()}


def pipeline_lines(plan: Plan) -> Sequence[str]:
    """Returns the pipeline as a line of text; none without one."""
    layout = plan.pipeline
    if layout is None:
        return []
    rows = plan.batch.local_batch_size // layout.num_micro_batches
    idle = layout.bubble(stage_costs(plan.model, layout))
    return [
        f"pipeline    {len(layout.stages)} stages of {', '.join(str(len(stage)) for stage in layout.stages)} layers on "
        f"{layout.degree} ranks, {layout.schedule} over {layout.num_micro_batches} micro-batches of {rows} "
        f"row{'s' if rows > 1 else ''}: {idle:.1%} idle"
    ]

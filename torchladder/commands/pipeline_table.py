"""The ranks of a pipeline as ``torchladder plan`` shows them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from torchladder import plots
from torchladder.registry import require
from torchladder.training.memory_estimate import RankMemory
from torchladder.training.pipeline_plan import idle_by_schedule, stage_costs, stage_parameters
from torchladder.training.run_plan import Plan


def pipeline_summary(plan: Plan, memory: list[RankMemory]) -> dict[str, Any]:
    """Returns stages and memory of each pipeline rank, and the idle time of schedules; {} without a pipeline."""
    layout = plan.pipeline
    if layout is None:
        return {}
    parameters = stage_parameters(plan.model, layout)
    ranks = [
        {
            "rank": rank,
            "stages": layout.stages_of(rank),
            "layers": layout.layers_of(rank),
            "parameters": sum(parameters[stage] for stage in layout.stages_of(rank)),
            "micro_batches_in_flight": sum(layout.in_flight(rank).values()),
            "memory": memory[rank].total,
        }
        for rank in range(layout.degree)
    ]
    return {"pipeline": {"schedule": layout.schedule, "ranks": ranks, "idle": idle_by_schedule(plan)}}


def print_pipeline(summary: dict[str, Any]) -> None:
    """Prints what ``pipeline_summary`` returned."""
    if not summary:
        return
    pipeline, table = summary["pipeline"], Table(box=None, header_style="bold")
    own, *others = pipeline["idle"].items()
    idle = [f"{share:.1%} with {name}" for name, share in (own, *others)]
    print(f"idle        {', '.join(idle)}")
    for name in ("rank", "stages", "layers", "parameters", "in flight", "memory"):
        table.add_column(name, justify="right", no_wrap=True)
    for rank in pipeline["ranks"]:
        stages, layers = (", ".join(_ranges(rank[key])) for key in ("stages", "layers"))
        size = f"{rank['memory'] / 2**30:.2f} GiB"
        flying = str(rank["micro_batches_in_flight"])
        table.add_row(str(rank["rank"]), stages, layers, f"{rank['parameters']:,}", flying, size)
    Console().print(table)


def _ranges(numbers: list[Any]) -> list[str]:
    """Returns consecutive numbers as ranges: 0 to 3, 8 to 11."""
    ranges: list[list[int]] = []
    for number in map(int, numbers):
        if ranges and number == ranges[-1][-1] + 1:
            ranges[-1].append(number)
        else:
            ranges.append([number])
    return [f"{one[0]} to {one[-1]}" if len(one) > 1 else str(one[0]) for one in ranges]


def plot_schedule(path: Path, plan: Plan) -> None:
    """Plots the passes of all ranks over time."""
    layout = plan.pipeline
    require(layout is not None, "--plot-pipeline: the run has no pipeline, set parallelism.pipeline_parallel_degree.")
    assert layout is not None
    costs = stage_costs(plan.model, layout)
    title = f"{layout.schedule}: {layout.bubble(costs):.1%} idle"
    plots.plot_pipelines(path, {title: layout.timeline(costs)}, layout.degree)

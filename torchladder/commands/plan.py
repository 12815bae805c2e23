"""Says what a run will do before an hour is spent: ladder, tokens, sources, FLOPs, memory."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from torchladder import config, plots
from torchladder.data.dataloader import SourceUsage
from torchladder.distributed import fake_ranks
from torchladder.registry import ConfigError
from torchladder.training import data_setup
from torchladder.training import run_plan as plans
from torchladder.training.memory_estimate import MemoryEstimator, RankMemory, Traffic

SHOWN_STEPS = 12
"""Rows of the table of windows."""

PHASE_SETTINGS = ("source_weights", "window", "lr_factor", "rope_theta")
"""What a phase may set."""


def run(argv: list[str]) -> int:
    """Prints the plan; every argument that is not the command's own is a setting of the run."""
    parser = argparse.ArgumentParser(prog="torchladder plan", description=__doc__, allow_abbrev=False)
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--at", default="", metavar="STEPS", help="steps whose windows to show: 0,1000,65280")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the ladder to a .png, .svg or .pdf")
    parser.add_argument("--world-size", type=int, default=1, metavar="N", help="ranks of the run, which need not exist")
    parser.add_argument("--gpu-memory", metavar="80GiB", help="what a rank has; a layout that takes more is refused")
    own, settings = parser.parse_known_args(argv)
    if own.world_size < 1:
        raise ConfigError(f"--world-size {own.world_size}: must be 1 or more.")
    plan = plans.make_plan(config.load(settings), own.world_size)
    memory, traffic = _dry_run(plan, own.world_size, own.gpu_memory)
    steps = _steps(own.at, plan.steps)
    if own.plot:
        plots.plan(
            own.plot, plan.steps, plan.schedule.window, plan.config.training.seq_len, plan.config.attention.masks
        )
    if own.json:
        taken = {"memory_per_rank": dataclasses.asdict(memory), "sent_per_rank_and_step": dataclasses.asdict(traffic)}
        print(json.dumps(_object(plan, steps) | taken))
        return 0
    print("\n".join(plans.summary_lines(plan)))
    print(f"attention   {plan.attention_share:.1%} of the FLOPs at full context")
    print(f"ranks       {own.world_size:,}: {plan.degrees}")
    print(f"memory      {_gib(memory.total)} per rank: {_parts(memory)}")
    print(f"sent        {_gib(sum(dataclasses.astuple(traffic)))} per rank and step: {_parts(traffic)}")
    _print_ladder(plan, steps)
    _print_phases(plan)
    if own.plot:
        print(f"wrote {own.plot}")
    return 0


def _dry_run(plan: plans.Plan, ranks: int, limit: str | None) -> tuple[RankMemory, Traffic]:
    """Builds the sharded model on ranks that do not exist; returns what a rank holds and sends.

    Raises:
        ConfigError: it takes more than the limit; the message names the nearest layouts that take less.
    """
    at_most = _bytes(limit) if limit else None
    with fake_ranks.ranks(ranks):
        model = MemoryEstimator(plan)
        memory, traffic = model.memory(), model.traffic()
        if at_most is None or memory.total <= at_most:
            return memory, traffic
        others = model.fitting(at_most)
    lines = [f"{_gib(memory.total)} per rank do not fit {limit}: {_parts(memory)}."]
    for layout, taken in others:
        settings = " ".join(f"--{key} {value}" for key, value in model.changes(layout).items())
        lines.append(f"  {_gib(taken.total)} with {settings}")
    lines.insert(1, "Nearest layouts that fit:" if others else f"No layout of {ranks} ranks fits: take more ranks.")
    raise ConfigError("\n".join(lines))


def _bytes(size: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?(GiB|GB|MiB|MB)", size)
    if not match:
        raise ConfigError(f"--gpu-memory {size}: must be a number with GiB, GB, MiB or MB, for example 80GiB.")
    return int(float(match[1]) * {"GiB": 2**30, "GB": 10**9, "MiB": 2**20, "MB": 10**6}[match[2]])


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"


def _parts(sizes: RankMemory | Traffic) -> str:
    return ", ".join(f"{name} {_gib(size)}" for name, size in dataclasses.asdict(sizes).items() if size) or "nothing"


def _steps(at: str, total: int) -> list[int]:
    """Returns the steps to show: those asked for, or some spread over the run."""
    if not at:
        return sorted({round(part * (total - 1) / (SHOWN_STEPS - 1)) for part in range(SHOWN_STEPS)})
    try:
        steps = [int(part) for part in at.split(",")]
    except ValueError:
        raise ConfigError(f"--at {at}: must be steps with commas between them, for example 0,1000,65280.") from None
    for step in steps:
        if not 0 <= step < total:
            raise ConfigError(f"--at {step}: the run has the steps 0 to {total - 1}.")
    return steps


def _object(plan: plans.Plan, steps: list[int]) -> dict[str, object]:
    return {
        "steps": plan.steps,
        "tokens_per_step": plan.tokens_per_step,
        "tokens": plan.tokens,
        "parameters": plan.parameters,
        "flops": plan.flops,
        "flops_full_context": plan.flops_full_context,
        "saved": plan.saved,
        "attention_saved": plan.attention_saved,
        "attention_share": plan.attention_share,
        "full_context_from_step": plan.full_at,
        "state_bytes_per_rank": plan.state_bytes,
        "windows": {str(step): plan.schedule.window(step) for step in steps},
        "phases": _phases(plan, _read(plan)[0]),
    }


def _print_ladder(plan: plans.Plan, steps: list[int]) -> None:
    table = Table("step", "window", "tokens seen", box=None, header_style="bold")
    for column in table.columns:
        column.justify = "right"
    for step in steps:
        table.add_row(f"{step:,}", f"{plan.schedule.window(step):,}", f"{step * plan.tokens_per_step:,}")
    Console().print(table)


def _phases(plan: plans.Plan, read: list[SourceUsage]) -> list[dict[str, Any]]:
    """Returns what each phase is: when it begins, how long it takes, what is set by then, what it reads."""
    starts = sorted({0, *plan.schedule.starts})
    phases = []
    for step, until in zip(starts, [*starts[1:], plan.steps], strict=True):
        settings = {key: plan.schedule.override(key, step) for key in PHASE_SETTINGS}
        phases.append(
            {
                "step": step,
                "steps": until - step,
                "tokens": (until - step) * plan.tokens_per_step,
                "sets": {key: value for key, value in settings.items() if value is not None},
                "sources": [dataclasses.asdict(one) for one in read if one.step == step],
            }
        )
    return phases


def _read(plan: plans.Plan) -> tuple[list[SourceUsage], str]:
    """Returns what the run reads of its sources, or why that cannot be told here."""
    try:
        return data_setup.source_usage(plan.config, plan.batch, plan.schedule), ""
    except ConfigError as error:
        return [], str(error)


def _print_phases(plan: plans.Plan) -> None:
    """Prints the stage table and, where the data is here, what each phase reads of each source."""
    table = Table(
        "from step", "steps", "tokens", "sets", "source", "tokens read", "epochs", box=None, header_style="bold"
    )
    for column in table.columns:
        column.justify = "left" if column.header in ("sets", "source") else "right"
        column.no_wrap = column.header != "source"
    read, why = _read(plan)
    for phase in _phases(plan, read):
        # Weights say what the sources that follow say in tokens.
        sets = {key: value for key, value in phase["sets"].items() if key != "source_weights" or not phase["sources"]}
        head = [f"{phase[key]:,}" for key in ("step", "steps", "tokens")]
        head.append("\n".join(f"{key} {value}" for key, value in sets.items()))
        for source in phase["sources"] or [{}]:
            table.add_row(*head, *_cells(source))
            head = [""] * len(head)
    Console().print(table)
    if why:
        print(f"data        not here to count epochs: {why}")


def _cells(source: dict[str, Any]) -> list[str]:
    if not source:
        return []
    before, after = source["epochs_before"], source["epochs_before"] + source["epochs"]
    return [source["source"], f"{source['tokens']:,}", f"{before:.2f} to {after:.2f}" if source["epochs"] else "-"]

"""Says what a run will do before an hour is spent: ladder, tokens, FLOPs, memory."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from rich.console import Console
from rich.table import Table

from torchladder import config, plots
from torchladder import plan as plans
from torchladder.registry import ConfigError

SHOWN = 12
"""Rows of the ladder's table."""


def run(argv: list[str]) -> int:
    """Prints the plan; every argument that is not the command's own is a setting of the run."""
    parser = argparse.ArgumentParser(prog="torchladder plan", description=__doc__, allow_abbrev=False)
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--at", default="", metavar="STEPS", help="steps whose windows to show: 0,1000,65280")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the ladder to a .png, .svg or .pdf")
    own, settings = parser.parse_known_args(argv)
    plan = plans.make(config.load(settings))
    steps = _steps(own.at, plan.steps)
    if own.plot:
        plots.plan(own.plot, plan.steps, plan.window, plan.config.training.seq_len, plan.config.attention.masks)
    if own.json:
        print(json.dumps(_object(plan, steps)))
        return 0
    print("\n".join(plans.lines(plan)))
    print(f"attention   {plan.attention_share:.1%} of the FLOPs at full context")
    _print_ladder(plan, steps)
    if own.plot:
        print(f"wrote {own.plot}")
    return 0


def _steps(at: str, total: int) -> list[int]:
    """Returns the steps to show: those asked for, or some spread over the run."""
    if not at:
        return sorted({round(part * (total - 1) / (SHOWN - 1)) for part in range(SHOWN)})
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
        "windows": {str(step): plan.window(step) for step in steps},
    }


def _print_ladder(plan: plans.Plan, steps: list[int]) -> None:
    table = Table("step", "window", "tokens seen", box=None, header_style="bold")
    for column in table.columns:
        column.justify = "right"
    for step in steps:
        table.add_row(f"{step:,}", f"{plan.window(step):,}", f"{step * plan.tokens_per_step:,}")
    Console().print(table)

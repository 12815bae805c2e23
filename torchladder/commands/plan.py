"""Shows what a run will do before it starts: windows, tokens, sources, FLOPs, memory."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from torchladder import config, plots
from torchladder.commands.arguments import SettingsParser, check_positive
from torchladder.commands.final_context import final_context, print_final_context
from torchladder.commands.pipeline_table import pipeline_summary, plot_schedule, print_pipeline
from torchladder.data.dataloader import SourceUsage
from torchladder.distributed import fake_ranks
from torchladder.registry import ConfigError, require
from torchladder.schedule import PHASE_SETTINGS
from torchladder.training import layout_search
from torchladder.training.data_setup import data_use
from torchladder.training.measured_speed import measure_speed
from torchladder.training.memory_estimate import MemoryEstimator, RankMemory
from torchladder.training.plan_report import summary_lines
from torchladder.training.run_plan import Plan, make_plan
from torchladder.training.traffic_estimate import Traffic, estimate_traffic

EPILOG = """
All other options are settings of the run, such as --job.config_file; they and the data are checked as when training
starts.

example:
  torchladder plan --job.config_file train_configs/llama1b_dm8.toml --world-size 8 --gpu-memory 80GiB
"""

NUM_SHOWN_STEPS = 12
"""Steps in the table of windows, unless --at lists them."""


def run(argv: list[str]) -> int:
    """Prints the plan of a run; unknown options are settings of the run."""
    parser = SettingsParser(prog="torchladder plan", description=__doc__, epilog=EPILOG)
    add = parser.add_argument
    add("--json", action="store_true", help="print one JSON object and nothing else")
    add("--at", default="", metavar="STEPS", help="steps whose windows to show: 0,1000,65280")
    add("--plot", type=Path, metavar="FILE", help="plot the windows over the run (.png, .svg, .pdf)")
    add("--plot-pipeline", type=Path, metavar="FILE", help="plot the schedule of the pipeline (.png, .svg, .pdf)")
    add("--world-size", type=int, default=1, metavar="N", help="number of ranks; they need not exist (default: 1)")
    add("--gpu-memory", metavar="SIZE", help="memory of one GPU, such as 80GiB; fail if the run needs more")
    add("--tokens-per-second", type=float, metavar="N", help="of all ranks at full context: adds the hours of the run")
    add("--measure", action="store_true", help="time a few steps on this machine instead of --tokens-per-second")
    text = "with --tokens-per-second or --measure: adds the cost of the run"
    add("--gpu-hour-price", type=float, metavar="X", help=text)
    arguments, settings = parser.parse(argv)
    check_positive(arguments, "world_size", "tokens_per_second")
    price = arguments.gpu_hour_price
    require(price is None or price > 0, f"--gpu-hour-price {price}: must be above 0.")
    require(
        price is None or arguments.measure or arguments.tokens_per_second is not None,
        "--gpu-hour-price needs --tokens-per-second or --measure, from which the hours follow.",
    )
    is_known = arguments.measure and arguments.tokens_per_second is not None
    require(not is_known, "--measure and --tokens-per-second are two sources of one number: pass one of them.")
    plan = make_plan(config.load(settings), arguments.world_size)
    by_stage, traffic = _estimate_memory(plan, arguments.world_size, arguments.gpu_memory)
    memory, pipeline = max(by_stage, key=lambda memory: memory.total), pipeline_summary(plan, by_stage)
    if arguments.plot_pipeline:
        plot_schedule(arguments.plot_pipeline, plan)
    steps = _shown_steps(arguments.at, plan.steps)
    reads = data_use(plan.config, plan.batch, plan.schedule)
    phases, context = _phases(plan, reads.usage), final_context(plan, reads)
    measured = measure_speed(plan, arguments.world_size) if arguments.measure else None
    speed = measured.full_context_tokens_per_second(plan) if measured else arguments.tokens_per_second
    costs = _costs(plan, arguments.world_size, speed, price)
    if arguments.plot:
        ladders = [
            plots.Ladder(one.layer_type, one.layers, one.masks, plan.windows[one.layer_type])
            for one in plan.layer_types
        ]
        seq_len = plan.config.training.seq_len
        plots.plot_curriculum(arguments.plot, plan.steps, ladders, seq_len, plan.full_context_step, plan.saved)
    if arguments.json:
        bytes_per_rank = {
            "memory_per_rank": dataclasses.asdict(memory),
            "sent_per_rank_and_step": dataclasses.asdict(traffic),
        }
        found = {"phases": phases, "final_context": context} | pipeline
        found |= {"measured": dataclasses.asdict(measured)} if measured else {}
        print(json.dumps(_summary(plan, steps) | found | bytes_per_rank | costs))
        return 0
    print("\n".join(summary_lines(plan)))
    print(f"attention   {plan.attention_share:.1%} of the FLOPs at full context")
    print(f"ranks       {arguments.world_size:,}: {plan.degrees}")
    print(f"memory      {_gib(memory.total)} per rank: {_breakdown(memory)}")
    print(f"sent        {_gib(sum(dataclasses.astuple(traffic)))} per rank and step: {_breakdown(traffic)}")
    print_pipeline(pipeline)
    if measured:
        print(f"measured    {measured.line()}")
    _print_costs(plan, costs)
    _print_windows(plan, steps)
    _print_phases(phases)
    print_final_context(context)
    if reads.unknown:
        print(f"data        epochs not counted: {reads.unknown}")
    for path in filter(None, (arguments.plot, arguments.plot_pipeline)):
        print(f"wrote {path}")
    return 0


def _estimate_memory(plan: Plan, ranks: int, limit: str | None) -> tuple[list[RankMemory], Traffic]:
    """Shards the model on a fake process group; returns the bytes that a rank of each stage holds, and sends per step.

    Raises:
        ConfigError: a rank holds more than the limit; the message lists the nearest layouts that fit.
    """
    max_bytes = _parse_bytes(limit) if limit else None
    with fake_ranks.fake_process_group(ranks):
        estimator = MemoryEstimator(plan)
        by_stage, traffic = estimator.memory_of_stages(), estimate_traffic(estimator)
        memory = max(by_stage, key=lambda memory: memory.total)
        if max_bytes is None or memory.total <= max_bytes:
            return by_stage, traffic
        fitting = layout_search.find_fitting(estimator, max_bytes)
    lines = [f"a rank needs {_gib(memory.total)}, more than --gpu-memory {limit}: {_breakdown(memory)}."]
    lines.append("Nearest layouts that fit:" if fitting else f"No layout of {ranks} ranks fits: use more ranks.")
    for layout, needed in fitting:
        settings = " ".join(f"--{key} {value}" for key, value in layout_search.changes(estimator, layout).items())
        lines.append(f"  {_gib(needed.total)} with {settings}")
    raise ConfigError("\n".join(lines))


def _parse_bytes(size: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?(GiB|GB|MiB|MB)", size)
    if not match:
        raise ConfigError(f"--gpu-memory {size}: must be a number with GiB, GB, MiB or MB, for example 80GiB.")
    return int(float(match[1]) * {"GiB": 2**30, "GB": 10**9, "MiB": 2**20, "MB": 10**6}[match[2]])


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"


def _breakdown(sizes: RankMemory | Traffic) -> str:
    return ", ".join(f"{name} {_gib(size)}" for name, size in dataclasses.asdict(sizes).items() if size) or "nothing"


def _shown_steps(at: str, total: int) -> list[int]:
    """Returns the steps that ``--at`` lists, by default ``NUM_SHOWN_STEPS`` from the first to the last."""
    if not at:
        return sorted({round(i * (total - 1) / (NUM_SHOWN_STEPS - 1)) for i in range(NUM_SHOWN_STEPS)})
    try:
        steps = [int(step) for step in at.split(",")]
    except ValueError:
        raise ConfigError(f"--at {at}: must be steps with commas between them, for example 0,1000,65280.") from None
    for step in steps:
        if not 0 <= step < total:
            raise ConfigError(f"--at {step}: the run has the steps 0 to {total - 1}.")
    return steps


def _summary(plan: Plan, steps: list[int]) -> dict[str, Any]:
    return {
        "steps": plan.steps,
        "tokens_per_step": plan.tokens_per_step,
        "tokens": plan.num_tokens,
        "parameters": plan.num_parameters,
        "flops": plan.flops,
        "flops_full_context": plan.flops_full_context,
        "saved": plan.saved,
        "attention_saved": plan.attention_saved,
        "attention_share": plan.attention_share,
        "full_context_step": plan.full_context_step,
        "state_bytes_per_rank": plan.state_bytes,
        "optimizer_groups": [group.summary() for group in plan.optimizer_groups],
        "windows": {str(step): plan.schedule.window(step) for step in steps},
        "layer_types": [dataclasses.asdict(one) | {"saved": one.saved} for one in plan.layer_types],
        "layer_windows": {
            name: {str(step): plan.schedule.window(step, name) for step in steps} for name in _other_types(plan)
        },
        "global_batch_sizes": {str(first): rows for first, rows in plan.schedule.batch.stages},
    }


def _costs(plan: Plan, ranks: int, tokens_per_second: float | None, price: float | None) -> dict[str, float]:
    """Returns the bytes of a checkpoint, and the hours and the price of the run if they can be known.

    A step under a narrow window is assumed to run at the FLOP/s of one at full context.
    """
    weights = plan.num_parameters * getattr(torch, plan.config.training.dtype).itemsize
    costs: dict[str, float] = {"checkpoint_bytes": 3 * weights}  # with two moments
    if tokens_per_second:
        flops_per_second = tokens_per_second * plan.flops_full_context / plan.num_tokens
        costs["hours"] = plan.flops / flops_per_second / 3600
        costs["hours_full_context"] = plan.num_tokens / tokens_per_second / 3600
        if price:
            costs["cost"] = costs["hours"] * ranks * price
    return costs


def _print_costs(plan: Plan, costs: dict[str, float]) -> None:
    section = plan.config.checkpoint
    if section.enable:
        saved, size = -(-plan.steps // section.interval), costs["checkpoint_bytes"]
        kept = min(saved, section.keep_latest_k or saved)
        kept += plan.steps // section.keep_every if section.keep_every and kept < saved else 0
        print(f"disk        {_gib(size)} per checkpoint, {_gib(size * kept)} for at most {kept:,} at a time")
    if "hours" in costs:
        full = f"{costs['hours_full_context']:,.1f} with constant full context"
        price = f", {costs['cost']:,.0f} at this price" if "cost" in costs else ""
        print(f"time        {costs['hours']:,.1f} hours ({full}){price}")


def _other_types(plan: Plan) -> list[str]:
    """Returns the layer types of a model beside its first, full_attention."""
    return [one.layer_type for one in plan.layer_types[1:]]


def _phases(plan: Plan, usage: list[SourceUsage]) -> list[dict[str, Any]]:
    """Returns the first step of each phase, its length, the settings that hold in it, and what it reads."""
    batch = plan.schedule.batch
    starts = sorted({0, *plan.schedule.phase_steps, *(source.step for source in usage)})
    phases = []
    for step, end in zip(starts, [*starts[1:], plan.steps], strict=True):
        settings = {key: plan.schedule.override(key, step) for key in PHASE_SETTINGS}
        windows = plan.schedule.window_overrides(step)
        if len(windows) > 1:  # of several phases, each for another layer type
            settings["window"] = windows
        phases.append(
            {
                "step": step,
                "steps": end - step,
                "tokens": batch.tokens_before(end) - batch.tokens_before(step),
                "sets": {key: value for key, value in settings.items() if value is not None},
                "sources": [dataclasses.asdict(source) for source in usage if source.step == step],
            }
        )
    return phases


def _print_windows(plan: Plan, steps: list[int]) -> None:
    table = Table(box=None, header_style="bold")
    others = _other_types(plan)
    for name in ("step", "window", *others, "tokens seen"):
        table.add_column(name, justify="right")
    for step in steps:
        windows = [plan.schedule.window(step), *(plan.schedule.window(step, name) for name in others)]
        table.add_row(
            f"{step:,}", *(f"{window:,}" for window in windows), f"{plan.schedule.batch.tokens_before(step):,}"
        )
    Console().print(table)


def _print_phases(phases: list[dict[str, Any]]) -> None:
    table = Table(box=None, header_style="bold")
    for name in ("from step", "steps", "tokens", "source", "tokens read", "epochs"):
        if name == "source":  # folded on a narrow terminal; numbers are not
            table.add_column(name, min_width=12, overflow="fold")
        else:
            table.add_column(name, justify="right", no_wrap=True)
    for phase in phases:
        cells = [f"{phase[key]:,}" for key in ("step", "steps", "tokens")]
        if not phase["sources"]:
            table.add_row(*cells)
        for source in phase["sources"]:
            before, epochs = source["epochs_before"], source["epochs"]
            read = f"{before:.2f} to {before + epochs:.2f}" if epochs else "-"
            table.add_row(*cells, source["source"], f"{source['tokens']:,}", read)
            cells = [""] * len(cells)
    Console().print(table)
    for phase in phases:
        # The table shows in tokens what the weights say.
        sets = {key: value for key, value in phase["sets"].items() if key != "source_weights" or not phase["sources"]}
        if sets:
            settings = ", ".join(f"{key} {value}" for key, value in sets.items())
            print(f"phase       from step {phase['step']:,}: {settings}")

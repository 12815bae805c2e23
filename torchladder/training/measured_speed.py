"""Times a few steps of a run on this machine, for ``torchladder plan --measure``; the run's folder is not touched."""

from __future__ import annotations

import logging
import os
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

from torchladder.checkpoint import CheckpointConfig
from torchladder.config import Config, SamplesConfig
from torchladder.distributed.ranks import destroy_distributed, init_distributed
from torchladder.profiling import ProfilingConfig
from torchladder.registry import require
from torchladder.training.run_plan import Plan
from torchladder.training.trainer import Trainer

MEASURED_STEPS = 5
"""Steps that are timed, after one that compiles and warms up."""


@dataclass(frozen=True)
class MeasuredSpeed:
    """The speed of the run's last step, under its widest window in most curricula.

    Attributes:
        steps: steps that were timed.
        window: their window.
        device: where they ran.
        seconds_per_step: their mean.
        tokens_per_second: tokens trained on per second.
        flops_per_second: FLOPs as executed per second.
    """

    steps: int
    window: int
    device: str
    seconds_per_step: float
    tokens_per_second: float
    flops_per_second: float

    def full_context_tokens_per_second(self, plan: Plan) -> float:
        """Returns the tokens per second at full context, at the FLOP/s that were measured."""
        return self.flops_per_second * plan.num_tokens / plan.flops_full_context

    def line(self) -> str:
        """Returns the measurement in a line of text."""
        return (
            f"{self.tokens_per_second:,.0f} tokens/s on 1 rank ({self.device}): {self.steps} steps of "
            f"{self.seconds_per_step:,.3f} s under the last window, {self.window:,}; random weights, without "
            "validation, samples and checkpoints"
        )


def measure_speed(plan: Plan, ranks: int) -> MeasuredSpeed:
    """Trains with the run's data, model and optimizer and the settings of its last step, in a temporary folder.

    Args:
        ranks: of the plan; only one can be measured.

    Raises:
        ConfigError: more ranks, a run too short, or settings that training would refuse.
    """
    require(
        ranks == int(os.environ.get("WORLD_SIZE", "1")) == 1,
        f"--measure times one rank on this machine, not the {ranks} of --world-size. Leave out --world-size, or train "
        "a few steps on these ranks and pass the tokens per second of all of them with --tokens-per-second.",
    )
    require(plan.steps >= 2, "--measure needs a run of at least 2 steps: one warms up.")
    steps = min(MEASURED_STEPS, plan.steps - 1)
    with tempfile.TemporaryDirectory() as folder:
        config = _without_outputs(plan.config, folder)
        log = logging.getLogger("torchladder")
        level = log.level
        log.setLevel(logging.WARNING)  # what a run says at its start is what the plan prints
        try:
            world = init_distributed(config.comm, Path(folder))
            trainer = Trainer(replace(plan, config=config), world)
            with trainer.metrics:
                _train_last_step(trainer, plan)
                before, begin = trainer.metrics.progress, time.perf_counter()
                for _ in range(steps):
                    _train_last_step(trainer, plan)
                seconds = time.perf_counter() - begin
                after = trainer.metrics.progress
                trainer.checkpointer.close()
        finally:
            destroy_distributed()
            log.setLevel(level)
    return MeasuredSpeed(
        steps=steps,
        window=plan.schedule.window(plan.steps - 1),
        device=str(world.device),
        seconds_per_step=seconds / steps,
        tokens_per_second=(after["tokens"] - before["tokens"]) / seconds,
        flops_per_second=(after["flops"] - before["flops"]) / seconds,
    )


def _without_outputs(config: Config, folder: str) -> Config:
    """Returns the settings of the run with all that it writes in another folder, or off."""
    return replace(
        config,
        job=replace(config.job, dump_folder=folder, description="", print_config=False),
        checkpoint=CheckpointConfig(),  # neither resumes nor reads weights, whose values do not matter here
        metrics=replace(
            config.metrics,
            enable_tensorboard=False,
            enable_wandb=False,
            energy_country="",
            outputs=[],
            disable_progress_bar=True,
        ),
        profiling=ProfilingConfig(),
        samples=SamplesConfig(),
        validation=replace(config.validation, enable=False),
    )


def _train_last_step(trainer: Trainer, plan: Plan) -> None:
    """Trains the run's last step on the next rows; it reports, so that the device has finished when it returns."""
    trainer.step = plan.steps - 1
    trainer.train_step()

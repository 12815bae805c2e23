"""The data loaders of a run, how many steps its epochs take, and what it reads of each source."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

from torchladder import data
from torchladder.config import Config
from torchladder.data.dataloader import SizedLoader, SourceUsage
from torchladder.registry import ConfigError
from torchladder.schedule import Schedule
from torchladder.training.batch_sizes import BatchSizes

DEFAULT_STEPS = 10_000
"""Optimizer steps of a run that sets neither steps nor epochs."""


def build_loader(
    config: Config,
    batch: BatchSizes,
    schedule: Schedule | None = None,
    split: str = "train",
    tokenizer: data.Tokenizer | None = None,
    dp_rank: int = 0,
) -> data.BaseDataLoader:
    """Builds the data loader of one data-parallel rank.

    Args:
        config: the settings of the run.
        batch: how its rows are divided.
        schedule: of the run; None to measure the data without its phases.
        split: ``train`` or ``validation``.
        tokenizer: of the run.
        dp_rank: the data-parallel rank.

    Raises:
        ConfigError: the data is missing, damaged or not enough, or the loader cannot change its weights.
    """
    changes = schedule.overrides("source_weights") if schedule else {}
    if changes and "weight_changes" not in inspect.signature(data.registry.get(config.data.name)).parameters:
        raise ConfigError(
            f"phases: source_weights: the data loader {config.data.name!r} does not mix sources; the loader rows does."
        )
    train = split == "train"
    return data.registry.build(
        config.data,
        split=split,
        tokenizer=tokenizer,
        seq_len=config.training.seq_len,
        dp_rank=dp_rank,
        dp_degree=batch.data_parallel,
        local_batch_size=batch.micro_batch_size,
        global_batch_size=batch.global_batch_size if train else batch.micro_batch_size * batch.data_parallel,
        steps=None if config.training.steps == -1 else config.training.steps,
        weight_changes={step: changes.get(step) for step in schedule.starts} if schedule else {},
    )


def with_steps(config: Config, batch: BatchSizes) -> Config:
    """Returns the settings with ``training.steps`` known; only ``training.epochs`` opens the data to find out.

    Raises:
        ConfigError: epochs, and a loader that does not know how long one is.
    """
    epochs, steps = config.training.epochs, config.training.steps
    if epochs is not None:
        loader = build_loader(config, batch, tokenizer=data.build_tokenizer(config.tokenizer, config.data))
        if not isinstance(loader, SizedLoader):
            raise ConfigError(f"the data loader {config.data.name!r} has no epochs: set training.steps.")
        steps = loader.steps_for(epochs)
    steps = DEFAULT_STEPS if steps == -1 else steps
    return replace(config, training=replace(config.training, steps=steps, epochs=None))


def check_data_suffices(config: Config, batch: BatchSizes, schedule: Schedule) -> None:
    """Opens the data of a run if not all of its sources repeat.

    Raises:
        ConfigError: a source runs out before the last step.
    """
    if not _repeats(config.data):
        tokenizer = data.build_tokenizer(config.tokenizer, config.data)
        build_loader(config, batch, schedule, tokenizer=tokenizer)


def source_usage(config: Config, batch: BatchSizes, schedule: Schedule) -> list[SourceUsage]:
    """Returns what each phase reads of each source, provided that this takes no longer than reading indices.

    Raises:
        ConfigError: the data is not here, or not tokenized yet.
    """
    sources = getattr(config.data, "sources", [])
    if not sources:
        raise ConfigError(f"the data loader {config.data.name!r} cannot tell in advance.")
    if _repeats(config.data):  # otherwise all of it has been tokenized already, to see whether it suffices
        for source in sources:
            source.check()
            if not source.is_tokens:
                raise ConfigError(f"{source.title} is raw text, tokenized when a run first needs it.")
    tokenizer = data.build_tokenizer(config.tokenizer, config.data)
    loader = build_loader(config, batch, schedule, tokenizer=tokenizer)
    return loader.usage() if isinstance(loader, SizedLoader) else []


def _repeats(section: Any) -> bool:
    repeat = getattr(section, "repeat", True)
    return all(repeat if source.repeat is None else source.repeat for source in getattr(section, "sources", []))

"""What a run reads: how a step's rows are divided, its tokenizer, its loaders, and how long the data makes it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torchladder import data
from torchladder.config import Config
from torchladder.data.dataloader import SizedLoader, SourceUsage
from torchladder.registry import ConfigError

STEPS = 10_000
"""Optimizer steps of a run that says neither steps nor epochs."""


@dataclass(frozen=True)
class BatchSizes:
    """How the rows of one step are divided: ``rows = data_ranks * local * accumulation``."""

    rows: int
    local: int
    accumulation: int
    data_ranks: int


def batch_sizes(config: Config, data_ranks: int) -> BatchSizes:
    """Divides a step's rows over ranks and micro-batches.

    Raises:
        ConfigError: they do not divide; the message names the nearest sizes that would.
    """
    local, rows = config.training.local_batch_size, config.training.global_batch_size
    at_once = local * data_ranks
    if rows == -1:
        rows = at_once
    if rows % at_once:
        below, above = rows // at_once * at_once, -(-rows // at_once) * at_once
        raise ConfigError(
            f"training.global_batch_size = {rows} is not a multiple of training.local_batch_size {local} x "
            f"{data_ranks} data-parallel ranks = {at_once}. Nearest: {below or above} or {above}."
        )
    return BatchSizes(rows, local, rows // at_once, data_ranks)


def loader(
    config: Config, batch: BatchSizes, split: str, tokenizer: data.Tokenizer | None, rank: int = 0
) -> data.BaseDataLoader:
    """Returns one data-parallel rank's rows of a split.

    Raises:
        ConfigError: the data is not there, is damaged, or is not enough.
    """
    return data.registry.build(
        config.data,
        split=split,
        tokenizer=tokenizer,
        seq_len=config.training.seq_len,
        dp_rank=rank,
        dp_degree=batch.data_ranks,
        local_batch_size=batch.local,
        global_batch_size=batch.rows if split == "train" else batch.local * batch.data_ranks,
        steps=None if config.training.steps == -1 else config.training.steps,
    )


def resolve(config: Config, batch: BatchSizes) -> Config:
    """Returns the settings with the number of steps, which the data decides where epochs are asked for.

    Opens the data, and prepares raw text, only if the run depends on how much there is.

    Raises:
        ConfigError: epochs of a loader that does not know how long one is, or a source that runs out.
    """
    epochs, steps = config.training.epochs, config.training.steps
    if epochs is not None:
        # Phases may begin at a share of steps that are yet to be found; how much data there is does not hang on them.
        section = replace(config.data, phases=[]) if hasattr(config.data, "phases") else config.data
        found = loader(
            replace(config, data=section), batch, "train", data.build_tokenizer(config.tokenizer, config.data)
        )
        if not isinstance(found, SizedLoader):
            raise ConfigError(f"the loader {config.data.name!r} does not know what an epoch is: set training.steps.")
        steps = found.steps_for(epochs)
    steps = STEPS if steps == -1 else steps
    config = replace(config, training=replace(config.training, steps=steps, epochs=None))
    if not _repeats(config.data):
        loader(config, batch, "train", data.build_tokenizer(config.tokenizer, config.data))  # refuses what runs out
    return config


def usage(config: Config, batch: BatchSizes) -> list[SourceUsage]:
    """Returns what each phase reads of each source, if that takes no longer than a look at indices.

    Raises:
        ConfigError: the data is not here, or not tokens yet.
    """
    sources = getattr(config.data, "sources", [])
    if not sources:
        raise ConfigError(f"the loader {config.data.name!r} does not know before it reads.")
    if _repeats(config.data):  # otherwise all was prepared to find that it is enough
        for source in sources:
            source.check()
            if not source.is_tokens:
                raise ConfigError(f"{source.title} is raw text, tokenized when a run first needs it.")
    found = loader(config, batch, "train", data.build_tokenizer(config.tokenizer, config.data))
    return found.usage() if isinstance(found, SizedLoader) else []


def _repeats(section: Any) -> bool:
    whole = getattr(section, "repeat", True)
    return all(whole if source.repeat is None else source.repeat for source in getattr(section, "sources", []))

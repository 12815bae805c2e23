"""The data of a run: how a step's rows are divided, its loaders, its length in epochs, what it reads of each source."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from torchladder import data, models
from torchladder.batch_schedule import BatchSchedule
from torchladder.config import Config
from torchladder.data.dataloader import KnowsDocuments, SizedLoader, SourceUsage
from torchladder.data.file_patterns import MissingFilesError
from torchladder.registry import ConfigError, require
from torchladder.schedule import Schedule

DEFAULT_STEPS = 10_000
"""Optimizer steps of a run that sets neither steps nor epochs."""


@dataclass(frozen=True)
class BatchSizes:
    """The rows of one step: ``global_batch_size = dp_degree * local_batch_size * accumulation_steps``.

    A step of another size (``BatchSchedule``) differs in its micro-batches alone.
    """

    global_batch_size: int
    local_batch_size: int
    accumulation_steps: int
    dp_degree: int

    def micro_batches(self, rows: int) -> int:
        """Returns the micro-batches of each rank in a step of ``rows`` rows."""
        return rows // (self.local_batch_size * self.dp_degree)


def batch_sizes(config: Config, dp_degree: int) -> BatchSizes:
    """Divides the rows of a step over data-parallel ranks and micro-batches.

    Raises:
        ConfigError: they do not divide; the message has the nearest sizes that do.
    """
    micro, rows = config.training.local_batch_size, config.training.global_batch_size
    at_once = micro * dp_degree
    rows = at_once if rows == -1 else rows
    _check_divides("training.global_batch_size =", rows, micro, dp_degree)
    return BatchSizes(rows, micro, rows // at_once, dp_degree)


def check_batch_schedule(config: Config, batch: BatchSizes, schedule: BatchSchedule) -> None:
    """Checks that every size of the batch divides over data-parallel ranks and micro-batches.

    Raises:
        ConfigError: one does not; the message has the nearest sizes that do.
    """
    warmup = config.batch_size_warmup.schedule(batch.global_batch_size, schedule.seq_len)
    for first, rows in schedule.stages:
        name = "batch_size_warmup.initial_batch_size ="
        if (first, rows) not in warmup.stages:
            name = "phases.global_batch_size ="
        elif first:
            name = f"batch_size_warmup: the batch from step {first:,} on ="
        _check_divides(name, rows, batch.local_batch_size, batch.dp_degree)


def _check_divides(name: str, rows: int, local_batch_size: int, dp_degree: int) -> None:
    at_once = local_batch_size * dp_degree
    below, above = rows // at_once * at_once, -(-rows // at_once) * at_once
    require(
        below == above,
        f"{name} {rows} is not a multiple of training.local_batch_size {local_batch_size} x "
        f"{dp_degree} data-parallel ranks = {at_once}. Nearest: {below or above} or {above if below else 2 * above}.",
    )


def build_checked_tokenizer(config: Config) -> data.Tokenizer | None:
    """Builds the tokenizer of a run; None if it has none.

    Raises:
        ConfigError: it has more tokens than the model's vocabulary.
    """
    tokenizer = data.build_tokenizer(config.tokenizer, config.data)
    vocab_size = models.resolve(config.model).vocab_size
    if tokenizer is not None and tokenizer.vocab_size > vocab_size:
        raise ConfigError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, more than model.vocab_size = {vocab_size}: "
            f"set model.vocab_size to {tokenizer.vocab_size} or more."
        )
    return tokenizer


def build_loader(
    config: Config,
    batch: BatchSizes,
    schedule: Schedule | None = None,
    split: str = "train",
    tokenizer: data.Tokenizer | None = None,
    dp_rank: int = 0,
    check_only: bool = False,
) -> data.BaseDataLoader:
    """Builds the data loader of one data-parallel rank.

    Args:
        schedule: of the run; None to measure the data without its phases.
        split: ``train`` or ``validation``.
        tokenizer: of the run; None builds it.
        check_only: check the settings and look for the files; the loader cannot be read.

    Raises:
        ConfigError: the data is missing, damaged or not enough, or the loader cannot change its weights or its batch.
    """
    if tokenizer is None and not check_only:
        tokenizer = build_checked_tokenizer(config)
    parameters = inspect.signature(data.registry.get(config.data.name)).parameters
    rows = schedule.batch if schedule else config.batch_schedule(batch.global_batch_size)
    if rows.varies and "batch_schedule" not in parameters:
        raise ConfigError(
            f"the data loader {config.data.name!r} reads the same number of rows in every step (it has no argument "
            "batch_schedule): remove batch_size_warmup and the global_batch_size of phases."
        )
    changes = schedule.overrides("source_weights") if schedule else {}
    if changes and "weight_changes" not in parameters:
        raise ConfigError(
            f"phases: source_weights: the data loader {config.data.name!r} does not mix sources; the loader rows does."
        )
    micro_batches = batch.accumulation_steps if split == "train" else 1
    return data.registry.build(
        config.data,
        split=split,
        tokenizer=tokenizer,
        vocab_size=models.resolve(config.model).vocab_size,
        seq_len=config.training.seq_len,
        dp_rank=dp_rank,
        dp_degree=batch.dp_degree,
        local_batch_size=batch.local_batch_size,
        global_batch_size=batch.local_batch_size * batch.dp_degree * micro_batches,
        batch_schedule=rows if split == "train" else None,
        steps=None if config.training.steps == -1 else config.training.steps,
        check_only=check_only,
        weight_changes={step: changes.get(step) for step in schedule.phase_steps} if schedule else {},
    )


def with_steps(config: Config, batch: BatchSizes) -> Config:
    """Returns the settings with ``training.steps`` known; only ``training.epochs`` opens the data to find out.

    Raises:
        ConfigError: epochs, and a loader that does not know how long one is.
    """
    epochs, steps = config.training.epochs, config.training.steps
    if epochs is not None:
        check_batch_schedule(config, batch, config.batch_schedule(batch.global_batch_size))
        loader = build_loader(config, batch)
        if not isinstance(loader, SizedLoader):
            raise ConfigError(f"the data loader {config.data.name!r} has no epochs: set training.steps.")
        steps = loader.steps_for(epochs)
    steps = DEFAULT_STEPS if steps == -1 else steps
    return replace(config, training=replace(config.training, steps=steps, epochs=None))


def all_sources_repeat(section: Any) -> bool:
    """Returns whether no source of ``[data]`` can run out before the last step."""
    repeat = getattr(section, "repeat", True)
    return all(repeat if source.repeat is None else source.repeat for source in getattr(section, "sources", []))


class DataUse(NamedTuple):
    """What a run reads.

    Attributes:
        usage: what each phase reads of each source.
        lengths: label of each source -> (documents,) tokens in each of its documents.
        unknown: why the others are empty, if they are.
    """

    usage: list[SourceUsage]
    lengths: dict[str, np.ndarray]
    unknown: str = ""


def data_use(config: Config, batch: BatchSizes, schedule: Schedule) -> DataUse:
    """Checks the data as when training starts; returns what the run reads.

    Text is not tokenized, and files need not be on this machine: then nothing is returned, with the reason.

    Raises:
        ConfigError: the settings do not fit the data, or the data is damaged.
    """
    if "check_only" not in inspect.signature(data.registry.get(config.data.name)).parameters:
        return DataUse([], {}, f"the data loader {config.data.name!r} is opened when training starts.")
    sources, splits = getattr(config.data, "sources", []), ("train", "validation")[: 1 + config.validation.enable]
    if not sources:
        return DataUse([], {}, "data.sources is empty: set it before training.")
    try:
        for split in splits:
            build_loader(config, batch, schedule, split, check_only=True)
        text = next((source for source in sources if not source.is_tokens), None)
        # Where a source may run out, the plan has tokenized everything already.
        tokenizes = text is not None and all_sources_repeat(config.data)
        trains_tokenizer = text is not None and not getattr(config.tokenizer, "path", "without a file")
        tokenizer = None if tokenizes and trains_tokenizer else build_checked_tokenizer(config)
        if text is not None and config.tokenizer.name == "none":
            raise ConfigError(f"the source {text.title} is raw text: it needs a tokenizer.")
        if text is not None and tokenizes:
            return DataUse([], {}, f"{text.title} is raw text, tokenized when a run first needs it.")
        loader = build_loader(config, batch, schedule, tokenizer=tokenizer)
    except MissingFilesError as error:
        return DataUse([], {}, str(error))
    usage = loader.usage() if isinstance(loader, SizedLoader) else []
    return DataUse(usage, loader.document_lengths() if isinstance(loader, KnowsDocuments) else {})

"""Splits the input of ``torchladder prepare`` into tasks: a pure function of the files, whatever runs the tasks."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torchladder.data.formats.indexed import prefix_of
from torchladder.data.prepare.document_encoder import DocumentEncoder
from torchladder.data.prepare.text_counts import MAX_UNKNOWN_FRACTION, check_max_unknown_fraction
from torchladder.data.text import file_formats
from torchladder.data.text.document_parsers import FileSlice
from torchladder.data.text.document_reader import DocumentReader, OnError
from torchladder.data.text.text_files import match_text_files
from torchladder.registry import require

TASK_VERSION = 2
"""Increment when the same text and tokenizer produce other parts: unfinished parts of older versions are ignored."""
TARGET_TASKS = 1024
"""Number of tasks to split the input into, within the limits below."""
MIN_TASK_BYTES, MAX_TASK_BYTES = 4 << 20, 64 << 20
MAX_TASK_FILES = 1024


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """What to tokenize, and how.

    Attributes:
        inputs: files, folders, globs.
        output: prefix of the dataset; a shard's index is appended to it.
        encoder: turns texts into tokens.
        tokenizer: the tokenizer's name for the metadata.
        text_key: the text's key in a line of a .jsonl, or its column in a table.
        on_error: how to handle documents that cannot be read.
        shard: (index from 0, number of shards) of the input to prepare; None prepares all of it.
        overwrite: whether to replace a dataset that was prepared with other settings.
        part_bytes: bytes of input per task; None chooses by the size of the input. Does not change the output.
        max_unknown_fraction: of the tokens; more is an error. Does not change the output.
        validation_fraction: of the documents, held out by the rule of ``data.validation_fraction``.
        split: which documents to prepare: ``train``, without those held out, or ``validation``, only those.
    """

    inputs: list[str]
    output: str
    encoder: DocumentEncoder
    tokenizer: str = ""
    text_key: str = "text"
    on_error: OnError = "error"
    shard: tuple[int, int] | None = None
    overwrite: bool = False
    part_bytes: int | None = None
    max_unknown_fraction: float = MAX_UNKNOWN_FRACTION
    validation_fraction: float = 0.0
    split: Literal["train", "validation"] = "train"

    def __post_init__(self) -> None:
        require(bool(self.inputs) and all(self.inputs), "there is no input: name files, folders or globs.")
        index, count = self.shard or (0, 1)
        require(0 <= index < count, f"shard is {index}/{count}; N shards are numbered 0/N to N-1/N.")
        in_range = self.part_bytes is None or self.part_bytes > 0
        require(in_range, f"--part-bytes {self.part_bytes}: must be 1 or more.")
        check_max_unknown_fraction(self.max_unknown_fraction, "--max-unknown-fraction")
        fraction = self.validation_fraction
        require(0 <= fraction < 1, f"--validation-fraction {fraction}: must be 0 or more and below 1.")
        DocumentReader(self.text_key, self.on_error)  # checks both

    @property
    def prefix(self) -> str:
        """The output's prefix, with ``-validation`` for held-out documents and the shard's index if there is one."""
        prefix = prefix_of(self.output) + ("-validation" if self.split == "validation" else "")
        return prefix if self.shard is None else f"{prefix}-{self.shard[0]:05}-of-{self.shard[1]:05}"


@dataclass(frozen=True)
class PrepareTask:
    """Documents that become one part.

    Attributes:
        key: hash of everything that determines the part.
        slices: of files, in order.
        names: of each slice's file within the input, as a source of text names it.
        stamps: (size, modification time in ns) of each slice's file.
    """

    key: str
    slices: tuple[FileSlice, ...]
    names: tuple[str, ...]
    stamps: tuple[tuple[int, int], ...]

    @property
    def num_bytes(self) -> int:
        return sum(part.size for part in self.slices)


def expand_inputs(inputs: Sequence[str]) -> dict[Path, str]:
    """Returns the files that paths, folders and globs name, each once with its name, the matches of each in order.

    Raises:
        ConfigError: a pattern matches no file.
    """
    return match_text_files(inputs)


def split_into_tasks(config: PrepareConfig, files: Mapping[Path, str]) -> list[PrepareTask]:
    """Splits files into tasks of about equal size."""
    stats = {path: path.stat() for path in files}
    total = sum(stat.st_size for stat in stats.values())
    target = config.part_bytes or min(max(total // TARGET_TASKS, MIN_TASK_BYTES), MAX_TASK_BYTES)
    groups: list[list[FileSlice]] = [[]]
    group_bytes = 0
    for path in files:
        for part in file_formats.split_file(path, stats[path].st_size, target):
            if group_bytes >= target or len(groups[-1]) == MAX_TASK_FILES:
                groups.append([])
                group_bytes = 0
            groups[-1].append(part)
            group_bytes += part.size
    encoder = config.encoder
    settings = [TASK_VERSION, encoder.tokenizer.fingerprint, encoder.special_ids, config.text_key]
    settings += [config.split, config.validation_fraction] if config.validation_fraction else []
    tasks = []
    for group in filter(None, groups):
        stamps = tuple(file_stamp(stats[part.path]) for part in group)
        places = [(os.path.abspath(part.path), part.begin, part.end) for part in group]
        content: list[tuple[object, ...]] = [(*place, stamp) for place, stamp in zip(places, stamps, strict=True)]
        names = tuple(files[part.path] for part in group)
        content += [names] if config.validation_fraction else []  # they decide which documents are held out
        key = hashlib.sha256(json.dumps([*settings, content]).encode("utf-8", "surrogateescape")).hexdigest()[:32]
        tasks.append(PrepareTask(key, tuple(group), names, stamps))
    return tasks


def file_stamp(stat: os.stat_result) -> tuple[int, int]:
    """Returns the size and the modification time in ns, which tell whether a file has changed."""
    return stat.st_size, stat.st_mtime_ns


def select_shard(tasks: list[PrepareTask], shard: tuple[int, int] | None) -> list[PrepareTask]:
    """Returns the tasks of a shard: consecutive ones, so that the shards in order are the whole output."""
    if shard is None:
        return tasks
    index, count = shard
    total, before, chosen = sum(task.num_bytes for task in tasks), 0, []
    for task in tasks:
        # The middle of a task decides: each task is in exactly one shard, and shards are of about equal size.
        if min((2 * before + task.num_bytes) * count // max(2 * total, 1), count - 1) == index:
            chosen.append(task)
        before += task.num_bytes
    return chosen

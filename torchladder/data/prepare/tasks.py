"""The input of a preparation, cut into tasks: the same for the same files, whoever does them, in whichever order."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torchladder.data.formats.indexed import prefix_of
from torchladder.data.prepare.document_encoder import DocumentEncoder
from torchladder.data.text import file_formats, sources
from torchladder.data.text.document_reader import DocumentReader, OnError
from torchladder.data.text.file_formats import FileSlice
from torchladder.registry import ConfigError

FORMAT = 1
"""Raised when the same text and tokenizer would give other parts, so that unfinished older ones are left alone."""
TASKS = 1024
"""Tasks that the input is cut into, as far as they stay within ``SMALLEST`` and ``LARGEST`` bytes."""
SMALLEST, LARGEST = 4 << 20, 64 << 20
FILES = 1024
"""Small files that one task reads at most."""


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """What is to be prepared, and how.

    Attributes:
        inputs: files, folders, globs.
        output: prefix of the pair; a shard adds its number.
        framing: how a text becomes tokens.
        tokenizer: what the tokenizer is called in the metadata.
        text_key: the text's key in a line of a .jsonl, or its column in a table.
        on_error: what a document that cannot be read does.
        shard: the part of the input to prepare, (number from 0, how many); None is all.
        overwrite: whether to replace a pair that was prepared otherwise.
        part_bytes: bytes of input in a task; None suits the input. The output does not depend on it.
    """

    inputs: list[str]
    output: str
    framing: DocumentEncoder
    tokenizer: str = ""
    text_key: str = "text"
    on_error: OnError = "error"
    shard: tuple[int, int] | None = None
    overwrite: bool = False
    part_bytes: int | None = None

    def __post_init__(self) -> None:
        if not self.inputs or not all(self.inputs):
            raise ConfigError("there is no input: name files, folders or globs.")
        if self.shard is not None and not 0 <= self.shard[0] < self.shard[1]:
            raise ConfigError(f"shard is {self.shard[0]}/{self.shard[1]}; shards of n are 0/n to n-1/n.")
        if self.part_bytes is not None and self.part_bytes < 1:
            raise ConfigError(f"part_bytes is {self.part_bytes}; it is 1 at least.")
        DocumentReader(self.text_key, self.on_error)

    @property
    def prefix(self) -> str:
        """The pair's prefix: of a shard, the output's with the shard's number."""
        own = prefix_of(self.output)
        return own if self.shard is None else f"{own}-{self.shard[0]:05}-of-{self.shard[1]:05}"


@dataclass(frozen=True)
class PrepareTask:
    """Documents that become one part.

    Attributes:
        key: a hash of all that the part follows from.
        stretches: of files, in order.
        stamps: size and time of each stretch's file.
    """

    key: str
    stretches: tuple[FileSlice, ...]
    stamps: tuple[tuple[int, int], ...]

    @property
    def size(self) -> int:
        return sum(stretch.size for stretch in self.stretches)


def expand_inputs(inputs: Sequence[str]) -> list[Path]:
    """Lists the files that paths, folders and globs name, the matches of each in sorted order.

    Raises:
        ConfigError: a pattern names no file, or two patterns name the same file.
    """
    files: dict[str, Path] = {}
    for pattern in inputs:
        for _, path in sources.expand(pattern):
            if os.path.abspath(path) in files:
                raise ConfigError(f"{path} is named by two inputs; its documents would be in the output twice.")
            files[os.path.abspath(path)] = path
    return list(files.values())


def split_into_tasks(preparation: PrepareConfig, files: Sequence[Path]) -> list[PrepareTask]:
    """Cuts the input into tasks, the same whoever does them."""
    stats = {path: path.stat() for path in files}
    total = sum(stat.st_size for stat in stats.values())
    target = preparation.part_bytes or min(max(total // TASKS, SMALLEST), LARGEST)
    framing = preparation.framing
    settings = [FORMAT, framing.tokenizer.fingerprint, framing.ends, preparation.text_key]
    tasks: list[PrepareTask] = []
    stretches: list[FileSlice] = []
    size = 0

    def close() -> None:
        stamps = tuple((stats[stretch.path].st_size, stats[stretch.path].st_mtime_ns) for stretch in stretches)
        places = [
            (os.path.abspath(path), begin, end, stamp)
            for (path, begin, end, _), stamp in zip(stretches, stamps, strict=True)
        ]
        key = hashlib.sha256(json.dumps([*settings, places]).encode("utf-8", "surrogateescape")).hexdigest()[:32]
        tasks.append(PrepareTask(key, tuple(stretches), stamps))
        stretches.clear()

    for path in files:
        for stretch in file_formats.split(path, stats[path].st_size, target):
            stretches.append(stretch)
            size += stretch.size
            if size >= target or len(stretches) == FILES:
                close()
                size = 0
    if stretches:
        close()
    return tasks


def select_shard(tasks: list[PrepareTask], shard: tuple[int, int] | None) -> list[PrepareTask]:
    """Returns the tasks of a shard: neighbours, so that shards one after the other are the whole."""
    if shard is None:
        return tasks
    number, count = shard
    total, before, mine = sum(task.size for task in tasks), 0, []
    for task in tasks:
        # By the middle of the task: every task is in exactly one shard, and shards are of equal size, about.
        if min((2 * before + task.size) * count // max(2 * total, 1), count - 1) == number:
            mine.append(task)
        before += task.size
    return mine

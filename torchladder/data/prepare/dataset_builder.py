"""Tokenizes text files into a .bin/.idx dataset with many processes, and continues where it was interrupted.

Each task writes a part, a small dataset named by a hash of everything that determines it, to ``PREFIX.parts``. When
all parts exist they are merged. A run that was killed at any moment therefore continues with the missing parts, and
the output is the same byte for byte whatever ran the tasks.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import filelock

from torchladder.data.formats.indexed import IndexedTokens, IndexedWriter, dtype_for
from torchladder.data.prepare import merging, metadata
from torchladder.data.prepare.document_encoder import DocumentEncoder, batch_by_chars
from torchladder.data.prepare.executor import Executor
from torchladder.data.prepare.metadata import DatasetMetadata
from torchladder.data.prepare.progress import PrepareProgress
from torchladder.data.prepare.tasks import (
    PrepareConfig,
    PrepareTask,
    expand_inputs,
    file_stamp,
    select_shard,
    split_into_tasks,
)
from torchladder.data.prepare.text_counts import TextCounts
from torchladder.data.sources import held_out
from torchladder.data.text.document_parsers import FileSlice
from torchladder.data.text.document_reader import (
    DocumentReader,
    OnError,
    document_location,
    numbers_before,
    summarize_skipped,
)
from torchladder.disk_errors import naming_path
from torchladder.registry import ConfigError, require


@dataclass(frozen=True, kw_only=True)
class PreparedPart:
    """The result of a task, and the content of ``<key>.json``.

    Attributes:
        key: of the task.
        pair: name of the part's .bin/.idx within the folder of parts.
        documents, tokens: number of each in the part.
        skipped: number of documents skipped or repaired, by reason.
        examples: file and line of the first such document, by reason.
        on_error: how documents that cannot be read were handled.
        text_counts: as in ``TextCounts``.
        checksums: SHA-256 of the ``bin`` and ``idx`` files.
    """

    key: str
    pair: str
    documents: int
    tokens: int
    skipped: dict[str, int] = field(default_factory=dict)
    examples: dict[str, str] = field(default_factory=dict)
    on_error: str = "error"
    text_counts: dict[str, Any] = field(default_factory=dict)
    checksums: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class PartWriter:
    """Writes the part of a task; an executor sends this object to its workers."""

    folder: Path
    encoder: DocumentEncoder
    text_key: str
    on_error: OnError
    validation_fraction: float
    split: str

    def __call__(self, task: PrepareTask) -> PreparedPart:
        reader = DocumentReader(self.text_key, self.on_error)
        # A unique name: a worker that was given up for lost may still be writing the same part.
        name, counts = f"{task.key}-{uuid.uuid4().hex[:8]}", TextCounts()
        with IndexedWriter(self.folder / name, dtype_for(self.encoder.tokenizer.vocab_size)) as writer:
            documents = self._documents(task, reader)
            for batch in batch_by_chars(documents, lambda document: document[2]):
                texts = [text for _, _, text in batch]
                encoded = self.encoder(texts, lambda n, batch=batch: document_location(*batch[n][:2]))  # type: ignore[misc]
                writer.extend(encoded.tokens, encoded.lengths)
                counts += encoded.counts
        for part, stamp in zip(task.slices, task.stamps, strict=True):
            unchanged = file_stamp(part.path.stat()) == stamp
            require(unchanged, f"{part.path} changed while it was being read; run the same command again.")
        prepared = PreparedPart(
            key=task.key,
            pair=name,
            documents=len(writer.lengths),
            tokens=sum(writer.lengths),
            skipped=dict(reader.skipped),
            examples=reader.examples,
            on_error=self.on_error,
            text_counts=dataclasses.asdict(counts),
            checksums=writer.checksums,
        )
        metadata.write_metadata(self.folder / task.key, prepared)
        return prepared

    def _documents(self, task: PrepareTask, reader: DocumentReader) -> Iterator[tuple[FileSlice, int | None, str]]:
        """Yields the documents of the split, each with its slice and its number there."""
        for part, name in zip(task.slices, task.names, strict=True):
            before = numbers_before(part) if self.validation_fraction else 0
            for number, text in reader.read(part):
                identity = name if number is None else f"{name}:{before + number}"
                if held_out(identity, self.validation_fraction) == (self.split == "validation"):
                    yield part, number, text


def prepare_held_out(config: PrepareConfig, executor: Executor) -> DatasetMetadata:
    """Prepares the held-out documents as PREFIX-validation; returns its metadata.

    Raises:
        ConfigError: as ``prepare_dataset``, or no document is held out.
    """
    done = prepare_dataset(dataclasses.replace(config, split="validation"), executor)
    require(
        done.documents > 0 or config.shard is not None,
        f"--validation-fraction {config.validation_fraction:g} holds out no document of this input: raise it.",
    )
    return done


def prepare_dataset(
    config: PrepareConfig, executor: Executor, files: Mapping[Path, str] | None = None
) -> DatasetMetadata:
    """Prepares a dataset, or continues an interrupted preparation; returns the dataset's metadata.

    Args:
        config: what to tokenize, and how.
        executor: runs the tasks.
        files: some of the files of the input, each with its name there; None for all.

    Raises:
        ConfigError: an input cannot be read, the output has other settings, or another process is preparing it.
    """
    files, tokenizer = expand_inputs(config.inputs) if files is None else files, config.encoder.tokenizer
    name_and_ids = {"name": config.tokenizer, "fingerprint": tokenizer.fingerprint, "vocab_size": tokenizer.vocab_size}
    wanted = DatasetMetadata(
        dtype=str(dtype_for(tokenizer.vocab_size)),
        tokenizer=name_and_ids | config.encoder.special_ids,
        text_key=config.text_key,
        on_error=config.on_error,
        shard=list(config.shard) if config.shard else None,
        sources=[{"path": str(path), "bytes": path.stat().st_size} for path in files],
        validation_fraction=config.validation_fraction,
        split=config.split,
    )
    with _lock_parts(config.prefix) as folder:
        done = _existing_output(config.prefix, wanted, config.overwrite)
        if done is None:
            tasks = select_shard(split_into_tasks(config, files), config.shard)
            parts = _make_parts(config, tasks, folder, executor)
            _check_unknown(config, TextCounts(**metadata.sum_text_counts(parts)))
            done = _merge_parts(wanted, config.prefix, folder, parts)
        shutil.rmtree(folder, ignore_errors=True)
        _check_unknown(config, TextCounts(**done.text_counts))  # it may have been accepted when it was prepared
    return done


def _existing_output(prefix: str, wanted: DatasetMetadata, overwrite: bool) -> DatasetMetadata | None:
    """Returns the metadata of an output that is complete and has the wanted settings; None if there is work to do."""
    index = Path(f"{prefix}.idx")
    found = metadata.read_metadata(prefix)
    if found is None:
        merge_was_interrupted = Path(f"{prefix}.parts", "merging").exists()
        if index.exists() and not merge_was_interrupted and not overwrite:
            raise ConfigError(f"{prefix}.bin already exists and has no metadata; --overwrite replaces it.")
        return None
    made = metadata.metadata_path(prefix).stat().st_mtime_ns
    newer = [source["path"] for source in wanted.sources if os.stat(source["path"]).st_mtime_ns > made]
    ours, theirs = wanted.settings(), found.settings()
    if not found.skipped:
        theirs["on_error"] = ours["on_error"]  # without an error it made no difference
    changed = [name for name in ours if ours[name] != theirs[name]] + [f"{path} is newer" for path in newer[:1]]
    if not changed and index.exists():
        return found
    if changed and not overwrite:
        raise ConfigError(f"{prefix} was prepared with other settings ({', '.join(changed)}); --overwrite replaces it.")
    return None


def _make_parts(
    config: PrepareConfig, tasks: list[PrepareTask], folder: Path, executor: Executor
) -> list[PreparedPart]:
    """Returns the part of each task in order; runs the tasks whose part does not exist yet."""
    done: dict[str, PreparedPart] = {}
    for task in tasks:
        path = metadata.metadata_path(folder / task.key)
        part = PreparedPart(**json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None
        if part and (part.on_error == config.on_error or not part.skipped):
            done[task.key] = part
    num_bytes = {task.key: task.num_bytes for task in tasks}
    writer = PartWriter(
        folder, config.encoder, config.text_key, config.on_error, config.validation_fraction, config.split
    )
    done_bytes = sum(num_bytes[key] for key in done)
    with PrepareProgress(Path(config.prefix).name, sum(num_bytes.values()), done_bytes) as progress:
        if done:
            progress.print(f"continuing: {len(done):,} of {len(tasks):,} parts exist")
        counts = TextCounts(**metadata.sum_text_counts(done.values()))
        for part in executor(writer, [task for task in tasks if task.key not in done]):
            done[part.key] = part
            part_counts = TextCounts(**part.text_counts)
            progress.update(part.documents, part.tokens, num_bytes[part.key], part_counts)
            counts, done_bytes = counts + part_counts, done_bytes + num_bytes[part.key]
            _check_unknown(config, counts, done_bytes / max(sum(num_bytes.values()), 1))
        parts = [done[task.key] for task in tasks]
        examples = {reason: example for part in reversed(parts) for reason, example in part.examples.items()}
        for line in summarize_skipped(metadata.count_skipped(parts), examples):
            progress.print(f"{config.on_error}: {line}")
    return parts


def _check_unknown(config: PrepareConfig, counts: TextCounts, done: float = 1.0) -> None:
    """Raises ``ConfigError`` if too much of the text is unknown; accepting it continues with the finished parts."""
    counts.check(config.output, config.max_unknown_fraction, "--max-unknown-fraction, which keeps finished parts", done)


def _merge_parts(wanted: DatasetMetadata, prefix: str, folder: Path, parts: list[PreparedPart]) -> DatasetMetadata:
    """Writes the output from its parts, the metadata last."""
    (folder / "merging").touch()  # tells the next run that a .bin without metadata is ours

    def verified() -> Iterator[IndexedTokens]:
        for part in parts:
            corrupt = metadata.find_corrupt_file(folder / part.pair, part.checksums)
            if corrupt:
                metadata.metadata_path(folder / part.key).unlink(missing_ok=True)
                raise ConfigError(
                    f"{corrupt} is missing or damaged; run the same command again to make it again. "
                    f"With several machines, {folder.parent} must be a folder that all of them share."
                )
            yield IndexedTokens(folder / part.pair)

    skipped, counts = metadata.count_skipped(parts), metadata.sum_text_counts(parts)
    return merging.write_merged(prefix, verified(), dataclasses.replace(wanted, skipped=skipped, text_counts=counts))


@contextmanager
def _lock_parts(prefix: str) -> Iterator[Path]:
    """Creates the folder of parts and yields it under an exclusive lock."""
    folder = Path(f"{prefix}.parts")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / "lock", "w")  # noqa: SIM115 - entered below, outside of this except
        # Released when the file closes, also when the process dies.
        locked = filelock.lock_descriptor(lock.fileno(), blocking=False)
    except OSError as error:
        raise ConfigError(f"the output folder {folder.parent} cannot be written: {error}.") from error
    with lock:
        require(locked, f"another process is preparing {prefix}; wait for it or end it.")
        with naming_path(folder):
            yield folder

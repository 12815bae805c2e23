"""Files of text to a pair of tokens, in parts: by many processes at once, ended at any moment and continued.

Each task is written as a pair of its own, known by a hash of all that it follows from, beside the output in
``PREFIX.parts``; when all are there they become one pair. So a
process that comes after another, however that one ended, does what is missing, and the output is the same whoever made
it.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import shutil
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from torchladder.data.dataloader import Tokenizer
from torchladder.data.formats.indexed import IndexedTokens, IndexedWriter, dtype_for
from torchladder.data.prepare import merging, metadata
from torchladder.data.prepare.document_encoder import DocumentEncoder, batch_by_chars
from torchladder.data.prepare.executor import Executor
from torchladder.data.prepare.metadata import DatasetMetadata
from torchladder.data.prepare.progress import PrepareProgress
from torchladder.data.prepare.tasks import PrepareConfig, PrepareTask, expand_inputs, select_shard, split_into_tasks
from torchladder.data.text import document_reader, sources
from torchladder.data.text.document_reader import DocumentReader, OnError
from torchladder.data.text.file_formats import FileSlice
from torchladder.registry import ConfigError


@dataclass(frozen=True, kw_only=True)
class PreparedPart:
    """A task that is done; the content of ``<key>.json``.

    Attributes:
        key: of the task.
        pair: name of the pair within the folder of parts.
        documents, tokens: how many it holds.
        skipped, examples: documents left out, by reason: how many, and the first one's file and line.
        on_error: what a document that cannot be read did.
        checksums: SHA-256 of ``bin`` and ``idx``.
    """

    key: str
    pair: str
    documents: int
    tokens: int
    skipped: dict[str, int] = field(default_factory=dict)
    examples: dict[str, str] = field(default_factory=dict)
    on_error: str = "error"
    checksums: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class PartWriter:
    """Makes parts of tasks; this is what a worker is sent."""

    folder: Path
    framing: DocumentEncoder
    text_key: str
    on_error: OnError

    def __call__(self, task: PrepareTask) -> PreparedPart:
        reader = DocumentReader(self.text_key, self.on_error)
        # A name of its own: a worker that was given up for lost may still be writing the same part.
        pair = f"{task.key}-{uuid.uuid4().hex[:8]}"
        with IndexedWriter(self.folder / pair, dtype_for(self.framing.tokenizer.vocab_size)) as writer:
            for batch in batch_by_chars(self._texts(reader, task), lambda item: item[2]):
                places = [(stretch, number) for stretch, number, _ in batch]
                texts = [text for _, _, text in batch]
                writer.extend(*self.framing(texts, lambda n, places=places: document_reader.where(*places[n])))  # type: ignore[misc]
        _unchanged(task)
        part = PreparedPart(
            key=task.key,
            pair=pair,
            documents=len(writer.lengths),
            tokens=sum(writer.lengths),
            skipped=dict(reader.skipped),
            examples=reader.examples,
            on_error=self.on_error,
            checksums=writer.checksums,
        )
        metadata.write_metadata(self.folder / task.key, part)
        return part

    def _texts(self, reader: DocumentReader, task: PrepareTask) -> Iterator[tuple[FileSlice, int | None, str]]:
        for stretch in task.stretches:
            for number, text in reader.read(stretch):
                yield stretch, number, text


def prepare_dataset(preparation: PrepareConfig, executor: Executor) -> DatasetMetadata:
    """Prepares, or continues a preparation; returns what came of it.

    Raises:
        ConfigError: an input cannot be read, the output is there and was prepared otherwise, or another process is
            preparing it.
    """
    files = expand_inputs(preparation.inputs)
    wanted = _wanted(preparation, files)
    prefix = preparation.prefix
    with _alone(prefix) as folder:
        done = _finished(prefix, wanted, preparation.overwrite)
        if done is None:
            tasks = select_shard(split_into_tasks(preparation, files), preparation.shard)
            parts = _parts(preparation, tasks, folder, executor)
            done = _join(wanted, prefix, folder, parts)
        shutil.rmtree(folder, ignore_errors=True)
    return done


def _wanted(preparation: PrepareConfig, files: Sequence[Path]) -> DatasetMetadata:
    """Returns the metadata of the output, as far as it is known before the work."""
    tokenizer: Tokenizer = preparation.framing.tokenizer
    return DatasetMetadata(
        dtype=str(dtype_for(tokenizer.vocab_size)),
        tokenizer={
            "name": preparation.tokenizer,
            "fingerprint": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
            **preparation.framing.ends,
        },
        text_key=preparation.text_key,
        on_error=preparation.on_error,
        shard=list(preparation.shard) if preparation.shard else None,
        sources=[{"path": str(path), "bytes": path.stat().st_size} for path in files],
    )


def _finished(prefix: str, wanted: DatasetMetadata, overwrite: bool) -> DatasetMetadata | None:
    """Returns what is known of an output that is complete and as wanted; None where there is work to do.

    Raises:
        ConfigError: there is an output that was prepared otherwise.
    """
    found = metadata.read_metadata(prefix)
    if found is None:
        if Path(f"{prefix}.idx").exists() and not _begun(prefix) and not overwrite:
            raise ConfigError(f"{prefix}.bin is there already, from elsewhere; --overwrite replaces it.")
        return None
    made = metadata.metadata_path(prefix).stat().st_mtime_ns
    newer = [source["path"] for source in wanted.sources if os.stat(source["path"]).st_mtime_ns > made]
    ours, theirs = wanted.settings(), found.settings()
    if not found.skipped:
        theirs["on_error"] = ours["on_error"]  # there was no error
    changed = [name for name in ours if ours[name] != theirs[name]] + [f"{path} is newer" for path in newer[:1]]
    if not changed and Path(f"{prefix}.idx").exists():
        return found
    if changed and not overwrite:
        raise ConfigError(f"{prefix} was prepared otherwise ({', '.join(changed)}); --overwrite replaces it.")
    return None


def _begun(prefix: str) -> bool:
    """Tells whether an earlier process had begun to put the parts together, which is when the pair appears."""
    return Path(f"{prefix}.parts", "joining").exists()


def _parts(
    preparation: PrepareConfig, tasks: list[PrepareTask], folder: Path, executor: Executor
) -> list[PreparedPart]:
    """Returns the part of each task, in order: those that are there already, and those that are now made."""
    done = {task.key: part for task in tasks if (part := _read(folder, task.key, preparation.on_error))}
    missing = [task for task in tasks if task.key not in done]
    sizes = {task.key: task.size for task in tasks}
    work = PartWriter(folder, preparation.framing, preparation.text_key, preparation.on_error)
    with PrepareProgress(Path(preparation.prefix).name, sum(sizes.values()), sum(sizes[key] for key in done)) as report:
        if done:
            report.say(f"continuing: {len(done):,} of {len(tasks):,} parts are there")
        for part in executor(work, missing):
            done[part.key] = part
            report.add(part.documents, part.tokens, sizes[part.key])
        parts = [done[task.key] for task in tasks]
        skipped, examples = Counter[str](), dict[str, str]()
        for part in parts:
            skipped.update(part.skipped)
            examples = {**part.examples, **examples}
        for line in sources.summary(skipped, examples):
            report.say(f"{preparation.on_error}: {line}")
    return parts


def _read(folder: Path, key: str, on_error: str) -> PreparedPart | None:
    """Returns a part that an earlier process finished; None where there is none that serves.

    What could be read without skipping anything serves whatever is to be done about errors.
    """
    path = metadata.metadata_path(folder / key)
    if not path.is_file():
        return None
    part = PreparedPart(**json.loads(path.read_text(encoding="utf-8")))
    return part if part.on_error == on_error or not part.skipped else None


def _join(wanted: DatasetMetadata, prefix: str, folder: Path, parts: list[PreparedPart]) -> DatasetMetadata:
    """Makes the output of its parts."""
    (folder / "joining").touch()
    skipped: Counter[str] = Counter()
    with IndexedWriter(prefix, np.dtype(wanted.dtype)) as writer:
        for part in parts:
            broken = metadata.find_corruption(folder / part.pair, part.checksums)
            if broken:
                metadata.metadata_path(folder / part.key).unlink(missing_ok=True)
                raise ConfigError(
                    f"{broken} is missing or damaged; the same command makes it again. "
                    f"With several machines, {folder.parent} must be a folder that all of them share."
                )
            merging.append_documents(writer, IndexedTokens(folder / part.pair))
            skipped.update(part.skipped)
        metadata.metadata_path(prefix).unlink(missing_ok=True)  # what it says of an older pair is over
    done = dataclasses.replace(
        wanted,
        documents=len(writer.lengths),
        tokens=sum(part.tokens for part in parts),
        skipped=dict(sorted(skipped.items())),
        checksums=writer.checksums,
    )
    metadata.write_metadata(prefix, done)
    return done


def _unchanged(task: PrepareTask) -> None:
    """Raises ConfigError where a file is not what it was when the work was planned."""
    for stretch, stamp in zip(task.stretches, task.stamps, strict=True):
        stat = stretch.path.stat()
        if (stat.st_size, stat.st_mtime_ns) != stamp:
            raise ConfigError(f"{stretch.path} was changed while it was read.")


@contextmanager
def _alone(prefix: str) -> Iterator[Path]:
    """Gives the folder of parts to one process at a time.

    Raises:
        ConfigError: another process has it, or it cannot be written.
    """
    folder = Path(f"{prefix}.parts")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock: Any = open(folder / "lock", "w")  # noqa: SIM115 - closed below
    except OSError as error:
        raise ConfigError(f"the output folder {folder.parent} cannot be written: {error}.") from error
    with lock:
        try:
            # Released when the file closes, also when the process dies.
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(f"another process is preparing {prefix}.") from None
        yield folder

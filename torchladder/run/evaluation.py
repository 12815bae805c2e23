"""The loss of trained models on files of documents: which weights, which files, and what is left to do."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch.distributed.checkpoint.api import CheckpointException

from torchladder import checkpoint, data, models
from torchladder.checkpoint import CheckpointConfig, checksums, folders, load
from torchladder.checkpoint.team import Team
from torchladder.config import Config, files
from torchladder.data.cache import DEFAULT, build_once
from torchladder.data.corpus import Corpus, Opener, SourceConfig
from torchladder.data.packing.base import Spans
from torchladder.data.text import kinds, sources
from torchladder.data.text.documents import OnError, Reader
from torchladder.data.text.kinds import Stretch
from torchladder.evaluation import Row, Scores, Table, Windows
from torchladder.evaluation.scores import Total, buckets
from torchladder.evaluation.table import Key, key
from torchladder.models import attention
from torchladder.models.attention.sdpa import Sdpa
from torchladder.models.interchange.folder import CONFIG
from torchladder.registry import ConfigError
from torchladder.run import reading
from torchladder.run.restored import Restored, settings_of

FORMAT = 1
"""Raised when the same weights and documents would give other numbers, so that they are evaluated again."""

NOBODY = ~0
"""Stands where a row has ended: token 0, which nobody is to predict."""


class DamageError(Exception):
    """Weights that cannot be read; the message says which and why."""


# --- weights ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Weights:
    """A checkpoint or a Hugging Face folder.

    Attributes:
        path: its folder.
        step: of the run; None of a Hugging Face folder.
        config: the settings that belong to it.
        stamp: another one for other weights.
        home: the folder of its run, or its own.
        tokenizer: fingerprint of the one that it was trained with; None where nobody knows.
    """

    path: Path
    step: int | None
    config: Config
    stamp: str
    home: Path
    tokenizer: str | None = None

    @property
    def trained(self) -> int:
        """Tokens of the longest row that the model was made for."""
        if self.step is not None:
            return self.config.training.seq_len
        told: int | None = json.loads((self.path / CONFIG).read_text()).get("max_position_embeddings")
        return told or self.config.training.seq_len

    def load(self, seq_len: int, dtype: torch.dtype) -> Restored:
        """Returns the model, for rows of up to ``seq_len`` tokens.

        Raises:
            DamageError: a file of the checkpoint is not what was saved.
        """
        if self.step is None:
            return Restored.load(self.config, self.path, Sdpa.attend, seq_len, dtype)
        wrong = load.problem(self.path, lambda run: None, Team())
        if wrong is not None:
            raise DamageError(f"{self.path} is damaged and passed over: {wrong}")
        try:
            return Restored.load(self.config, self.path, Sdpa.attend, seq_len, dtype)
        except (OSError, CheckpointException) as error:  # a run that goes on deletes its older ones
            raise DamageError(f"{self.path} cannot be read and is passed over: {error}") from error


def find(path: Path, seq_len: int | None = None) -> tuple[list[Weights], list[DamageError]]:
    """Returns all weights that a path means, oldest first, and what is wrong with others.

    Args:
        path: a run's folder (or that of its checkpoints), a checkpoint, or a Hugging Face folder.
        seq_len: tokens of the longest row that will be read.

    Raises:
        ConfigError: it is none of them, or has no complete checkpoint yet.
    """
    path = path.expanduser()
    if (path / CONFIG).is_file():
        return [_weights(path, settings_of(path, seq_len))], []
    found: list[Weights] = []
    damaged: list[DamageError] = []
    known: dict[str, Config] = {}
    for one in [path] if checkpoint.complete(path) else _checkpoints(path):
        try:
            found.append(_weights(one, _config(one, known)))
        except (OSError, ValueError, KeyError) as error:  # ConfigError is a ValueError
            damaged.append(DamageError(f"{one} cannot be read and is passed over: {error}"))
    if not found and not damaged:
        raise ConfigError(
            f"{str(path)!r} is no run with a complete checkpoint, no complete checkpoint (step-N) and no Hugging Face "
            "folder."
        )
    return found, damaged


def _checkpoints(path: Path) -> list[Path]:
    """Returns the complete checkpoints in a folder, or in that of the run whose folder it is."""
    folder = path
    if not checkpoint.steps(path) and (path / "config.toml").is_file():
        section = files.read(path / "config.toml")[0].get("checkpoint", {})
        folder = path / section.get("folder", CheckpointConfig.folder)
    return [folders.path_of(folder, step) for step in checkpoint.steps(folder)]


def _config(path: Path, known: dict[str, Config]) -> Config:
    """Returns the settings of a checkpoint; those of a run's checkpoints are the same mostly, and read once."""
    file = path / folders.SETTINGS
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    if text not in known:
        known[text] = settings_of(path)
    return known[text]


def _weights(path: Path, config: Config) -> Weights:
    if (path / CONFIG).is_file():
        stats = {file.name: file.stat() for file in sorted(path.iterdir()) if file.suffix in (".json", ".safetensors")}
        stamp = json.dumps([(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()])
        return Weights(path, None, config, stamp, path)
    above = path.resolve().parents[:2]
    home = next((folder for folder in above if (folder / "config.toml").is_file()), above[0])
    stamp = (path / checksums.SUMS).read_text(encoding="utf-8")
    if not (path / folders.SETTINGS).is_file():
        stamp += config.to_toml()  # they lie elsewhere, and may change
    run = folders.read_run(path)
    tokenizer = run["fingerprints"].get("data.tokenizer")
    return Weights(path, run["step"], config, stamp, Path(os.path.relpath(home)), tokenizer)


# --- documents --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Documents:
    """A file as tokens.

    Attributes:
        path: the file, as it was named.
        corpus: its tokens.
        bytes: of its texts in UTF-8; None where it holds tokens.
    """

    path: Path
    corpus: Corpus
    bytes: int | None


@dataclass(frozen=True)
class Files:
    """Files to evaluate on, turned into tokens once for each tokenizer, in the cache of the runs.

    Attributes:
        paths: of text or tokens.
        text_key: the text's key or column; None takes the one of the run's sources, where they agree on one.
        on_error: what a document that cannot be read does.
        bos: whether documents of text begin with the tokenizer's bos; None does what the run did.

    Raises:
        ConfigError: a file is not there, or of no known kind.
    """

    paths: Sequence[Path]
    text_key: str | None = None
    on_error: OnError = "error"
    bos: bool | None = None
    _opened: dict[str, list[Documents]] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        for path in self.paths:
            SourceConfig(path=str(path)).check()

    def of(self, weights: Weights) -> list[Documents]:
        """Returns the files as a model reads them.

        Raises:
            ConfigError: a document cannot be read, a text has no tokenizer, or not the one that the model knows.
        """
        config = weights.config
        run = repr((config.tokenizer, config.data, weights.tokenizer))
        if run not in self._opened:
            cache = data.cache_path(getattr(config.data, "cache_folder", DEFAULT))
            bos = getattr(config.data, "bos", False) if self.bos is None else self.bos
            opener = Opener(self._tokenizer(config), cache, validation_fraction=0.0, bos=bos)
            self._opened[run] = [self._open(path, opener, weights) for path in self.paths]
        return self._opened[run]

    def _tokenizer(self, config: Config) -> data.Tokenizer | None:
        """Returns the tokenizer; none where there is none and all files are tokens."""
        try:
            return reading.tokenizer(config)
        except ConfigError:
            if all(SourceConfig(path=str(path)).is_tokens for path in self.paths):
                return None
            raise

    def _key(self, config: Config) -> str:
        if self.text_key is not None:
            return self.text_key
        keys = {source.text_key for source in getattr(config.data, "sources", []) if not source.is_tokens}
        return keys.pop() if len(keys) == 1 else SourceConfig.text_key

    def _open(self, path: Path, opener: Opener, weights: Weights) -> Documents:
        source = SourceConfig(path=str(path))
        if source.is_tokens:
            return Documents(path, opener.open(source, "train"), None)
        known, found = weights.tokenizer, opener.tokenizer.fingerprint if opener.tokenizer else None
        if known is not None and found not in (None, known):
            raise ConfigError(
                f"{weights.path} was trained with the tokenizer {known}, and its settings give {found} now: the "
                "tokenizer's file has changed, or the texts that it was trained on."
            )
        text_key = self._key(weights.config)
        source = replace(source, text_key=text_key, on_error=self.on_error)
        corpus = opener.open(source, "train")

        def count(target: Path) -> None:
            texts = Reader(text_key, self.on_error).read(Stretch(path, 0, None, path.stat().st_size))
            target.write_text(str(sum(len(text.encode()) for _, text in texts)))

        size = build_once(opener.cache / "sizes" / source.raw().stamp(), count)
        return Documents(path, corpus, int(size.read_text()))


def named(patterns: Sequence[str]) -> list[Path]:
    """Returns the files that paths, folders (to the bottom) and globs name, each once, a pair of tokens by its .bin.

    Raises:
        ConfigError: a pattern names none.
    """
    found: dict[str, Path] = {}
    for pattern in patterns:
        for match in sources.matches(pattern):
            inside = [match]
            if match.is_dir():
                inside = [file for file in sorted(match.rglob("*")) if kinds.known(file) or file.suffix == ".bin"]
            if not inside:
                raise ConfigError(f"{pattern!r} names no text file. Known: {kinds.names()}; tokens are named as *.bin.")
            for file in inside:
                one = file.with_suffix(".bin") if file.suffix == ".idx" else file
                found.setdefault(os.path.abspath(one), Path(os.path.normpath(one)))
    return list(found.values())


# --- evaluating -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Job:
    """Some weights on one file at one context.

    Attributes:
        weights: the weights.
        documents: the file.
        windows: how its documents are cut.
        dtype: of the weights, as the model computes with them.
        by_position: whether the result says what tokens cost by position.
        table: where the result goes.
    """

    weights: Weights
    documents: Documents
    windows: Windows
    dtype: str
    by_position: bool
    table: Table

    @cached_property
    def fingerprint(self) -> str:
        """A hash of all that the result follows from, and of the file's name."""
        of = [FORMAT, self.weights.stamp, self.documents.path.name, self.documents.corpus.fingerprint()]
        of += [self.windows.context, self.windows.stride, self.dtype]
        return hashlib.sha256(json.dumps(of).encode()).hexdigest()[:16]

    @cached_property
    def tokens(self) -> int:
        """Tokens that the model reads."""
        return self.windows.tokens(self.documents.corpus.lengths)

    @property
    def keys(self) -> list[Key]:
        """What the rows of the result are of."""
        return [(self.fingerprint, first) for first in (None, *(first for first, _ in self._buckets))]

    def rows(self, scores: Scores) -> list[Row]:
        """Returns the rows of the result: of all positions, and of each bucket."""
        about: Row = {
            "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "checkpoint": label(self.weights.path),
            "step": self.weights.step,
            "file": label(self.documents.path),
            "context": self.windows.context,
            "stride": self.windows.stride,
            "dtype": self.dtype,
            "fingerprint": self.fingerprint,
        }
        size, whole = self.documents.bytes, scores.total()
        of_all = {
            "documents": len(self.documents.corpus.lengths),
            "bytes": size,
            "bits_per_byte": whole.bits_per_byte(size),
        }
        rows = [about | _place(None, None) | _figures(whole) | of_all]
        for place in self._buckets:
            rows.append(about | _place(*place) | _figures(scores.total(*place)) | dict.fromkeys(of_all))
        return rows

    @property
    def _buckets(self) -> list[tuple[int, int]]:
        return buckets(self.windows.context) if self.by_position else []


def _place(first: int | None, last: int | None) -> Row:
    return {"first_position": first, "last_position": last}


def _figures(total: Total) -> Row:
    return {
        "tokens": total.tokens,
        "loss": total.mean,
        "perplexity": total.perplexity,
        "total_loss": total.loss if total.tokens else None,
    }


def label(path: Path) -> str:
    """Returns a path as one line of text."""
    return os.fsencode(path).decode("utf-8", "replace").replace("\n", " ")


def left(jobs: Sequence[Job]) -> list[Job]:
    """Returns the jobs whose tables do not hold all of their rows."""
    known = {table: {key(row) for row in table.rows()} for table in {job.table for job in jobs}}
    return [job for job in jobs if not known[job.table].issuperset(job.keys)]


def done(jobs: Sequence[Job]) -> list[Row]:
    """Returns the rows of jobs that their tables hold, in the order of the jobs."""
    known = {table: {key(row): row for row in table.rows()} for table in {job.table for job in jobs}}
    rows = (known[job.table].get(one) for job in jobs for one in job.keys)
    return [row for row in rows if row is not None]


@torch.no_grad()
def score(restored: Restored, job: Job, budget: int, read: Callable[[int], None]) -> Scores:
    """Reads all windows of a job and adds up what each token costs.

    Args:
        restored: the job's model.
        job: what to read.
        budget: places in a batch.
        read: told the tokens of each batch that has been read.

    Raises:
        ConfigError: the file holds a token that the model does not have.
    """
    config, corpus = job.weights.config, job.documents.corpus
    kernel = attention.kernel("sdpa", config.attention.masks, restored.device, training=False)
    start, vocab_size = restored.start.cpu(), models.resolve(config.model).vocab_size
    scores = Scores(job.windows.context)
    for batch in job.windows.batches(corpus.lengths, budget):
        lengths = batch.ends - batch.begins
        rows, longest = len(lengths), int(lengths[0])
        places = np.arange(longest + 1)
        content = np.full((rows, longest + 1), NOBODY, dtype=np.int64)  # the last one only a label
        content[places <= lengths[:, None]] = corpus.read(Spans(batch.documents, batch.begins, batch.ends + 1))
        tokens = content ^ (content >> 63)  # one that nobody is to predict is ~token
        if tokens.max() >= vocab_size:
            raise ConfigError(f"{job.documents.path} holds token {tokens.max()}, the model has {vocab_size}.")
        labels = content[:, 1:].copy()
        labels[(labels < 0) | (places[:-1] < batch.seen[:, None])] = data.IGNORED
        form = kernel.derive(start[:longest].expand(rows, longest), restored.device)
        inputs, wanted = (torch.from_numpy(x).to(restored.device) for x in (tokens[:, :-1].copy(), labels))
        losses = restored.model.losses(inputs, form, wanted)  # (rows, longest)
        scores.add(losses.sum(0, dtype=torch.float64).cpu().numpy(), (labels != data.IGNORED).sum(0))
        read(int(lengths.sum()))
    return scores

"""Pairs of tokens to one pair: documents keep their order, and the index counts them on."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from torchladder.data.formats.indexed import IndexedTokens, IndexedWriter, prefix_of
from torchladder.data.prepare import metadata
from torchladder.data.prepare.metadata import DatasetMetadata
from torchladder.registry import ConfigError

COPY_TOKENS = 1 << 24
"""Tokens that are copied at once, about; a document is copied whole."""


def append_documents(writer: IndexedWriter, pair: IndexedTokens) -> None:
    """Writes all documents of a pair behind those that a writer has.

    Raises:
        ConfigError: its tokens are of another type.
    """
    if pair.dtype != writer.dtype:
        raise ConfigError(f"{pair.prefix} holds tokens as {pair.dtype}, those before it as {writer.dtype}.")
    for tokens, lengths in _copies(pair):
        writer.extend(tokens, lengths)


def _copies(pair: IndexedTokens) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields the documents of a pair, many at once."""
    lengths, starts = np.asarray(pair.lengths), np.asarray(pair.starts)
    ends = np.cumsum(lengths)
    begin = 0
    while begin < len(lengths):
        done = int(ends[begin - 1]) if begin else 0
        end = max(begin + 1, int(np.searchsorted(ends, done + COPY_TOKENS, side="right")))
        mine = slice(begin, end)
        if (starts[mine][1:] == (starts[mine] + lengths[mine])[:-1]).all():
            place = int(starts[begin]) * pair.dtype.itemsize
            yield np.fromfile(f"{pair.prefix}.bin", pair.dtype, int(lengths[mine].sum()), offset=place), lengths[mine]
        else:
            yield np.concatenate([pair[document] for document in range(begin, end)]), lengths[mine]
        begin = end


def merge_datasets(output: str, parts: Sequence[str], overwrite: bool = False) -> DatasetMetadata:
    """Writes the documents of several pairs, one after the other, as one pair with its metadata.

    Shards of one preparation are put in their order whatever the order they are named in, and give what the
    preparation of all would have given, byte for byte.

    Args:
        output: prefix of the pair to write.
        parts: prefixes of pairs, or either of their files.
        overwrite: whether to replace a pair that is there.

    Raises:
        ConfigError: a part is missing, damaged or named twice, or they do not belong together.
    """
    prefixes = [prefix_of(part) for part in parts]
    if len(set(prefixes)) < len(prefixes) or prefix_of(output) in prefixes:
        raise ConfigError("each part is named once, and the output is none of them.")
    if not overwrite and Path(f"{prefix_of(output)}.bin").exists():
        raise ConfigError(f"{prefix_of(output)}.bin is there already; --overwrite replaces it.")
    pairs = [(IndexedTokens(prefix), metadata.read_metadata(prefix)) for prefix in prefixes]
    known = [about for _, about in pairs if about is not None]
    together = _together(known) if len(known) == len(pairs) else None
    if any(about.shard for about in known):
        pairs = _in_order(pairs)
    for pair, about in pairs:
        broken = about and metadata.find_corruption(pair.prefix, about.checksums)
        if broken:
            raise ConfigError(f"{broken} is damaged: it is not what its checksum in {pair.prefix}.json says.")
    with IndexedWriter(output, pairs[0][0].dtype.newbyteorder("=")) as writer:
        for pair, _ in pairs:
            append_documents(writer, pair)
        metadata.metadata_path(output).unlink(missing_ok=True)  # what it says of an older pair is over
    together = together or DatasetMetadata(dtype=str(writer.dtype))
    whole = dataclasses.replace(
        together,
        documents=len(writer.lengths),
        tokens=sum(pair.tokens for pair, _ in pairs),
        checksums=writer.checksums,
    )
    metadata.write_metadata(output, whole)
    return whole


Pairs = list[tuple[IndexedTokens, DatasetMetadata | None]]


def _in_order(pairs: Pairs) -> Pairs:
    """Returns the shards of one preparation in their order.

    Raises:
        ConfigError: one is missing, or they are of several preparations.
    """
    shards = {about.shard[0]: (pair, about) for pair, about in pairs if about and about.shard}
    wholes = [about.shard[1] for _, about in pairs if about and about.shard]
    first = next(about for _, about in pairs if about and about.shard)
    for pair, about in pairs:
        if about is None or about.shard is None or _unsharded(about) != _unsharded(first):
            raise ConfigError(f"{pair.prefix} is no shard of the same preparation as the others.")
    missing = sorted(set(range(wholes[0])) - set(shards))
    if missing or len(set(wholes)) > 1 or len(pairs) != wholes[0]:
        named = ", ".join(f"{number}/{wholes[0]}" for number in missing) or "none"
        raise ConfigError(f"these are {len(pairs)} of {wholes[0]} shards; missing: {named}.")
    return [shards[number] for number in sorted(shards)]


def _unsharded(about: DatasetMetadata) -> dict[str, Any]:
    return {**about.settings(), "shard": None}


def _together(known: Sequence[DatasetMetadata]) -> DatasetMetadata:
    """Returns what is known of several pairs as one.

    Raises:
        ConfigError: they have different tokenizers, or end their documents differently.
    """
    first = known[0].settings()
    for about in known:
        if about.settings()["tokenizer"] != first["tokenizer"]:
            raise ConfigError(
                f"the parts are of different tokenizers or ends: {first['tokenizer']} and "
                f"{about.settings()['tokenizer']}."
            )
    same_sources = all(about.sources == known[0].sources and about.shard for about in known)
    sources = known[0].sources if same_sources else [source for about in known for source in about.sources]
    skipped: Counter[str] = Counter()
    for about in known:
        skipped.update(about.skipped)
    return dataclasses.replace(known[0], sources=sources, skipped=dict(sorted(skipped.items())), shard=None)

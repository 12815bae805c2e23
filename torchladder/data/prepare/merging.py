"""Merges .bin/.idx datasets into one, document after document."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from torchladder.data.formats.indexed import IndexedTokens, IndexedWriter, prefix_of
from torchladder.data.prepare import metadata
from torchladder.data.prepare.metadata import DatasetMetadata
from torchladder.registry import ConfigError, require

COPY_TOKENS = 1 << 24
"""Tokens that are copied at once, rounded to whole documents."""


def write_merged(
    output: str, datasets: Iterable[IndexedTokens], about: DatasetMetadata, eos: int | None = None
) -> DatasetMetadata:
    """Writes the documents of all datasets, and then the metadata; returns it with its counts and checksums.

    Args:
        output: prefix of the dataset to write.
        datasets: what to merge, in order.
        about: dtype, settings and sources of the output.
        eos: the token to append to each document that does not end with it; None to append nothing.

    Raises:
        ConfigError: a dataset stores tokens as another dtype.
    """
    with IndexedWriter(output, np.dtype(about.dtype)) as writer:
        for dataset in datasets:
            require(
                dataset.dtype == writer.dtype,
                f"{dataset.prefix} stores tokens as {dataset.dtype}, the datasets before it as {writer.dtype}; "
                "merge datasets of one dtype.",
            )
            for tokens, lengths in _document_batches(dataset):
                tokens, lengths = (tokens, lengths) if eos is None else append_eos(tokens, lengths, eos)
                writer.extend(tokens, lengths)
        metadata.metadata_path(output).unlink(missing_ok=True)  # it describes the dataset that is being replaced
    counts = len(writer.lengths), sum(writer.lengths)
    merged = dataclasses.replace(about, documents=counts[0], tokens=counts[1], checksums=writer.checksums)
    metadata.write_metadata(output, merged)
    return merged


def append_eos(tokens: np.ndarray, lengths: np.ndarray, eos: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns documents with an eos at the end of each that had another token there; empty ones remain empty.

    Args:
        tokens: (tokens,) of the documents back to back.
        lengths: (documents,) tokens in each.
        eos: the token.

    Raises:
        ConfigError: the type of the tokens cannot store it.
    """
    require(eos <= np.iinfo(tokens.dtype).max, f"--append-eos {eos}: the tokens are stored as {tokens.dtype}.")
    ends = np.cumsum(lengths)
    lacks = lengths > 0
    lacks[lacks] = tokens[ends[lacks] - 1] != eos
    return np.insert(tokens, ends[lacks], eos), lengths + lacks


def _document_batches(dataset: IndexedTokens) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields (tokens, lengths) of about ``COPY_TOKENS`` tokens each, at least one document."""
    lengths, offsets = np.asarray(dataset.lengths), np.asarray(dataset.offsets)
    ends = np.cumsum(lengths)
    first = 0
    while first < len(lengths):
        done = int(ends[first - 1]) if first else 0
        until = max(first + 1, int(np.searchsorted(ends, done + COPY_TOKENS, side="right")))
        batch = slice(first, until)
        if (offsets[batch][1:] == (offsets[batch] + lengths[batch])[:-1]).all():  # back to back: one read
            offset = int(offsets[first]) * dataset.dtype.itemsize
            count = int(lengths[batch].sum())
            yield np.fromfile(f"{dataset.prefix}.bin", dataset.dtype, count, offset=offset), lengths[batch]
        else:
            yield np.concatenate([dataset[document] for document in range(first, until)]), lengths[batch]
        first = until


def merge_datasets(
    output: str, inputs: Sequence[str], overwrite: bool = False, eos: int | None = None
) -> DatasetMetadata:
    """Merges datasets into one, and returns its metadata.

    Shards of one ``torchladder prepare --shard`` are sorted first. Merged, they equal the unsharded output byte for
    byte.

    Args:
        output: prefix of the dataset to write.
        inputs: prefixes of datasets, or either of their files.
        overwrite: whether to replace an existing output.
        eos: the token to append to each document that does not end with it; None to append nothing.

    Raises:
        ConfigError: an input is missing, damaged or named twice, the inputs do not belong together, or their tokenizer
            has another eos.
    """
    require(eos is None or eos >= 0, f"--append-eos {eos}: must be the id of a token, 0 or more.")
    prefixes = [prefix_of(name) for name in inputs]
    target = prefix_of(output)
    different = len({target, *prefixes}) == 1 + len(prefixes)
    require(different, "name each input once, and an output that is not one of them.")
    replaceable = overwrite or not Path(f"{target}.bin").exists()
    require(replaceable, f"{target}.bin already exists; --overwrite replaces it.")
    datasets = [(IndexedTokens(prefix), metadata.read_metadata(prefix)) for prefix in prefixes]
    known = [about for _, about in datasets if about is not None]
    merged = _merge_metadata(known) if len(known) == len(datasets) else None
    if any(about.shard for about in known):
        datasets = _sort_shards(datasets)
    for dataset, about in datasets:
        corrupt = about and metadata.find_corrupt_file(dataset.prefix, about.checksums)
        require(not corrupt, f"{corrupt} is damaged: it differs from its checksum in {dataset.prefix}.json.")
    merged = merged or DatasetMetadata(dtype=datasets[0][0].dtype.name)
    if eos is not None:
        merged = _with_eos(merged, eos)
    return write_merged(output, [dataset for dataset, _ in datasets], merged, eos)


def _with_eos(about: DatasetMetadata, eos: int) -> DatasetMetadata:
    """Returns the metadata of documents that end with an eos; raises ConfigError if it is not their tokenizer's."""
    ends, size = about.tokenizer.get("eos"), about.tokenizer.get("vocab_size")
    require(ends in (None, eos), f"--append-eos {eos}: the documents already end with the token {ends}.")
    require(size is None or eos < size, f"--append-eos {eos}: their tokenizer has {size} tokens.")
    return dataclasses.replace(about, tokenizer=about.tokenizer | {"eos": eos})


Datasets = list[tuple[IndexedTokens, DatasetMetadata | None]]


def _sort_shards(datasets: Datasets) -> Datasets:
    """Returns the shards of one preparation in order."""
    shards = {about.shard[0]: (dataset, about) for dataset, about in datasets if about and about.shard}
    counts = [about.shard[1] for _, about in datasets if about and about.shard]
    settings = [about and {**about.settings(), "shard": about.shard and about.shard[1]} for _, about in datasets]
    expected = next(found for found in settings if found and found["shard"])
    for (dataset, _), found in zip(datasets, settings, strict=True):
        require(found == expected, f"{dataset.prefix} is not a shard of the same preparation as the others.")
    missing = sorted(set(range(counts[0])) - set(shards))
    if missing or len(datasets) != counts[0]:
        named = ", ".join(f"{index}/{counts[0]}" for index in missing) or "none"
        raise ConfigError(f"got {len(datasets)} of {counts[0]} shards; missing: {named}.")
    return [shards[index] for index in sorted(shards)]


def _merge_metadata(known: Sequence[DatasetMetadata]) -> DatasetMetadata:
    """Returns the settings, sources and skipped documents of several datasets as one."""
    first = known[0].settings()["tokenizer"]
    for about in known:
        found = about.settings()["tokenizer"]
        require(found == first, f"the inputs have different tokenizers or bos/eos tokens: {first} and {found}.")
        same_split = about.split == known[0].split
        require(same_split, "some inputs are held out for validation (PREFIX-validation), and others are not.")
    # All shards of a preparation list all of its sources.
    same_sources = all(about.sources == known[0].sources and about.shard for about in known)
    sources = known[0].sources if same_sources else [source for about in known for source in about.sources]
    return dataclasses.replace(
        known[0],
        sources=sources,
        skipped=metadata.count_skipped(known),
        text_counts=metadata.sum_text_counts(known),
        shard=None,
    )

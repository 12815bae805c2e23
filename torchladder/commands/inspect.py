"""Shows the documents, lengths and a sample of a .bin/.idx dataset, and verifies its checksums; or a row of a run."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from torchladder.commands import inspect_row
from torchladder.commands.arguments import CommandParser, add_tokenizer_options, tokenizer_from_args
from torchladder.data import document_lengths, tokenizer
from torchladder.data.formats.indexed import IndexedTokens
from torchladder.data.prepare import metadata
from torchladder.data.prepare.metadata import DatasetMetadata
from torchladder.data.prepare.text_counts import TextCounts
from torchladder.data.tokenizer import Tokenizer
from torchladder.registry import ConfigError

SAMPLE_TOKENS = 200
MAX_BAR_CHARS = 40
EPILOG = """
The exit code is 1 if a file differs from its checksum.

examples:
  torchladder inspect tokens/train --document 7
  torchladder inspect outputs/mine --row 1000         (a row as a run reads it: torchladder inspect --row 0 --help)
"""


def run(argv: list[str]) -> int:
    """Prints a summary of a dataset, or with ``--row`` a row of a run; returns 1 if a checksum differs."""
    if any(word == "--row" or word.startswith("--row=") for word in argv):
        return inspect_row.run(argv)
    parser = CommandParser(prog="torchladder inspect", description=__doc__, epilog=EPILOG)
    parser.add_argument("prefix", metavar="PREFIX", help="prefix of the dataset, or either of its files")
    add_tokenizer_options(parser, required=False)
    parser.add_argument("--document", type=int, metavar="N", help="document to show, counted from 0 (default: 0)")
    parser.add_argument("--no-checksums", action="store_true", help="do not read the whole dataset to verify it")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    arguments = parser.parse_args(argv)
    dataset, about = IndexedTokens(arguments.prefix), metadata.read_metadata(arguments.prefix)
    known = about.tokenizer if about else {}
    number = arguments.document or 0
    if arguments.document is not None and not 0 <= number < len(dataset):
        raise ConfigError(f"--document {number}: the dataset has {len(dataset)} documents, counted from 0.")
    decoder = None
    if arguments.tokenizer:
        decoder = tokenizer_from_args(arguments)
    elif known.get("name"):
        with suppress(ConfigError):  # its files may be elsewhere
            decoder = tokenizer.load_tokenizer(known["name"])
    written_with = known.get("fingerprint")
    if written_with and decoder is not None and decoder.fingerprint != written_with:
        raise ConfigError(f"the dataset was written with the tokenizer {written_with}, not {decoder.fingerprint}.")
    verify = about is not None and not arguments.no_checksums
    corrupt = metadata.find_corrupt_file(dataset.prefix, about.checksums) if about and verify else None
    if arguments.json:
        summary = {
            "documents": len(dataset),
            "tokens": dataset.num_tokens,
            "dtype": dataset.dtype.name,
            "histogram": [list(row) for row in length_histogram(dataset.lengths)],
            "contexts": [list(row) for row in context_table(dataset.lengths)],
            "settings": about.settings() if about else None,
            "skipped": about.skipped if about else None,
            "text_counts": about.text_counts if about else None,
            "damaged": corrupt,
            "checksums_tested": verify,
        }
        print(json.dumps(summary))
        return 1 if corrupt else 0
    _print_summary(dataset, about)
    _print_histogram(dataset)
    _print_contexts(dataset)
    if len(dataset):
        _print_sample(dataset, number, decoder)
    result = f"MISMATCH, {corrupt} is damaged" if corrupt else "verified" if verify else "not verified"
    print(f"checksums: {result if about else 'none (the dataset has no metadata)'}")
    return 1 if corrupt else 0


def length_histogram(lengths: np.ndarray) -> list[tuple[int, int, int, int]]:
    """Returns (min length, max length, documents, tokens) for each power of two, from the first to the last in use."""
    bins = np.frexp(lengths.astype(np.float64))[1]  # 0 is bin 0, then 1, 2-3, 4-7, ...
    counts = np.bincount(bins)
    tokens = np.bincount(bins, weights=lengths).astype(np.int64)
    used = np.flatnonzero(counts)
    shown = range(int(used[0]), int(used[-1]) + 1) if len(used) else range(0)
    return [(2 ** (i - 1) if i else 0, 2**i - 1, int(counts[i]), int(tokens[i])) for i in shown]


def context_table(lengths: np.ndarray) -> list[tuple[int, float, float]]:
    """Returns (context, fraction of tokens in longer documents, mean effective context) for 1K, 2K, ..., 128K."""
    long_share, mean = document_lengths.long_share, document_lengths.mean_effective_context
    return [(context, long_share(lengths, context), mean(lengths, context)) for context in document_lengths.CONTEXTS]


def _print_summary(dataset: IndexedTokens, about: DatasetMetadata | None) -> None:
    size = Path(f"{dataset.prefix}.bin").stat().st_size
    counts = f"{len(dataset):,} documents, {dataset.num_tokens:,} tokens"
    print(f"{dataset.prefix}: {counts} as {dataset.dtype.name}, {size:,} bytes")
    if len(dataset):
        low, median, high = np.percentile(dataset.lengths, [0, 50, 100]).astype(int).tolist()
        mean = dataset.num_tokens / len(dataset)
        print(f"document lengths: {low:,} to {high:,} tokens, median {median:,}, mean {mean:,.1f}")
    if about:
        if "fingerprint" in (known := about.tokenizer):
            print(f"tokenizer: {known.get('name')}, {known.get('vocab_size'):,} tokens, {known.get('fingerprint')}")
            print(f"added to each document: bos {known.get('bos')}, eos {known.get('eos')}")
        else:
            print("tokenizer: unknown (the merged datasets had no metadata)")
        if about.text_counts:
            of_text = TextCounts(**about.text_counts)
            print(f"text: {of_text.text_bytes:,} bytes, {of_text.describe()}")
        print(f"sources: {len(about.sources):,} files, {sum(source['bytes'] for source in about.sources):,} bytes")
        for reason, count in about.skipped.items():
            print(f"{about.on_error}: {count:,} documents {reason}")


def _print_histogram(dataset: IndexedTokens) -> None:
    table = Table(box=None, header_style="bold")
    for name in ("length in tokens", "documents", "% of all tokens"):
        table.add_column(name, justify="right")
    rows = length_histogram(dataset.lengths)
    most = max((documents for _, _, documents, _ in rows), default=1)
    for low, high, documents, tokens in rows:
        lengths = f"{low:,}" if low >= high else f"{low:,}-{high:,}"
        bar = "█" * -(-documents * MAX_BAR_CHARS // most)
        table.add_row(lengths, f"{documents:,}", f"{tokens / max(dataset.num_tokens, 1):.1%}", bar)
    Console().print(table)


def _print_contexts(dataset: IndexedTokens) -> None:
    table = Table(box=None, header_style="bold")
    for name in ("context", "% of tokens in longer documents", "mean effective context"):
        table.add_column(name, justify="right")
    for context, share, mean in context_table(dataset.lengths):
        table.add_row(f"{context:,}", f"{share:.1%}", f"{mean:,.0f}")
    Console().print(table)


def _print_sample(dataset: IndexedTokens, number: int, decoder: Tokenizer | None) -> None:
    ids = dataset[number][:SAMPLE_TOKENS].tolist()
    title = f"document {number}" + (f", first {SAMPLE_TOKENS} tokens" if len(dataset[number]) > SAMPLE_TOKENS else "")
    if decoder is None:
        print(f"{title} (pass --tokenizer to decode): {' '.join(map(str, ids))}")
    else:
        Console().print(f"[bold]{title}:[/bold]\n{escape(decoder.decode(ids))}", highlight=False)

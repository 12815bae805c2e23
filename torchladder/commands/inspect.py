"""Shows what a pair of tokens holds: documents, lengths, a sample, and whether it is whole."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from torchladder.commands.prepare import add_tokenizer, load_tokenizer
from torchladder.data import tokenizer
from torchladder.data.dataloader import Tokenizer
from torchladder.data.formats.indexed import IndexedTokens
from torchladder.data.prepare import metadata
from torchladder.data.prepare.metadata import DatasetMetadata
from torchladder.registry import ConfigError

SAMPLE = 200
"""Tokens of the sample."""
WIDTH = 40
"""Characters of the longest bar."""


def run(argv: list[str]) -> int:
    """Prints what is known of a pair; returns 1 when a checksum differs."""
    parser = argparse.ArgumentParser(prog="torchladder inspect", description=__doc__, allow_abbrev=False)
    parser.add_argument("prefix", metavar="PREFIX", help="of the pair, or either of its files")
    add_tokenizer(parser, required=False)
    parser.add_argument("--document", type=int, metavar="N", help="the document to show (default: the first one)")
    parser.add_argument("--no-checksums", action="store_true", help="do not read the whole pair to test its checksums")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    arguments = parser.parse_args(argv)
    pair, about = IndexedTokens(arguments.prefix), metadata.read_metadata(arguments.prefix)
    number = arguments.document or 0
    if arguments.document is not None and not 0 <= number < len(pair):
        raise ConfigError(f"--document {number}: the pair has {len(pair)} documents, from 0.")
    part = load_tokenizer(arguments) if arguments.tokenizer else _recorded(about)
    _belongs(about, part)
    broken = metadata.find_corruption(pair.prefix, about.checksums) if about and not arguments.no_checksums else None
    if arguments.json:
        print(json.dumps(_object(pair, about, broken, tested=not arguments.no_checksums)))
    else:
        _print(pair, about)
        _print_sample(pair, number, part)
        print(_checksums(about, broken, tested=not arguments.no_checksums))
    return 1 if broken else 0


def histogram(lengths: np.ndarray) -> list[tuple[int, int, int, int]]:
    """Returns (from, to, documents, tokens) for each power of two, from the first that occurs to the last."""
    bins = np.frexp(lengths.astype(np.float64))[1]  # 0 is a bin of its own, then 1, 2-3, 4-7, ...
    counts = np.bincount(bins)
    tokens = np.bincount(bins, weights=lengths).astype(np.int64)
    used = np.flatnonzero(counts)
    shown = range(int(used[0]), int(used[-1]) + 1) if len(used) else range(0)
    return [(2 ** (i - 1) if i else 0, 2**i - 1, int(counts[i]), int(tokens[i])) for i in shown]


def _object(pair: IndexedTokens, about: DatasetMetadata | None, broken: str | None, tested: bool) -> dict[str, Any]:
    return {
        "documents": len(pair),
        "tokens": pair.tokens,
        "dtype": pair.dtype.name,
        "histogram": [list(bin) for bin in histogram(pair.lengths)],
        "settings": about.settings() if about else None,
        "skipped": about.skipped if about else None,
        "damaged": broken,
        "checksums_tested": bool(about and tested),
    }


def _print(pair: IndexedTokens, about: DatasetMetadata | None) -> None:
    size = Path(f"{pair.prefix}.bin").stat().st_size
    print(f"{pair.prefix}: {len(pair):,} documents, {pair.tokens:,} tokens as {pair.dtype.name}, {size:,} bytes")
    if len(pair):
        low, middle, high = np.percentile(pair.lengths, [0, 50, 100]).astype(int).tolist()
        mean = pair.tokens / len(pair)
        print(f"lengths: {low:,} to {high:,} tokens, median {middle:,}, mean {mean:,.1f}")
    if about:
        known = about.tokenizer
        print(f"tokenizer: {known.get('name')}, {known.get('vocab_size'):,} tokens, {known.get('fingerprint')}")
        print(f"ends: bos {known.get('bos')}, eos {known.get('eos')}")
        print(f"sources: {len(about.sources):,} files, {sum(source['bytes'] for source in about.sources):,} bytes")
        for reason, count in about.skipped.items():
            print(f"{about.on_error}: {count:,} documents {reason}")
    table = Table("tokens", "documents", "of all tokens", "", box=None, header_style="bold")
    for column in table.columns[:3]:
        column.justify = "right"
    rows = histogram(pair.lengths)
    most = max((documents for _, _, documents, _ in rows), default=1)
    for low, high, documents, tokens in rows:
        share = f"{tokens / max(pair.tokens, 1):.1%}"
        between = f"{low:,}" if low >= high else f"{low:,}-{high:,}"
        table.add_row(between, f"{documents:,}", share, "█" * -(-documents * WIDTH // most))
    Console().print(table)


def _print_sample(pair: IndexedTokens, number: int, part: Tokenizer | None) -> None:
    if not len(pair):
        return
    ids = pair[number][:SAMPLE].tolist()
    cut = " (its beginning)" if len(pair[number]) > SAMPLE else ""
    if part is None:
        print(f"document {number}{cut}, undecoded without --tokenizer: {' '.join(map(str, ids))}")
    else:
        Console().print(f"[bold]document {number}{cut}:[/bold]\n{escape(part.decode(ids))}", highlight=False)


def _recorded(about: DatasetMetadata | None) -> Tokenizer | None:
    """Returns the tokenizer of the metadata, where it is still to be found."""
    name = about.tokenizer.get("name") if about else None
    if not name or (name != "bytes" and not Path(name).expanduser().exists()):
        return None
    try:
        return tokenizer.load(name)
    except ConfigError:
        return None


def _belongs(about: DatasetMetadata | None, part: Tokenizer | None) -> None:
    """Raises ConfigError for a tokenizer that the pair was not written with."""
    written = about.tokenizer.get("fingerprint") if about else None
    if written and part is not None and part.fingerprint != written:
        raise ConfigError(f"the pair was written with the tokenizer {written}; this one is {part.fingerprint}.")


def _checksums(about: DatasetMetadata | None, broken: str | None, tested: bool) -> str:
    if about is None:
        return "checksums: none, there is no metadata beside the pair"
    if not tested:
        return "checksums: not tested"
    return f"checksums: DAMAGED, {broken} is not what was written" if broken else "checksums: all is as it was written"

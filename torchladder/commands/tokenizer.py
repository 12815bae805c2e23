"""Trains a tokenizer on files of text: SentencePiece, or byte-level BPE as a tokenizer.json."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

from torchladder.commands.prepare import add_input
from torchladder.data import tokenizer
from torchladder.data.prepare import tasks
from torchladder.data.text import sources
from torchladder.data.text.document_reader import DocumentReader
from torchladder.data.text.file_formats import FileSlice
from torchladder.data.tokenizer import Training, train_tokenizer
from torchladder.registry import ConfigError

EPILOG = """
FOLDER then holds tokenizer.model or tokenizer.json, and training.json, which says how it came to be. The same texts and
options give the same files. --tokenizer FOLDER names it elsewhere.

  torchladder tokenizer train --input data/en data/de --output tokenizers/mine --vocab-size 32000
"""


def run(argv: list[str]) -> int:
    """Trains a tokenizer."""
    parser = argparse.ArgumentParser(prog="torchladder tokenizer", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="train")
    _add_options(
        commands.add_parser(
            "train",
            help="trains a tokenizer",
            description=__doc__,
            epilog=EPILOG,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
    )
    arguments = parser.parse_args(argv)
    settings = Training(
        kind=arguments.kind,
        vocab_size=arguments.vocab_size,
        special_tokens=arguments.special_tokens,
        character_coverage=arguments.character_coverage,
        normalization=arguments.normalization,
        split_digits=arguments.split_digits,
    )
    folder = Path(arguments.output)
    if folder.exists() and not arguments.overwrite:
        raise ConfigError(f"{folder} is there already; --overwrite replaces it.")
    if arguments.sample_chars < 1:
        raise ConfigError(f"--sample-chars {arguments.sample_chars}: it is 1 at least.")
    reader = DocumentReader(arguments.text_key, arguments.on_error)
    sample = train_tokenizer.sample(_texts(reader, tasks.expand_inputs(arguments.input)), arguments.sample_chars)
    for line in sources.summary(reader.skipped, reader.examples):
        print(f"{arguments.on_error}: {line}")
    files = tokenizer.train(sample, settings)
    files["training.json"] = json.dumps(_record(settings, sample), indent=2, ensure_ascii=False).encode()
    _write(folder, files)
    print(f"{folder}: {tokenizer.load(str(folder)).vocab_size:,} tokens of {sum(map(len, sample)):,} characters")
    return 0


def _add_options(parser: argparse.ArgumentParser) -> None:
    add_input(parser)
    parser.add_argument("--output", required=True, metavar="FOLDER", help="folder of the tokenizer")
    parser.add_argument("--kind", choices=get_args(train_tokenizer.Kind), default="bpe", help="default: bpe")
    parser.add_argument("--vocab-size", type=int, default=32_000, metavar="N", help="tokens (default: 32000)")
    parser.add_argument(
        "--special-tokens", nargs="+", default=[], metavar="TOKEN", help="tokens that no text is encoded to"
    )
    parser.add_argument(
        "--sample-chars",
        type=int,
        default=1 << 26,
        metavar="N",
        help="characters to train on at most: every n-th document (default: 67108864)",
    )
    parser.add_argument(
        "--character-coverage",
        type=float,
        metavar="SHARE",
        help="share of the characters with tokens of their own, bytes carry the rest (default: 0.9995)",
    )
    parser.add_argument(
        "--normalization",
        choices=get_args(train_tokenizer.Normalization),
        default="none",
        help="none (default) gives every text back exactly",
    )
    parser.add_argument("--split-digits", action="store_true", help="make each digit a token of its own")
    parser.add_argument("--overwrite", action="store_true", help="replace FOLDER where it is there already")


def _texts(reader: DocumentReader, files: list[Path]) -> Iterator[str]:
    for path in files:
        for _, text in reader.read(FileSlice(path, 0, None, path.stat().st_size)):
            yield text


def _record(settings: Training, sample: list[str]) -> dict[str, Any]:
    digest = hashlib.sha256()
    for text in sample:
        digest.update(hashlib.sha256(text.encode()).digest())
    return {
        **asdict(settings),
        "documents": len(sample),
        "characters": sum(map(len, sample)),
        "sample_sha256": digest.hexdigest(),
        "library": train_tokenizer.library(settings.kind),
    }


def _write(folder: Path, files: dict[str, bytes]) -> None:
    """Writes a folder that appears under its name only when it is complete."""
    partial = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
    partial.mkdir(parents=True)
    for name, content in files.items():
        (partial / name).write_bytes(content)
    if folder.is_dir():
        shutil.rmtree(folder)
    os.replace(partial, folder)

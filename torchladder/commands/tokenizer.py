"""Trains a tokenizer on text files: SentencePiece (BPE, unigram), or byte-level BPE as a tokenizer.json."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, get_args

from torchladder.commands.prepare import add_input_options
from torchladder.data import tokenizer
from torchladder.data.prepare.tasks import expand_inputs
from torchladder.data.text.document_reader import DocumentReader, summarize_skipped
from torchladder.data.text.file_formats import FileSlice
from torchladder.data.tokenizer import TokenizerTrainingConfig, tokenizer_training
from torchladder.registry import ConfigError

EPILOG = """
FOLDER then holds tokenizer.model or tokenizer.json, and training.json with the options, the sample's hash and the
library's version. The same texts and options produce the same files. Other commands take --tokenizer FOLDER.

example:
  torchladder tokenizer train --input data/en data/de --output tokenizers/mine --vocab-size 32000
"""


def run(argv: list[str]) -> int:
    """Trains a tokenizer."""
    help_page: Any = {
        "description": __doc__,
        "epilog": EPILOG,
        "allow_abbrev": False,
        "formatter_class": argparse.RawDescriptionHelpFormatter,
    }
    parser = argparse.ArgumentParser(prog="torchladder tokenizer", **help_page)
    commands = parser.add_subparsers(dest="command", required=True, metavar="train")
    _add_options(commands.add_parser("train", help="lists the options with: train --help", **help_page))
    arguments = parser.parse_args(argv)
    names = [setting.name for setting in fields(TokenizerTrainingConfig)]
    settings = TokenizerTrainingConfig(**{name: getattr(arguments, name) for name in names})
    folder = Path(arguments.output)
    if folder.exists() and not arguments.overwrite:
        raise ConfigError(f"{folder} already exists; --overwrite replaces it.")
    if arguments.sample_chars < 1:
        raise ConfigError(f"--sample-chars is {arguments.sample_chars}; it must be 1 or more.")
    reader = DocumentReader(arguments.text_key, arguments.on_error)
    sample = tokenizer_training.sample_texts(
        _read_texts(reader, expand_inputs(arguments.input)), arguments.sample_chars
    )
    for line in summarize_skipped(reader.skipped, reader.examples):
        print(f"{arguments.on_error}: {line}")
    files = tokenizer.train_tokenizer(sample, settings)
    record = _training_record(settings, sample)
    files["training.json"] = json.dumps(record, indent=2, ensure_ascii=False).encode()
    _write_folder(folder, files)
    vocab_size = tokenizer.load_tokenizer(str(folder)).vocab_size
    print(f"{folder}: {vocab_size:,} tokens, trained on {record['characters']:,} characters")
    return 0


def _add_options(parser: argparse.ArgumentParser) -> None:
    add_input_options(parser)
    parser.add_argument("--output", required=True, metavar="FOLDER", help="folder to write")
    parser.add_argument(
        "--kind",
        choices=get_args(tokenizer_training.TokenizerKind),
        default="bpe",
        help="bpe (default), unigram: SentencePiece with byte fallback; byte-bpe: byte-level BPE, a tokenizer.json",
    )
    parser.add_argument(
        "--vocab-size",
        type=int,
        default=32_000,
        metavar="N",
        help="tokens, with special ones (default: %(default)s)",
    )
    parser.add_argument(
        "--special-tokens",
        nargs="+",
        default=[],
        metavar="TOKEN",
        help="more special tokens; no text encodes to them",
    )
    parser.add_argument(
        "--sample-chars",
        type=int,
        default=1 << 26,
        metavar="N",
        help="train on at most N characters, spread evenly over the documents (default: %(default)s)",
    )
    parser.add_argument(
        "--character-coverage",
        type=float,
        metavar="FRACTION",
        help="fraction of the sample's characters that get tokens; the rest is encoded as bytes (default: 0.9995)",
    )
    parser.add_argument(
        "--normalization",
        choices=get_args(tokenizer_training.Normalization),
        default="none",
        help="Unicode normalization before encoding; with none (default) decoding restores every text exactly",
    )
    parser.add_argument("--split-digits", action="store_true", help="encode each digit as one token")
    parser.add_argument("--overwrite", action="store_true", help="replace FOLDER if it exists")


def _read_texts(reader: DocumentReader, files: list[Path]) -> Iterator[str]:
    for path in files:
        for _, text in reader.read(FileSlice.whole(path)):
            yield text


def _training_record(settings: TokenizerTrainingConfig, sample: list[str]) -> dict[str, Any]:
    digest = hashlib.sha256()
    for text in sample:
        digest.update(hashlib.sha256(text.encode()).digest())
    return {
        **asdict(settings),
        "documents": len(sample),
        "characters": sum(map(len, sample)),
        "sample_sha256": digest.hexdigest(),
        "library": tokenizer_training.training_library(settings.kind),
    }


def _write_folder(folder: Path, files: dict[str, bytes]) -> None:
    """Writes a folder under a temporary name and replaces ``folder`` with it when it is complete."""
    partial = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
    partial.mkdir(parents=True)
    for name, content in files.items():
        (partial / name).write_bytes(content)
    if folder.is_dir():
        shutil.rmtree(folder)
    os.replace(partial, folder)

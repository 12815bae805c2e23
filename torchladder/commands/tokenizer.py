"""Trains a tokenizer on text files: SentencePiece (BPE, unigram), or byte-level BPE as a tokenizer.json."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import get_args

from torchladder.commands.arguments import CommandParser, add_input_options, check_positive
from torchladder.data import tokenizer
from torchladder.data.prepare.tasks import expand_inputs
from torchladder.data.text.document_parsers import FileSlice
from torchladder.data.text.document_reader import DocumentReader, summarize_skipped
from torchladder.data.tokenizer import TokenizerTrainingConfig, tokenizer_training
from torchladder.data.tokenizer.tokenizer_training import Normalization, TokenizerKind
from torchladder.inference.hf_export import replace_directory
from torchladder.registry import ConfigError

EPILOG = """
FOLDER then holds tokenizer.model or tokenizer.json, and training.json with the options, the sample's hash and the
library's version. The same texts and options produce the same files. Other commands take --tokenizer FOLDER.

example:
  torchladder tokenizer train --input data/en data/de --output tokenizers/mine --vocab-size 32000
"""


def run(argv: list[str]) -> int:
    """Trains a tokenizer."""
    parser = CommandParser(prog="torchladder tokenizer", description=__doc__, epilog=EPILOG)
    commands = parser.add_subparsers(dest="command", required=True, metavar="train")
    train = commands.add_parser("train", help="train --help lists the options", description=__doc__, epilog=EPILOG)
    add_input_options(train)
    add, kinds, forms = train.add_argument, get_args(TokenizerKind), get_args(Normalization)
    add("--output", required=True, metavar="FOLDER", help="folder to write")
    text = "bpe (default), unigram: SentencePiece with byte fallback; byte-bpe: byte-level BPE, a tokenizer.json"
    add("--kind", choices=kinds, default="bpe", help=text)
    text = "tokens, with special ones (default: %(default)s)"
    add("--vocab-size", type=int, default=32_000, metavar="N", help=text)
    text = "more special tokens; no text encodes to them"
    add("--special-tokens", nargs="+", default=[], metavar="TOKEN", help=text)
    text = "train on at most N characters, spread evenly over the documents (default: %(default)s)"
    add("--sample-chars", type=int, default=1 << 26, metavar="N", help=text)
    text = "fraction of the sample's characters that get tokens; the rest is encoded as bytes (default: 0.9995)"
    add("--character-coverage", type=float, metavar="FRACTION", help=text)
    text = "Unicode normalization before encoding; with none (default) decoding restores every text exactly"
    add("--normalization", choices=forms, default="none", help=text)
    add("--split-digits", action="store_true", help="encode each digit as one token")
    add("--overwrite", action="store_true", help="replace FOLDER if it exists")
    arguments = parser.parse_args(argv)
    names = [setting.name for setting in fields(TokenizerTrainingConfig)]
    settings = TokenizerTrainingConfig(**{name: getattr(arguments, name) for name in names})
    folder = Path(arguments.output)
    if folder.exists() and not arguments.overwrite:
        raise ConfigError(f"{folder} already exists; --overwrite replaces it.")
    check_positive(arguments, "sample_chars")
    reader, inputs = DocumentReader(arguments.text_key, arguments.on_error), expand_inputs(arguments.input)
    texts = (text for path in inputs for _, text in reader.read(FileSlice.whole(path)))
    sample = tokenizer_training.sample_texts(texts, arguments.sample_chars)
    for line in summarize_skipped(reader.skipped, reader.examples):
        print(f"{arguments.on_error}: {line}")
    files = tokenizer.train_tokenizer(sample, settings)
    digests = b"".join(hashlib.sha256(text.encode()).digest() for text in sample)
    record = {
        **asdict(settings),
        "documents": len(sample),
        "characters": sum(map(len, sample)),
        "sample_sha256": hashlib.sha256(digests).hexdigest(),
        "library": tokenizer_training.training_library(settings.kind),
    }
    files["training.json"] = json.dumps(record, indent=2, ensure_ascii=False).encode()
    with replace_directory(folder, files):
        pass
    vocab_size = tokenizer.load_tokenizer(str(folder)).vocab_size
    print(f"{folder}: {vocab_size:,} tokens, trained on {record['characters']:,} characters")
    return 0

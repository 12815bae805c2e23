"""Tokenizes text files into a .bin/.idx dataset, with many processes; continues where it was interrupted."""

from __future__ import annotations

import argparse
import sys
from typing import get_args

from torchladder.data import tokenizer
from torchladder.data.prepare import executor
from torchladder.data.prepare.dataset_builder import prepare_dataset
from torchladder.data.prepare.document_encoder import DocumentEncoder
from torchladder.data.prepare.metadata import DatasetMetadata
from torchladder.data.prepare.tasks import PrepareConfig
from torchladder.data.text.document_reader import OnError
from torchladder.registry import ConfigError, unknown_name

EPILOG = """
A .txt, .md or .py file is one document; a .jsonl has one per line, a .csv or .parquet one per row. Each may be
compressed as .gz, .zst or .bz2. The output is PREFIX.bin, PREFIX.idx and PREFIX.json, the same for any number of
workers. If the command is interrupted, even by SIGKILL, run it again: finished parts are kept in PREFIX.parts.

examples:
  torchladder prepare --input data/en 'data/de/*.jsonl.gz' --output tokens/train --tokenizer tokenizers/mine
  torchladder prepare ... --shard $SLURM_ARRAY_TASK_ID/16     # then: torchladder merge tokens/train tokens/train-*.bin
"""


def run(argv: list[str]) -> int:
    """Prepares a dataset; returns 130 if it was interrupted by Ctrl-C."""
    arguments = _prepare_parser().parse_args(argv)
    if arguments.executor not in executor.registry.names():
        raise unknown_name("executor", arguments.executor, executor.registry.names())
    config = PrepareConfig(
        inputs=arguments.input,
        output=arguments.output,
        encoder=DocumentEncoder(tokenizer_of_arguments(arguments), bos=arguments.bos, eos=arguments.eos),
        tokenizer=arguments.tokenizer,
        text_key=arguments.text_key,
        on_error=arguments.on_error,
        shard=_parse_shard(arguments.shard),
        overwrite=arguments.overwrite,
        part_bytes=arguments.part_bytes,
    )
    try:
        done = prepare_dataset(config, executor.registry.get(arguments.executor)(workers=arguments.workers))
    except KeyboardInterrupt:
        print("interrupted; run the same command again to continue", file=sys.stderr)
        return 130
    print(describe_dataset(config.prefix, done))
    return 0


def describe_dataset(prefix: str, about: DatasetMetadata) -> str:
    """Returns a line on the documents and tokens of a dataset."""
    bos, eos = ("no token" if (token := about.tokenizer.get(end)) is None else token for end in ("bos", "eos"))
    counts = f"{about.documents:,} documents, {about.tokens:,} tokens as {about.dtype}"
    return f"{prefix}.bin: {counts}; bos: {bos}, eos: {eos}"


def add_tokenizer_options(parser: argparse.ArgumentParser, required: bool) -> None:
    """Adds the options that name a tokenizer."""
    parser.add_argument(
        "--tokenizer",
        required=required,
        metavar="T",
        help="bytes, a tokenizer.json, a SentencePiece .model, a tiktoken rank file, or a folder with one of them",
    )
    for token in ("bos", "eos"):
        text = f"{token} token of a tokenizer.json that does not define one"
        parser.add_argument(f"--{token}-token", default="", metavar="TOKEN", help=text)


def tokenizer_of_arguments(arguments: argparse.Namespace) -> tokenizer.Tokenizer:
    """Returns the tokenizer that the options name."""
    return tokenizer.load_tokenizer(arguments.tokenizer, arguments.bos_token, arguments.eos_token)


def add_input_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that name text files."""
    parser.add_argument("--input", nargs="+", required=True, metavar="PATH", help="files, folders or globs, in order")
    parser.add_argument(
        "--text-key", default="text", metavar="KEY", help="JSON key or column of the text (default: %(default)s)"
    )
    parser.add_argument(
        "--on-error",
        choices=get_args(OnError),
        default="error",
        help="if a document cannot be read: stop with its file and line (error, the default), leave it out and count "
        "it (skip), or remove invalid UTF-8 and leave out what is otherwise unreadable (repair)",
    )


def _prepare_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="torchladder prepare",
        description=__doc__,
        epilog=EPILOG,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_input_options(parser)
    parser.add_argument("--output", required=True, metavar="PREFIX", help="write PREFIX.bin, PREFIX.idx, PREFIX.json")
    add_tokenizer_options(parser, required=True)
    flag = argparse.BooleanOptionalAction
    parser.add_argument("--bos", action=flag, default=False, help="begin each document with the tokenizer's bos token")
    parser.add_argument("--eos", action=flag, default=True, help="end each document with the tokenizer's eos token")
    parser.add_argument("--workers", type=int, metavar="N", help="number of worker processes (default: one per CPU)")
    parser.add_argument(
        "--executor", default="local", metavar="NAME", help="local: this machine (default); ray: a Ray cluster"
    )
    parser.add_argument("--shard", metavar="I/N", help="prepare shard I of N, counted from 0, as PREFIX-I-of-N")
    parser.add_argument(
        "--part-bytes",
        type=int,
        metavar="N",
        help="bytes of input per task (default: 4 to 64 MiB)",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace an output that was prepared with other settings"
    )
    return parser


def _parse_shard(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    index, slash, count = text.partition("/")
    if not (slash and index.isdecimal() and count.isdecimal()):
        raise ConfigError(f"--shard {text}: must be I/N, for example 0/16 to 15/16.")
    return int(index), int(count)

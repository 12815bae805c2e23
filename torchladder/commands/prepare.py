"""Turns files of text into tokens on disk, by many processes, continued where it was interrupted."""

from __future__ import annotations

import argparse
import sys
from typing import get_args

from torchladder.data import tokenizer
from torchladder.data.prepare import dataset_builder, executor, tasks
from torchladder.data.prepare.document_encoder import DocumentEncoder
from torchladder.data.prepare.metadata import DatasetMetadata
from torchladder.data.text.document_reader import OnError
from torchladder.registry import ConfigError, unknown_name

EPILOG = """
Files: .txt .md .py are one document each; .jsonl one a line; .csv and .parquet one a row; each also as .gz .zst .bz2.
The output is PREFIX.bin, PREFIX.idx and PREFIX.json, the same for any number of workers. Ended at any moment, even by
kill -9, the same command goes on where it was; what is done so far lies in PREFIX.parts.

  torchladder prepare --input data/en 'data/de/*.jsonl.gz' --output tokens/train --tokenizer tokenizers/mine
  torchladder prepare ... --shard $SLURM_ARRAY_TASK_ID/16     # then: torchladder merge tokens/train tokens/train-*.bin
"""


def run(argv: list[str]) -> int:
    """Prepares; returns 130 when it was interrupted."""
    arguments = _parser().parse_args(argv)
    if arguments.executor not in executor.registry.names():
        raise unknown_name("executor", arguments.executor, executor.registry.names())
    preparation = tasks.PrepareConfig(
        inputs=arguments.input,
        output=arguments.output,
        framing=DocumentEncoder(load_tokenizer(arguments), bos=arguments.bos, eos=arguments.eos),
        tokenizer=arguments.tokenizer,
        text_key=arguments.text_key,
        on_error=arguments.on_error,
        shard=_shard(arguments.shard),
        overwrite=arguments.overwrite,
        part_bytes=arguments.part_bytes,
    )
    try:
        done = dataset_builder.prepare_dataset(
            preparation, executor.registry.get(arguments.executor)(workers=arguments.workers)
        )
    except KeyboardInterrupt:
        print("interrupted; the same command continues where it was", file=sys.stderr)
        return 130
    print("\n".join(lines(preparation.prefix, done)))
    return 0


def lines(prefix: str, about: DatasetMetadata) -> list[str]:
    """Returns what a pair holds, for people."""
    bos, eos = (about.tokenizer.get(end) for end in ("bos", "eos"))
    framed = f"each begins with {_token(bos)} and ends with {_token(eos)}"
    return [f"{prefix}.bin: {about.documents:,} documents, {about.tokens:,} tokens as {about.dtype}; {framed}"]


def _token(token: int | None) -> str:
    return "no token of its own" if token is None else f"token {token}"


def add_tokenizer(parser: argparse.ArgumentParser, required: bool) -> None:
    """Adds the options that name a tokenizer."""
    parser.add_argument(
        "--tokenizer",
        required=required,
        metavar="T",
        help="bytes, a tokenizer.json, a SentencePiece .model, a tiktoken rank file, or a folder with one",
    )
    parser.add_argument("--bos-token", default="", metavar="TOKEN", help="the bos of a tokenizer.json that tells none")
    parser.add_argument("--eos-token", default="", metavar="TOKEN", help="the eos of a tokenizer.json that tells none")


def load_tokenizer(arguments: argparse.Namespace) -> tokenizer.Tokenizer:
    """Returns the tokenizer that the options name."""
    return tokenizer.load(arguments.tokenizer, arguments.bos_token, arguments.eos_token)


def add_input(parser: argparse.ArgumentParser) -> None:
    """Adds the options that say what to read."""
    parser.add_argument("--input", nargs="+", required=True, metavar="PATH", help="files, folders or globs, in order")
    parser.add_argument("--text-key", default="text", metavar="KEY", help="key or column of the text (default: text)")
    parser.add_argument(
        "--on-error",
        choices=get_args(OnError),
        default="error",
        help="a document that cannot be read: end with its file and line (default), skip and count it, or skip it "
        "unless it only has bytes that are not UTF-8, which are left out",
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="torchladder prepare",
        description=__doc__,
        epilog=EPILOG,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_input(parser)
    parser.add_argument("--output", required=True, metavar="PREFIX", help="where PREFIX.bin, .idx and .json appear")
    add_tokenizer(parser, required=True)
    flag = argparse.BooleanOptionalAction
    parser.add_argument("--bos", action=flag, default=False, help="begin each document with the tokenizer's bos")
    parser.add_argument("--eos", action=flag, default=True, help="end each document with the tokenizer's eos")
    parser.add_argument("--workers", type=int, metavar="N", help="processes (default: all cores)")
    parser.add_argument("--executor", default="local", metavar="NAME", help="local (default), or ray: a Ray cluster")
    parser.add_argument("--shard", metavar="I/N", help="prepare the I-th of N shards, from 0, as PREFIX-I-of-N")
    parser.add_argument("--part-bytes", type=int, metavar="N", help="input of one task (default: 4 to 64 MiB)")
    parser.add_argument("--overwrite", action="store_true", help="replace an output that was prepared otherwise")
    return parser


def _shard(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    number, slash, count = text.partition("/")
    if not (slash and number.isdecimal() and count.isdecimal()):
        raise ConfigError(f"--shard {text}: must be I/N, for example 0/16 to 15/16.")
    return int(number), int(count)

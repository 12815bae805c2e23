"""Tokenizes text files into a .bin/.idx dataset, with many processes; continues where it was interrupted."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace

from torchladder.commands.arguments import (
    CommandParser,
    add_input_options,
    add_tokenizer_options,
    tokenizer_from_args,
)
from torchladder.data.prepare import executor
from torchladder.data.prepare.dataset_builder import prepare_dataset, prepare_held_out
from torchladder.data.prepare.document_encoder import DocumentEncoder
from torchladder.data.prepare.metadata import DatasetMetadata
from torchladder.data.prepare.per_file import prepare_each
from torchladder.data.prepare.tasks import PrepareConfig
from torchladder.data.prepare.text_counts import MAX_UNKNOWN_FRACTION, TextCounts
from torchladder.registry import ConfigError

EPILOG = """
A .txt, .md or .py file is one document; a .jsonl or .json has one per line, a .csv or .parquet one per row. Each may
be compressed as .gz, .zst, .bz2 or .xz. The output is PREFIX.bin, PREFIX.idx and PREFIX.json, the same for any number
of workers. If the command is interrupted, even by SIGKILL, run it again: finished parts are kept in PREFIX.parts.

examples:
  torchladder prepare --input data/en 'data/de/*.jsonl.gz' --output tokens/train --tokenizer tokenizers/mine
  torchladder prepare ... --output tokens --per-file          # data/en/a.jsonl: tokens/a.bin, .idx and .json
  torchladder prepare ... --validation-fraction 0.01          # 1% of the documents: tokens/train-validation
  torchladder prepare ... --shard $SLURM_ARRAY_TASK_ID/16     # then: torchladder merge tokens/train tokens/train-*.bin
"""


def run(argv: list[str]) -> int:
    """Prepares a dataset; returns 130 if it was interrupted by Ctrl-C."""
    parser = CommandParser(prog="torchladder prepare", description=__doc__, epilog=EPILOG)
    add_input_options(parser)
    add, flag = parser.add_argument, argparse.BooleanOptionalAction
    add("--output", required=True, metavar="PREFIX", help="write PREFIX.bin, PREFIX.idx, PREFIX.json")
    add_tokenizer_options(parser, required=True)
    add("--bos", action=flag, default=False, help="begin each document with the tokenizer's bos token")
    add("--eos", action=flag, default=True, help="end each document with the tokenizer's eos token")
    add("--workers", type=int, metavar="N", help="number of worker processes (default: one per CPU)")
    add("--executor", default="local", metavar="NAME", help="local: this machine (default); ray: a Ray cluster")
    text = "write a pair for each input file; --output is their folder, and --shard I/N takes every Nth file"
    add("--per-file", action="store_true", help=text)
    add("--shard", metavar="I/N", help="prepare shard I of N, counted from 0, as PREFIX-I-of-N")
    add("--part-bytes", type=int, metavar="N", help="bytes of input per task (default: 4 to 64 MiB)")
    text = "fraction of the tokens that may be unknown to the tokenizer (default: %(default)s)"
    add("--max-unknown-fraction", type=float, default=MAX_UNKNOWN_FRACTION, metavar="F", help=text)
    text = "fraction of the documents to hold out, as PREFIX-validation (default: %(default)s)"
    add("--validation-fraction", type=float, default=0.0, metavar="F", help=text)
    add("--overwrite", action="store_true", help="replace an output that was prepared with other settings")
    arguments = parser.parse_args(argv)
    build_executor = executor.registry.get(arguments.executor)
    config = PrepareConfig(
        inputs=arguments.input,
        output=arguments.output,
        encoder=DocumentEncoder(tokenizer_from_args(arguments), bos=arguments.bos, eos=arguments.eos),
        tokenizer=arguments.tokenizer,
        text_key=arguments.text_key,
        on_error=arguments.on_error,
        shard=_parse_shard(arguments.shard),
        overwrite=arguments.overwrite,
        part_bytes=arguments.part_bytes,
        max_unknown_fraction=arguments.max_unknown_fraction,
        validation_fraction=arguments.validation_fraction,
    )
    try:
        if arguments.per_file:
            for prefix, done in prepare_each(config, build_executor(workers=arguments.workers)):
                print(describe_dataset(prefix, done), flush=True)
            return 0
        if config.validation_fraction:
            held_out = prepare_held_out(config, build_executor(workers=arguments.workers))
        done = prepare_dataset(config, build_executor(workers=arguments.workers))
    except KeyboardInterrupt:
        kept = f"finished parts are kept in {f'{config.output}/*' if arguments.per_file else config.prefix}.parts"
        print(f"torchladder: interrupted; {kept}; run the same command again to continue", file=sys.stderr)
        return 130
    print(describe_dataset(config.prefix, done))
    if config.validation_fraction:
        print(describe_dataset(replace(config, split="validation").prefix, held_out))
    return 0


def describe_dataset(prefix: str, about: DatasetMetadata) -> str:
    """Returns a line on the documents and tokens of a dataset."""
    bos, eos = ("no token" if (token := about.tokenizer.get(end)) is None else token for end in ("bos", "eos"))
    counts = f"{about.documents:,} documents, {about.tokens:,} tokens as {about.dtype}"
    line = f"{prefix}.bin: {counts}; bos: {bos}, eos: {eos}"
    return f"{line}; {TextCounts(**about.text_counts).describe()}" if about.text_counts else line


def _parse_shard(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    index, slash, count = text.partition("/")
    if not (slash and index.isdecimal() and count.isdecimal()):
        raise ConfigError(f"--shard {text}: must be I/N, for example 0/16 to 15/16.")
    return int(index), int(count)

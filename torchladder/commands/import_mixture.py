"""Writes the mixture of ALLaM's JSON files, multipliers by domain and probabilities by language, as settings."""

from __future__ import annotations

import sys
from pathlib import Path

from torchladder import config
from torchladder.commands.arguments import CommandParser, check_positive
from torchladder.data.mixing import mixture_import
from torchladder.registry import require

EPILOG = """\
example:
  torchladder import-mixture --data-signature data.json --folder /data/bin_idx --data-ratio data_ratio.json \\
      --lang-prob lang_prob.json --exclude exclude_iterator.json --output mixture.toml

  Names say what a shard is: {language}_{domain}_..._tc={tokens}.bin. The output is a [data] section; a config takes it
  with job.extends. Every entry is imported with its value, or named on stderr and at the head of the output.
"""


def run(argv: list[str]) -> int:
    """Imports a mixture."""
    parser = CommandParser(prog="torchladder import-mixture", description=__doc__, epilog=EPILOG)
    add = parser.add_argument
    shards = parser.add_mutually_exclusive_group(required=True)
    shards.add_argument("--data-signature", type=Path, metavar="JSON", help="a list of the names of .bin files")
    shards.add_argument("--files", nargs="+", metavar="PATH", help="the .bin files: paths, folders or globs")
    add("--folder", default="", metavar="PATH", help="folder of the names in --data-signature")
    add("--data-ratio", type=Path, metavar="JSON", help="multipliers: {domain: m} or {language: {domain: m}}")
    add("--lang-prob", type=Path, metavar="JSON", help="probabilities: {language: p} (default: by size)")
    add("--exclude", type=Path, metavar="JSON", help='names to leave out: {"exclude_iterator_name": [...]}')
    add("--split", default="", metavar="A,B,C", help="training, validation and test parts of each shard, as Megatron's")
    add("--total-tokens", type=int, metavar="N", help="also show what a run of N tokens reads of each shard")
    add("--output", type=Path, metavar="FILE", help="config to write (default: standard output)")
    add("--overwrite", action="store_true", help="replace the output if it exists")
    arguments = parser.parse_args(argv)
    check_positive(arguments, "total_tokens")
    output: Path | None = arguments.output
    replaces = output is not None and output.exists()
    require(not replaces or arguments.overwrite, f"{output} exists: choose another --output, or set --overwrite.")
    require(not arguments.folder or arguments.files is None, "--folder is that of --data-signature, not of --files.")
    notices: list[str] = []
    if arguments.files is None:
        found, notices = mixture_import.read_signature(arguments.data_signature, arguments.folder)
    else:
        found = mixture_import.find_shards(arguments.files)
    mixture = mixture_import.MixtureImport(
        found,
        mixture_import.read_table(arguments.data_ratio) if arguments.data_ratio else {},
        mixture_import.read_table(arguments.lang_prob) if arguments.lang_prob else {},
        mixture_import.read_excluded(arguments.exclude) if arguments.exclude else [],
        arguments.split,
        notices,
    )
    table = mixture.table(arguments.total_tokens)
    named = (arguments.data_signature, arguments.data_ratio, arguments.lang_prob, arguments.exclude)
    text = mixture.to_toml(", ".join(file.name for file in named if file) or " ".join(arguments.files))
    config.load_text(text, str(output or "the imported mixture"))
    if output is None:
        print(text, end="")
    else:
        output.write_text(text, encoding="utf-8")
    for line in (*table, *mixture.notices):
        print(f"torchladder: {line}", file=sys.stderr)
    return 0

"""Writes the config of a torchtitan v0.2.2 job file, and names every key without a counterpart."""

from __future__ import annotations

import sys
from pathlib import Path

from torchladder import config
from torchladder.commands.arguments import CommandParser
from torchladder.config.titan_import import read_titan_file
from torchladder.registry import require

EPILOG = """\
example:
  torchladder import-titan llama3_8b.toml --output run.toml

  Settings that the file leaves to torchtitan keep torchtitan's defaults. What has no counterpart is named on stderr and
  in comments at the beginning of the config, with the nearest setting.
"""


def run(argv: list[str]) -> int:
    """Imports a file."""
    parser = CommandParser(prog="torchladder import-titan", description=__doc__, epilog=EPILOG)
    parser.add_argument("file", type=Path, metavar="FILE", help="a job file of torchtitan v0.2.2")
    parser.add_argument("--output", type=Path, metavar="FILE", help="config to write (default: standard output)")
    parser.add_argument("--overwrite", action="store_true", help="replace the output if it exists")
    arguments = parser.parse_args(argv)
    output: Path | None = arguments.output
    replaces = output is not None and output.exists()
    require(not replaces or arguments.overwrite, f"{output} exists: choose another --output, or set --overwrite.")
    imported = read_titan_file(arguments.file)
    text = imported.to_toml(arguments.file.name)
    if output is None:
        print(text, end="")
    else:
        output.write_text(text, encoding="utf-8")
    for line in imported.notices():
        print(f"torchladder: {line}", file=sys.stderr)
    given, left = len(imported.given), len(imported.missing.keys() & imported.given.keys())
    summary = f"{given - left - len(imported.unneeded)} of {given} keys imported, {left} named above"
    print(f"torchladder: {summary}, {len(imported.unneeded)} at torchtitan's default.", file=sys.stderr)
    config.load_text(text, str(output or "the imported config"))  # a value that is refused here is an error now
    return 0

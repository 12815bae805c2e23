"""Joins pairs of tokens to one, their documents in order; shards of one preparation give the whole."""

from __future__ import annotations

import argparse

from torchladder.commands.prepare import lines
from torchladder.data.formats.indexed import prefix_of
from torchladder.data.prepare import merging


def run(argv: list[str]) -> int:
    """Joins the pairs."""
    parser = argparse.ArgumentParser(prog="torchladder merge", description=__doc__, allow_abbrev=False)
    parser.add_argument("output", metavar="OUT", help="prefix of the pair to write")
    parser.add_argument("parts", nargs="+", metavar="PART", help="prefixes of pairs, or their .bin, in order")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT where it is there already")
    arguments = parser.parse_args(argv)
    parts = list(dict.fromkeys(map(prefix_of, arguments.parts)))
    print(
        "\n".join(
            lines(prefix_of(arguments.output), merging.merge_datasets(arguments.output, parts, arguments.overwrite))
        )
    )
    return 0

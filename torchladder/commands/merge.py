"""Merges .bin/.idx datasets into one, document after document; also the shards of torchladder prepare --shard."""

from __future__ import annotations

from torchladder.commands.arguments import CommandParser
from torchladder.commands.prepare import describe_dataset
from torchladder.data.formats.indexed import prefix_of
from torchladder.data.prepare.merging import merge_datasets

EPILOG = """
Datasets are merged in the order given, shards by their number. All must have the same tokenizer and token type.

example:
  torchladder merge tokens/train tokens/train-*.bin
  torchladder merge tokens/ended tokens/megatron.bin --append-eos 2
"""


def run(argv: list[str]) -> int:
    """Merges datasets."""
    parser = CommandParser(prog="torchladder merge", description=__doc__, epilog=EPILOG)
    parser.add_argument("output", metavar="OUTPUT", help="prefix of the dataset to write")
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="prefixes of datasets, or their .bin files")
    text = "append the token ID to each document that does not end with it"
    parser.add_argument("--append-eos", type=int, metavar="ID", help=text)
    parser.add_argument("--overwrite", action="store_true", help="replace OUTPUT if it exists")
    arguments = parser.parse_args(argv)
    inputs = list(dict.fromkeys(map(prefix_of, arguments.inputs)))
    merged = merge_datasets(arguments.output, inputs, arguments.overwrite, arguments.append_eos)
    print(describe_dataset(prefix_of(arguments.output), merged))
    return 0

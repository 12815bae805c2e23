"""Command-line options that several commands share."""

from __future__ import annotations

import argparse
from typing import Any, get_args

from torchladder.data import tokenizer
from torchladder.data.text.document_reader import OnError
from torchladder.inference.weight_choice import Kind, WeightChoice
from torchladder.registry import require


class CommandParser(argparse.ArgumentParser):
    """The parser of a command: its help keeps line breaks, and options cannot be abbreviated."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options)


def check_positive(arguments: argparse.Namespace, *names: str) -> None:
    """Raises ``ConfigError`` if one of the options is set and below 1."""
    for name in names:
        value = getattr(arguments, name, None)
        require(value is None or value >= 1, f"--{name.replace('_', '-')} {value}: must be 1 or more.")


def add_weight_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that choose weights of a run, for ``weights_from_args``."""
    text = "the weights, or their exponential moving average if the run had ema.enable (default: %(default)s)"
    parser.add_argument("--weights", choices=get_args(Kind), default="model", help=text)
    text = "the mean of the weights of K checkpoints, the last ones up to this one (default: %(default)s)"
    parser.add_argument("--average-last", type=int, default=1, metavar="K", help=text)


def weights_from_args(arguments: argparse.Namespace) -> WeightChoice:
    """Returns the weights that the options choose."""
    check_positive(arguments, "average_last")
    return WeightChoice(arguments.weights, arguments.average_last)


def add_tokenizer_options(parser: argparse.ArgumentParser, required: bool) -> None:
    """Adds the options that name a tokenizer."""
    text = "bytes, a tokenizer.json, a SentencePiece .model, a tiktoken rank file, or a folder with one of them"
    parser.add_argument("--tokenizer", required=required, metavar="T", help=text)
    for token in ("bos", "eos"):
        text = f"{token} token of a tokenizer.json that does not define one"
        parser.add_argument(f"--{token}-token", default="", metavar="TOKEN", help=text)


def tokenizer_from_args(arguments: argparse.Namespace) -> tokenizer.Tokenizer:
    """Returns the tokenizer that the options name."""
    return tokenizer.load_tokenizer(arguments.tokenizer, arguments.bos_token, arguments.eos_token)


def add_input_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that name text files."""
    add = parser.add_argument
    add("--input", nargs="+", required=True, metavar="PATH", help="files, folders or globs, in order")
    add("--text-key", default="text", metavar="KEY", help="JSON key or column of the text (default: %(default)s)")
    add_on_error_option(parser)


def add_on_error_option(parser: argparse.ArgumentParser) -> None:
    """Adds ``--on-error``."""
    parser.add_argument(
        "--on-error",
        choices=get_args(OnError),
        default="error",
        help="if a document is unreadable: stop with its file and line (error, the default), skip and count it (skip), "
        "or remove invalid UTF-8 and skip what is still unreadable (repair)",
    )

"""Command-line options that several commands share."""

from __future__ import annotations

import argparse
from typing import Any, get_args

from torchladder import config
from torchladder.data import tokenizer
from torchladder.data.text.document_reader import OnError
from torchladder.inference.weight_choice import Kind, WeightChoice
from torchladder.registry import require, unknown_name


class CommandParser(argparse.ArgumentParser):
    """The parser of a command: its help keeps line breaks, and options cannot be abbreviated."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options)


class SettingsParser(CommandParser):
    """The parser of a command that also takes the settings of a run, which the parser of training reads."""

    def parse(self, argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
        """Returns the command's own options, and the words that are settings; ``--help`` shows both and exits.

        Raises:
            ConfigError: an option without a section that the command does not have.
        """
        words = [word for word in argv if word not in ("-h", "--help")]
        arguments, rest = self.parse_known_args(words)
        settings = rest[1:] if rest[:1] == ["--"] else rest
        if words != argv:
            self.print_help()
            print("\nSettings of the run:\n", flush=True)
            config.load([*settings, "--help"], self.prog)
        for name in config.option_names(settings):
            if "." not in name and name != "phases":
                raise unknown_name("option", f"--{name.replace('_', '-')}", self._option_string_actions)
        return arguments, settings


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

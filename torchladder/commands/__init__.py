"""``torchladder <command>``: what is done before, beside and after training."""

from __future__ import annotations

import sys

from torchladder import config
from torchladder.commands import convert, evaluate, generate, inspect, merge, plan, prepare, report, slurm, tokenizer
from torchladder.registry import ConfigError, unknown_name

COMMANDS = {
    "plan": plan,
    "prepare": prepare,
    "merge": merge,
    "inspect": inspect,
    "tokenizer": tokenizer,
    "report": report,
    "convert": convert,
    "generate": generate,
    "evaluate": evaluate,
    "slurm": slurm,
}


def main() -> int:
    """Runs the command that the command line names; returns its exit code."""
    words = sys.argv[1:]
    if not words or words[0] in ("-h", "--help"):
        print("usage: torchladder <command> ...\n")
        for name, module in COMMANDS.items():
            print(f"  {name:10} {(module.__doc__ or '').splitlines()[0]}")
        print("\nTraining itself: ./run_train.sh, or python -m torchladder.train.")
        return 0
    try:
        if words[0] not in COMMANDS:
            raise unknown_name("command", words[0], COMMANDS)
        return COMMANDS[words[0]].run(words[1:])
    except ConfigError as error:
        return config.fail(error)

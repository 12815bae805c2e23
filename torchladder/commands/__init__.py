"""``torchladder <command>``: the tools around training."""

from __future__ import annotations

import platform
import sys

import torch
from torch.distributed.elastic.multiprocessing.errors import record

from torchladder import __version__, config, train
from torchladder.commands import (
    convert,
    evaluate,
    generate,
    import_mixture,
    import_titan,
    inspect,
    merge,
    plan,
    prepare,
    report,
    slurm,
    tokenizer,
)
from torchladder.registry import ConfigError, unknown_name

COMMANDS = {
    "train": (train, "train a model, or continue a run that was stopped"),
    "plan": (plan, "show a run's windows, tokens, FLOPs and memory before it starts"),
    "prepare": (prepare, "tokenize text files into binary token files, in parallel and resumable"),
    "tokenizer": (tokenizer, "train a tokenizer on text files"),
    "inspect": (inspect, "show the documents of a token file and verify it"),
    "merge": (merge, "merge token files into one"),
    "convert": (convert, "convert a checkpoint from or to Hugging Face format"),
    "generate": (generate, "generate text from a checkpoint or a Hugging Face model"),
    "evaluate": (evaluate, "compute loss and perplexity of checkpoints on files"),
    "slurm": (slurm, "write and submit an sbatch script that saves, requeues and resumes"),
    "report": (report, "compare runs in one plot and one table"),
    "import-titan": (import_titan, "write the config of a torchtitan v0.2.2 job file"),
    "import-mixture": (import_mixture, "write the mixture of ALLaM's JSON files as settings"),
}
"""Name → module with ``run(argv) -> exit code``, and the description in ``torchladder --help``."""


def main(argv: list[str] | None = None) -> int:
    """Runs the command named on the command line; returns its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: torchladder <command> [options]\n\ncommands:")
        for name, (_, description) in COMMANDS.items():
            print(f"  {name:14} {description}")
        print("\n'torchladder <command> --help' shows the options of a command.")
        print("./run_train.sh takes what 'torchladder train' takes, installs first, and starts a process per GPU.")
        return 0
    if argv[0] == "--version":
        print(f"torchladder {__version__}, torch {torch.__version__}, Python {platform.python_version()}")
        return 0
    try:
        if argv[0] not in COMMANDS:
            raise unknown_name("command", argv[0], COMMANDS)
        if argv[0] == "train":
            train.exit_process(record(train.main)(argv[1:]) or 0)
        return COMMANDS[argv[0]][0].run(argv[1:])
    except (ConfigError, OSError) as error:
        return config.print_config_error(error)
    except KeyboardInterrupt:
        print("torchladder: interrupted", file=sys.stderr)
        return 130

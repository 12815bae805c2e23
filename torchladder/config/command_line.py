"""The command line of a run: how a mistake in it is explained, and the parser of what is left."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import re
from collections.abc import Iterable
from typing import Annotated, TypeVar, get_args, get_origin

import tyro

from torchladder.config.values import cli_values, fields, spell_flags
from torchladder.registry import ConfigError, unknown_name

T = TypeVar("T")

COUNTERPARTS = {
    "config": "job.config_file",
    "config_file": "job.config_file",
    "data.phases": "a top-level [[phases]] (--phases on the command line)",
    "phases.weights": "phases.source_weights",
    "phases.from_share": "phases.from_fraction",
    "resilience.norm_deviations": "resilience.sigma_factor",
    # torchtitan's names, where they are not ours
    "checkpoint.enable_checkpoint": "checkpoint.enable",
    "checkpoint.model_weights_only": "checkpoint.last_save_model_only",
    "debug.print_config": "job.print_config",
    "dump_folder": "job.dump_folder",
    "experimental.custom_args_module": "job.plugins, a list of modules",
    "experimental.custom_import": "job.plugins, a list of modules",
    "hf_assets_path": "model.hf_assets_path",
    "job.custom_config_module": "job.plugins, a list of modules",
    "model.converters": "[float8] with enable = true, for 'float8'",
    "model.print_after_conversion": "job.print_config",
    "model.tokenizer_path": "tokenizer.path",
    "module": "model.name and model.flavor",
    "training.batch_size": "training.local_batch_size",
    "training.dataset": "data.sources, such as [{ path = 'corpus/*.jsonl' }], or [data] name = 'hub'",
    "training.dataset_path": "data.sources, such as [{ path = 'corpus/*.jsonl' }], or [data] name = 'hub'",
    "training.deterministic": "debug.deterministic",
    "training.max_context_length": "training.seq_len",
    "training.seed": "debug.seed",
    "training.warmup_steps": "lr_scheduler.warmup_steps",
    "training.num_tokens_per_microbatch_per_dp_rank": "training.local_batch_size, in rows of training.seq_len tokens",
    "training.num_tokens_per_train_step": "training.global_batch_size, in rows of training.seq_len tokens",
}
"""Names that users bring along -> the name here."""

SECTION_COUNTERPARTS = {"dataloader": "data", "profiler": "profiling", "validator": "validation"}
"""Sections of newer versions of torchtitan -> the section here."""

TYRO_TERMS = {
    r"^Unrecognized options: (.*)": r"unexpected \1: no option takes it. All settings: --help",
    r"^Missing from [\w. ]+: (.*) \(required\)": r"\1 is required",
    r"^(\w+): (?=\1\.)": "",  # a section that refuses its settings names them itself
    r"invalid literal for int\(\) with base 10: (.*)": r"\1 is not an integer",
    r"could not convert string to float: (.*)": r"\1 is not a number",
    r"no type matching .* could be instantiated from (\[.*?\])\. Got errors:.*": r"\1 is of another type",
}
"""How tyro says it -> how we do."""


def refuse_foreign_names(names: Iterable[str], place: str) -> None:
    """Raises ConfigError for a ``section.key`` that has another name here."""
    for name in names:
        section = name.partition(".")[0]
        if name in COUNTERPARTS:
            raise ConfigError(f"{place}: instead of {name}, use {COUNTERPARTS[name]}.")
        if section in SECTION_COUNTERPARTS:
            raise ConfigError(f"{place}: instead of [{section}] in {name}, use [{SECTION_COUNTERPARTS[section]}].")


def option_names(argv: Iterable[str]) -> list[str]:
    """Returns the settings that options on a command line name, as ``section.key``."""
    return [word[2:].partition("=")[0].replace("-", "_") for word in argv if word.startswith("--")]


def check_words(argv: list[str]) -> None:
    """Raises ConfigError for a command line without settings, or with a config file that no option names."""
    if not argv:
        raise ConfigError(
            "no settings. A first run: --job.config_file train_configs/quickstart.toml; all settings: --help."
        )
    refuse_foreign_names(option_names(argv), "the command line")
    files = [value for value in cli_values(argv, "job.config_file") if value.endswith(".toml")]
    if len(files) > 1 and option_names(argv).count("job.config_file") == 1:
        raise ConfigError(
            f"--job.config_file takes one file, not {' and '.join(files)}. A file builds on another by its key "
            "job.extends."
        )
    for number, word in enumerate(argv):
        after_option = number > 0 and argv[number - 1].startswith("--") and "=" not in argv[number - 1]
        if not word.startswith("-") and (number == 0 or (word.endswith(".toml") and not after_option)):
            raise ConfigError(f"unexpected {word!r}. A config file is named by --job.config_file {word}")


def parse(argv: list[str], defaults: T, prog: str) -> T:
    """Returns the settings that a command line sets over ``defaults``; prints the help and exits for ``--help``.

    Raises:
        ConfigError: an unknown option, or a value that is missing or of another type.
    """
    kind = type(defaults)
    _check_options(argv, kind)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(
                kind,
                default=defaults,
                args=spell_flags(argv, kind),
                prog=prog,
                description="Trains a language model on a context-length curriculum. The command line overrides the "
                "file that --job.config_file names.",
                use_underscores=True,
                config=(tyro.conf.HelptextFromCommentsOff,),  # help is in docstrings; the search for others is slow
            )
    except SystemExit as end:
        if not end.code:
            raise
        raise ConfigError(_first_sentence(said.getvalue())) from None


def _check_options(argv: list[str], kind: type) -> None:
    """Raises ConfigError for an option that is no setting."""
    known = {"help": ""} | {option: option.rpartition(".")[0] for option in _options("", kind)}
    for name in option_names(argv):
        if name in known or name.replace(".no_", ".") in known:
            continue
        section, _, key = name.rpartition(".")
        keys = [option.rpartition(".")[2] for option in known if known[option] == section]
        if keys and section:
            raise unknown_name("key", key, keys, f"--{name}")
        nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        hint = f"Did you mean --{nearest[0]}? " if nearest else ""
        sections = ", ".join(sorted({section for section in known.values() if section}))
        raise ConfigError(f"unknown option --{name}. {hint}Options are --section.key; sections: {sections}.")


def _options(prefix: str, kind: type) -> Iterable[str]:
    for name, field in fields(kind).items():
        type_ = get_args(field.type)[0] if get_origin(field.type) is Annotated else field.type
        if dataclasses.is_dataclass(type_) and isinstance(type_, type):
            yield from _options(f"{prefix}{name}.", type_)
        else:
            yield f"{prefix}{name}"


def _first_sentence(box: str) -> str:
    """Returns the message of tyro's error box, between its title and a rule, on one line, and what it expects."""
    groups: list[list[str]] = [[]]
    for line in [line.strip(" │|╭╮╰╯") for line in box.splitlines()][1:]:
        if line and not line.strip("─-"):
            groups.append([])
        elif line:
            groups[-1].append(line)
    first, *others = [group for group in groups if group] or [[box]]
    message = " ".join(first).removeprefix("Error parsing ")
    for pattern, text in TYRO_TERMS.items():
        message = re.sub(pattern, text, message)
    expected = next((group[1] for group in others if group[0].startswith("Argument helptext")), "")
    return f"{message.rstrip('. ')}." + (f" Expected: {expected}." if expected else "")

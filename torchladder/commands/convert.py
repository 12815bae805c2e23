"""Turns a Hugging Face folder into a checkpoint to start from, and a run's checkpoint into such a folder."""

from __future__ import annotations

import argparse
import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import tomli_w
import torch

from torchladder import checkpoint, models
from torchladder.config import Config
from torchladder.data import tokenizer
from torchladder.inference import hf_export
from torchladder.inference.trained_model import tokenizer_of
from torchladder.models.hf import conversion, hf_config
from torchladder.models.hf.hf_folder import CONFIG, Folder
from torchladder.registry import ConfigError

EPILOG = """
  torchladder convert from-hf models/Llama-3.2-1B --output models/llama3.2-1b
      writes checkpoint/step-0, the tokenizer, and config.toml, which a run extends (job.extends) or takes as it is
  torchladder convert to-hf outputs/run/checkpoint/step-5000 --output models/mine --dtype bfloat16
      writes what AutoModelForCausalLM.from_pretrained reads; the run's config.toml says what the checkpoint is of

Weights go from file to file, tensor by tensor: memory holds one or two of them (from-hf) and a shard of 2 GiB (to-hf).
"""

LONGEST = 8192
"""Tokens of a row in the settings of a converted model, at most; its own context may be far longer."""


def run(argv: list[str]) -> int:
    """Converts, in the direction that the first word says."""
    arguments = _parser().parse_args(argv)
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process is what is meant
    for option in ("vocab_size", "seq_len"):
        number = getattr(arguments, option, None)
        if number is not None and number < 1:
            raise ConfigError(f"--{option.replace('_', '-')} {number}: must be 1 or more.")
    if arguments.output.exists() and not arguments.overwrite:
        raise ConfigError(f"{arguments.output} is there already; --overwrite replaces it.")
    if arguments.output.is_file():
        raise ConfigError(f"--output {arguments.output} is a file, and a folder is written.")
    if arguments.source.resolve().is_relative_to(arguments.output.resolve()):
        raise ConfigError(f"--output {arguments.output} would replace {arguments.source}, which is read.")
    return _from_hf(arguments) if arguments.command == "from-hf" else _to_hf(arguments)


def _parser() -> argparse.ArgumentParser:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="torchladder convert", description=__doc__, epilog=EPILOG, allow_abbrev=False, formatter_class=form
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="from-hf|to-hf")
    ours = commands.add_parser("from-hf", help="a Hugging Face folder to a checkpoint", allow_abbrev=False)
    ours.add_argument("source", type=Path, metavar="DIR", help="with config.json and safetensors")
    ours.add_argument("--vocab-size", type=int, metavar="N", help="rows to have; new ones are the mean of the others")

    theirs = commands.add_parser("to-hf", help="a checkpoint to a Hugging Face folder", allow_abbrev=False)
    theirs.add_argument("source", type=Path, metavar="CHECKPOINT", help="of a run: .../checkpoint/step-N")
    theirs.add_argument("--vocab-size", type=int, metavar="N", help="rows to keep: leaves out what pads the vocabulary")
    theirs.add_argument("--seq-len", type=int, metavar="N", help="tokens of the longest row (default: of the run's)")
    theirs.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of weights (default: as saved)")
    theirs.add_argument("--tokenizer", metavar="T", help="file or folder, or none (default: the run's)")
    for command in (ours, theirs):
        command.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to write")
        command.add_argument("--overwrite", action="store_true", help="replace DIR where it is there already")
    return parser


def _from_hf(arguments: argparse.Namespace) -> int:
    source, output = Folder(arguments.source), arguments.output
    sections = _sections(source, output, arguments.vocab_size)
    with hf_export.replace_directory(output, {}) as partial:
        step = partial / "checkpoint" / "step-0"
        conversion.to_checkpoint(source, step, arguments.vocab_size)
        state = checkpoint.RunState(step=0, row=0, versions={"torch": torch.__version__})
        (step / checkpoint.RUN_STATE_FILE).write_text(state.to_json())
        checkpoint.write_checksums(step)
        (partial / "tokenizer").mkdir()
        for file in source.assets():
            shutil.copyfile(file, partial / "tokenizer" / file.name)
        (partial / "config.toml").write_text(tomli_w.dumps(sections))
    print(f"{output}: checkpoint/step-0 to start from, config.toml to extend")
    return 0


def _sections(source: Folder, output: Path, vocab_size: int | None) -> dict[str, dict[str, Any]]:
    """Returns the settings of a run that starts from the converted model."""
    model = hf_config.read(source.config)
    length = min(source.config.get("max_position_embeddings", LONGEST), LONGEST)
    window, files = hf_config.window_of(source.config), {file.name for file in source.assets()}
    sections: dict[str, dict[str, Any]] = {
        "model": {**model, "vocab_size": vocab_size or model["vocab_size"]},
        "training": {"seq_len": length},
        "checkpoint": {"enable": True, "initial_load_path": str(output.resolve() / "checkpoint" / "step-0")},
    }
    if files & {*tokenizer.tokenizer_files.NAMES}:
        name = next(name for name in tokenizer.tokenizer_files.NAMES if name in files)
        kind = tokenizer.tokenizer_files.kind((source.path / name).read_bytes())
        sections["tokenizer"] = {"name": kind, "path": str(output.resolve() / "tokenizer" / name)}
    if window is not None and window < length:
        sections["attention"] = {"masks": ["sliding"]}
        sections["curriculum"] = {"name": "constant", "window": window}
    return sections


def _to_hf(arguments: argparse.Namespace) -> int:
    source, output = arguments.source, arguments.output
    if not checkpoint.is_complete(source):
        raise ConfigError(f"{str(source)!r} is no complete checkpoint: a folder step-N is meant.")
    config = hf_export.run_config(source)
    model = models.resolve(config.model)
    if arguments.vocab_size:
        if arguments.vocab_size > model.vocab_size:
            raise ConfigError(f"--vocab-size {arguments.vocab_size}: the model has {model.vocab_size} rows.")
        model = replace(model, vocab_size=arguments.vocab_size)
    dtype = getattr(torch, arguments.dtype) if arguments.dtype else None
    reads, files = _tokenizer(arguments, config)
    if arguments.vocab_size and reads is not None and reads.vocab_size > arguments.vocab_size:
        raise ConfigError(f"--vocab-size {arguments.vocab_size}: the tokenizer has {reads.vocab_size} tokens.")
    facts = hf_export.hf_metadata(config, reads)
    theta = hf_export.trained_rope_theta(config, source)
    facts = replace(facts, seq_len=arguments.seq_len or facts.seq_len, rope_theta=theta)
    hf_export.export_checkpoint(source, output, (config.model.name, model), facts, files, dtype)
    print(f"{output}: {CONFIG}, weights, {', '.join(files) or 'no tokenizer (--tokenizer names one)'}")
    whole = {"chunk"} if hf_export.final_window(config) is None else set()  # a chunk that fills the row
    for mask in sorted({*config.attention.masks} - {"causal", "sliding"} - whole):
        print(f"The run's mask {mask!r} has no form there: the model attends to all tokens before it.")
    return 0


def _tokenizer(arguments: argparse.Namespace, config: Config) -> tuple[tokenizer.Tokenizer | None, dict[str, bytes]]:
    """Returns the tokenizer that goes along, the given one or the run's, and its files.

    Raises:
        ConfigError: it is not here, or no longer the one that the run had.
    """
    if arguments.tokenizer == "none":
        return None, {}
    if arguments.tokenizer:
        found = tokenizer.load(arguments.tokenizer)
        return found, hf_export.exported_tokenizer_files(found, arguments.tokenizer)
    try:
        reads = tokenizer_of(arguments.source, config)
    except ConfigError as error:
        raise ConfigError(f"{error} --tokenizer names another, or none.") from error
    return reads, hf_export.exported_tokenizer_files(reads, getattr(config.tokenizer, "path", ""))

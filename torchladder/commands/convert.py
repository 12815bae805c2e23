"""Converts a Hugging Face folder to a checkpoint to train from, or a checkpoint to a Hugging Face folder."""

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
from torchladder.commands.arguments import CommandParser, add_weight_options, check_positive, weights_from_args
from torchladder.config import hf_defaults
from torchladder.data import tokenizer
from torchladder.data.tokenizer import hf_tokenizer
from torchladder.inference import hf_export
from torchladder.inference.hub_upload import HubRepository
from torchladder.inference.trained_model import TOKENIZER_FOLDER, TrainedModel
from torchladder.models.hf import conversion, hf_config
from torchladder.models.hf.hf_folder import HF_CONFIG_FILE, HFFolder
from torchladder.registry import ConfigError, require

EPILOG = """
examples:
  torchladder convert from-hf models/Llama-3.2-1B --output models/llama3.2-1b
      writes checkpoint/step-0, the tokenizer, and config.toml for a run that starts from them (job.extends)
  torchladder convert to-hf outputs/run/checkpoint/step-5000 --output models/exported --dtype bfloat16
      writes a folder for AutoModelForCausalLM.from_pretrained

Weights are converted tensor by tensor: memory holds one or two of them (from-hf) or a shard of 2 GiB (to-hf).
"""

MAX_SEQ_LEN = 8192
"""Maximum training.seq_len in the settings of a converted model, in tokens. Its own context may be much longer."""


def run(argv: list[str]) -> int:
    """Converts in the direction of the subcommand, from-hf or to-hf."""
    parser = CommandParser(prog="torchladder convert", description=__doc__, epilog=EPILOG)
    commands = parser.add_subparsers(dest="command", required=True, metavar="from-hf|to-hf")
    from_hf = commands.add_parser("from-hf", help="Hugging Face folder to checkpoint")
    add = from_hf.add_argument
    add("source", type=Path, metavar="DIR", help="folder with config.json and weights")
    add("--vocab-size", type=int, metavar="N", help="rows of the vocabulary; new ones are the mean of the others")
    to_hf = commands.add_parser("to-hf", help="checkpoint to Hugging Face folder")
    add = to_hf.add_argument
    add("source", type=Path, metavar="CHECKPOINT", help="checkpoint of a run: .../checkpoint/step-N")
    add("--vocab-size", type=int, metavar="N", help="rows of the vocabulary to keep, without padding")
    add("--seq-len", type=int, metavar="N", help="max_position_embeddings (default: training.seq_len)")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="dtype of the weights (default: as saved)")
    add("--tokenizer", metavar="T", help="tokenizer file or folder, or none (default: the run's)")
    add("--push-to-hub", metavar="REPO", help="also upload the folder to this model repository on the Hugging Face Hub")
    add("--private", action="store_true", help="with --push-to-hub: a new repository is private")
    add_weight_options(to_hf)
    for command in (from_hf, to_hf):
        command.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to write")
        command.add_argument("--overwrite", action="store_true", help="replace the folder if it exists")
    arguments = parser.parse_args(argv)
    check_positive(arguments, "vocab_size", "seq_len")
    source, output = arguments.source, arguments.output
    require(not output.exists() or arguments.overwrite, f"--output {output} exists already; --overwrite replaces it.")
    require(not output.is_file(), f"--output {output} is a file; it must be a folder.")
    replaces_source = source.resolve().is_relative_to(output.resolve())
    require(not replaces_source, f"--output {output} would replace the source {source}.")
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # a single process is intended
    return _from_hf(arguments) if arguments.command == "from-hf" else _to_hf(arguments)


def _from_hf(arguments: argparse.Namespace) -> int:
    source, output = HFFolder(arguments.source), arguments.output
    settings = _run_settings(source, output, arguments.vocab_size)
    with hf_export.replace_directory(output, {}) as partial:
        step = partial / "checkpoint" / "step-0"
        conversion.hf_to_checkpoint(source, step, arguments.vocab_size)
        state = checkpoint.RunState(step=0, row=0, versions={"torch": torch.__version__})
        (step / checkpoint.RUN_STATE_FILE).write_text(state.to_json())
        checkpoint.write_checksums(step)
        (partial / TOKENIZER_FOLDER).mkdir()
        for file in source.asset_files():
            shutil.copyfile(file, partial / TOKENIZER_FOLDER / file.name)
        (partial / checkpoint.CONFIG_FILE).write_text(tomli_w.dumps(settings))
    print(f"{output}: checkpoint/step-0 to start from, config.toml to extend")
    return 0


def _run_settings(source: HFFolder, output: Path, vocab_size: int | None) -> dict[str, dict[str, Any]]:
    """Returns the settings of a run that starts from the converted model."""
    model = hf_config.model_section(source.config, source.config_file)
    seq_len = min(source.config.get("max_position_embeddings", MAX_SEQ_LEN), MAX_SEQ_LEN)
    sections: dict[str, dict[str, Any]] = {
        "model": {**model, "vocab_size": vocab_size or model["vocab_size"]},
        "training": {"seq_len": seq_len},
        "checkpoint": {"enable": True, "initial_load_path": str(output.resolve() / "checkpoint" / "step-0")},
    }
    section = hf_defaults.tokenizer_section(source.path)
    path = output.resolve() / TOKENIZER_FOLDER / Path(section.get("path", "")).name
    sections["tokenizer"] = {**section, "path": str(path)} if section else {"name": "none"}
    window = hf_config.sliding_window(source.config)
    if window is not None and (window < seq_len or "layer_types" in model):
        sections |= hf_defaults.sliding_window_sections(window, "layer_types" in model)
    return sections


def _to_hf(arguments: argparse.Namespace) -> int:
    source, output, vocab_size = arguments.source, arguments.output, arguments.vocab_size
    require(arguments.push_to_hub is not None or not arguments.private, "--private needs --push-to-hub REPO.")
    require(checkpoint.is_complete(source), f"{str(source)!r} is not a complete checkpoint (step-N).")
    trained = TrainedModel.open(source, choice=weights_from_args(arguments))
    config = trained.config
    own, files = _tokenizer_to_export(arguments, trained)
    if vocab_size is not None:
        rows, tokens = models.resolve(config.model).vocab_size, own.vocab_size if own else 0
        require(vocab_size <= rows, f"--vocab-size {vocab_size}: the model has only {rows} rows.")
        require(vocab_size >= tokens, f"--vocab-size {vocab_size}: the tokenizer has {tokens} tokens.")
    files, token_ids = hf_tokenizer.export_tokenizer(own, files)
    metadata = hf_export.hf_metadata(config, token_ids, trained.window, trained.rope_theta, trained.layer_windows)
    metadata = replace(metadata, seq_len=arguments.seq_len or metadata.seq_len)
    dtype = getattr(torch, arguments.dtype) if arguments.dtype else None
    repository = HubRepository(arguments.push_to_hub, arguments.private) if arguments.push_to_hub is not None else None
    hf_export.export_checkpoint(trained, output, metadata, files, dtype, vocab_size)
    print(f"{output}: {HF_CONFIG_FILE}, weights, {', '.join(files) or 'no tokenizer (add one with --tokenizer)'}")
    for line in hf_export.lost_masks(config, trained.window, trained.layer_windows):
        print(line)
    if repository:
        print(f"uploaded: {repository.upload(output)}")
    return 0


def _tokenizer_to_export(
    arguments: argparse.Namespace, trained: TrainedModel
) -> tuple[tokenizer.Tokenizer | None, dict[str, bytes]]:
    """Returns the tokenizer to export, that of ``--tokenizer`` or the run's, and its files."""
    if arguments.tokenizer == "none":
        return None, {}
    path = arguments.tokenizer or getattr(trained.config.tokenizer, "path", "")
    try:
        own = tokenizer.load_tokenizer(path) if arguments.tokenizer else trained.build_tokenizer()
    except ConfigError as error:
        hint = "" if arguments.tokenizer else " Choose another with --tokenizer, or none."
        raise ConfigError(f"{error}{hint}") from error
    return own, hf_export.exported_tokenizer_files(own, path)

"""Continues prompts with the weights of a checkpoint or of a Hugging Face folder."""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

import torch

from torchladder.config import SamplesConfig
from torchladder.inference.decoding import generate
from torchladder.inference.trained_model import IncrementalDecoder, settings_of, tokenizer_of
from torchladder.registry import ConfigError


def run(argv: list[str]) -> int:
    """Prints each prompt with its continuation."""
    defaults = SamplesConfig()
    parser = argparse.ArgumentParser(prog="torchladder generate", description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "--checkpoint", type=Path, required=True, metavar="DIR", help="a run's .../step-N, or a Hugging Face folder"
    )
    parser.add_argument("--prompt", nargs="+", required=True, metavar="TEXT", help="texts to continue")
    parser.add_argument("--max-new-tokens", type=int, default=defaults.max_new_tokens, metavar="N", help="of each")
    parser.add_argument("--temperature", type=float, default=defaults.temperature, help="0 takes the likeliest token")
    parser.add_argument("--top-p", type=float, default=defaults.top_p, help="probability of the tokens to draw from")
    parser.add_argument("--seed", type=int, default=0, help="of each prompt's draw")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="prompts side by side (default: 8)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the weights")
    arguments = parser.parse_args(argv)
    if arguments.batch_size < 1:
        raise ConfigError(f"--batch-size {arguments.batch_size}: must be 1 or more.")
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process is what is meant
    samples = SamplesConfig(
        max_new_tokens=arguments.max_new_tokens, temperature=arguments.temperature, top_p=arguments.top_p
    )
    config = settings_of(arguments.checkpoint)
    tokenizer = tokenizer_of(arguments.checkpoint, config)
    if tokenizer is None:
        raise ConfigError(f"{arguments.checkpoint} has no tokenizer to read the prompts with.")
    reader = IncrementalDecoder(config, arguments.checkpoint, getattr(torch, arguments.dtype))
    for first in range(0, len(arguments.prompt), arguments.batch_size):
        prompts = arguments.prompt[first : first + arguments.batch_size]
        ids = [tokenizer.encode(prompt) or [tokenizer.eos] for prompt in prompts]
        for prompt, new in zip(
            prompts, generate(reader, ids, samples, reader.seq_len, arguments.seed, tokenizer.eos), strict=True
        ):
            print(prompt + tokenizer.decode(new), flush=True)
    return 0

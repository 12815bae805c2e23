"""Continues prompts with a checkpoint or a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path

import torch

from torchladder.commands.arguments import CommandParser, add_weight_options, check_positive, weights_from_args
from torchladder.config import SamplesConfig
from torchladder.inference.decoding import IncrementalDecoder, generate
from torchladder.inference.trained_model import TrainedModel
from torchladder.registry import ConfigError

EPILOG = """
example:
  torchladder generate --checkpoint outputs/run --prompt "The ladder" "A mask" --temperature 0
"""


def run(argv: list[str]) -> int:
    """Prints each prompt with its continuation."""
    defaults = SamplesConfig()
    parser = CommandParser(prog="torchladder generate", description=__doc__, epilog=EPILOG)
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, metavar="DIR", help="run, checkpoint step-N or Hugging Face folder")
    add("--prompt", nargs="+", required=True, metavar="TEXT", help="texts to continue")
    add("--max-new-tokens", type=int, default=defaults.max_new_tokens, metavar="N", help="default: %(default)s")
    add("--temperature", type=float, default=defaults.temperature, help="0 is greedy (default: %(default)s)")
    add("--top-k", type=int, default=defaults.top_k, metavar="K", help="likeliest tokens; 0: all (default: 0)")
    add("--top-p", type=float, default=defaults.top_p, help="nucleus sampling (default: %(default)s)")
    penalty = defaults.repetition_penalty
    add("--repetition-penalty", type=float, default=penalty, help="of tokens in the text (default: 1, none)")
    add("--seed", type=int, default=0, help="seed of each prompt's sampling (default: %(default)s)")
    add("--batch-size", type=int, default=8, metavar="N", help="prompts per batch (default: %(default)s)")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the weights (default: %(default)s)")
    add_weight_options(parser)
    arguments = parser.parse_args(argv)
    check_positive(arguments, "batch_size")
    options = "max_new_tokens", "temperature", "top_k", "top_p", "repetition_penalty"
    samples = SamplesConfig(**{name: getattr(arguments, name) for name in options})
    trained = TrainedModel.open(arguments.checkpoint, choice=weights_from_args(arguments))
    tokenizer = trained.build_tokenizer()
    if tokenizer is None:
        raise ConfigError(f"{arguments.checkpoint} has no tokenizer for the prompts.")
    decoder = IncrementalDecoder(trained, getattr(torch, arguments.dtype))
    for first in range(0, len(arguments.prompt), arguments.batch_size):
        prompts = arguments.prompt[first : first + arguments.batch_size]
        ids = [tokenizer.encode(prompt) or [tokenizer.eos] for prompt in prompts]
        texts = generate(decoder, ids, samples, decoder.seq_len, arguments.seed, tokenizer.eos)
        for number, (prompt, new) in enumerate(zip(prompts, texts, strict=True), first + 1):
            if len(arguments.prompt) > 1:
                print(f"--- {number} of {len(arguments.prompt)}")
            print(prompt + tokenizer.decode(new), flush=True)
    return 0

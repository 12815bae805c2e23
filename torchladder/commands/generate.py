"""Continues prompts with the weights of a checkpoint or of a Hugging Face folder."""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_model_state_dict

from torchladder import checkpoint, config, export, mask, models, reading
from torchladder.config import Config
from torchladder.generate import SamplesConfig, generate
from torchladder.models import Model, attention
from torchladder.models.interchange import weights
from torchladder.models.interchange.folder import CONFIG
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
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    arguments = parser.parse_args(argv)
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process is what is meant
    samples = SamplesConfig(
        max_new_tokens=arguments.max_new_tokens, temperature=arguments.temperature, top_p=arguments.top_p
    )
    run_config = _settings(arguments.checkpoint)
    tokenizer = reading.tokenizer(run_config)
    if tokenizer is None:
        raise ConfigError(f"{arguments.checkpoint} has no tokenizer to read the prompts with.")
    speak = Speaker(run_config, arguments.checkpoint)
    for prompt in arguments.prompt:
        generator = torch.Generator().manual_seed(arguments.seed)
        ids = tokenizer.encode(prompt) or [tokenizer.eos]
        print(prompt + tokenizer.decode(generate(speak, ids, samples, speak.seq_len, generator, tokenizer.eos)))
    return 0


class Speaker:
    """A model with its weights, under the mask and at the RoPE theta with which its run ended.

    Args:
        settings: of the run.
        path: its weights, a checkpoint or a Hugging Face folder.
    """

    def __init__(self, settings: Config, path: Path) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.seq_len = settings.training.seq_len
        self.window = export.window(settings) or self.seq_len
        self.masks = [mask.registry.get(name) for name in settings.attention.masks]
        self.kernel = attention.kernel("auto", settings.attention.masks, self.device, training=False)
        with torch.device("meta"):
            self.model = models.build(settings.model, attend=self.kernel.attend, seq_len=self.seq_len)
        self.model.to_empty(device=self.device)
        _load(self.model, path)
        theta = export.facts(settings, None).rope_theta
        if theta is not None:
            self.model.turn(theta)

    def __call__(self, tokens: Tensor) -> Tensor:
        """Returns the logits (1, T, V) of tokens (1, T)."""
        positions = torch.arange(tokens.shape[1], dtype=torch.int32)[None]
        start = mask.compose(*(allow(positions, self.window) for allow in self.masks))
        return self.model(tokens.to(self.device), self.kernel.derive(start, self.device))


def _settings(path: Path) -> Config:
    if (path / CONFIG).is_file():
        return config.load(["--model.hf_assets_path", str(path)])
    if not checkpoint.complete(path):
        raise ConfigError(f"{str(path)!r} is neither a complete checkpoint (step-N) nor a Hugging Face folder.")
    return export.run_of(path)


def _load(model: Model, path: Path) -> None:
    if (path / CONFIG).is_file():
        weights.load(model, path)
    else:
        dcp.load({"model": get_model_state_dict(model)}, checkpoint_id=path, no_dist=True)

"""Generation with a KV cache against none, and with a batch of prompts against one prompt.

python -m tests.benchmarks.generate [new tokens] [prompts]

Llama ``small`` with its initial weights, prompts of 64 tokens. All rows of a table are measured in one run.
"""

import sys
import tempfile
from pathlib import Path

from tests.benchmarks.timing import seconds, table
from torchladder import train
from torchladder.config import SamplesConfig
from torchladder.inference.decoding import IncrementalDecoder, generate
from torchladder.inference.trained_model import TrainedModel

DEBUG = Path(__file__).parents[2] / "train_configs" / "debug.toml"
PROMPT = 64


def decoder(folder: Path) -> IncrementalDecoder:
    """Returns a model with its initial weights."""
    argv = ["--job.config_file", str(DEBUG), "--job.dump_folder", str(folder), "--model.flavor", "small"]
    argv += ["--training.seq_len", "1024", "--checkpoint.enable", "--checkpoint.create_seed_checkpoint"]
    assert train.main(argv) == 0
    return IncrementalDecoder(TrainedModel.open(folder / "checkpoint" / "step-0"))


def main(new: int = 256, prompts: int = 8) -> None:
    """Prints tokens per second, and the speedup over the first line."""
    config = SamplesConfig(max_new_tokens=new, temperature=1.0, top_p=1.0)
    rows = [[(7 * place + number) % 512 for place in range(PROMPT)] for number in range(prompts)]
    with tempfile.TemporaryDirectory() as folder:
        cached, uncached = decoder(Path(folder)), decoder(Path(folder) / "again")

    def without_cache(rows: list[list[int]]):
        uncached.reset()
        return uncached(rows)

    def text(next_logits, rows: list[list[int]]) -> None:
        generate(next_logits, rows, config, cached.seq_len, seed=0)

    found = seconds(
        {
            ("no cache", 1): lambda: text(without_cache, rows[:1]),
            ("cache", 1): lambda: text(cached, rows[:1]),
            ("cache", prompts): lambda: text(cached, rows),
        },
        turns=3,
    )
    speeds = {name: new * name[1] / took for name, took in found.items()}
    first = next(iter(speeds.values()))
    lines = [[name, f"{count}", f"{speed:,.0f}", f"{speed / first:.1f}"] for (name, count), speed in speeds.items()]
    table([f"{new} new tokens each", "prompts", "tokens/s", "times"], lines)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))

"""Text from a cache against every token read anew, and prompts side by side against one after the other.

python -m tests.benchmarks.generate [new tokens] [prompts]

Llama ``small`` with its first weights, prompts of 64 tokens. Whatever stands in one table was measured in one run.
"""

import sys
import tempfile
from pathlib import Path

from tests.benchmarks.timing import seconds, table
from torchladder import train
from torchladder.config import SamplesConfig
from torchladder.inference.decoding import generate
from torchladder.inference.trained_model import IncrementalDecoder, settings_of

DEBUG = Path(__file__).parents[2] / "train_configs" / "debug.toml"
PROMPT = 64


def reader(folder: Path) -> IncrementalDecoder:
    """Returns a model with its first weights."""
    argv = ["--job.config_file", str(DEBUG), "--job.dump_folder", str(folder), "--model.flavor", "small"]
    argv += ["--training.seq_len", "1024", "--checkpoint.enable", "--checkpoint.create_seed_checkpoint"]
    assert train.main(argv) == 0
    path = folder / "checkpoint" / "step-0"
    return IncrementalDecoder(settings_of(path), path)


def main(new: int = 256, prompts: int = 8) -> None:
    """Prints tokens per second, and how many times those of the first line."""
    config = SamplesConfig(max_new_tokens=new, temperature=1.0, top_p=1.0)
    rows = [[(7 * place + number) % 512 for place in range(PROMPT)] for number in range(prompts)]
    with tempfile.TemporaryDirectory() as folder:
        cached, anew = reader(Path(folder)), reader(Path(folder) / "again")

    def forget(rows: list[list[int]]):
        anew.forget()
        return anew(rows)

    def text(read, rows: list[list[int]]) -> None:
        generate(read, rows, config, cached.seq_len, seed=0)

    found = seconds(
        {
            ("read anew", 1): lambda: text(forget, rows[:1]),
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

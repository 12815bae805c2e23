"""Proof and speed on one GPU, in one command: a short table of each part, and one JSON file of all of them.

    python -m tests.benchmarks.gpu                     what fits into eight minutes on one H200
    python -m tests.benchmarks.gpu warm speed ladder   only these parts
    python -m tests.benchmarks.gpu --minutes 25        starts no measurement later; lists what is left out
    python -m tests.benchmarks.gpu speed --only "1b, 8,192 tokens, flash" --only "llama3-8b"
    python -m tests.benchmarks.gpu --output figures.json

Without a GPU the same parts run on small shapes, which tests the command and says nothing about speed.
"""

import argparse
import json
import platform
import sys
import time
import traceback
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from tests.benchmarks.gpu import correctness, costs, kernels, ladder, peer, speed, warm
from tests.benchmarks.gpu.stepping import CUDA, clock

PARTS = {
    "warm": warm,
    "correctness": correctness,
    "kernels": kernels,
    "speed": speed,
    "peer": peer,
    "ladder": ladder,
    "costs": costs,
}


def main() -> int:
    """Runs the parts; returns 1 when one of them fails."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--output", type=Path, default=Path("outputs/gpu.json"), metavar="FILE", help="the JSON file")
    parser.add_argument("--minutes", type=float, default=7.5, help="after which no measurement begins (default: 7.5)")
    parser.add_argument(
        "--only", action="append", metavar="TEXT", help="measures only what has this in its description"
    )
    arguments = parser.parse_args()
    for name in arguments.parts:
        if name not in PARTS:
            parser.error(f"no part {name!r}; there are {', '.join(PARTS)}")
    sys.stdout.reconfigure(line_buffering=True)  # what is stopped has said what it knows
    clock.end = time.perf_counter() + 60 * arguments.minutes
    clock.only = tuple(arguments.only or clock.only)
    figures: dict[str, Any] = {"when": datetime.now(timezone.utc).isoformat(timespec="seconds"), **about()}
    print(" · ".join(str(value) for value in figures.values()) + "\n")
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    failed = []
    for name in arguments.parts or PARTS:
        if not clock.has_time(name):
            continue
        begin = time.perf_counter()
        try:
            figures[name] = PARTS[name].run()
        except Exception:  # one part that cannot run does not cost the others their figures
            figures[name] = {"failed": traceback.format_exc()}
            failed.append(name)
            traceback.print_exc()
        figures[name]["seconds"] = round(time.perf_counter() - begin, 1)
        arguments.output.write_text(json.dumps(figures, indent=1) + "\n")
    print(f"wrote {arguments.output}" + (f"; failed: {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


def about() -> dict[str, Any]:
    """Returns hardware and versions."""
    return {
        "device": torch.cuda.get_device_name() if CUDA else f"CPU, {torch.get_num_threads()} threads",
        "torch": f"torch {torch.__version__}",
        "python": f"Python {platform.python_version()}",
        "cudnn": f"cuDNN {torch.backends.cudnn.version()}" if CUDA else "no CUDA",
    }


if __name__ == "__main__":
    raise SystemExit(main())

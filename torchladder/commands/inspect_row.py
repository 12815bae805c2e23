"""Shows one row as a run reads it: its documents, their text, and the tokens without a label.

The run is its folder, or settings as for training: torchladder inspect --row N --job.config_file run.toml.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from torch import Tensor

from torchladder import config
from torchladder.checkpoint import CONFIG_FILE
from torchladder.commands.arguments import SettingsParser, check_positive
from torchladder.data import Batch, Tokenizer
from torchladder.data.dataloader import IGNORE_INDEX, TracksSources
from torchladder.data.row_skipping import RowSkipper
from torchladder.registry import ConfigError, require
from torchladder.training import data_setup
from torchladder.training.run_plan import Plan, make_plan

MAX_SHOWN_TOKENS = 100
"""Tokens of a document that are shown at its begin and, if it is longer than twice that, at its end."""

EPILOG = """
All other options are settings of the run, such as --job.config_file; the data is opened as when training starts. RUN is
the folder of a run, or its config file.

examples:
  torchladder inspect --row 0 --job.config_file train_configs/quickstart.toml
  torchladder inspect outputs/mine --row 1000 --json
"""


@dataclass(frozen=True)
class RowView:
    """A row of a run.

    Attributes:
        row: its global number.
        source: label of the source that it comes from.
        step: the step that trains on it, from 0; None for validation.
        window: tokens that a query may see in this step, itself included.
        tokens: (T) ids.
        labels: (T) next tokens, ``IGNORE_INDEX`` where there is none.
        starts: positions at which documents, and padding, begin.
    """

    row: int
    source: str
    step: int | None
    window: int | None
    tokens: list[int]
    labels: list[int]
    starts: list[int]

    def pieces(self) -> list[tuple[int, int]]:
        """Returns the first position of each document, or of the padding, and the position after its last."""
        return list(pairwise([*self.starts, len(self.tokens)]))

    def unlabeled(self, begin: int, end: int) -> list[tuple[int, int]]:
        """Returns the ranges of positions without a label, first and last inclusive."""
        found: list[tuple[int, int]] = []
        for position in range(begin, end):
            if self.labels[position] == IGNORE_INDEX:
                joins = found and found[-1][1] == position - 1
                found.append((found.pop()[0] if joins else position, position))
        return found

    def is_padding(self, begin: int, end: int) -> bool:
        """Whether positions are padding: token 0, without labels, to the end of the row."""
        return end == len(self.tokens) and not any(self.tokens[begin:]) and {*self.labels[begin:]} == {IGNORE_INDEX}


def run(argv: list[str]) -> int:
    """Prints a row of a run; unknown options are settings of the run."""
    words = [*argv]
    source = [] if not words or words[0].startswith("-") else _config_file(words.pop(0))
    parser = SettingsParser(prog="torchladder inspect [RUN]", description=__doc__, epilog=EPILOG)
    add = parser.add_argument
    add("--row", type=int, required=True, metavar="N", help="global row of the run to show, counted from 0")
    add("--split", choices=("train", "validation"), default="train", help="rows to count (default: %(default)s)")
    add("--world-size", type=int, default=1, metavar="N", help="number of ranks of the run (default: 1)")
    add("--json", action="store_true", help="print one JSON object with all tokens, labels and texts")
    arguments, settings = parser.parse(words)
    check_positive(arguments, "world_size")
    plan = make_plan(config.load([*source, *settings]), arguments.world_size)
    tokenizer = data_setup.build_checked_tokenizer(plan.config)
    view = read_row(plan, tokenizer, arguments.row, arguments.split)
    if arguments.json:
        texts = [tokenizer.decode(view.tokens[begin:end]) for begin, end in view.pieces()] if tokenizer else None
        print(json.dumps(vars(view) | {"texts": texts}))
    else:
        _print_row(view, tokenizer)
    return 0


def read_row(plan: Plan, tokenizer: Tokenizer | None, row: int, split: str) -> RowView:
    """Returns a row as a run reads it.

    Raises:
        ConfigError: the run never reads the row, or its data loader does not number rows.
    """
    section: Any = plan.config.data
    if hasattr(section, "num_workers"):  # one row does not need processes
        section = replace(section, num_workers=0, prefetch_factor=None)
    loader = data_setup.build_loader(replace(plan.config, data=section), plan.batch, plan.schedule, split, tokenizer)
    if not isinstance(loader, TracksSources):
        raise ConfigError(f"--row {row}: the data loader {section.name!r} does not number rows; the loader rows does.")
    step = _step_of(plan, section, row) if split == "train" else None
    if split == "validation":
        count = getattr(loader, "num_rows", 0)
        require(0 <= row < count, f"--row {row}: the validation data has {count:,} rows, counted from 0.")
    loader.seek(row)
    batch: Batch = next(loader)
    require(batch.rows[:1] == (row,), f"--row {row}: data.skip_rows leaves it out; the next one is {batch.rows[0]}.")
    tokens, labels, positions = (part[0] for part in (batch.tokens, batch.labels, batch.positions))
    starts: Tensor = torch.nonzero(positions == 0).flatten()
    window = None if step is None else plan.schedule.window(step)
    source = loader.source_of(row)
    return RowView(row, source, step, window, tokens.tolist(), labels.tolist(), starts.tolist())


def _step_of(plan: Plan, section: Any, row: int) -> int:
    """Returns the step that trains on a row; ``ConfigError`` if none does."""
    batch, skipper = plan.schedule.batch, RowSkipper(getattr(section, "skip_rows", ()))
    before = batch.rows_before(getattr(section, "first_step", 0))
    end = skipper.advance(0, batch.rows_before(plan.steps) - before)
    require(0 <= row < end, f"--row {row}: the run reads the rows 0 to {end - 1:,} in {plan.steps:,} steps.")
    skipped = sum(min(last, row - 1) - first + 1 for first, last in skipper.ranges if first < row)
    return batch.step_at(before + row - skipped)


def _config_file(run: str) -> list[str]:
    """Returns the settings of a run's folder, or of its config file."""
    path = Path(run)
    file = path / CONFIG_FILE if path.is_dir() else path
    require(
        file.is_file() and file.suffix == ".toml",
        f"--row shows a row of a run: {run!r} is neither the folder of one nor its config file. A document of a token "
        "file: --document N.",
    )
    return ["--job.config_file", str(file)]


def _print_row(view: RowView, tokenizer: Tokenizer | None) -> None:
    step = (
        "" if view.step is None else f", read in step {view.step:,} (from 0) under a window of {view.window:,} tokens"
    )
    print(f"row {view.row:,}: from {view.source}{step}")
    labels = len(view.labels) - view.labels.count(IGNORE_INDEX)
    print(f"{len(view.tokens):,} tokens, {labels:,} labels; documents, or parts of them, begin at:")
    for begin, end in view.pieces():
        unlabeled = view.unlabeled(begin, end)
        ranges = ", ".join(f"{first}" if first == last else f"{first}-{last}" for first, last in unlabeled)
        without = f", no label at {ranges}" if ranges else ""
        is_padding = view.is_padding(begin, end)
        kind = "padding" if is_padding else "tokens"
        Console().print(f"[bold]{begin}: {end - begin:,} {kind}, to {end - 1}{without}[/bold]", highlight=False)
        if not is_padding:
            Console().print(escape(_text(view.tokens[begin:end], tokenizer)), highlight=False)


def _text(ids: list[int], tokenizer: Tokenizer | None) -> str:
    """Returns the text of tokens, or their ids without a tokenizer; without the middle if they are many."""
    is_long = len(ids) > 2 * MAX_SHOWN_TOKENS
    parts = [ids[:MAX_SHOWN_TOKENS], ids[-MAX_SHOWN_TOKENS:]] if is_long else [ids]
    texts = [tokenizer.decode(part) if tokenizer else " ".join(map(str, part)) for part in parts]
    return f"\n... {len(ids) - 2 * MAX_SHOWN_TOKENS:,} tokens ...\n".join(texts)

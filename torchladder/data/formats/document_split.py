"""Megatron's ``--split 9998,1,1``: which documents of a pair are for training, validation and test, in this order."""

from __future__ import annotations

import math
from itertools import accumulate
from typing import Literal

from torchladder.registry import ConfigError


def split_bounds(split: str, part: Literal["train", "validation"]) -> tuple[float, float]:
    """Returns where a part begins and ends, as fractions of the documents; empty text: training has all of them.

    Document ``round(begin * n)`` of n is the first one and ``round(end * n)`` the first one after it, as in
    Megatron-Core since 0.6; earlier ones and GPT-NeoX round each length, and move the bounds by what is missing.

    Args:
        split: up to three numbers with commas between them, relative to their sum; missing ones are 0.
        part: ``train``, the first one, or ``validation``, the second one.

    Raises:
        ConfigError: ``split`` is something else, or leaves training no document.
    """
    try:
        numbers = [float(number) for number in split.split(",")] if split else [1.0]
    except ValueError:
        numbers = []
    valid = 1 <= len(numbers) <= 3 and all(0 <= number < math.inf for number in numbers) and numbers[0] > 0
    if not valid:
        raise ConfigError(
            f'split = "{split}": must be the proportions of training, validation and test, such as "9998,1,1"; that of '
            "training must be above 0."
        )
    total = sum(numbers)
    ends = [0.0, *accumulate(number / total for number in [*numbers, 0.0])]
    return (0.0, ends[1]) if part == "train" else (ends[1], ends[2])


def holds_out(source: object) -> bool:
    """Returns whether a source has the setting ``split`` with documents for validation."""
    begin, end = split_bounds(getattr(source, "split", ""), "validation")
    return begin < end

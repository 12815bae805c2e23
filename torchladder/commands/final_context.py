"""How much of a run's final window its documents can fill."""

from __future__ import annotations

import sys
from typing import Any

from rich.console import Console
from rich.table import Table

from torchladder.data.document_lengths import long_share, mean_effective_context
from torchladder.training.data_setup import DataUse
from torchladder.training.run_plan import Plan

MIN_LONG_SHARE = 0.05
"""Fraction of tokens in documents that fill the final window; less is a warning."""


def final_context(plan: Plan, reads: DataUse) -> dict[str, Any]:
    """Returns what documents give to the final window, by source and over the tokens of the last phase.

    ``long_share`` is the fraction of tokens in documents that fill the window. Empty if the documents are unknown.
    """
    window, last = plan.schedule.window(plan.steps - 1), max((one.step for one in reads.usage), default=0)
    read = {one.source: one.tokens for one in reads.usage if one.step == last}
    total = sum(read.values())
    if not reads.lengths or not total:
        return {}
    shares = {label: long_share(lengths, window - 1) for label, lengths in reads.lengths.items()}
    means = {label: mean_effective_context(lengths, window) for label, lengths in reads.lengths.items()}
    return {
        "window": window,
        "long_share": sum(shares[label] * tokens for label, tokens in read.items()) / total,
        "mean_effective_context": sum(means[label] * tokens for label, tokens in read.items()) / total,
        "sources": [
            {"source": label, "long_share": shares[label], "mean_effective_context": means[label]} for label in shares
        ],
    }


def print_final_context(context: dict[str, Any]) -> None:
    """Prints what ``final_context`` returns; warns if the window is longer than nearly all documents."""
    if not context:
        return
    window = context["window"]
    table = Table(box=None, header_style="bold")
    table.add_column("source", min_width=12, overflow="fold")
    for name in (f"context of {window:,}", "filled", "tokens in documents that fill it"):
        table.add_column(name, justify="right", no_wrap=name == "filled")
    total = [context | {"source": "all"}] if len(context["sources"]) > 1 else []
    for one in context["sources"] + total:
        mean = one["mean_effective_context"]
        table.add_row(one["source"], f"{mean:,.0f}", f"{mean / window:.1%}", f"{one['long_share']:.1%}")
    Console().print(table)
    if context["long_share"] < MIN_LONG_SHARE:
        print(
            f"warning: the final window of {window:,} tokens is longer than nearly all documents: only "
            f"{context['long_share']:.2%} of the tokens are in documents that fill it. Add longer ones, or shorten it.",
            file=sys.stderr,
        )

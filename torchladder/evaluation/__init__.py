"""Losses on documents: windows of them, what they add up to, and the table where results are kept."""

from torchladder.evaluation.scores import Scores
from torchladder.evaluation.table import Row, Table
from torchladder.evaluation.windows import Batch, Windows

__all__ = ["Batch", "Row", "Scores", "Table", "Windows"]

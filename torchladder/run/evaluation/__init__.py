"""The loss of trained models on files: weights × documents → windows → scores → a table."""

from torchladder.run.evaluation.documents import Files, named
from torchladder.run.evaluation.jobs import Job, done, label, left, score
from torchladder.run.evaluation.table import Row, Table
from torchladder.run.evaluation.weights import DamageError, Weights, find
from torchladder.run.evaluation.windows import Windows

__all__ = [
    "DamageError",
    "Files",
    "Job",
    "Row",
    "Table",
    "Weights",
    "Windows",
    "done",
    "find",
    "label",
    "left",
    "named",
    "score",
]

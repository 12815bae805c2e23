"""Evaluation: the loss of trained models on files, document by document, collected in a table."""

from torchladder.inference.evaluation.eval_files import EvalFiles, expand_paths
from torchladder.inference.evaluation.eval_jobs import EvalJob, compute_losses, finished_rows, path_label, unfinished
from torchladder.inference.evaluation.eval_slices import EvalSlices
from torchladder.inference.evaluation.result_table import ResultRow, ResultTable

__all__ = [
    "EvalFiles",
    "EvalJob",
    "EvalSlices",
    "ResultRow",
    "ResultTable",
    "compute_losses",
    "expand_paths",
    "finished_rows",
    "path_label",
    "unfinished",
]

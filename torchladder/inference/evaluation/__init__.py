"""The loss of trained models on files: weights × documents → windows → scores → a table."""

from torchladder.inference.evaluation.eval_files import EvalFiles, expand_paths
from torchladder.inference.evaluation.eval_jobs import EvalJob, finished_rows, label, score, unfinished
from torchladder.inference.evaluation.eval_slices import EvalSlices
from torchladder.inference.evaluation.eval_weights import EvalWeights, UnreadableWeightsError, find
from torchladder.inference.evaluation.result_table import ResultTable, Row

__all__ = [
    "EvalFiles",
    "EvalJob",
    "EvalSlices",
    "EvalWeights",
    "ResultTable",
    "Row",
    "UnreadableWeightsError",
    "expand_paths",
    "find",
    "finished_rows",
    "label",
    "score",
    "unfinished",
]

"""What a run reports: console, progress, metrics.jsonl, TensorBoard, W&B.

The trainer counts tokens and attended pairs, and hands over the loss of the steps that are due. Speed, FLOPs and MFU
follow from the pairs, so they are right under every mask. Nothing here waits for a GPU: all values come as numbers.
"""

from torchladder.metrics.console import console, init_logger
from torchladder.metrics.device import peak_flops
from torchladder.metrics.processor import MetricsConfig, MetricsProcessor, RunInfo

__all__ = ["MetricsConfig", "MetricsProcessor", "RunInfo", "console", "init_logger", "peak_flops"]

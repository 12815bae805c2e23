"""Reports of a run: console, progress bar, metrics.jsonl, TensorBoard and Weights & Biases.

The trainer counts tokens and attended pairs, and passes the loss of the steps that report. Speed, FLOPs and MFU follow
from the pairs, so they are exact under every mask. Values arrive as Python numbers: nothing here waits for a GPU.
"""

from torchladder.metrics.console import init_logger
from torchladder.metrics.device import get_peak_flops
from torchladder.metrics.energy import check_energy_country
from torchladder.metrics.metric_table import Interval, Metric, Report, RunInfo, register
from torchladder.metrics.output_config import MetricsConfig, Output, OutputConfig, register_output
from torchladder.metrics.outputs import METRICS_FILE, read_jsonl
from torchladder.metrics.processor import MetricsProcessor

__all__ = ["METRICS_FILE", "Interval", "Metric", "MetricsConfig", "MetricsProcessor", "Output", "OutputConfig"]
__all__ += ["Report", "RunInfo", "check_energy_country", "get_peak_flops", "init_logger", "read_jsonl", "register"]
__all__ += ["register_output"]

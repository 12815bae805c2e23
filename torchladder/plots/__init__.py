"""Plots: masks, the windows of a run before and after it, several runs side by side, evaluations, probes.

Each function writes one file; its suffix selects PNG, SVG or PDF, and a report of runs is also an HTML page. matplotlib
and plotly are imported when the first plot is drawn, so that starting a run does not load them.
"""

from torchladder.plots.evaluation_curves import plot_evaluations
from torchladder.plots.ladder_plot import Ladder, plot_curriculum
from torchladder.plots.mask_diagram import plot_layer_masks, plot_masks
from torchladder.plots.pipeline_timeline import plot_pipelines
from torchladder.plots.probe_maps import plot_probes
from torchladder.plots.report_page import check_page_path, write_report_page
from torchladder.plots.run_comparison import ReportedRun, finals
from torchladder.plots.run_curves import RunCurves, compare_runs, plot_run
from torchladder.plots.style import check_plot_path, short_names

__all__ = ["Ladder", "ReportedRun", "RunCurves", "check_page_path", "check_plot_path", "compare_runs", "finals"]
__all__ += ["plot_curriculum", "plot_evaluations", "plot_layer_masks", "plot_masks", "plot_pipelines", "plot_probes"]
__all__ += ["plot_run", "short_names", "write_report_page"]

"""Plots: masks, the windows of a run before and after it, several runs side by side, evaluations, probes.

Each function writes one file; its suffix selects PNG, SVG or PDF. matplotlib is imported when the first plot is drawn,
so that starting a run does not load it.
"""

from torchladder.plots.evaluation_curves import plot_evaluations
from torchladder.plots.ladder_plot import Ladder, plot_curriculum
from torchladder.plots.mask_diagram import plot_layer_masks, plot_masks
from torchladder.plots.probe_maps import plot_probes
from torchladder.plots.run_curves import RunCurves, compare_runs, plot_run
from torchladder.plots.style import check_plot_path

__all__ = ["Ladder", "RunCurves", "check_plot_path", "compare_runs", "plot_curriculum", "plot_evaluations"]
__all__ += ["plot_layer_masks", "plot_masks", "plot_probes", "plot_run"]

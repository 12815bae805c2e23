"""Pictures: masks as start lines, the ladder before a run and after it, runs side by side, evaluations.

Each function writes one file, PNG, SVG or PDF by its suffix. matplotlib is imported where a picture is drawn, so that a
run which draws none starts without it.
"""

from torchladder.plots.curves import read
from torchladder.plots.evaluation_curves import evaluations
from torchladder.plots.mask_diagram import masks
from torchladder.plots.run_curves import ladder, plan, report
from torchladder.plots.style import check

__all__ = ["check", "evaluations", "ladder", "masks", "plan", "read", "report"]

"""Optimizers with parameter groups, and learning-rate schedules.

An optimizer is a registered dataclass of settings that, called with a model, returns a ``torch.optim.Optimizer``
(``optimizers.py``). The learning rate is a pure function of the step (``lr_schedules.py``).
"""

from torchladder.optim.lr_schedules import LRScheduler, LRSchedulerConfig, decays
from torchladder.optim.optimizers import (
    Adam,
    AdamW,
    Muon,
    build,
    is_fused,
    parameter_groups,
    register,
    registry,
    should_step,
)
from torchladder.optim.param_groups import GroupConfig, ParameterGroup

__all__ = ["Adam", "AdamW", "GroupConfig", "LRScheduler", "LRSchedulerConfig", "Muon", "ParameterGroup", "build"]
__all__ += ["decays", "is_fused", "parameter_groups", "register", "registry", "should_step"]

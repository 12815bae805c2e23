"""The loss on held-out rows during training."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from torchladder import data, mask
from torchladder.data import Batch
from torchladder.distributed.ranks import Ranks
from torchladder.training.run_plan import Plan

SummedLoss = Callable[[Batch, Tensor], Tensor]
"""``(batch, start) -> loss``, summed over the labels of this rank's tokens."""


class Validation:
    """Mean losses over the same held-out rows each time, at full context and at ``validation.windows``.

    Document masks apply as in training; the curriculum's window does not.

    Args:
        plan: of the run.
        ranks: this process among all.
        loader: of held-out rows.
        loss: of the model.
        stop_if_requested: called before each batch; may raise to interrupt the validation.
    """

    def __init__(
        self,
        plan: Plan,
        ranks: Ranks,
        loader: data.BaseDataLoader,
        loss: SummedLoss,
        stop_if_requested: Callable[[], None],
    ) -> None:
        self.plan, self.ranks, self.loader, self.loss = plan, ranks, loader, loss
        self.stop_if_requested = stop_if_requested

    @torch.no_grad()
    def losses(self) -> dict[int, float]:
        """Returns window -> mean loss per label over all ranks."""
        config = self.plan.config
        windows = sorted({*config.validation.windows, config.training.seq_len})
        return {window: self._mean_loss(window) for window in windows}

    def _mean_loss(self, window: int) -> float:
        config, degrees = self.plan.config, self.plan.degrees
        self.loader.seek(0)
        loss, num_labels = torch.zeros((), device=self.ranks.device), 0
        for number, batch in enumerate(self.loader):
            if number == config.validation.steps:
                break
            self.stop_if_requested()
            start = mask.from_names(config.attention.masks, batch.positions, window)
            num_labels += batch.num_labels
            loss += self.loss(batch.to(self.ranks.device), start)
        return self.ranks.sum(loss.item(), degrees.tensor) / max(self.ranks.sum(num_labels, degrees.copies), 1)

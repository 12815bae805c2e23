"""The loss on held-out rows while a model trains."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from torchladder import data, mask
from torchladder.data import Batch
from torchladder.distributed.ranks import Ranks
from torchladder.training.run_plan import Plan

Loss = Callable[[Batch, Tensor], Tensor]
"""``(batch, start) -> loss``, summed over this rank's part of the batch."""


class Validation:
    """Means over the same rows each time, at full context and at the windows asked for.

    Documents stay apart if the run keeps them apart; the curriculum's window has no part in this.

    Args:
        plan: of the run.
        ranks: this process among all.
        loader: of held-out rows.
        loss: the model's.
        pause: called before each batch; may break off what takes long.
    """

    def __init__(
        self, plan: Plan, ranks: Ranks, loader: data.BaseDataLoader, loss: Loss, pause: Callable[[], None]
    ) -> None:
        self.plan, self.ranks, self.loader, self.loss, self.pause = plan, ranks, loader, loss, pause

    @torch.no_grad()
    def means(self) -> dict[int, float]:
        """Returns window → mean loss over the labels of all ranks."""
        config = self.plan.config
        windows = sorted({*config.validation.windows, config.training.seq_len})
        return {window: self._mean(window) for window in windows}

    def _mean(self, window: int) -> float:
        self.loader.seek(0)
        loss, num_labels = torch.zeros((), device=self.ranks.device), 0
        for number, batch in enumerate(self.loader):
            if number == self.plan.config.validation.steps:
                break
            self.pause()
            start = mask.from_names(self.plan.config.attention.masks, batch.positions, window)
            num_labels += batch.num_labels
            loss += self.loss(batch.to(self.ranks.device), start)
        degrees = self.plan.degrees
        return self.ranks.sum(loss.item(), degrees.tensor) / max(self.ranks.sum(num_labels, degrees.model_parallel), 1)

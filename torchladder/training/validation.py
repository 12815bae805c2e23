"""The loss on held-out rows during training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from torchladder import mask
from torchladder.data import BaseDataLoader, Batch
from torchladder.distributed.ranks import Ranks
from torchladder.registry import require
from torchladder.training.run_plan import Plan


class Validation:
    """Mean losses over the same held-out rows each time, at full context and at ``validation.windows``.

    Document masks apply as in training; the curriculum's window does not. Layer types other than full_attention have
    their windows of the last step, as in inference. ``validation.masks`` give one more loss at full context.
    """

    def __init__(self, plan: Plan, ranks: Ranks, loader: BaseDataLoader) -> None:
        self.plan, self.ranks, self.loader = plan, ranks, loader

    @torch.no_grad()
    def losses(
        self, summed_loss: Callable[[Batch, dict[str, Tensor]], Tensor], stop_if_requested: Callable[[], None]
    ) -> dict[tuple[int, str], float]:
        """Returns (window, masks) -> mean loss per label over all ranks; masks are "" under those of the run.

        Args:
            summed_loss: ``(batch, start of each layer type) -> loss``, summed over the labels of this rank's tokens.
            stop_if_requested: called before each batch; may raise to interrupt the validation.

        Raises:
            ConfigError: no row has a label.
        """
        config, ranks, degrees = self.plan.config, self.ranks, self.plan.degrees
        final, full = self.plan.schedule(self.plan.steps - 1), config.training.seq_len
        cases = {(window, ""): config.layer_masks for window in sorted({*config.validation.windows, full})}
        if config.validation.masks:
            cases[full, "_".join(config.validation.masks)] = config.validation_layer_masks
        losses = {}
        for (window, name), masks in cases.items():
            self.loader.seek(0)
            now = replace(final, window=window)
            loss, num_labels = torch.zeros((), device=ranks.device), 0
            for number, batch in enumerate(self.loader):
                if number == config.validation.steps:
                    break
                stop_if_requested()
                start = mask.from_types(masks, batch.positions, now.window_of)
                num_labels += batch.num_labels
                loss += summed_loss(batch.to(ranks.device), start)
            total, all_labels = ranks.sum(loss.item(), degrees.tp), ranks.sum(num_labels, degrees.model_parallel)
            require(all_labels > 0, "no row of the validation data has a label: every one is -100.")
            losses[window, name] = total / all_labels
        return losses

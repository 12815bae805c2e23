"""A run: its parts, built from the settings, and the loop that moves the weights."""

from __future__ import annotations

import gc
import logging
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchladder import checkpoint, data, mask, models, optim, plan, plots, profiling
from torchladder.data import Batch
from torchladder.distributed import mesh, parallelize
from torchladder.distributed.ranks import Ranks
from torchladder.generate import generate
from torchladder.metrics import Metrics
from torchladder.models import attention

logger = logging.getLogger(__name__)


class Trainer:
    """Everything that a run needs, in the order in which it is built.

    Args:
        plan: the run's settings, checked, with its curriculum and its batch.
        ranks: this process among all.

    Raises:
        ConfigError: a part refuses its settings, or its input is not there.
    """

    def __init__(self, plan: plan.Plan, ranks: Ranks) -> None:
        config = self.config = plan.config
        self.plan = plan
        self.ranks = ranks
        self.folder = Path(config.job.dump_folder)
        self.step = 0

        self.curriculum = plan.window
        self.masks = [mask.registry.get(name) for name in config.attention.masks]
        self.kernel = attention.kernel(config.attention.kernel, config.attention.masks, ranks.device)
        self.tokenizer = data.tokenizer.build(config.tokenizer, config.data)
        self.loader = self._loader("train")
        self.validation = self._loader("validation") if config.validation.enable else None
        self.mesh = mesh.build(config.parallelism, ranks.size, ranks.device.type)
        self.model = self._model()
        self.optimizer = optim.build(config.optimizer, self.model)
        self.schedule = optim.LRSchedule(config.lr_scheduler, self.optimizer, config.training.steps)
        folder = self.folder / config.checkpoint.folder
        self.checkpointer = checkpoint.Checkpointer(config.checkpoint, folder, self.model, self.optimizer)
        self.metrics = Metrics(config.metrics, self.folder, ranks.rank)
        self._start()

    def _loader(self, split: str) -> data.Loader:
        batch, training = self.plan.batch, self.config.training
        return data.registry.build(
            self.config.data,
            split=split,
            tokenizer=self.tokenizer,
            seq_len=training.seq_len,
            dp_rank=self.ranks.rank,
            dp_degree=batch.data_ranks,
            local_batch_size=batch.local,
            global_batch_size=batch.rows if split == "train" else batch.local * batch.data_ranks,
        )

    def _model(self) -> models.Model:
        """Makes the model on meta, spreads it, then gives it memory and its first weights."""
        config, training = self.config, self.config.training
        with torch.device("meta"):
            model = models.registry.build(config.model, attend=self.kernel.attend, seq_len=training.seq_len)
        self.compute = getattr(torch, training.mixed_precision_param)
        precision = parallelize.Precision(self.compute, getattr(torch, training.mixed_precision_reduce))
        parallelize.parallelize(
            model,
            self.mesh,
            config.activation_checkpoint,
            config.compile,
            precision,
            config.parallelism.fsdp_reshard_after_forward,
        )
        model.to_empty(device=self.ranks.device)
        with torch.no_grad():
            model.init_weights(config.debug.seed)
        return model

    # --- the loop -----------------------------------------------------------------------------------------------------

    def train(self) -> None:
        """Trains from the current step to the last."""
        config = self.config
        last = config.training.steps
        gc.disable()
        with profiling.profile(config.profiling, self.folder, self.ranks.rank) as profiler:
            if self.step == 0:
                self.validate()
            while self.step < last:
                self.train_step()
                if self.step % config.validation.freq == 0 or self.step == last:
                    self.validate()
                if config.samples.due(self.step, self.step == last):
                    self.sample()
                if self.checkpointer.due(self.step, self.step == last):
                    self.checkpointer.save(self.step, self.state(), self.step == last)
                if self.step % config.training.gc_freq == 0:
                    gc.collect(1)
                profiler.step()
        self.close()

    def train_step(self) -> None:
        """One optimizer step: pick the window, gather gradients, move the weights."""
        window = self.curriculum(self.step)
        batches = [next(self.loader) for _ in range(self.plan.batch.accumulation)]
        num_labels = self.ranks.sum(sum(batch.num_labels for batch in batches))  # each label weighs the same

        self.optimizer.zero_grad()
        loss, pairs = torch.zeros((), device=self.ranks.device), 0
        for batch in batches:
            start = mask.compose(*(allow(batch.positions, window) for allow in self.masks))
            loss += self.forward_backward(batch.to(self.ranks.device), start, num_labels)
            pairs += mask.pairs(start)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.training.max_norm)

        lr = self.schedule.set(self.step)
        self.checkpointer.wait_for_staging()
        self.optimizer.step()
        self.step += 1
        self.report(loss, norm, lr, window, pairs)

    def forward_backward(self, batch: Batch, start: Tensor, num_labels: int) -> Tensor:
        """Adds the gradients of a micro-batch; returns its part of the mean loss over the step's labels."""
        form = self.kernel.derive(start, self.ranks.device)
        with self.precision():
            loss = self.model(batch.tokens, form, batch.labels) / num_labels
        loss.backward()
        return loss.detach()

    def precision(self) -> AbstractContextManager[Any]:
        """Computes in the run's type; FSDP2 casts by itself."""
        if self.mesh is not None or self.compute == torch.float32:
            return nullcontext()
        return torch.autocast(self.ranks.device.type, self.compute)

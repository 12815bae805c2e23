"""A run: its parts, built from the settings, and the loop that moves the weights."""

from __future__ import annotations

import dataclasses
import gc
import logging
import platform
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from torchladder import checkpoint, data, mask, models, optim, plots, profiling
from torchladder.data import Batch
from torchladder.distributed import context_parallel, float8, mesh, parallelize
from torchladder.distributed.ranks import Ranks
from torchladder.inference import hf_export
from torchladder.metrics import MetricsProcessor, RunInfo
from torchladder.models import attention
from torchladder.models.hf import hf_weights
from torchladder.registry import ConfigError
from torchladder.resilience import bad_steps
from torchladder.resilience.bad_steps import RollBack
from torchladder.resilience.interrupt import Interrupt, Interrupted
from torchladder.training import data_setup
from torchladder.training.fault_tolerance import FaultTolerance
from torchladder.training.run_plan import Plan, fingerprints, summary_lines
from torchladder.training.samples import Samples
from torchladder.training.validation import Validation

logger = logging.getLogger(__name__)


class Trainer:
    """Everything that a run needs, in the order in which it is built.

    Args:
        plan: the run's settings, checked, with its curriculum and its batch.
        ranks: this process among all.
        interrupt: what asks this process to end early; nothing does where it is left out.

    Raises:
        ConfigError: a part refuses its settings, or its input is not there.
    """

    def __init__(self, plan: Plan, ranks: Ranks, interrupt: Interrupt | None = None) -> None:
        config = self.config = plan.config
        self.plan = plan
        self.ranks = ranks
        self.folder = Path(config.job.dump_folder)
        self.step = 0
        self.row = 0
        self.pending = True  # validation, at step 0
        self.validated = -1  # the step of the last validation

        self.curriculum = plan.window
        self.masks = [mask.registry.get(name) for name in config.attention.masks]
        self.mesh = mesh.build(plan.degrees, ranks.rank, ranks.device.type)
        self.share = context_parallel.ContextShard(self.mesh, config.training.seq_len)
        self.spread = self._spread()
        parallelize.check_parallelize_config(self.mesh, self.spread, ranks.device)
        shared = self.share.tokens if self.mesh.context else None
        self.kernel = attention.build_kernel(
            config.attention.kernel, config.attention.masks, ranks.device, tokens_per_rank=shared
        )
        self.tokenizer = self._tokenizer()
        self.loader = self._loader("train")
        self.validation = self._validation() if config.validation.enable else None
        self.samples = Samples(config, self.tokenizer, self._logits, plan.degrees.tensor)
        self.model = self._model()
        self.optimizer = optim.build(config.optimizer, self.model)
        if after := float8.post_optimizer_hook(self.model, config.float8):
            self.optimizer.register_step_post_hook(after)
        self.schedule = optim.LRSchedule(config.lr_scheduler, self.optimizer, config.training.steps)
        files = hf_export.exported_tokenizer_files(self.tokenizer, getattr(config.tokenizer, "path", ""))
        self.last_save = hf_export.LastSave(config, self.tokenizer, files)
        belongings = hf_export.checkpoint_assets(config, files)
        self.lifeline = FaultTolerance(config, ranks, interrupt or Interrupt(), self.model, self.optimizer, belongings)
        self._resume()
        self._turn()
        self._announce()
        self.metrics = MetricsProcessor(config.metrics, self._run(), self.step)
        if ranks.first:
            self.samples.rewind(self.step - self.pending)

    # --- the loop -----------------------------------------------------------------------------------------------------

    def train(self) -> bool:
        """Trains from the current step to the last; returns whether it got there, or was asked to end before."""
        config, first = self.config, self.step
        if config.checkpoint.create_seed_checkpoint:
            self.lifeline.save(self.state(), must=True)
            return True
        if self.step >= config.training.steps and not self.pending:
            self.metrics.close()
            if config.checkpoint.last_save_in_hf and self.ranks.first:
                self.last_save.convert(self.model.config)
            logger.info("all %d steps are taken: nothing to do", config.training.steps)
            return True
        gc.disable()
        with self.metrics, profiling.profile(config.profiling, self.folder, self.ranks.rank, first) as profiler:
            try:
                if self.pending:
                    self.between_steps()
                while self.step < config.training.steps:
                    try:
                        self.train_step()
                        self.between_steps()
                    except RollBack as bad:
                        self._go_on(self.lifeline.roll_back(bad, self._check, self.loader))
                        self.metrics.rewind(self.step)
                        if self.ranks.first:
                            self.samples.rewind(self.step)
                    if self.step == first + 1:  # compiled, connected, warm
                        self.ranks.set_timeout(config.comm.train_timeout_seconds)
                    profiler.step()
            except Interrupted as why:
                self.lifeline.leave(self.state(), str(why))
                return False
            finally:
                self.lifeline.close()
                gc.enable()
        self._draw()
        return True

    def between_steps(self) -> None:
        """Does what is due after a step: validation, samples, a checkpoint."""
        config, step = self.config, self.step
        last = step == config.training.steps
        self.pending = True
        with self.metrics.pause():
            if (last or step % config.validation.freq == 0) and step != self.validated:
                self.validate()
                self.validated = step  # not again, should samples be broken off
            if step and config.samples.due(step, last):
                self.samples.draw(step, self.ranks.first)
            self.pending = False
            if self.lifeline.due(step):
                self.lifeline.save(self.state())
            if last and config.checkpoint.last_save_in_hf:
                self.last_save.write(self.model, self.ranks.first)
            if step % config.training.gc_freq == 0:
                gc.collect(1)
        if step and not last and config.job.exit_interval and step % config.job.exit_interval == 0:
            raise Interrupted(f"job.exit_interval = {config.job.exit_interval}")

    def train_step(self) -> None:
        """One optimizer step: pick the window, gather gradients, move the weights."""
        window = self.curriculum(self.step)
        self._turn()
        batches = self.lifeline.read(self.loader, self.plan.batch.accumulation)
        labels = sum(batch.num_labels for batch in batches)
        num_labels = self.lifeline.exchange(labels, self.plan.degrees.model_parallel)  # each label weighs the same

        self.optimizer.zero_grad()
        losses: list[bad_steps.MicroBatchLoss] = []
        pairs = 0
        for batch in batches:
            start = mask.compose(*(allow(batch.positions, window) for allow in self.masks))
            losses.append((batch.rows, self.forward_backward(batch.to(self.ranks.device), start, num_labels)))
            pairs += mask.pairs(start)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.training.max_norm)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm

        self.lifeline.saves.wait_for_copy()
        lr = self.schedule.set(self.step, self.plan.phases("lr_factor", self.step, 1.0))
        rows = self.row, self.loader.row - 1
        self.lifeline.guard.update(self.step + 1, rows, norm, losses)
        self.step, self.row = self.step + 1, self.loader.row
        self._report(window, torch.stack([loss for _, loss in losses]).sum(), norm, lr, pairs)

    def _turn(self) -> None:
        """Gives the model the RoPE theta of the step, where the phases set one."""
        theta = self.plan.phases("rope_theta", self.step)
        if theta is not None:
            self.model.set_rope_theta(theta)

    def forward_backward(self, batch: Batch, start: Tensor, num_labels: int) -> Tensor:
        """Adds the gradients of a micro-batch; returns its part of the mean loss over the step's labels."""
        loss = self._loss(batch, start) / max(num_labels, 1)
        loss.backward(bad_steps.backward_seed(loss))
        return loss.detach()

    def _loss(self, batch: Batch, start: Tensor) -> Tensor:
        """Returns the loss summed over this rank's stretch of the rows."""
        form = self.share.prepare_mask(self.kernel.prepare, start, self.ranks.device)
        with self._precision():
            return self.model(self.share(batch.tokens), form, self.share(batch.labels))

    def validate(self) -> None:
        """Reports the loss on held-out rows; all of its windows or none, so what is broken off is done again."""
        if self.validation is not None:
            for window, mean in self.validation.means().items():
                self.metrics.validation(self.step, mean, window)

    def _logits(self, tokens: Tensor) -> Tensor:
        """Returns the logits (1, T, V) of one row under plain causal attention."""
        self.lifeline.stop_if_asked()
        start = torch.zeros(tokens.shape, dtype=torch.int32)
        with self._precision():
            return self.model(tokens.to(self.ranks.device), self.kernel.prepare(start, self.ranks.device))

    # --- state --------------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Returns what a checkpoint holds beside model and optimizer."""
        return {
            "step": self.step,
            "row": self.row,
            "pending": self.pending,
            "validated": self.validated,
            "rope_theta": self.plan.phases("rope_theta", max(self.step - 1, 0)),
            "fingerprints": self._fingerprints(),
            "versions": {"torch": torch.__version__, "python": platform.python_version()},
        }

    def _resume(self) -> None:
        """Continues from the newest checkpoint, if there is one and it is of this run."""
        saved = self.lifeline.resume(self._check, self.loader)
        if saved is not None:
            self._go_on(saved)
        elif self.config.checkpoint.initial_load_in_hf:
            path = self.config.checkpoint.initial_load_path or self.config.model.hf_assets_path
            hf_weights.load(self.model, path)
            logger.info("loaded the weights of %s", path)

    def _go_on(self, saved: dict[str, Any]) -> None:
        self.step, self.row = saved["step"], saved["row"]
        self.pending = saved["pending"] or self.step == 0  # metrics that begin at step 0 begin anew
        self.validated = saved.get("validated", -1) if self.step else -1

    def _check(self, run: dict[str, Any]) -> None:
        checkpoint.check(run["fingerprints"], self._fingerprints(), self.config.checkpoint.accept_changes)

    def _fingerprints(self) -> dict[str, str]:
        return fingerprints(self.plan, self.model.config, self.loader)

    # --- building -----------------------------------------------------------------------------------------------------

    def _tokenizer(self) -> data.Tokenizer | None:
        model, tokenizer = (
            models.registry.resolve(self.config.model),
            data.build_tokenizer(self.config.tokenizer, self.config.data),
        )
        if tokenizer is not None and tokenizer.vocab_size > model.vocab_size:
            raise ConfigError(
                f"the tokenizer has {tokenizer.vocab_size} tokens, more than model.vocab_size = {model.vocab_size}: "
                f"set model.vocab_size to {tokenizer.vocab_size} or more."
            )
        return tokenizer

    def _loader(self, split: str) -> data.BaseDataLoader:
        return data_setup.loader(self.config, self.plan.batch, split, self.tokenizer, self.mesh.data_rank)

    def _validation(self) -> Validation:
        loader = self._loader("validation")
        return Validation(self.plan, self.ranks, loader, self._loss, lambda: self.lifeline.stop_if_asked())

    def _spread(self) -> parallelize.ParallelizeConfig:
        config, training = self.config, self.config.training
        return parallelize.ParallelizeConfig(
            parallelism=config.parallelism,
            float8=config.float8,
            activation_checkpoint=config.activation_checkpoint,
            compile=config.compile,
            precision=parallelize.Precision(
                compute=getattr(torch, training.mixed_precision_param),
                reduce=getattr(torch, training.mixed_precision_reduce),
            ),
            offload=training.enable_cpu_offload,
        )

    def _model(self) -> models.Model:
        """Makes the model on meta, spreads it, then gives it memory and its first weights."""
        config, training = self.config, self.config.training
        with torch.device("meta"):
            attention_fn = self.share.wrap_attention(self.kernel.attention)
            model = models.registry.build(config.model, attention_fn=attention_fn, seq_len=training.seq_len)
        if self.mesh.context:
            model.set_position_offset(self.share.offset)
        parallelize.parallelize_model(model, model.parallel_plan(), self.mesh, self.spread, self.kernel.saved_ops)
        parallelize.materialize(model, self.ranks.device, training.enable_cpu_offload)
        model.init_weights(config.debug.seed)
        return model

    def _precision(self) -> AbstractContextManager[Any]:
        """Computes in the run's type; FSDP2 casts by itself."""
        if self.mesh.data is not None or self.spread.precision.compute == torch.float32:
            return nullcontext()
        return torch.autocast(self.ranks.device.type, self.spread.precision.compute)

    # --- telling ------------------------------------------------------------------------------------------------------

    def _run(self) -> RunInfo:
        return RunInfo(
            folder=self.folder,
            steps=self.config.training.steps,
            seq_len=self.config.training.seq_len,
            flops=self.model.flops,
            device=self.ranks.device,
            rank=self.ranks.rank,
            ranks=self.ranks.size,
            settings=dataclasses.asdict(self.config),
        )

    def _announce(self) -> None:
        """Says what the run will do, and writes its resolved settings."""
        if not self.ranks.first:
            return
        config = self.config
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "config.toml").write_text(config.to_toml())
        said = [config.job.description] if config.job.description else []
        said += [*summary_lines(self.plan), f"kernel      {self.kernel.name}: {self.kernel.reason}"]
        said += [f"data        {line}" for line in self.loader.describe()]
        said += [f"            {line}" for line in self.validation.loader.describe()] if self.validation else []
        if self.step:
            said.append(f"resume      after step {self.step:,}")
        for line in said:
            logger.info(line)
        if config.job.print_config:
            logger.info("settings:\n%s", config.to_toml())

    def _report(self, window: int, loss: Tensor, norm: Tensor, lr: float, pairs: int) -> None:
        """Counts a step, and reports the ones that are due; only those wait for the accelerator."""
        self.metrics.count(self.plan.tokens_per_step, self.ranks.sum(pairs, self.plan.degrees.model_parallel))
        if self.metrics.due(self.step) or self.lifeline.due(self.step):  # totals go on from a checkpoint
            mean = self.ranks.sum(loss.item(), self.plan.degrees.tensor)
            self.lifeline.guard.settle()
            self.metrics.log(self.step, loss=mean, grad_norm=norm.item(), lr=lr, window=window)

    def _draw(self) -> None:
        """Leaves the picture of loss and window."""
        if self.ranks.first:
            plots.ladder(self.folder / "ladder.png", self.folder / "metrics.jsonl")

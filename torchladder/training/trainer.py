"""The trainer: builds the components of a run, then loops over its steps."""

from __future__ import annotations

import gc
import logging
import platform
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from torchladder import mask, optim, plots, profiling
from torchladder.checkpoint import Checkpointer, RunState
from torchladder.data import BaseDataLoader
from torchladder.disk_errors import tolerating
from torchladder.distributed import float8, mesh
from torchladder.distributed.pipeline import clip_grad_norm_
from torchladder.distributed.ranks import Ranks
from torchladder.ema import WeightEMA
from torchladder.inference import hf_export
from torchladder.metrics import METRICS_FILE, MetricsProcessor, read_jsonl
from torchladder.models.hf import hf_weights
from torchladder.resilience.bad_steps import BadStepDetector, Rollback, StepOutcome
from torchladder.resilience.interrupt import Interrupt, Interrupted
from torchladder.training import data_setup
from torchladder.training.context_weights import ContextWeights
from torchladder.training.fault_tolerance import FaultTolerance, InvalidRowError
from torchladder.training.label_check import LabelCheck
from torchladder.training.model_passes import ModelPasses
from torchladder.training.plan_report import log_plan
from torchladder.training.run_plan import Plan, fingerprints, run_info
from torchladder.training.samples import Samples
from torchladder.training.validation import Validation
from torchladder.training.validation_probes import ValidationProbes

logger = logging.getLogger(__name__)


class Trainer:
    """A training run.

    Attributes:
        step: optimizer steps taken.
        row: the next global row of the training data.
        post_step_pending: whether validation, samples or saving after the last step are still pending.

    Raises:
        ConfigError: a component refuses its settings, or its input is missing.
    """

    def __init__(self, plan: Plan, ranks: Ranks, interrupt: Interrupt | None = None) -> None:
        config = self.config = plan.config
        self.plan, self.ranks = plan, ranks
        self.folder = Path(config.job.dump_folder)
        self.step = self.row = 0
        self.totals: Mapping[str, float] = {}  # at the checkpoint that the run continues from
        self.post_step_pending = True  # validation at step 0
        self.validated_step = -1

        self.mesh = mesh.build(plan.degrees, ranks.rank, ranks.device.type)
        self.passes = ModelPasses(plan, ranks, self.mesh)
        tokenizer = data_setup.build_checked_tokenizer(config)

        def build_loader(split: str) -> BaseDataLoader:
            return data_setup.build_loader(config, plan.batch, plan.schedule, split, tokenizer, self.mesh.dp_rank)

        self.loader = build_loader("train")
        self.context_weights = ContextWeights(config.training.context_weight_exponent)
        self.label_check = LabelCheck(self.loader, config.metrics.log_freq, config.training.steps, ranks.is_rank0)
        self.validation = Validation(plan, ranks, build_loader("validation")) if config.validation.enable else None
        has_probes = config.validation.enable and config.validation.probes
        self.probes = ValidationProbes(plan, ranks, self.mesh, tokenizer) if has_probes else None
        self.samples = Samples(config, tokenizer, self._next_logits, plan.degrees.tp)

        self.model = self.passes.build_model()
        self.num_layers = Counter(self.model.layer_types)
        self.optimizer = optim.build(config.optimizer, self.model)
        if after_step := float8.post_optimizer_hook(self.model, config.float8):
            self.optimizer.register_step_post_hook(after_step)
        self.lr_scheduler = optim.LRScheduler(self.optimizer)
        self.ema = WeightEMA(config.ema, self.model) if config.ema.enable else None

        tokenizer_files = hf_export.exported_tokenizer_files(tokenizer, getattr(config.tokenizer, "path", ""))
        self.final_export = hf_export.FinalHFExport(config, tokenizer, tokenizer_files, plan.schedule(plan.steps - 1))
        assets = hf_export.checkpoint_assets(config, tokenizer_files)
        checkpoints = config.checkpoint.folder_in(self.folder)
        averages = self.ema.averages if self.ema else None
        self.checkpointer = Checkpointer(
            config.checkpoint, checkpoints, self.model, self.optimizer, assets, config.training.steps, averages
        )
        self.bad_steps = BadStepDetector(
            config.resilience, ranks.device, optim.is_fused(self.optimizer), is_rank0=ranks.is_rank0
        )
        self.fault_tolerance = FaultTolerance(plan, ranks, interrupt or Interrupt(), self.checkpointer, self.bad_steps)
        self._resume()
        self._set_rope_theta(self.plan.schedule.override("rope_theta", self.step))
        if ranks.is_rank0:
            loaders = [self.loader, self.validation.loader] if self.validation else [self.loader]
            log_plan(plan, self.passes.kernels, loaders, self.step)
            self.samples.rewind(self.step - self.post_step_pending)
        self.metrics = MetricsProcessor(config.metrics, run_info(plan, ranks), self.step, self.totals)

    # --- the loop -----------------------------------------------------------------------------------------------------

    def train(self) -> bool:
        """Trains from the current step to the last; returns False if the run was interrupted."""
        config, first = self.config, self.step
        if config.checkpoint.create_seed_checkpoint:
            with self.metrics:
                self.fault_tolerance.save(self.state(), blocking=True)
            return True
        if self.step >= config.training.steps and not self.post_step_pending:
            self.metrics.close()
            if config.checkpoint.last_save_in_hf and self.ranks.is_rank0:
                self.final_export.convert()
            logger.info("all %d steps are done: nothing to train", config.training.steps)
            return True
        gc.disable()
        with self.metrics, profiling.profile(config.profiling, self.folder, self.ranks.rank, first) as step_profilers:
            try:
                if self.post_step_pending:
                    self.after_step()
                while self.step < config.training.steps:
                    try:
                        self.train_step()
                        self.after_step()
                    except Rollback as rollback:
                        self.restore_progress(self.fault_tolerance.roll_back(rollback, self.loader))
                        self.metrics.rewind(self.step, self.totals)
                        if self.ranks.is_rank0:
                            self.samples.rewind(self.step)
                    if self.step == first + 1:  # compiled, connected, warm
                        self.ranks.set_timeout(config.comm.train_timeout_seconds)
                    step_profilers()
            except Interrupted as reason:
                self.fault_tolerance.save_and_exit(self.state(), str(reason))
                return False
            except InvalidRowError:
                self.fault_tolerance.save_and_exit(self.state(), "the next row is invalid")
                raise
            finally:
                self.checkpointer.close()
                gc.enable()
        if self.ranks.is_rank0:
            curves = plots.RunCurves(self.folder.resolve().name, read_jsonl(self.folder / METRICS_FILE))
            with tolerating(self.folder / "ladder.png"):
                plots.plot_run(self.folder / "ladder.png", curves, self.plan.windows)
        return True

    def train_step(self) -> None:
        """One optimizer step."""
        now = self.plan.schedule(self.step)
        self._set_rope_theta(now.rope_theta)
        batches = self.fault_tolerance.read(self.loader, self.plan.batch.micro_batches(now.global_batch_size))
        masks = self.config.layer_masks
        starts = [mask.from_types(masks, batch.positions, now.window_of) for batch in batches]
        weights = [self.context_weights(batch.labels, start) for batch, start in zip(batches, starts, strict=True)]
        num_labels, pairs, label_weight = self.fault_tolerance.sync_ranks(
            sum(batch.num_labels for batch in batches),
            sum(mask.layer_pairs(start, self.num_layers) for start in starts),
            sum(weighted.total for weighted in weights if weighted),
            self.plan.degrees.model_parallel,
        )

        self.label_check(self.step + 1, self.row, num_labels)

        self.optimizer.zero_grad()
        losses = [
            self.passes.forward_backward(batch.to(self.ranks.device), start, num_labels, weighted, label_weight)
            for batch, start, weighted in zip(batches, starts, weights, strict=True)
        ]
        max_norm = now.max_norm or self.config.training.max_norm
        grad_norm = clip_grad_norm_(list(self.model.parameters()), max_norm, self.mesh.pp_group)

        bad = self.bad_steps.check(grad_norm)  # 0 or 1, on the device
        self.checkpointer.wait_for_staging()  # an asynchronous save has its own copy of the weights from here on
        lr = self.lr_scheduler.set_factor(now.lr_factor)
        if optim.should_step(self.optimizer, bad):
            self.optimizer.step()

        self.step += 1
        if self.ema:
            self.ema.update(self.step, bad)
        rows = self.row, self.loader.row - 1
        self.row = self.loader.row
        by_rows = [(batch.rows, loss["loss"]) for batch, loss in zip(batches, losses, strict=True)]
        self.bad_steps.record(StepOutcome(self.step, rows, bad, grad_norm.detach(), by_rows))
        self.metrics.count(now.global_batch_size * self.config.training.seq_len, pairs)
        # Only steps that are reported or saved synchronize with the device.
        if self.metrics.should_log(self.step) or self.fault_tolerance.save_due(self.step):
            totals = {name: torch.stack([loss[name] for loss in losses]).sum().item() for name in losses[0]}
            means = {name: self.ranks.sum(total, self.plan.degrees.tp) for name, total in totals.items()}
            self.bad_steps.flush()
            if self.plan.schedule.batch.varies:
                means["global_batch_size"] = now.global_batch_size
            self.metrics.log(
                self.step,
                **means,
                grad_norm=grad_norm.item(),
                lr=lr,
                window=now.window,
                layer_windows=now.layer_windows,
            )

    def after_step(self) -> None:
        """Validates, samples and saves a checkpoint, each if it is due."""
        config, step = self.config, self.step
        last = step == config.training.steps
        self.post_step_pending = True
        with self.metrics.pause():
            if (last or step % config.validation.freq == 0) and step != self.validated_step:
                self._validate()
                self.validated_step = step  # not to be repeated if sampling is interrupted
            if step and config.samples.due(step, last):
                self.samples.sample(step, self.ranks.is_rank0)
            self.post_step_pending = False
            if self.fault_tolerance.save_due(step):
                self.fault_tolerance.save(self.state())
            if last and config.checkpoint.last_save_in_hf:
                self._export()
            if step % config.training.gc_freq == 0:
                gc.collect(1)
        if step and not last and config.job.exit_interval and step % config.job.exit_interval == 0:
            raise Interrupted(f"job.exit_interval = {config.job.exit_interval}")

    def _export(self) -> None:
        """Saves the model as a Hugging Face folder beside the last checkpoint."""
        if self.plan.pipeline is None:
            self.final_export.write(self.model, self.ranks.is_rank0)
        elif self.ranks.is_rank0:  # no rank has the whole model, but the checkpoint does
            self.final_export.convert()

    def _next_logits(self, tokens: Tensor, position: int) -> Tensor:
        self.fault_tolerance.stop_if_requested()
        return self.passes.next_logits(tokens, position)

    def _validate(self) -> None:
        """Logs the validation losses, of all windows and masks, and the scores of probes; if interrupted, nothing."""
        if self.validation is not None:
            arguments = self.passes.summed_loss, self.fault_tolerance.stop_if_requested
            losses, ema_losses, scores = self.validation.losses(*arguments), {}, self._probe_scores()
            if self.ema:
                self.optimizer.zero_grad()  # makes room for the copy of the weights
                with self.ema.in_model():
                    ema_losses = self.validation.losses(*arguments)
                    scores |= {f"ema_{name}": score for name, score in self._probe_scores().items()}
            for (window, masks), loss in losses.items():
                self.metrics.log_validation(self.step, loss, window, ema_losses.get((window, masks)), masks)
            if scores:
                self.metrics.log_probes(self.step, scores)

    def _probe_scores(self) -> dict[str, float]:
        return self.probes.scores(self.passes.logits_at, self.fault_tolerance.stop_if_requested) if self.probes else {}

    def _set_rope_theta(self, theta: float | None) -> None:
        if theta is not None:
            self.model.set_rope_theta(theta)

    # --- state --------------------------------------------------------------------------------------------------------

    def state(self) -> RunState:
        """Returns the state that a checkpoint holds in addition to model and optimizer."""
        last, final = self.plan.schedule(max(self.step - 1, 0)), self.plan.schedule(self.plan.steps - 1)
        return RunState(
            step=self.step,
            row=self.row,
            fingerprints=fingerprints(self.plan, self.loader),
            window=last.window,
            final_window=final.window,
            layer_windows=dict(last.layer_windows),
            final_layer_windows=dict(final.layer_windows),
            rope_theta=last.rope_theta,
            post_step_pending=self.post_step_pending,
            validated_step=self.validated_step,
            bad_steps=self.bad_steps.state_dict(),
            skipped_rows=self.fault_tolerance.skipped_rows,
            totals=self.metrics.progress,
            versions={"torch": torch.__version__, "python": platform.python_version()},
        )

    def restore_progress(self, state: RunState) -> None:
        """Sets step, row and totals to those of a checkpoint."""
        self.step, self.row, self.totals = state.step, state.row, state.totals
        self.post_step_pending = state.post_step_pending or self.step == 0  # metrics at step 0 are logged again
        self.validated_step = state.validated_step if self.step else -1

    def _resume(self) -> None:
        """Continues from the newest checkpoint of this run, if any."""
        state = self.fault_tolerance.resume(self.loader)
        if state is not None:
            self.restore_progress(state)
        elif self.config.checkpoint.initial_load_in_hf:
            path = self.config.checkpoint.initial_load_path or self.config.model.hf_assets_path
            hf_weights.load_hf_weights(self.model, path, self.plan.model if self.plan.pipeline else None)
            logger.info("loaded the weights of %s", path)
        if state is None and self.ema:
            self.ema.restart()

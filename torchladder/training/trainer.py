"""The trainer: builds the components of a run, then loops over its steps."""

from __future__ import annotations

import gc
import logging
import platform
from collections import Counter
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchladder import mask, models, optim, plots, profiling
from torchladder.checkpoint import Checkpointer, RunState
from torchladder.data import BaseDataLoader, Batch
from torchladder.disk_errors import tolerating
from torchladder.distributed import context_parallel, float8, mesh, parallelize
from torchladder.distributed.pipeline import MicroBatch, Pipeline, clip_grad_norm_
from torchladder.distributed.ranks import Ranks
from torchladder.ema import WeightEMA
from torchladder.inference import hf_export
from torchladder.metrics import METRICS_FILE, MetricsProcessor, read_jsonl
from torchladder.models import attention
from torchladder.models.hf import hf_weights
from torchladder.models.layer_types import collapse
from torchladder.resilience.bad_steps import BadStepDetector, Rollback, StepOutcome, backward_seed
from torchladder.resilience.interrupt import Interrupt, Interrupted
from torchladder.training import data_setup
from torchladder.training.context_weights import ContextWeights, LabelWeights
from torchladder.training.fault_tolerance import FaultTolerance, InvalidRowError
from torchladder.training.label_check import LabelCheck
from torchladder.training.plan_report import log_plan
from torchladder.training.run_plan import Plan, fingerprints, parallelize_config, run_info
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
        self.context_shard = context_parallel.ContextShard(self.mesh, config.training.seq_len)
        self.parallel_config = parallelize_config(config)
        parallelize.check_parallelize_config(self.mesh, self.parallel_config, ranks.device)
        self.masks, model_config = config.layer_masks, models.resolve(config.model)
        self.kernels = {
            layer_type: attention.build_kernel(
                section.kernel or config.attention.kernel,
                [*dict.fromkeys(section.masks + config.validation_layer_masks.get(layer_type, []))],
                ranks.device,
                tokens_per_rank=self.context_shard.tokens_per_rank if self.mesh.cp_group else None,
                dtype=self.parallel_config.precision.compute,
                attention_sinks=layer_type in getattr(model_config, "attention_sinks", ()),
            )
            for layer_type, section in config.layer_attention.items()
        }
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

        self.model, self.pipeline = self._build_model()
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
            log_plan(plan, self.kernels, loaders, self.step)
            self.samples.rewind(self.step - self.post_step_pending)
        self.metrics = MetricsProcessor(config.metrics, run_info(plan, ranks), self.step, self.totals)

    def _build_model(self) -> tuple[models.Model, Pipeline | None]:
        """Builds the model on meta, parallelizes it, then allocates and initializes its weights.

        In a pipeline the model has only the blocks of this rank.
        """
        config, training, layout = self.config, self.config.training, self.plan.pipeline
        with torch.device("meta"):
            wrap = self.context_shard.wrap_attention
            attention_fn = collapse({name: wrap(kernel.attention) for name, kernel in self.kernels.items()})
            model = models.registry.build(config.model, attention_fn=attention_fn, seq_len=training.seq_len)
        if layout:
            model.keep_stage(*layout.part_of(self.mesh.pp_rank))
        model.to(getattr(torch, training.dtype))
        if self.mesh.cp_group:
            model.set_position_offset(self.context_shard.offset)
        saved_ops = frozenset[str]().union(*(kernel.saved_ops for kernel in self.kernels.values()))
        arguments = model.parallel_plan(), self.mesh, self.parallel_config, saved_ops, layout
        stages = parallelize.parallelize_model(model, *arguments)
        parallelize.materialize(model, self.ranks.device, training.enable_cpu_offload)
        model.init_weights(config.debug.seed)
        if layout is None or self.mesh.pp_group is None:
            return model, None
        dtype, dim = self.parallel_config.precision.compute, self.plan.model.config.dim
        return model, Pipeline(layout, stages, self.mesh.pp_group, self.ranks.device, dtype, dim, self.mesh.degrees.tp)

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
        starts = [mask.from_types(self.masks, batch.positions, now.window_of) for batch in batches]
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
            self.forward_backward(batch.to(self.ranks.device), start, num_labels, weighted, label_weight)
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

    def forward_backward(
        self,
        batch: Batch,
        start: dict[str, Tensor],
        num_labels: int,
        weighted: LabelWeights | None = None,
        label_weight: float = 0.0,
    ) -> dict[str, Tensor]:
        """Accumulates the gradients of a micro-batch; returns its share of the step's mean losses per label: the cross
        entropy as ``loss`` and, if it is enabled, ``z_loss``, both without weights.
        """
        multiplier, labels = self.config.training.z_loss_multiplier, max(num_labels, 1)
        options: dict[str, Any] = {"z_loss_multiplier": multiplier} if multiplier else {}
        if weighted:
            options["label_weights"] = self.context_shard(weighted.weights.to(self.ranks.device, non_blocking=True))

        def mean_losses(sums: Any) -> tuple[Tensor, dict[str, Tensor]]:
            """Returns the loss to differentiate, and what to report."""
            if weighted:
                total, loss, z_loss = sums
                total = total / max(label_weight, 1)
                means = {"loss": loss / labels} | ({"z_loss": z_loss / labels} if multiplier else {})
            elif multiplier:
                total, z_loss = (x / labels for x in sums)
                means = {"loss": total.detach() - z_loss, "z_loss": z_loss}
            else:
                total = sums / labels
                means = {"loss": total.detach()}
            return total * backward_seed(total), means

        if self.pipeline:
            reported = self.pipeline.forward_backward(self._micro_batches(batch, start, options), mean_losses)
            names = ["loss", "z_loss"] if multiplier else ["loss"]
            zero = torch.zeros((), device=self.ranks.device)  # on ranks without the last stage
            return {name: sum((means[name] for means in reported), zero) for name in names}
        total, means = mean_losses(self._summed_loss(batch, start, **options))
        total.backward()
        return means

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

    # --- forward passes -----------------------------------------------------------------------------------------------

    def _summed_loss(self, batch: Batch, start: dict[str, Tensor], **options: Any) -> Any:
        """Returns the loss summed over the labels of this rank's tokens, under ``start`` of each layer type.

        ``options`` are those of the model's forward.
        """
        if self.pipeline:
            losses = self.pipeline.forward(self._micro_batches(batch, start, options))
            return sum(losses, torch.zeros((), device=self.ranks.device))
        attn_mask = self._prepare_mask(start)
        with self._precision():
            return self.model(self.context_shard(batch.tokens), attn_mask, self.context_shard(batch.labels), **options)

    def _micro_batches(self, batch: Batch, start: dict[str, Tensor], options: dict[str, Any]) -> list[MicroBatch]:
        """Divides the rows of a batch over micro-batches of the pipeline, each with its own mask."""
        tokens, labels = self.context_shard(batch.tokens), self.context_shard(batch.labels)
        size = self.config.parallelism.pipeline_parallel_microbatch_size
        parts = [slice(first, first + size) for first in range(0, len(tokens), size)]
        return [
            MicroBatch(
                tokens[rows],
                self._prepare_mask({name: whole[rows] for name, whole in start.items()}),
                labels[rows],
                {name: value[rows] if isinstance(value, Tensor) else value for name, value in options.items()},
            )
            for rows in parts
        ]

    def _prepare_mask(self, start: dict[str, Tensor]) -> Any:
        """Returns the attention mask of the model, prepared once per layer type."""
        prepare, device = self.context_shard.prepare_mask, self.ranks.device
        return collapse({name: prepare(kernel.prepare, start[name], device) for name, kernel in self.kernels.items()})

    def _next_logits(self, tokens: Tensor, position: int) -> Tensor:
        """Returns the logits (1, V) of the token after ``position`` in a row (1, T) under plain causal attention, other
        layer types under their masks.
        """
        self.fault_tolerance.stop_if_requested()
        positions = torch.arange(tokens.shape[1], dtype=torch.int32)[None]
        final = self.plan.schedule(self.plan.steps - 1)
        start = mask.from_types(self.masks, positions, final.window_of)
        start[next(iter(start))] = torch.zeros(tokens.shape, dtype=torch.int32)
        attn_mask, tokens = self._prepare_mask(start), tokens.to(self.ranks.device)
        if self.pipeline:
            at = torch.tensor([[position]], device=self.ranks.device)
            logits = self.pipeline.forward([MicroBatch(tokens, attn_mask, options={"logits_at": at})])
            shape = 1, self.plan.model.config.vocab_size
            return self.pipeline.broadcast(logits[0][:, 0].float() if logits else None, shape, torch.float32)
        with self._precision():
            return self.model(tokens, attn_mask)[:, position]

    def _logits_at(self, tokens: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the logits (B, n, V) at positions (B, n) of rows of one document, and which of them this rank has."""
        row = torch.arange(tokens.shape[1], dtype=torch.int32).expand(tokens.shape)
        final = replace(self.plan.schedule(self.plan.steps - 1), window=tokens.shape[1])
        attn_mask = self._prepare_mask(mask.from_types(self.masks, row, final.window_of))
        local, last = positions - self.context_shard.offset, self.context_shard.tokens_per_rank - 1
        mine, at = local == local.clamp(0, last), local.clamp(0, last).to(self.ranks.device)
        tokens = self.context_shard(tokens).to(self.ranks.device)
        if self.pipeline:
            outputs = self.pipeline.forward([MicroBatch(tokens, attn_mask, options={"logits_at": at})])
            logits = outputs[0] if outputs else torch.zeros(*at.shape, self.plan.model.config.vocab_size)
            return logits, (mine & bool(outputs)).to(self.ranks.device)
        with self._precision():
            return self.model.logits_at(tokens, attn_mask, at), mine.to(self.ranks.device)

    def _precision(self) -> AbstractContextManager[Any]:
        """Computes in the run's dtype; FSDP2 casts by itself."""
        dtype = self.parallel_config.precision.compute
        single = self.mesh.fsdp_mesh is None and dtype != torch.float32
        return torch.autocast(self.ranks.device.type, dtype) if single else nullcontext()

    def _export(self) -> None:
        """Saves the model as a Hugging Face folder beside the last checkpoint."""
        if self.pipeline is None:
            self.final_export.write(self.model, self.ranks.is_rank0)
            return
        if self.ranks.is_rank0:  # no rank has the whole model, but the checkpoint does
            self.final_export.convert()
        self.ranks.barrier()

    def _validate(self) -> None:
        """Logs the validation losses, of all windows and masks, and the scores of probes; if interrupted, nothing."""
        if self.validation is not None:
            arguments = self._summed_loss, self.fault_tolerance.stop_if_requested
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
        return self.probes.scores(self._logits_at, self.fault_tolerance.stop_if_requested) if self.probes else {}

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
            hf_weights.load_hf_weights(self.model, path, self.plan.model if self.pipeline else None)
            logger.info("loaded the weights of %s", path)
        if state is None and self.ema:
            self.ema.restart()

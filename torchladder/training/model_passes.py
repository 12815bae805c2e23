"""The forward and backward passes of a run, on one rank: of training, validation, samples and probes.

Here the plan of a run meets its model: kernels by layer type, this rank's share of rows, precision, and the pipeline.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from torchladder import mask, models
from torchladder.data import Batch
from torchladder.distributed import context_parallel, parallelize
from torchladder.distributed.mesh import Mesh
from torchladder.distributed.pipeline import MicroBatch, Pipeline
from torchladder.distributed.ranks import Ranks
from torchladder.models import attention
from torchladder.models.layer_types import collapse
from torchladder.resilience.bad_steps import backward_seed
from torchladder.training.context_weights import LabelWeights
from torchladder.training.run_plan import Plan, parallelize_config


class ModelPasses:
    """The model of a run on this rank, and its passes over rows.

    Attributes:
        kernels: layer type -> attention kernel.
        model: set by ``build_model``; in a pipeline it has only the blocks of this rank.

    Raises:
        ConfigError: a kernel or a parallelism does not support a setting, or the device.
    """

    model: models.Model

    def __init__(self, plan: Plan, ranks: Ranks, mesh: Mesh) -> None:
        config = self.config = plan.config
        self.plan, self.ranks, self.mesh = plan, ranks, mesh
        self.pipeline: Pipeline | None = None
        self.context_shard = context_parallel.ContextShard(mesh, config.training.seq_len)
        self.parallel_config = parallelize_config(config)
        parallelize.check_parallelize_config(mesh, self.parallel_config, ranks.device)
        model_config = models.resolve(config.model)
        self.kernels = {
            layer_type: attention.build_kernel(
                section.kernel or config.attention.kernel,
                [*dict.fromkeys(section.masks + config.validation_layer_masks.get(layer_type, []))],
                ranks.device,
                tokens_per_rank=self.context_shard.tokens_per_rank if mesh.cp_group else None,
                dtype=self.parallel_config.precision.compute,
                attention_sinks=layer_type in getattr(model_config, "attention_sinks", ()),
            )
            for layer_type, section in config.layer_attention.items()
        }

    def build_model(self) -> models.Model:
        """Builds the model on meta, parallelizes it, then allocates and initializes its weights."""
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
        if layout and self.mesh.pp_group:
            dtype, dim = self.parallel_config.precision.compute, self.plan.model.config.dim
            shape = self.ranks.device, dtype, dim, self.mesh.degrees.tp
            self.pipeline = Pipeline(layout, stages, self.mesh.pp_group, *shape)
        self.model = model
        return model

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
        total, means = mean_losses(self.summed_loss(batch, start, **options))
        total.backward()
        return means

    def summed_loss(self, batch: Batch, start: dict[str, Tensor], **options: Any) -> Any:
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

    def next_logits(self, tokens: Tensor, position: int) -> Tensor:
        """Returns the logits (1, V) of the token after ``position`` in a row (1, T) under plain causal attention, other
        layer types under their masks.
        """
        positions = torch.arange(tokens.shape[1], dtype=torch.int32)[None]
        final = self.plan.schedule(self.plan.steps - 1)
        start = mask.from_types(self.config.layer_masks, positions, final.window_of)
        start[next(iter(start))] = torch.zeros(tokens.shape, dtype=torch.int32)
        attn_mask, tokens = self._prepare_mask(start), tokens.to(self.ranks.device)
        if self.pipeline:
            at = torch.tensor([[position]], device=self.ranks.device)
            logits = self.pipeline.forward([MicroBatch(tokens, attn_mask, options={"logits_at": at})])
            shape = 1, self.plan.model.config.vocab_size
            return self.pipeline.broadcast(logits[0][:, 0].float() if logits else None, shape, torch.float32)
        with self._precision():
            return self.model(tokens, attn_mask)[:, position]

    def logits_at(self, tokens: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the logits (B, n, V) at positions (B, n) of rows of one document, and which of them this rank has."""
        row = torch.arange(tokens.shape[1], dtype=torch.int32).expand(tokens.shape)
        final = replace(self.plan.schedule(self.plan.steps - 1), window=tokens.shape[1])
        attn_mask = self._prepare_mask(mask.from_types(self.config.layer_masks, row, final.window_of))
        local, last = positions - self.context_shard.offset, self.context_shard.tokens_per_rank - 1
        mine, at = local == local.clamp(0, last), local.clamp(0, last).to(self.ranks.device)
        tokens = self.context_shard(tokens).to(self.ranks.device)
        if self.pipeline:
            outputs = self.pipeline.forward([MicroBatch(tokens, attn_mask, options={"logits_at": at})])
            logits = (
                outputs[0]
                if outputs
                else torch.zeros(*at.shape, self.plan.model.config.vocab_size, device=self.ranks.device)
            )
            return logits, (mine & bool(outputs)).to(self.ranks.device)
        with self._precision():
            return self.model.logits_at(tokens, attn_mask, at), mine.to(self.ranks.device)

    def _precision(self) -> AbstractContextManager[Any]:
        """Computes in the run's dtype; FSDP2 casts by itself."""
        dtype = self.parallel_config.precision.compute
        single = self.mesh.fsdp_mesh is None and dtype != torch.float32
        return torch.autocast(self.ranks.device.type, dtype) if single else nullcontext()

"""Estimates the memory of a rank before it exists."""

from __future__ import annotations

from dataclasses import astuple, dataclass, replace

import torch
from torch import Tensor

from torchladder import models
from torchladder.distributed import activation_memory, fake_ranks, float8, mesh, parallelize, tensor_parallel
from torchladder.distributed.mesh import Degrees
from torchladder.distributed.parallelize import ParallelizeConfig
from torchladder.distributed.pipeline import build_stages
from torchladder.distributed.pipeline_layout import PipelineLayout, pipeline_layout
from torchladder.models.attention.sdpa import SdpaKernel
from torchladder.models.loss import MAX_LOGITS_GPU
from torchladder.training.run_plan import Plan


@dataclass(frozen=True)
class RankMemory:
    """Bytes on one rank where memory peaks: at the end of a forward pass, or of a backward pass if that needs more.

    Without gradient accumulation, gradients replace activations during backward, and ``gradients`` holds only what they
    need beyond them.
    """

    parameters: int
    gradients: int
    optimizer: int
    ema: int
    gathered: int
    activations: int
    loss: int

    @property
    def total(self) -> int:
        return sum(astuple(self))


@dataclass(frozen=True)
class CandidateLayout:
    """The settings that the search for a layout that fits (``layout_search``) may change.

    Attributes:
        degrees: the degrees of parallelism.
        local_batch_size: rows of a micro-batch on one data-parallel rank.
        ac_mode: activation checkpointing: none, full, op, or n to checkpoint every n-th block.
    """

    degrees: Degrees
    local_batch_size: int
    ac_mode: str


@dataclass(frozen=True)
class RankShare:
    """What a rank has of the model.

    Attributes:
        block_sizes: parameters of each of its blocks.
        root: its other parameters, embedding and head.
        rows: of a micro-batch.
        saved_blocks: blocks whose activations it holds at once, each as often as micro-batches are in flight.
        buffers: what it receives from other stages, in outputs of a block.
        has_loss: whether it computes the loss.
        passes: micro-batches between two reductions of the gradients.
    """

    block_sizes: list[int]
    root: int
    rows: int
    saved_blocks: int
    buffers: int
    has_loss: bool = True
    passes: int = 1

    @property
    def parameters(self) -> int:
        return sum(self.block_sizes) + self.root


class MemoryEstimator:
    """Estimates the memory of a run; use it inside ``fake_ranks.fake_process_group``.

    Args:
        plan: the run.
    """

    def __init__(self, plan: Plan) -> None:
        training, checkpointing = plan.config.training, plan.config.activation_checkpoint
        self.plan, self.config, self.seq_len = plan, plan.config, training.seq_len
        selective = checkpointing.mode == "selective"
        ac_mode = checkpointing.selective_ac_option if selective else checkpointing.mode
        self.layout = CandidateLayout(plan.degrees, plan.batch.local_batch_size, ac_mode)
        self.dtype, self.state_dtype = (getattr(torch, x) for x in (training.mixed_precision_param, training.dtype))
        self.reduce_bytes = getattr(torch, training.mixed_precision_reduce).itemsize
        self.keeps_gathered = plan.config.parallelism.fsdp_reshard_after_forward == "never"
        model = plan.model
        self.num_parameters = model.num_parameters()
        self.block_sizes = {name: sum(p.numel() for p in block.parameters()) for name, block in model.layers.items()}
        embedding = next(p for name, p in model.named_parameters() if not name.startswith("layers.") and p.dim() == 2)
        self.vocab_size, self.dim = embedding.shape
        self.logit_softcap = getattr(model.config, "logit_softcap", 0)
        self._block_bytes: dict[tuple[int, int, int], tuple[dict[str, int], int]] = {}
        self._compiled_share = self._measure_compiled_share()

    def memory(self, layout: CandidateLayout | None = None) -> RankMemory:
        """Returns the memory of the rank that needs most: exact shards for the run's own layout (None), an estimate for
        another.
        """
        return max(self.memory_of_stages(layout), key=lambda memory: memory.total)

    def memory_of_stages(self, layout: CandidateLayout | None = None) -> list[RankMemory]:
        """Returns the memory of a rank at each place of a pipeline; without one, of any rank."""
        own, layout = layout is None, layout or self.layout
        shares = self.rank_shares(layout)
        return [
            self._rank_memory(layout, share, self._sharded_bytes(rank) if own else None)
            for rank, share in enumerate(shares)
        ]

    def pipeline(self, layout: CandidateLayout) -> PipelineLayout | None:
        """Returns the stages of a layout; raises ``ConfigError`` if the model cannot be divided so."""
        parallelism = replace(self.config.parallelism, pipeline_parallel_degree=layout.degrees.pp)
        return pipeline_layout(parallelism, list(self.plan.model.layers), layout.local_batch_size)

    def rank_shares(self, layout: CandidateLayout) -> list[RankShare]:
        """Returns what a rank at each place of the pipeline has of the model."""
        stages, sizes, rows = self.pipeline(layout), self.block_sizes, layout.local_batch_size
        if stages is None:
            return [RankShare(list(sizes.values()), self.num_parameters - sum(sizes.values()), rows, len(sizes), 0)]
        last, each = len(stages.stages) - 1, stages.num_micro_batches
        shares = []
        for rank in range(stages.degree):
            numbers, in_flight = stages.stages_of(rank), stages.in_flight(rank)
            blocks = [sizes[name] for name in stages.layers_of(rank)]
            parts = build_stages(self.plan.model, stages, rank).values()
            parameters = sum(p.numel() for part in parts for p in part.parameters())
            shares.append(
                RankShare(
                    blocks,
                    parameters - sum(blocks),
                    rows // each,
                    saved_blocks=sum(in_flight[stage] * len(stages.stages[stage]) for stage in numbers),
                    buffers=each * sum((stage > 0) + (stage < last) for stage in numbers),
                    has_loss=last in numbers,
                    passes=each,
                )
            )
        return shares

    def _rank_memory(self, layout: CandidateLayout, share: RankShare, shards: int | None) -> RankMemory:
        degrees, itemsize = layout.degrees, self.dtype.itemsize
        parameters = shards or self.state_dtype.itemsize * share.parameters // (
            degrees.dp_shard * degrees.cp * degrees.tp
        )
        blocks, largest = sum(share.block_sizes), max(share.block_sizes)
        if degrees.dp * degrees.model_parallel == 1:
            # Autocast keeps the weights that it casts.
            gathered = share.parameters * itemsize if itemsize < self.state_dtype.itemsize else 0
        else:
            # One block computes while the next is gathered, and the gradient of one is being reduced. In a pipeline
            # blocks stay gathered after their backward pass, for that of the next micro-batch.
            kept = blocks if self.keeps_gathered or degrees.pp > 1 else 2 * largest
            gathered = (itemsize * (share.root + kept) + self.reduce_bytes * largest) // degrees.tp
        tokens = share.rows * self.seq_len // degrees.cp
        hidden = tokens * self.dim * itemsize
        logits = min(MAX_LOGITS_GPU, tokens * self.vocab_size // degrees.tp)
        # Log probabilities in fp32, logits and their gradients; or three in fp32: tanh, capped logits and the former.
        logit_bytes = 12 if self.logit_softcap else 4 + 2 * itemsize
        head_gradient = 4 * self.vocab_size * self.dim // degrees.tp
        activations = self._activation_bytes(layout, share)
        accumulates = max(self.plan.schedule.batch.sizes) > layout.local_batch_size * degrees.dp
        gradients = parameters if accumulates else max(parameters - activations, 0)
        if degrees.pp > 1:  # they are summed over micro-batches before they are reduced over ranks
            gradients = parameters + self.reduce_bytes * share.parameters // degrees.tp
        return RankMemory(
            parameters=parameters,
            gradients=gradients,
            optimizer=parameters * self.plan.moments // self.num_parameters,
            ema=4 * parameters // self.state_dtype.itemsize if self.config.ema.enable else 0,
            gathered=gathered,
            activations=activations + share.buffers * hidden // degrees.tp,
            loss=logits * logit_bytes + head_gradient + hidden if share.has_loss else 0,
        )

    def _activation_bytes(self, layout: CandidateLayout, share: RankShare) -> int:
        saved, _ = self.measure_block(layout, share.rows)
        if layout.ac_mode in saved:
            all_blocks = share.saved_blocks * saved[layout.ac_mode]
        else:
            checkpointed = -(-share.saved_blocks // int(layout.ac_mode))
            all_blocks = checkpointed * saved["full"] + (share.saved_blocks - checkpointed) * saved["none"]
        recomputed = saved["none"] if layout.ac_mode != "none" else 0  # one block at a time
        # And the inputs of the last norm and of the head.
        return all_blocks + recomputed + (2 * saved["full"] if share.has_loss else 0)

    def measure_block(self, layout: CandidateLayout, rows: int) -> tuple[dict[str, int], int]:
        """Returns the bytes that a block saves for backward, by checkpointing mode, and the bytes of its K and V."""
        degrees = layout.degrees
        key = (degrees.tp, degrees.cp, rows)
        if key in self._block_bytes:
            return self._block_bytes[key]
        kv_bytes = 0

        def attention_fn(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor, *sinks: Tensor) -> Tensor:
            nonlocal kv_bytes
            kv_bytes = 2 * k.nbytes
            if degrees.cp > 1:  # the last rank receives the keys of the whole row
                k, v = (x.new_empty(*x.shape[:2], self.seq_len, x.shape[3]) for x in (k, v))
            return SdpaKernel.attention(q, k, v, attn_mask, *sinks)

        model = self._build_meta_model(attention_fn).to(self.dtype)
        if degrees.tp > 1:
            ranks = mesh.build(Degrees(1, 1, 1, degrees.tp), 0, "cpu").tp_mesh
            assert ranks is not None
            tensor_parallel.apply_tensor_parallel(model, model.parallel_plan(), ranks, loss_parallel=True)
        shape = rows, self.seq_len // degrees.cp // degrees.tp, self.dim
        x = torch.empty(shape, dtype=self.dtype, device="meta", requires_grad=True)
        attn_mask = torch.zeros(rows, self.seq_len, dtype=torch.int32)
        block = next(iter(model.layers.values()))
        saved = activation_memory.activation_bytes(block, x, attn_mask, SdpaKernel.saved_ops)
        saved = {mode: int(size * self._compiled_share[mode]) for mode, size in saved.items()}
        self._block_bytes[key] = saved, kv_bytes
        return saved, kv_bytes

    def _measure_compiled_share(self) -> dict[str, float]:
        """Returns, by checkpointing mode, what a compiled block saves relative to one that is not compiled.

        Measured on one row and one rank; every layout's activations are in proportion to its tokens.
        """
        if not self.config.compile.compiles("model") or self.config.compile.backend != "inductor":
            return dict.fromkeys(("none", "op", "full"), 1.0)
        x = torch.empty(1, self.seq_len, self.dim, dtype=self.dtype, device="meta", requires_grad=True)
        attn_mask = torch.zeros(1, self.seq_len, dtype=torch.int32)
        counted = []
        for count in (activation_memory.compiled_activation_bytes, activation_memory.activation_bytes):
            model = self._build_meta_model(SdpaKernel.attention).to(self.dtype)
            if count is activation_memory.compiled_activation_bytes:
                float8.convert_to_float8(model, self.config.float8, sharded=True)
            counted.append(count(next(iter(model.layers.values())), x, attn_mask, SdpaKernel.saved_ops))
        compiled, eager = counted
        return {mode: compiled[mode] / eager[mode] for mode in eager}

    def _sharded_bytes(self, pp_rank: int) -> int:
        """Returns the bytes of a rank's parameters in the run's own layout."""
        model, stages = self._build_meta_model().to(self.state_dtype), self.plan.pipeline
        if stages:
            model.keep_stage(*stages.part_of(pp_rank))
        parallelism = replace(self.config.parallelism, enable_async_tensor_parallel=False)
        ranks = replace(mesh.build(self.layout.degrees, 0, "cpu"), pp_rank=pp_rank)
        config = ParallelizeConfig(parallelism)
        parallelize.parallelize_model(model, model.parallel_plan(), ranks, config, saved_ops=(), layout=stages)
        return fake_ranks.local_parameter_bytes(model)

    def _build_meta_model(self, attention_fn: models.AttentionFunction | None = None) -> models.Model:
        with torch.device("meta"):
            return models.build(self.config.model, attention_fn=attention_fn, seq_len=self.seq_len)

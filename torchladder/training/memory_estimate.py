"""Estimates a layout before its ranks exist: memory per rank, communication per step, and layouts that fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import astuple, dataclass, replace
from itertools import product

import torch
from torch import Tensor

from torchladder import mask, models
from torchladder.distributed import activation_memory, fake_ranks, float8, mesh, parallelize, tensor_parallel
from torchladder.distributed.mesh import Degrees
from torchladder.distributed.parallelize import ParallelizeConfig
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
class Traffic:
    """Bytes that one rank sends in a step, by mesh dimension."""

    shard: int
    replicate: int
    tensor: int
    context: int


@dataclass(frozen=True)
class CandidateLayout:
    """The settings that the search for a layout that fits may change.

    Attributes:
        degrees: the degrees of parallelism.
        local_batch_size: rows of a micro-batch on one data-parallel rank.
        ac_mode: activation checkpointing: none, full, op, or n to checkpoint every n-th block.
    """

    degrees: Degrees
    local_batch_size: int
    ac_mode: str


class MemoryEstimator:
    """Estimates the memory and communication of a run; use it inside ``fake_ranks.fake_process_group``.

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
        model = self._build_meta_model()
        self.num_parameters, self.heads = model.num_parameters(), model.head_counts()
        self.block_sizes = [sum(p.numel() for p in block.parameters()) for block in model.layers.values()]
        embedding = next(p for name, p in model.named_parameters() if not name.startswith("layers.") and p.dim() == 2)
        self.vocab_size, self.dim = embedding.shape
        self.logit_softcap = getattr(model.config, "logit_softcap", 0)
        self._block_bytes: dict[tuple[int, int, int], tuple[dict[str, int], int]] = {}
        self._compiled_share = self._measure_compiled_share()

    def memory(self, layout: CandidateLayout | None = None) -> RankMemory:
        """Returns the memory of a rank: exact shards for the run's own layout (None), an estimate for another."""
        shards, layout = (None if layout else self._sharded_bytes()), layout or self.layout
        degrees, itemsize = layout.degrees, self.dtype.itemsize
        all_parameters = self.state_dtype.itemsize * self.num_parameters
        parameters = shards or all_parameters // (degrees.dp_shard * degrees.model_parallel)
        if degrees.dp * degrees.model_parallel == 1:
            # Autocast keeps the weights that it casts.
            gathered = self.num_parameters * itemsize if itemsize < self.state_dtype.itemsize else 0
        else:
            root, largest = self.num_parameters - sum(self.block_sizes), max(self.block_sizes)
            # One block computes while the next is gathered, and the gradient of one is being reduced.
            blocks = sum(self.block_sizes) if self.keeps_gathered else 2 * largest
            gathered = (itemsize * (root + blocks) + self.reduce_bytes * largest) // degrees.tp
        tokens = layout.local_batch_size * self.seq_len // degrees.cp
        logits = min(MAX_LOGITS_GPU, tokens * self.vocab_size // degrees.tp)
        # Log probabilities in fp32, logits and their gradients; or three in fp32: tanh, capped logits and the former.
        logit_bytes = 12 if self.logit_softcap else 4 + 2 * itemsize
        head_gradient = 4 * self.vocab_size * self.dim // degrees.tp
        activations = self._activation_bytes(layout)
        accumulates = max(self.plan.schedule.batch.sizes) > layout.local_batch_size * degrees.dp
        return RankMemory(
            parameters=parameters,
            gradients=parameters if accumulates else max(parameters - activations, 0),
            optimizer=parameters * self.plan.moments // self.num_parameters,
            ema=4 * parameters // self.state_dtype.itemsize if self.config.ema.enable else 0,
            gathered=gathered,
            activations=activations,
            loss=logits * logit_bytes + head_gradient + tokens * self.dim * itemsize,
        )

    def traffic(self) -> Traffic:
        """Returns the bytes that a rank of the run's own layout sends in its largest step, under its widest window."""
        degrees, micro_batches = self.layout.degrees, self.plan.batch.micro_batches(max(self.plan.schedule.batch.sizes))
        itemsize, layers = self.dtype.itemsize, len(self.block_sizes)
        all_gathers = 1 if self.keeps_gathered else 2
        n, r, t, c = degrees.dp_shard * degrees.cp, degrees.dp_replicate, degrees.tp, degrees.cp
        parameters = self.num_parameters // t
        tokens = self.layout.local_batch_size * self.seq_len // c
        # A block all-gathers and reduce-scatters tokens twice each, forward and backward; embedding and head once.
        collectives = (8 + (4 if self.layout.ac_mode == "full" else 0)) * layers + 4
        _, kv_bytes = self._measure_block(self.layout)
        # Muon exchanges its matrices in bfloat16 before and after it orthogonalizes them.
        groups = self.plan.optimizer_groups
        matrices = 2 * sum(group.num_parameters for group in groups if group.algorithm == "Muon") // (n * t)
        return Traffic(
            shard=micro_batches * (all_gathers * itemsize + self.reduce_bytes) * parameters * (n - 1) // n
            + 2 * matrices * (n - 1) // n,
            replicate=micro_batches * 2 * self.reduce_bytes * parameters // n * (r - 1) // r + matrices * (r - 1) // r,
            tensor=micro_batches * collectives * tokens * self.dim * itemsize * (t - 1) // t
            + 2 * matrices * (t - 1) // t,
            context=micro_batches * 2 * kv_bytes * self._max_sent_keys(c) // (self.seq_len // c),
        )

    def find_fitting(self, limit: int) -> list[tuple[CandidateLayout, RankMemory]]:
        """Returns up to three layouts of at most ``limit`` bytes per rank, those with the fewest changes first."""
        estimates = ((layout, self.memory(layout)) for layout in self._candidates())
        fitting = [(layout, memory) for layout, memory in estimates if memory.total <= limit]
        fitting.sort(key=lambda x: (len(self.changes(x[0])), x[0].degrees.model_parallel, -x[0].local_batch_size))
        return fitting[:3]

    def changes(self, layout: CandidateLayout) -> dict[str, int | str]:
        """Returns the settings that turn the run's own layout into another: key -> value."""
        own = self._settings(self.layout)
        return {key: value for key, value in self._settings(layout).items() if own.get(key) != value}

    def _settings(self, layout: CandidateLayout) -> dict[str, int | str]:
        degrees, selective = layout.degrees, layout.ac_mode not in ("none", "full")
        settings: dict[str, int | str] = {
            "parallelism.data_parallel_replicate_degree": degrees.dp_replicate,
            "parallelism.tensor_parallel_degree": degrees.tp,
            "parallelism.context_parallel_degree": degrees.cp,
            "training.local_batch_size": layout.local_batch_size,
            "activation_checkpoint.mode": "selective" if selective else layout.ac_mode,
        }
        if self.config.parallelism.data_parallel_shard_degree != -1:
            settings["parallelism.data_parallel_shard_degree"] = degrees.dp_shard
        return settings | ({"activation_checkpoint.selective_ac_option": layout.ac_mode} if selective else {})

    def _candidates(self) -> Iterator[CandidateLayout]:
        """Yields the layouts of the same ranks whose degrees divide ranks, heads, tokens and rows."""
        own = self.layout
        ranks = own.degrees.dp * own.degrees.model_parallel
        local_batch_sizes = {own.local_batch_size >> shift for shift in range(own.local_batch_size.bit_length())}
        for replicate, tensor, context, local_batch_size in product(
            {own.degrees.dp_replicate, 1}, (1, 2, 4, 8), (1, 2, 4, 8, 16), local_batch_sizes
        ):
            degrees = Degrees(replicate, ranks // (replicate * tensor * context), context, tensor)
            if (
                degrees.dp * degrees.model_parallel == ranks
                and not any(heads % tensor for heads in self.heads)
                and self.seq_len % (context * tensor) == 0
                and not any(rows % (local_batch_size * degrees.dp) for rows in self.plan.schedule.batch.sizes)
            ):
                for ac_mode in dict.fromkeys((own.ac_mode, "op", "full")):
                    yield CandidateLayout(degrees, local_batch_size, ac_mode)

    def _max_sent_keys(self, context: int) -> int:
        """Returns the most keys per row that a rank sends to later ranks in all layers, under their widest windows."""
        tokens = self.seq_len // context
        sent = [0] * context  # by rank
        for one in self.plan.layer_types:
            row = torch.arange(self.seq_len, dtype=torch.int32)[None]
            first_keys = mask.from_names(one.masks, row, one.window_range[1])[0, ::tokens].tolist()  # of each rank
            for rank in range(context):
                keys = sum(min(max((rank + 1) * tokens - first, 0), tokens) for first in first_keys[rank + 1 :])
                sent[rank] += one.layers * keys
        return max(sent)

    def _activation_bytes(self, layout: CandidateLayout) -> int:
        saved, _ = self._measure_block(layout)
        layers = len(self.block_sizes)
        if layout.ac_mode in saved:
            all_blocks = layers * saved[layout.ac_mode]
        else:
            checkpointed = -(-layers // int(layout.ac_mode))
            all_blocks = checkpointed * saved["full"] + (layers - checkpointed) * saved["none"]
        recomputed = saved["none"] if layout.ac_mode != "none" else 0  # one block at a time
        return all_blocks + recomputed + 2 * saved["full"]  # and the inputs of the last norm and of the head

    def _measure_block(self, layout: CandidateLayout) -> tuple[dict[str, int], int]:
        """Returns the bytes that a block saves for backward, by checkpointing mode, and the bytes of its K and V."""
        degrees = layout.degrees
        key = (degrees.tp, degrees.cp, layout.local_batch_size)
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
        shape = layout.local_batch_size, self.seq_len // degrees.cp // degrees.tp, self.dim
        x = torch.empty(shape, dtype=self.dtype, device="meta", requires_grad=True)
        attn_mask = torch.zeros(layout.local_batch_size, self.seq_len, dtype=torch.int32)
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

    def _sharded_bytes(self) -> int:
        """Returns the bytes of this rank's parameters in the run's own layout."""
        model = self._build_meta_model().to(self.state_dtype)
        parallelism = replace(self.config.parallelism, enable_async_tensor_parallel=False)
        ranks = mesh.build(self.layout.degrees, 0, "cpu")
        parallelize.parallelize_model(model, model.parallel_plan(), ranks, ParallelizeConfig(parallelism), saved_ops=())
        return fake_ranks.local_parameter_bytes(model)

    def _build_meta_model(self, attention_fn: models.AttentionFunction | None = None) -> models.Model:
        with torch.device("meta"):
            return models.build(self.config.model, attention_fn=attention_fn, seq_len=self.seq_len)

"""What a layout takes before any rank exists: memory per rank, bytes sent per step, and which layouts would fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import astuple, dataclass, replace
from itertools import product

import torch
from torch import Tensor

from torchladder import mask, models
from torchladder.distributed import fake_ranks, mesh, parallelize, tensor_parallel
from torchladder.distributed.mesh import Degrees
from torchladder.models.attention import sdpa
from torchladder.models.loss import LOGITS_ON_GPU
from torchladder.training.run_plan import Plan


@dataclass(frozen=True)
class RankMemory:
    """Bytes on one rank at the end of a forward pass, when most is held."""

    parameters: int
    gradients: int
    optimizer: int
    gathered: int
    activations: int
    loss: int

    @property
    def total(self) -> int:
        return sum(astuple(self))


@dataclass(frozen=True)
class Traffic:
    """Bytes that one rank sends in a step."""

    shard: int
    replicate: int
    tensor: int
    context: int


@dataclass(frozen=True)
class CandidateLayout:
    """What a search for one that fits may change.

    Attributes:
        degrees: how the ranks are divided.
        local: rows that a rank puts through the model at once.
        mode: none, full, op, or n to recompute every n-th block.
    """

    degrees: Degrees
    local: int
    mode: str


class MemoryEstimator:
    """The model of a run on ranks that do not exist; to be made and asked inside ``fake.ranks``.

    Args:
        plan: the run, on so many ranks.
    """

    def __init__(self, plan: Plan) -> None:
        training, recompute = plan.config.training, plan.config.activation_checkpoint
        self.plan, self.config = plan, plan.config
        mode = recompute.selective_ac_option if recompute.mode == "selective" else recompute.mode
        self.layout = CandidateLayout(plan.degrees, plan.batch.micro_batch_size, mode)
        self.compute = getattr(torch, training.mixed_precision_param)
        self.reduced = getattr(torch, training.mixed_precision_reduce).itemsize
        model = self._model()
        self.numbers, self.heads = model.num_parameters(), model.heads()
        self.blocks = [sum(p.numel() for p in block.parameters()) for block in model.layers.values()]
        table = next(p for name, p in model.named_parameters() if not name.startswith("layers.") and p.dim() == 2)
        self.vocabulary, self.dim = table.shape
        self._kept: dict[tuple[int, int, int], tuple[dict[str, int], int]] = {}

    def memory(self, layout: CandidateLayout | None = None) -> RankMemory:
        """Returns what a layout takes on a rank, the run's own as its model is sharded, another by its degrees."""
        own, layout = layout is None, layout or self.layout
        degrees, size = layout.degrees, self.compute.itemsize
        parameters = self._sharded() if own else 4 * self.numbers // (degrees.shard * degrees.copies)
        root, block = self.numbers - sum(self.blocks), max(self.blocks)
        if degrees.data * degrees.copies == 1:
            gathered = self.numbers * size if size < 4 else 0  # autocast keeps what it has cast
        else:
            kept = self.config.parallelism.fsdp_reshard_after_forward == "never"
            # One block computes while the next is gathered, and one's gradient is on its way.
            blocks = sum(self.blocks) if kept else 2 * block
            gathered = (size * (root + blocks) + self.reduced * block) // degrees.tensor
        tokens = layout.local * self.config.training.seq_len // degrees.context
        logits = min(LOGITS_ON_GPU, tokens * self.vocabulary // degrees.tensor)
        head = 4 * self.vocabulary * self.dim // degrees.tensor
        return RankMemory(
            parameters=parameters,
            gradients=parameters,
            optimizer=2 * parameters,
            gathered=gathered,
            activations=self._activations(layout),
            loss=logits * (4 + 2 * size) + head + tokens * self.dim * size,
        )

    def traffic(self) -> Traffic:
        """Returns the bytes that a rank of the run's own layout sends in a step, under the widest mask."""
        degrees, layout, micro = self.layout.degrees, self.layout, self.plan.batch.accumulation
        size, layers = self.compute.itemsize, len(self.blocks)
        gathers = 1 if self.config.parallelism.fsdp_reshard_after_forward == "never" else 2
        n, r, t, c = degrees.shard * degrees.context, degrees.replicate, degrees.tensor, degrees.context
        mine = self.numbers // t
        tokens = layout.local * self.config.training.seq_len // c
        # A block gathers tokens twice and scatters them twice, forward and backward; the embedding and the head once.
        moves = (8 + (4 if layout.mode == "full" else 0)) * layers + 4
        _, keys = self._block(layout)
        return Traffic(
            shard=micro * (gathers * size + self.reduced) * mine * (n - 1) // n,
            replicate=micro * 2 * self.reduced * mine // n * (r - 1) // r,
            tensor=micro * moves * tokens * self.dim * size * (t - 1) // t,
            context=micro * layers * 2 * keys * self._reach(c) // (self.config.training.seq_len // c),
        )

    def fitting(self, limit: int) -> list[tuple[CandidateLayout, RankMemory]]:
        """Returns up to three layouts that take no more than ``limit`` bytes, those with the fewest changes first."""
        found = [(layout, self.memory(layout)) for layout in self._candidates()]
        fits = [(layout, memory) for layout, memory in found if memory.total <= limit]
        return sorted(fits, key=lambda one: (len(self.changes(one[0])), one[0].degrees.copies, -one[0].local))[:3]

    def changes(self, layout: CandidateLayout) -> dict[str, int | str]:
        """Returns the settings that make the run's own layout into another."""
        own, other = self._settings(self.layout), self._settings(layout)
        return {key: value for key, value in other.items() if own.get(key) != value}

    def _settings(self, layout: CandidateLayout) -> dict[str, int | str]:
        degrees, selective = layout.degrees, layout.mode not in ("none", "full")
        settings: dict[str, int | str] = {
            "parallelism.data_parallel_replicate_degree": degrees.replicate,
            "parallelism.tensor_parallel_degree": degrees.tensor,
            "parallelism.context_parallel_degree": degrees.context,
            "training.local_batch_size": layout.local,
            "activation_checkpoint.mode": "selective" if selective else layout.mode,
        }
        if self.config.parallelism.data_parallel_shard_degree != -1:
            settings["parallelism.data_parallel_shard_degree"] = degrees.shard
        return settings | ({"activation_checkpoint.selective_ac_option": layout.mode} if selective else {})

    def _candidates(self) -> Iterator[CandidateLayout]:
        ranks = self.layout.degrees.data * self.layout.degrees.copies
        replicates = {self.layout.degrees.replicate, 1}
        locals_ = {self.layout.local >> shift for shift in range(self.layout.local.bit_length())}
        for replicate, heads, parts, local in product(replicates, (1, 2, 4, 8), (1, 2, 4, 8, 16), locals_):
            rest = replicate * heads * parts
            if ranks % rest or any(number % heads for number in self.heads):
                continue
            degrees = Degrees(replicate, ranks // rest, parts, heads)
            if self.config.training.seq_len % (parts * heads) or self.plan.batch.global_batch_size % (
                local * degrees.data
            ):
                continue
            for mode in {self.layout.mode, "op", "full"}:
                yield CandidateLayout(degrees, local, mode)

    def _reach(self, parts: int) -> int:
        """Returns the most keys that a rank gives away, in tokens of a row, under any window of the run."""
        length = self.config.training.seq_len
        row = torch.arange(length, dtype=torch.int32)[None]
        widest = max(self.plan.schedule.window(step) for step in {0, self.plan.steps // 2, self.plan.steps - 1})
        start = mask.from_names(self.config.attention.masks, row, widest)
        tokens = length // parts
        needs = start[0, ::tokens].tolist()
        given = [
            sum(min(max((part + 1) * tokens - need, 0), tokens) for need in needs[part + 1 :]) for part in range(parts)
        ]
        return max(given)

    def _activations(self, layout: CandidateLayout) -> int:
        kept, _ = self._block(layout)
        layers = len(self.blocks)
        if layout.mode in kept:
            all_blocks = layers * kept[layout.mode]
        else:
            again = -(-layers // int(layout.mode))
            all_blocks = again * kept["full"] + (layers - again) * kept["none"]
        at_work = kept["none"] if layout.mode != "none" else 0  # the block that is computed again
        return all_blocks + at_work + 2 * kept["full"]  # and what goes into the norm and the head

    def _block(self, layout: CandidateLayout) -> tuple[dict[str, int], int]:
        """Returns what a block keeps, by mode, and the bytes of its keys and values."""
        degrees, length = layout.degrees, self.config.training.seq_len
        key = (degrees.tensor, degrees.context, layout.local)
        if key in self._kept:
            return self._kept[key]
        keys = 0

        def attend(q: Tensor, k: Tensor, v: Tensor, form: Tensor) -> Tensor:
            nonlocal keys
            keys = 2 * k.numel() * k.element_size()
            if degrees.context > 1:  # the last rank has the keys of the whole row
                k, v = (x.new_empty(*x.shape[:2], length, x.shape[3]) for x in (k, v))
            return sdpa.SdpaKernel.attend(q, k, v, form)

        model = self._model(attend).to(self.compute)
        if degrees.tensor > 1:
            ranks = mesh.build(Degrees(1, 1, 1, degrees.tensor), 0, "cpu").tensor
            assert ranks is not None
            tensor_parallel.parallelize(model, model.parallel_plan(), ranks, loss_parallel=True)
        tokens = length // degrees.context // degrees.tensor
        x = torch.empty(layout.local, tokens, self.dim, dtype=self.compute, device="meta", requires_grad=True)
        form = torch.zeros(layout.local, length, dtype=torch.int32)
        kept = fake_ranks.activations(next(iter(model.layers.values())), x, form)
        self._kept[key] = kept, keys
        return kept, keys

    def _sharded(self) -> int:
        """Returns the bytes of this rank's parameters in the model as it is sharded."""
        model = self._model()
        parallelism = replace(self.config.parallelism, enable_async_tensor_parallel=False)
        ranks = mesh.build(self.layout.degrees, 0, "cpu")
        parallelize.parallelize(model, model.parallel_plan(), ranks, parallelize.ParallelizeConfig(parallelism))
        return fake_ranks.local_bytes(model)

    def _model(self, attend: models.Attend | None = None) -> models.Model:
        with torch.device("meta"):
            return models.registry.build(self.config.model, attend=attend, seq_len=self.config.training.seq_len)

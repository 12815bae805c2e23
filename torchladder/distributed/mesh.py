"""How the ranks are laid out: which of them replicate the model, shard it, share a row, share a layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from torchladder.registry import ConfigError


@dataclass(frozen=True)
class ParallelismConfig:
    """Degrees of parallelism; their product is the number of ranks."""

    data_parallel_replicate_degree: int = 1
    """Copies of the sharded model (HSDP); each copy reads other rows."""

    data_parallel_shard_degree: int = -1
    """Ranks over which one copy of the model is sharded (FSDP2); -1 takes all that are left."""

    fsdp_reshard_after_forward: Literal["default", "always", "never"] = "default"
    """Free a block's gathered parameters after its forward: less memory, one more all-gather per block in backward."""

    tensor_parallel_degree: int = 1
    """Ranks that share each layer: heads, features, and in norms and between blocks the tokens."""

    disable_loss_parallel: bool = False
    """Give each tensor-parallel rank the whole head for its share of the tokens, not a share of the vocabulary."""

    enable_async_tensor_parallel: bool = False
    """Overlap tensor parallel's collectives with the products around them; needs CUDA and compiled blocks."""

    context_parallel_degree: int = 1
    """Ranks that share each row: every one holds a stretch of its tokens, and gets the keys that those reach."""

    def __post_init__(self) -> None:
        for key in ("data_parallel_replicate_degree", "tensor_parallel_degree", "context_parallel_degree"):
            if getattr(self, key) < 1:
                raise ConfigError(f"parallelism.{key} = {getattr(self, key)}: must be 1 or more.")
        shard = self.data_parallel_shard_degree
        if shard < 1 and shard != -1:
            raise ConfigError(f"parallelism.data_parallel_shard_degree = {shard}: must be 1 or more, or -1.")
        if self.enable_async_tensor_parallel and self.tensor_parallel_degree == 1:
            raise ConfigError(
                "parallelism.enable_async_tensor_parallel has nothing to overlap: tensor_parallel_degree is 1."
            )


@dataclass(frozen=True)
class Degrees:
    """The degrees of a run, all known; rank numbers run fastest over ``tensor``, slowest over ``replicate``."""

    replicate: int
    shard: int
    context: int
    tensor: int

    @property
    def data(self) -> int:
        """Groups of ranks that read rows of their own."""
        return self.replicate * self.shard

    @property
    def copies(self) -> int:
        """Ranks that read the same rows."""
        return self.context * self.tensor

    def __str__(self) -> str:
        return f"replicate {self.replicate} x shard {self.shard} x context {self.context} x tensor {self.tensor}"


@dataclass(frozen=True)
class Mesh:
    """The ranks, laid out.

    Attributes:
        degrees: how many there are of each kind.
        data: ``(shard,)`` or ``(replicate, shard)``; parameters are also sharded over the ranks that share a row.
            None for a single rank, whose model stays whole.
        tensor: the ranks that share this rank's layers, None where each has its own.
        context: the ranks that share this rank's rows, None where each has its own.
        data_rank: which rows this rank reads, from 0 to ``degrees.data - 1``.
        part: which stretch of them, from 0 to ``degrees.context - 1``.
    """

    degrees: Degrees
    data: DeviceMesh | None = None
    tensor: DeviceMesh | None = None
    context: ProcessGroup | None = None
    data_rank: int = 0
    part: int = 0


def degrees(config: ParallelismConfig, ranks: int) -> Degrees:
    """Returns the degrees for that many ranks.

    Raises:
        ConfigError: they do not multiply to the number of ranks; the message says which would.
    """
    given = {
        "data_parallel_replicate_degree": config.data_parallel_replicate_degree,
        "data_parallel_shard_degree": config.data_parallel_shard_degree,
        "context_parallel_degree": config.context_parallel_degree,
        "tensor_parallel_degree": config.tensor_parallel_degree,
    }
    replicate, shard, context, tensor = given.values()
    if shard == -1 and ranks % (replicate * context * tensor) == 0:
        shard = ranks // (replicate * context * tensor)
    if replicate * shard * context * tensor != ranks:
        said = " x ".join(f"{key} {value}" for key, value in given.items())
        fitting = [_fitting(key, given, ranks) for key in given]
        raise ConfigError(
            f"parallelism: {said} does not make the {ranks} ranks of this run. "
            f"With the others as they are, these do: {'; '.join(filter(None, fitting)) or 'none, change two'}."
        )
    return Degrees(replicate, shard, context, tensor)


def _fitting(key: str, given: dict[str, int], ranks: int) -> str:
    """Returns the values of one degree that make the ranks while all others stay."""
    others, free = 1, False
    for name, value in given.items():
        if name != key:
            others, free = (others, True) if value == -1 else (others * value, free)
    if ranks % others:
        return ""
    share = ranks // others
    values = [d for d in range(1, share + 1) if share % d == 0] if free else [share]
    return f"{key} {' or '.join(map(str, values))}"


def check(config: ParallelismConfig, heads: tuple[int, ...], seq_len: int) -> None:
    """Checks the degrees against the model and its rows.

    Args:
        config: the degrees.
        heads: the numbers of heads that tensor-parallel ranks share evenly.
        seq_len: tokens in a row.

    Raises:
        ConfigError: a degree does not divide what it shares; the message says which would.
    """
    tensor, context = config.tensor_parallel_degree, config.context_parallel_degree
    if any(number % tensor for number in heads):
        fits = [d for d in range(1, max(heads) + 1) if all(number % d == 0 for number in heads)]
        raise ConfigError(
            f"parallelism.tensor_parallel_degree = {tensor} does not divide the model's heads "
            f"({', '.join(map(str, heads))}). These do: {', '.join(map(str, fits))}."
        )
    for key, degree, tokens in (
        ("context_parallel_degree", context, seq_len),
        ("tensor_parallel_degree", tensor, seq_len // context),
    ):
        if tokens % degree:
            fits = [d for d in range(1, min(tokens, 4 * degree) + 1) if tokens % d == 0]
            of = f"training.seq_len = {seq_len}" + (f" / {context}" if tokens < seq_len else "")
            raise ConfigError(
                f"parallelism.{key} = {degree} does not divide the tokens of a row, {of}. "
                f"These do: {', '.join(map(str, fits))}."
            )


def build(degrees: Degrees, rank: int, device_type: str) -> Mesh:
    """Returns the layout of ``rank`` among the ranks that the degrees make; every rank has to call this."""
    replicate, shard, context, tensor = degrees.replicate, degrees.shard, degrees.context, degrees.tensor
    if degrees.data * degrees.copies == 1:
        return Mesh(degrees)
    # Ranks that share a row hold gradients of other tokens of it, so that FSDP shards over them as over any others.
    sizes = {"replicate": replicate, "shard": shard * context, "tensor": tensor}
    sizes = {name: size for name, size in sizes.items() if size > 1 or name == "shard"}
    ranks = init_device_mesh(device_type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))
    if tensor > 1:
        ranks["shard", "tensor"]._flatten()  # one all-reduce over both where the gradients' norm needs it
    group = None
    if context > 1:
        rows = init_device_mesh(
            device_type, (degrees.data, context, tensor), mesh_dim_names=("data", "context", "tensor")
        )
        group = rows.get_group("context")
    return Mesh(
        degrees,
        data=ranks["replicate", "shard"] if replicate > 1 else ranks["shard"],
        tensor=ranks["tensor"] if tensor > 1 else None,
        context=group,
        data_rank=rank // degrees.copies,
        part=rank // tensor % context,
    )

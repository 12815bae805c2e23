"""The device mesh: pipeline, data (replicate, shard), context and tensor parallelism."""

from __future__ import annotations

from dataclasses import astuple, dataclass, field, fields
from typing import Annotated, Literal

from annotated_types import Ge
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from torchladder.registry import ConfigError, check_bounds, require


@dataclass(frozen=True)
class ParallelismConfig:
    """Degrees of parallelism. Their product is the number of ranks."""

    data_parallel_replicate_degree: Annotated[int, Ge(1)] = 1
    """Replicas of the sharded model (HSDP)."""

    data_parallel_shard_degree: Annotated[int, Ge(1)] = -1
    """Ranks over which one replica is sharded (FSDP2); -1 takes all remaining ranks."""

    fsdp_reshard_after_forward: str = "always"
    """always frees gathered parameters after a block's forward and gathers them again in backward; never keeps them."""

    tensor_parallel_degree: Annotated[int, Ge(1)] = 1
    """Ranks over which each layer is sharded: heads and features, and tokens in norms and between blocks."""

    disable_loss_parallel: bool = False
    """Shard the head over tokens instead of over the vocabulary."""

    enable_async_tensor_parallel: bool = False
    """Overlap tensor-parallel collectives with matrix products; needs CUDA and compile.enable."""

    context_parallel_degree: Annotated[int, Ge(1)] = 1
    """Ranks over which each row is sharded: a rank holds a slice of its tokens and receives the keys it attends to."""

    pipeline_parallel_degree: Annotated[int, Ge(1)] = 1
    """Ranks over which the layers are divided into stages."""

    pipeline_parallel_schedule: Literal["1F1B", "GPipe", "Interleaved1F1B", "ZBVZeroBubble"] = "1F1B"
    """Order of the forward and backward passes of the micro-batches; the last two have several stages per rank."""

    pipeline_parallel_microbatch_size: Annotated[int, Ge(1)] = 1
    """Rows of a micro-batch in the pipeline; divides training.local_batch_size."""

    pipeline_parallel_layers_per_stage: Annotated[int, Ge(1)] | None = None
    """Layers of a stage, embedding and head counted by the next two settings; None: one or two stages per rank."""

    pipeline_parallel_first_stage_less_layers: Annotated[int, Ge(0)] = 1
    """By how many layers the first stage is shorter than the others, because it has the embedding."""

    pipeline_parallel_last_stage_less_layers: Annotated[int, Ge(0)] = 1
    """By how many layers the last stage is shorter than the others, because it has the head and the loss."""

    pipeline_parallel_split_points: list[str] = field(default_factory=list)
    """Layers at which a stage begins, such as layers.4 layers.8; empty: as the settings above say."""

    def __post_init__(self) -> None:
        check_bounds(self, "parallelism")
        reshard = self.fsdp_reshard_after_forward
        require(
            reshard in ("always", "never"),
            f"parallelism.fsdp_reshard_after_forward = {reshard!r}: must be 'always' or 'never'."
            + (" Use 'always', which is the same." if reshard == "default" else ""),
        )
        unused = [field.name for field in fields(self) if field.name.startswith("pipeline_parallel_")]
        unused = [name for name in unused if getattr(self, name) != getattr(type(self), name, [])]
        require(
            self.pipeline_parallel_degree > 1 or not unused,
            f"parallelism.{', parallelism.'.join(unused)} needs a pipeline_parallel_degree of 2 or more.",
        )
        require(
            not self.enable_async_tensor_parallel or self.tensor_parallel_degree > 1,
            "parallelism.enable_async_tensor_parallel needs a tensor_parallel_degree of 2 or more.",
        )


@dataclass(frozen=True)
class Degrees:
    """The resolved degrees. Consecutive ranks differ in ``tp`` first, then cp, dp_shard, dp_replicate, pp."""

    dp_replicate: int
    dp_shard: int
    cp: int
    tp: int
    pp: int = 1

    @property
    def dp(self) -> int:
        """Number of data-parallel ranks: groups that read different rows."""
        return self.dp_replicate * self.dp_shard

    @property
    def model_parallel(self) -> int:
        """Ranks that read the same rows: pp × cp × tp."""
        return self.pp * self.cp * self.tp

    def __str__(self) -> str:
        pipeline = f"pp {self.pp} x " if self.pp > 1 else ""
        return f"{pipeline}dp_replicate {self.dp_replicate} x dp_shard {self.dp_shard} x cp {self.cp} x tp {self.tp}"


@dataclass(frozen=True)
class Mesh:
    """The device mesh, as this rank sees it.

    Attributes:
        degrees: size of each dimension.
        fsdp_mesh: ``(shard,)`` or ``(replicate, shard)`` for FSDP2; shard includes context-parallel ranks. None for a
            single rank.
        tp_mesh: the tensor-parallel ranks of this rank; None without tensor parallelism.
        cp_group: the context-parallel ranks of this rank; None without context parallelism.
        pp_group: the pipeline-parallel ranks of this rank; None without pipeline parallelism.
        dp_rank: which rows this rank reads, 0 to ``degrees.dp - 1``.
        cp_rank: which slice of each row, 0 to ``degrees.cp - 1``.
        pp_rank: which stages of the model, 0 to ``degrees.pp - 1``.
    """

    degrees: Degrees
    fsdp_mesh: DeviceMesh | None = None
    tp_mesh: DeviceMesh | None = None
    cp_group: ProcessGroup | None = None
    pp_group: ProcessGroup | None = None
    dp_rank: int = 0
    cp_rank: int = 0
    pp_rank: int = 0


def degrees(config: ParallelismConfig, ranks: int) -> Degrees:
    """Returns the degrees for a number of ranks, which their product must equal."""
    keys = ["data_parallel_replicate", "data_parallel_shard", "context_parallel", "tensor_parallel"]
    keys += ["pipeline_parallel"] if config.pipeline_parallel_degree > 1 else []
    given = {f"{key}_degree": getattr(config, f"{key}_degree") for key in keys}
    replicate, shard, context, tensor, pipeline = (*given.values(), 1)[:5]
    if shard == -1 and ranks % (replicate * context * tensor * pipeline) == 0:
        shard = ranks // (replicate * context * tensor * pipeline)
    if replicate * shard * context * tensor * pipeline != ranks:
        product = " x ".join(f"{key} {value}" for key, value in given.items())
        fitting = [_fitting_values(key, given, ranks) for key in given]
        raise ConfigError(
            f"parallelism: {product} does not equal the {ranks} ranks of this run. "
            f"Change one degree: {'; '.join(filter(None, fitting)) or 'none fits, change two'}."
        )
    return Degrees(replicate, shard, context, tensor, pipeline)


def _fitting_values(key: str, given: dict[str, int], ranks: int) -> str:
    """Returns the values of one degree for which the product equals the ranks, with all others unchanged."""
    others, free = 1, False
    for name, value in given.items():
        if name != key:
            others, free = (others, True) if value == -1 else (others * value, free)
    if ranks % others:
        return ""
    rest = ranks // others
    values = [d for d in range(1, rest + 1) if rest % d == 0] if free else [rest]
    return f"{key} {' or '.join(map(str, values))}"


def check_degrees(config: ParallelismConfig, heads: tuple[int, ...], seq_len: int) -> None:
    """Raises ``ConfigError`` unless the degrees divide the model's head counts and the tokens of a row."""
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
    """Returns the mesh of ``rank``; a collective call."""
    dp_replicate, dp_shard, cp, tp, pp = astuple(degrees)
    if degrees.dp * degrees.model_parallel == 1:
        return Mesh(degrees)
    # Context-parallel ranks have gradients of different tokens, so FSDP shards over them like over data-parallel ranks.
    sizes = {"pipeline": pp, "replicate": dp_replicate, "shard": dp_shard * cp, "tensor": tp}
    sizes = {name: size for name, size in sizes.items() if size > 1 or name == "shard"}
    ranks = init_device_mesh(device_type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))
    if tp > 1:
        ranks["shard", "tensor"]._flatten()  # one all-reduce over both for the norm of the gradients
    group = None
    if cp > 1:
        sizes = {"data": pp * degrees.dp, "context": cp, "tensor": tp}
        group = init_device_mesh(device_type, tuple(sizes.values()), mesh_dim_names=tuple(sizes)).get_group("context")
    return Mesh(
        degrees,
        fsdp_mesh=ranks["replicate", "shard"] if dp_replicate > 1 else ranks["shard"],
        tp_mesh=ranks["tensor"] if tp > 1 else None,
        cp_group=group,
        pp_group=ranks["pipeline"].get_group() if pp > 1 else None,
        dp_rank=rank // (cp * tp) % degrees.dp,
        cp_rank=rank // tp % cp,
        pp_rank=rank // (degrees.dp * cp * tp),
    )

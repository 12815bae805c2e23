"""How the ranks are laid out: which of them replicate and which of them shard the model."""

from __future__ import annotations

from dataclasses import dataclass

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from torchladder.registry import ConfigError


@dataclass(frozen=True)
class ParallelismConfig:
    """Degrees of parallelism; their product is the number of ranks."""

    data_parallel_replicate_degree: int = 1
    """Copies of the sharded model (HSDP); each copy reads other rows."""

    data_parallel_shard_degree: int = -1
    """Ranks over which one copy of the model is sharded (FSDP2); -1 takes all that are left."""

    fsdp_reshard_after_forward: bool = True
    """Free a block's gathered parameters after its forward: less memory, one more all-gather per block in backward."""

    def __post_init__(self) -> None:
        replicate, shard = self.data_parallel_replicate_degree, self.data_parallel_shard_degree
        if replicate < 1:
            raise ConfigError(f"parallelism.data_parallel_replicate_degree = {replicate}: must be 1 or more.")
        if shard < 1 and shard != -1:
            raise ConfigError(f"parallelism.data_parallel_shard_degree = {shard}: must be 1 or more, or -1.")


def degrees(config: ParallelismConfig, ranks: int) -> tuple[int, int]:
    """Returns (replicate, shard) for that many ranks.

    Raises:
        ConfigError: the degrees do not multiply to the number of ranks; the message says which would.
    """
    replicate, shard = config.data_parallel_replicate_degree, config.data_parallel_shard_degree
    if shard == -1 and ranks % replicate == 0:
        shard = ranks // replicate
    if replicate * shard != ranks:
        fitting = ", ".join(f"{r} x {ranks // r}" for r in range(1, ranks + 1) if ranks % r == 0)
        raise ConfigError(
            f"parallelism: data_parallel_replicate_degree {replicate} x data_parallel_shard_degree {shard} "
            f"does not make the {ranks} ranks of this run. These do: {fitting}."
        )
    return replicate, shard


def build(config: ParallelismConfig, ranks: int, device_type: str) -> DeviceMesh | None:
    """Returns the data-parallel mesh: ``(shard,)`` or ``(replicate, shard)``; None for a single rank."""
    replicate, shard = degrees(config, ranks)
    if ranks == 1:
        return None
    if replicate == 1:
        return init_device_mesh(device_type, (shard,), mesh_dim_names=("shard",))
    return init_device_mesh(device_type, (replicate, shard), mesh_dim_names=("replicate", "shard"))

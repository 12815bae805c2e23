"""Tokens on disk: readers by name, and the formats that they read."""

from torchladder.data.formats import litpkds, parquet
from torchladder.data.formats.token_readers import Shard, register, registry

__all__ = ["Shard", "litpkds", "parquet", "register", "registry"]

"""Documents to rows. The names other rooms use, and the parts that register themselves."""

from torchladder.data import formats, loader, packing, tokenizer
from torchladder.data.base import IGNORED, Batch, Loader, Tokenizer, register, registry
from torchladder.data.cache import DEFAULT as DEFAULT_CACHE
from torchladder.data.cache import cache_path
from torchladder.data.corpus import SourceConfig, training_texts
from torchladder.data.text import sources

__all__ = [
    "DEFAULT_CACHE",
    "IGNORED",
    "Batch",
    "Loader",
    "SourceConfig",
    "Tokenizer",
    "cache_path",
    "formats",
    "loader",
    "packing",
    "register",
    "registry",
    "sources",
    "tokenizer",
    "training_texts",
]

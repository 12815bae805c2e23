"""Documents to rows. The names other rooms use, and the parts that register themselves."""

from torchladder.data import loader, packing, prepare, sources, tokenizer
from torchladder.data.base import IGNORED, Batch, Loader, Tokenizer, register, registry
from torchladder.data.cache import cache_path
from torchladder.data.corpus import SourceConfig, training_texts

__all__ = [
    "IGNORED",
    "Batch",
    "Loader",
    "SourceConfig",
    "Tokenizer",
    "cache_path",
    "loader",
    "packing",
    "prepare",
    "register",
    "registry",
    "sources",
    "tokenizer",
    "training_texts",
]

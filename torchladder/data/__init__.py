"""Documents to rows. The names other rooms use, and the parts that register themselves."""

from torchladder.data import formats, hub_loader, packing, row_loader, tokenizer
from torchladder.data.corpus import SourceConfig, build_tokenizer, training_texts
from torchladder.data.dataloader import IGNORE_INDEX, BaseDataLoader, Batch, Tokenizer, register, registry
from torchladder.data.disk_cache import cache_path
from torchladder.data.text import sources

__all__ = [
    "IGNORE_INDEX",
    "BaseDataLoader",
    "Batch",
    "SourceConfig",
    "Tokenizer",
    "build_tokenizer",
    "cache_path",
    "formats",
    "hub_loader",
    "packing",
    "register",
    "registry",
    "row_loader",
    "sources",
    "tokenizer",
    "training_texts",
]

"""Documents to rows. The names that other packages use, and the components that register themselves.

To add a kind of data source, see ``sources.py``; a tokenizer, ``tokenizer/tokenizer_registry.py``; a file format of
text, ``text/file_formats.py``; a loader, ``dataloader.py``.
"""

from torchladder.data import hub_loader, packing, row_loader, sources, tokenizer
from torchladder.data.corpus import build_tokenizer, training_texts
from torchladder.data.dataloader import IGNORE_INDEX, BaseDataLoader, Batch, register, registry
from torchladder.data.disk_cache import cache_path
from torchladder.data.formats import indexed, litpkds, parquet
from torchladder.data.source_config import SourceConfig
from torchladder.data.text import installed_text, text_files
from torchladder.data.tokenizer import Tokenizer

__all__ = [
    "IGNORE_INDEX",
    "BaseDataLoader",
    "Batch",
    "SourceConfig",
    "Tokenizer",
    "build_tokenizer",
    "cache_path",
    "hub_loader",
    "indexed",
    "installed_text",
    "litpkds",
    "packing",
    "parquet",
    "register",
    "registry",
    "row_loader",
    "sources",
    "text_files",
    "tokenizer",
    "training_texts",
]

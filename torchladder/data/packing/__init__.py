"""Rows out of documents: which spans make up row n of a source, and in which order. Packings by name."""

from torchladder.data.packing import bin_packing, stream_packing
from torchladder.data.packing.spans import Packing, Spans, register, registry

__all__ = ["Packing", "Spans", "bin_packing", "register", "registry", "stream_packing"]

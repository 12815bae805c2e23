"""Packings: which spans of which documents make up row ``n`` of a source."""

from torchladder.data.packing import bin_packing, stream_packing
from torchladder.data.packing.spans import Packing, Spans, register, registry

__all__ = ["Packing", "Spans", "bin_packing", "register", "registry", "stream_packing"]

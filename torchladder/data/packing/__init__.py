"""Rows out of documents: which spans make up row n of a source, and in which order. Packings by name."""

from torchladder.data.packing import bins, stream
from torchladder.data.packing.base import Packing, Spans, register, registry

__all__ = ["Packing", "Spans", "bins", "register", "registry", "stream"]

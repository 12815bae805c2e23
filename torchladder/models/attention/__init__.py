"""Attention kernels: each derives its own form of a mask, then attends with it in every layer."""

from torchladder.models.attention import dense, flex, sdpa, varlen
from torchladder.models.attention.kernel import Kernel, causal, kernel, register, registry

__all__ = ["Kernel", "causal", "dense", "flex", "kernel", "register", "registry", "sdpa", "varlen"]

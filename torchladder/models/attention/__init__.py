"""Attention kernels: each derives its own form of a mask, then attends with it in every layer."""

from torchladder.models.attention import dense, flex, sdpa, varlen
from torchladder.models.attention.kernel import AttentionKernel, build_kernel, causal, register, registry

__all__ = ["AttentionKernel", "build_kernel", "causal", "dense", "flex", "register", "registry", "sdpa", "varlen"]

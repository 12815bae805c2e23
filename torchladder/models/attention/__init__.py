"""Attention kernels. Each is one module here that registers its class; every module of this package is imported."""

import importlib
import pkgutil

from torchladder.models.attention.kernel import (
    AttentionFunction,
    AttentionKernel,
    AttentionSetup,
    build_kernel,
    causal_attention,
    register,
    registry,
)

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = [
    "AttentionFunction",
    "AttentionKernel",
    "AttentionSetup",
    "build_kernel",
    "causal_attention",
    "register",
    "registry",
]

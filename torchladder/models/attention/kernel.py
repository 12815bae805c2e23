"""The contract of an attention kernel, and the choice of one for a run.

Once per batch a kernel prepares ``start`` (see ``torchladder.mask``) into its own attention mask; every layer of the
model then computes attention with it. A kernel is one class, in a module of this package or in a plugin (docs/mask.md).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from torchladder import mask
from torchladder.registry import ConfigError, Registry

AttentionFunction = Callable[..., Tensor]
"""``(q (B, H, T, K), k (B, G, S, K), v (B, G, S, K), attn_mask) -> (B, H, T, K)``, as ``AttentionKernel.attention``.

A model with attention sinks passes them as a fifth argument: (H,) logits of one more key per head, whose value is 0.
"""

UNIFORM_CHUNKS = frozenset({"causal", "chunk"})
"""Masks that cut a row into chunks of one width, alone or composed."""


@dataclass(frozen=True)
class AttentionSetup:
    """What a run needs from its kernel.

    Attributes:
        masks: names of the masks that ``start`` is composed of.
        device: where attention runs.
        training: whether gradients are needed.
        dtype: of queries, keys and values.
        attention_sinks: whether the model has them.
        tokens_per_rank: tokens of a row on each context-parallel rank; None without context parallelism.
    """

    masks: tuple[str, ...]
    device: torch.device
    training: bool = True
    tokens_per_rank: int | None = None
    dtype: torch.dtype = torch.bfloat16
    attention_sinks: bool = False


class AttentionKernel(ABC):
    """Attention under the mask ``start``.

    Attributes:
        masks: names of the masks that the kernel can compute; None for any ``start``, a plugin's mask included.
        devices: device types that the kernel runs on; None for all.
        attention_sinks: whether ``attention`` takes attention sinks as its fifth argument.
        context_parallel: whether queries may be the last T of S keys, as context parallelism needs.
        saved_ops: operators whose results selective activation checkpointing keeps, as ``namespace::name``.
        auto_priority: ``auto`` asks kernels with a higher priority first.
        name: the kernel's name in the registry.
        reason: why this kernel was chosen, for the startup log.
    """

    masks: ClassVar[frozenset[str] | None] = None
    devices: ClassVar[frozenset[str] | None] = None
    attention_sinks: ClassVar[bool] = False
    context_parallel: ClassVar[bool] = False
    saved_ops: ClassVar[frozenset[str]] = frozenset()
    auto_priority: ClassVar[int] = 0

    name: str
    reason: str

    @classmethod
    def auto_reason(cls, setup: AttentionSetup) -> str | None:
        """Returns why ``auto`` takes this kernel for a run, or None to leave it to the next one.

        Called only for setups that ``masks``, ``devices`` and ``context_parallel`` allow.
        """
        return None

    @classmethod  # noqa: B027 - most kernels have no further limits
    def check(cls, setup: AttentionSetup) -> None:
        """Raises ``ConfigError`` if the setup exceeds limits beyond ``masks``, ``devices`` and ``context_parallel``."""

    @abstractmethod
    def prepare(self, start: Tensor, device: torch.device, query_offset: int = 0) -> Any:
        """Returns the attention mask that ``attention`` takes.

        Args:
            start: (B, T) int32 on the CPU.
            device: where attention runs.
            query_offset: position of the first query, above 0 only under context parallelism; there are always T keys.
        """

    @staticmethod
    @abstractmethod
    def attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Any) -> Tensor:
        """Returns the attention output (B, H, T, K).

        Args:
            q: (B, H, T, K), the last T of S positions; T = S without context parallelism.
            k: (B, G, S, K), G divides H.
            v: (B, G, S, K).
            attn_mask: what ``prepare`` returned.
        """


registry: Registry[AttentionKernel] = Registry("kernel")
register = registry.register


def build_kernel(
    name: str,
    masks: list[str],
    device: torch.device | str,
    training: bool = True,
    tokens_per_rank: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    attention_sinks: bool = False,
) -> AttentionKernel:
    """Returns the kernel ``name``, or for ``auto`` the first by priority that takes the run; see ``AttentionSetup``."""
    for mask_name in masks:
        mask.registry.get(mask_name)
    setup = AttentionSetup(tuple(masks), torch.device(device), training, tokens_per_rank, dtype, attention_sinks)
    name, reason = _choose(setup) if name == "auto" else (name, "as configured")
    kernel: Any = registry.get(name)
    if (mismatch := _mismatch(kernel, setup)) is not None:
        raise ConfigError(f"kernel {name!r} {mismatch}. Use flex (CUDA), sdpa, dense or auto.")
    kernel.check(setup)
    built: AttentionKernel = kernel()
    built.name, built.reason = name, reason
    return built


def _choose(setup: AttentionSetup) -> tuple[str, str]:
    kernels: dict[str, Any] = {name: registry.get(name) for name in registry.names()}
    for name, kernel in sorted(kernels.items(), key=lambda item: -item[1].auto_priority):
        if _mismatch(kernel, setup) is None and (reason := kernel.auto_reason(setup)) is not None:
            return name, reason
    raise ConfigError(f"no kernel computes the masks {', '.join(setup.masks)} on {setup.device.type}.")


def _mismatch(kernel: type[AttentionKernel], setup: AttentionSetup) -> str | None:
    """Returns why the kernel's class attributes rule the setup out, None if they allow it."""
    if kernel.masks is not None and (unknown := [name for name in setup.masks if name not in kernel.masks]):
        return f"does not support the mask {unknown[0]!r}, only {', '.join(sorted(kernel.masks))}"
    if kernel.devices is not None and setup.device.type not in kernel.devices:
        return f"runs on {', '.join(sorted(kernel.devices))}, not on {setup.device.type}"
    if setup.attention_sinks and not kernel.attention_sinks:
        return "does not support attention sinks (model.attention_sinks)"
    if setup.tokens_per_rank is not None and not kernel.context_parallel:
        return "does not support context parallelism (parallelism.context_parallel_degree)"
    return None


def causal_attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: None = None) -> Tensor:
    """Computes causal attention over the whole row: the default of a model that is built without a kernel."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])

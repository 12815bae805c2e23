"""What a kernel is, and which one to use where.

A kernel turns ``start`` (see ``torchladder.mask``) into its own form once per batch, and every layer of the model
attends with that form.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from torchladder import mask
from torchladder.registry import ConfigError, Registry

UNIFORM = frozenset({"causal", "chunk"})
"""Masks that cut a row into chunks of one width, together as well as alone."""

SEGMENTS = frozenset({"causal", "document", "chunk", "sliding"})
"""Masks that make segments under one window, in any mix."""


class AttentionKernel(ABC):
    """Attention under the masks of a run.

    Args:
        masks: names of the masks that ``start`` is composed of.
        device: where attention runs.
        training: whether gradients are needed.

    Attributes:
        why: one phrase for the start-up report: why this kernel serves the run.

    Raises:
        ConfigError: the kernel cannot express the masks, or cannot run on the device.
    """

    name: ClassVar[str]
    expresses: ClassVar[frozenset[str] | None] = None
    """The masks that the kernel can compute; None for any ``start``, a plugin's mask included."""

    def __init__(self, masks: list[str], device: torch.device, training: bool) -> None:
        self.why = "as configured"
        beyond = [name for name in masks if self.expresses is not None and name not in self.expresses]
        if beyond:
            raise ConfigError(
                f"kernel {self.name!r} cannot express the mask {beyond[0]!r}, only "
                f"{', '.join(sorted(self.expresses or []))}. Use flex (CUDA), sdpa, dense or auto."
            )
        self.check(device, training)

    def check(self, device: torch.device, training: bool) -> None:  # noqa: B027 - most kernels run everywhere
        """Raises ConfigError where the kernel cannot run."""

    def check_context_parallel(self, tokens: int) -> None:
        """Raises ConfigError where queries cannot be the last ``tokens`` of the keys, as with ranks that share rows."""
        raise ConfigError(
            f"kernel {self.name!r} cannot share rows among ranks (parallelism.context_parallel_degree): "
            "use sdpa, flex, dense or auto."
        )

    @abstractmethod
    def derive(self, start: Tensor, device: torch.device, first: int = 0) -> Any:
        """Returns the kernel's form of a mask.

        Args:
            start: (B, T) int32 on the CPU.
            device: where attention runs.
            first: the token that queries begin at; the keys are all T. Above 0 only after ``check_context_parallel``.
        """

    @staticmethod
    @abstractmethod
    def attend(q: Tensor, k: Tensor, v: Tensor, form: Any) -> Tensor:
        """Returns attention (B, H, T, K) of ``q`` (B, H, T, K) over ``k`` and ``v`` (B, G, S, K); G divides H.

        Queries are the last T of S tokens, all of them unless ranks share rows.
        """


registry: Registry[AttentionKernel] = Registry(
    "kernel", facts={"masks": "names", "device": "where attention runs", "training": "whether gradients are needed"}
)
register = registry.register


def build_kernel(
    name: str, masks: list[str], device: torch.device | str, training: bool = True, share: int | None = None
) -> AttentionKernel:
    """Returns the kernel of that name, or for ``auto`` the one that suits the device and the masks.

    Args:
        name: a registered kernel, or ``auto``.
        masks: names of the masks that ``start`` will be composed of.
        device: where attention will run.
        training: whether gradients will be needed.
        share: tokens of a row that each rank holds, None for all.

    Raises:
        ConfigError: an unknown name, or a kernel that cannot do it.
    """
    device = torch.device(device)
    for known in masks:
        mask.registry.get(known)
    chosen, why = (name, "as configured") if name != "auto" else _choose(masks, device, share is not None)
    made = registry.get(chosen)(masks=masks, device=device, training=training)
    made.why = why
    if share is not None:
        made.check_context_parallel(share)
    return made


def _choose(masks: list[str], device: torch.device, shared: bool) -> tuple[str, str]:
    if shared and UNIFORM.issuperset(masks):
        return "sdpa", f"ranks share rows, and it takes each whole chunk of {' + '.join(masks)} as plain attention"
    if UNIFORM.issuperset(masks):
        return "fold", f"{' + '.join(masks)} cuts rows into chunks of one width, each a row of plain causal attention"
    if device.type == "cuda":
        return "flex", f"it takes any mask ({' + '.join(masks)}), and one compiled graph serves every window"
    return "sdpa", f"it takes any mask ({' + '.join(masks)}) and trains on {device.type}, where flex cannot"


def causal(q: Tensor, k: Tensor, v: Tensor, form: None = None) -> Tensor:
    """Attends with full causal attention: what a model does where no kernel is given."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])

"""Muon: momentum whose update is orthogonalized by Newton-Schulz iterations, for matrices; AdamW for the rest.

A sharded matrix is orthogonalized as a whole. Its momentum stays sharded. As many matrices of one shape as there are
ranks are exchanged together: each rank receives one of them whole, in bfloat16, orthogonalizes it, and returns the
shards of the result. So the work is divided among the ranks, and the result does not depend on their number.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Placement, Shard
from torch.distributed.tensor.placement_types import _StridedShard

EPS = 1e-7
"""Least norm that a matrix is divided by."""


class MuonWithAdamW(torch.optim.Optimizer):
    """Steps groups whose ``algorithm`` is Muon like ``torch.optim.Muon``, sharded or not, and all others with AdamW.

    At ``found_inf`` = 1 it changes neither weights nor state, like torch's fused optimizers.

    Args:
        groups: parameter groups of torch with ``lr`` and ``weight_decay``; those of Muon have ``algorithm`` = Muon.
        muon_options: momentum, nesterov, ns_steps, ns_coefficients, adjust_lr_fn.
        **adamw_options: options of ``torch.optim.AdamW``.
    """

    def __init__(self, groups: list[dict[str, Any]], muon_options: dict[str, Any], **adamw_options: Any) -> None:
        fused = adamw_options.get("fused", False)
        for group in groups:
            if group.get("algorithm") == "Muon":
                group.update(muon_options, fused=fused)
        # AdamW completes its groups in place; this optimizer owns them, and the state of all parameters.
        adamw_groups = [group for group in groups if group.get("algorithm") != "Muon"]
        self.adamw = torch.optim.AdamW(adamw_groups, **adamw_options) if adamw_groups else None
        super().__init__(groups, {})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Takes an optimizer step; a closure is not supported."""
        assert closure is None
        bad = getattr(self, "found_inf", None)
        for group in self.param_groups:
            if group.get("algorithm") == "Muon":
                self._step_matrices(group, bad)
        if self.adamw is not None:
            # Loading a checkpoint has replaced both.
            self.adamw.param_groups = [group for group in self.param_groups if group.get("algorithm") != "Muon"]
            self.adamw.state = self.state
            if bad is not None:
                self.adamw.found_inf = bad  # type: ignore[attr-defined]
            self.adamw.step()

    def _step_matrices(self, group: dict[str, Any], bad: Tensor | None) -> None:
        alike: dict[Any, list[Tensor]] = defaultdict(list)  # what can be exchanged together
        for matrix in group["params"]:
            if matrix.grad is not None:
                layout = (matrix.device_mesh, matrix.placements) if isinstance(matrix, DTensor) else ()
                alike[matrix.shape, layout].append(matrix)
        for (shape, layout), matrices in alike.items():
            size = layout[0].size() if layout else 1
            for first in range(0, len(matrices), size):
                chunk = matrices[first : first + size]
                updates = [self._update_momentum(matrix, group, bad) for matrix in chunk]
                lr, ratio = group["lr"], _lr_ratio(group["adjust_lr_fn"], *shape)
                for matrix, update in zip(chunk, _orthogonalize_shards(updates, chunk[0], group), strict=True):
                    weight = _local(matrix)
                    updated = weight.mul(1 - lr * group["weight_decay"]).add_(update, alpha=-lr * ratio)
                    _assign(weight, updated, bad)

    def _update_momentum(self, matrix: Tensor, group: dict[str, Any], bad: Tensor | None) -> Tensor:
        """Returns this rank's shard of the update before it is orthogonalized."""
        state = self.state[matrix]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(matrix.grad)  # type: ignore[arg-type]
        gradient, buffer = _local(matrix.grad), _local(state["momentum_buffer"])  # type: ignore[arg-type]
        momentum = buffer.lerp(gradient, 1 - group["momentum"])
        _assign(buffer, momentum, bad)
        return gradient.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum


def newton_schulz(matrix: Tensor, coefficients: tuple[float, float, float], steps: int) -> Tensor:
    """Returns a bfloat16 approximation of U Vᵀ for a matrix U S Vᵀ (https://kellerjordan.github.io/posts/muon/).

    Each step maps every singular value s to a s + b s³ + c s⁵. The default coefficients grow small ones fastest and
    leave all between about 0.7 and 1.2, which trains as well as exact ones.

    Args:
        matrix: (A, B).
        coefficients: a, b, c.
        steps: iterations.
    """
    a, b, c = coefficients
    is_tall = matrix.size(0) > matrix.size(1)
    x = (matrix.T if is_tall else matrix).bfloat16()  # x xᵀ is the smaller Gram matrix
    x = x / x.norm().clamp(min=EPS)  # singular values of at most 1
    for _ in range(steps):
        gram = x @ x.T
        polynomial = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.addmm(x, polynomial, x, beta=a)
    return x.T if is_tall else x


def _orthogonalize_shards(updates: Sequence[Tensor], like: Tensor, group: dict[str, Any]) -> Sequence[Tensor]:
    """Orthogonalizes matrices of which every rank has a shard; returns this rank's shards of the results.

    Args:
        updates: this rank's shards, of at most as many matrices as there are ranks.
        like: a parameter with their shape and layout.
        group: has ns_coefficients and ns_steps.
    """
    coefficients, steps = group["ns_coefficients"], group["ns_steps"]
    if not isinstance(like, DTensor):
        return [newton_schulz(update, coefficients, steps) for update in updates]
    mesh, (rows, columns) = like.device_mesh, like.shape
    # Zeros complete the stack, so that it divides evenly: one matrix for each rank.
    padding = [torch.zeros_like(updates[0])] * (mesh.size() - len(updates))
    stack = torch.stack([update.bfloat16() for update in (*updates, *padding)])
    options: dict[str, Any] = {
        "device_mesh": mesh,
        "run_check": False,
        "shape": torch.Size((mesh.size(), rows, columns)),
        "stride": (rows * columns, columns, 1),
    }
    sharded, whole = [_behind_first(placement) for placement in like.placements], [Shard(0)] * mesh.ndim
    own = DTensor.from_local(stack, placements=sharded, **options).redistribute(placements=whole).to_local()
    result = newton_schulz(own[0], coefficients, steps)[None].contiguous()
    back = DTensor.from_local(result, placements=whole, **options).redistribute(placements=sharded)
    return back.to_local()[: len(updates)].unbind()


def _behind_first(placement: Placement) -> Placement:
    """Returns the placement of a matrix for a stack of such matrices."""
    if isinstance(placement, _StridedShard):
        return _StridedShard(placement.dim + 1, split_factor=placement.split_factor)
    return Shard(placement.dim + 1) if isinstance(placement, Shard) else placement


def _lr_ratio(adjust_lr_fn: str, rows: int, columns: int) -> float:
    """Returns the factor on the update of a matrix, which makes its RMS independent of the shape."""
    if adjust_lr_fn == "original":
        return math.sqrt(max(1, rows / columns))
    return 0.2 * math.sqrt(max(rows, columns))


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _assign(target: Tensor, value: Tensor, bad: Tensor | None) -> None:
    """Assigns a value unless ``bad`` () is 1, without a device synchronization."""
    target.copy_(value if bad is None else torch.where(bad.bool(), target, value))

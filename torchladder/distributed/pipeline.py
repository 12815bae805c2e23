"""Pipeline parallelism: each rank runs its stages of the model, by a schedule of ``torch.distributed.pipelining``.

A micro-batch brings its own attention mask, labels and options to every stage: all ranks of a pipeline read the same
rows, so only the output of a stage, and its gradient, is sent.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import PipelineStage, schedules
from torch.distributed.tensor import DTensor

from torchladder.distributed.pipeline_layout import PipelineLayout

Result = TypeVar("Result")


@dataclass(frozen=True)
class MicroBatch:
    """The input of all stages.

    Attributes:
        tokens: (B, t) int64, those of this rank.
        attn_mask: the kernel's attention mask.
        labels: (B, t) int64; None for logits.
        options: further arguments of the model's forward.
    """

    tokens: Tensor
    attn_mask: Any
    labels: Tensor | None = None
    options: dict[str, Any] = field(default_factory=dict)


class Stage(nn.Module):
    """A stage of a model.

    Args:
        model: the model without the blocks of other stages (``keep_stage``).
        is_last: whether it has the head.
    """

    def __init__(self, model: nn.Module, is_last: bool) -> None:
        super().__init__()
        self.model = model
        self.is_last = is_last
        self._micro_batches: Iterator[MicroBatch] = iter(())
        self._finish: Callable[[Any], Tensor] | None = None

    def start(self, micro_batches: Sequence[MicroBatch], finish: Callable[[Any], Tensor] | None = None) -> None:
        """Sets the micro-batches of the following forward passes; every schedule takes them in order.

        ``finish`` makes the output of the last stage from that of the model; None: it is the same.
        """
        self._micro_batches, self._finish = iter(micro_batches), finish

    def forward(self, x: Tensor) -> Any:
        one = next(self._micro_batches)
        if not self.is_last:
            return self.model(x, one.attn_mask)
        output = self.model(x, one.attn_mask, one.labels, **one.options)
        return self._finish(output) if self._finish else output


def build_stages(model: Any, layout: PipelineLayout, rank: int) -> dict[int, Stage]:
    """Returns the stages of a pipeline rank by number; they share their blocks with ``model``."""
    last = len(layout.stages) - 1
    stages = {}
    for number in layout.stages_of(rank):
        part = copy.copy(model)
        part._modules = dict(model._modules)  # the copy shares it otherwise
        part.keep_stage(layout.stages[number], number == 0, number == last)
        stages[number] = Stage(part, number == last)
    return stages


class Pipeline:
    """Runs the stages of this rank together with the other ranks of its pipeline.

    Args:
        layout: which rank has which stage.
        stages: number → stage, those of this rank.
        group: the ranks of the pipeline.
        device: of this rank.
        dtype: that of the output of a stage.
        dim: features of the output of a stage.
        tensor_parallel: ranks that share the tokens between two blocks.
    """

    def __init__(
        self,
        layout: PipelineLayout,
        stages: dict[int, Stage],
        group: ProcessGroup,
        device: torch.device,
        dtype: torch.dtype,
        dim: int,
        tensor_parallel: int,
    ) -> None:
        self.layout, self.stages, self.group = layout, stages, group
        self.device, self.dtype, self.dim = device, dtype, dim
        self.tensor_parallel = tensor_parallel
        self.is_last = any(stage.is_last for stage in stages.values())
        self._schedule: Any = None

    def forward_backward(
        self, micro_batches: Sequence[MicroBatch], loss: Callable[[Any], tuple[Tensor, Result]]
    ) -> list[Result]:
        """Accumulates the gradients of the micro-batches, ``layout.num_micro_batches`` of one shape.

        Args:
            loss: output of the model → the loss to differentiate, and anything else.

        Returns:
            The latter for each micro-batch; nothing on ranks without the last stage.
        """
        results = []

        def finish(output: Any) -> Tensor:
            total, result = loss(output)
            results.append(result)
            return total

        for stage in self.stages.values():
            stage.start(micro_batches, finish)
        if self._schedule is None:
            self._schedule = self._build_schedule(micro_batches[0].tokens)
        tokens = [torch.cat([one.tokens for one in micro_batches])] if 0 in self.stages else []
        unused = torch.zeros(len(micro_batches)) if self.is_last else None  # the stage has computed the loss
        self._schedule.step(*tokens, target=unused, losses=[] if self.is_last else None, return_outputs=False)
        return results

    @torch.no_grad()
    def forward(self, micro_batches: Sequence[MicroBatch]) -> list[Any]:
        """Returns the model's output for each micro-batch, of any shapes; nothing on ranks without the last stage."""
        outputs: list[Any] = []
        sends: list[tuple[Any, Tensor]] = []  # with what they send, which must stay in memory
        for one in micro_batches:
            x = one.tokens
            for number, stage in self.stages.items():
                before, after = number - 1, number + 1
                if number and before not in self.stages:
                    x = self._hidden(one.tokens, self.device)
                    dist.recv(x, group=self.group, group_src=self.layout.rank_of(before))
                stage.start([one])
                x = stage(x)
                if stage.is_last:
                    outputs.append(x)
                elif after not in self.stages:
                    x = x.contiguous()
                    sends.append((dist.isend(x, group=self.group, group_dst=self.layout.rank_of(after)), x))
        for work, _ in sends:
            work.wait()
        for module in (module for stage in self.stages.values() for module in stage.modules()):
            if isinstance(module, FSDPModule):
                module.reshard()  # FSDP2 leaves that to the backward pass
        return outputs

    def broadcast(self, tensor: Tensor | None, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Returns the tensor of the rank with the last stage on all ranks of the pipeline."""
        if tensor is None:
            tensor = torch.empty(*shape, dtype=dtype, device=self.device)
        dist.broadcast(tensor, group=self.group, group_src=self.layout.last_rank)
        return tensor

    def _hidden(self, tokens: Tensor, device: torch.device | str) -> Tensor:
        """Returns an empty tensor for the output of a stage that is not the last."""
        rows, length = tokens.shape
        return torch.empty(rows, length // self.tensor_parallel, self.dim, dtype=self.dtype, device=device)

    def _build_schedule(self, tokens: Tensor) -> Any:
        """Returns the schedule for micro-batches like ``tokens``. With shapes given, it runs no stage to infer them."""
        hidden = self._hidden(tokens, "meta").requires_grad_()
        loss = torch.empty((), device="meta", requires_grad=True)
        stages = [
            PipelineStage(
                stage,
                number,
                len(self.layout.stages),
                self.device,
                input_args=hidden if number else tokens.to("meta"),
                output_args=loss if stage.is_last else hidden,
                group=self.group,
            )
            for number, stage in self.stages.items()
        ]
        schedule = schedules.get_schedule_class(self.layout.schedule)
        single = issubclass(schedule, schedules.PipelineScheduleSingle)
        return schedule(
            stages[0] if single else stages,
            self.layout.num_micro_batches,
            loss_fn=lambda loss, _: loss,
            scale_grads=False,
        )


def clip_grad_norm_(parameters: Sequence[nn.Parameter], max_norm: float, group: ProcessGroup | None) -> Tensor:
    """Clips the norm of all gradients together, those of other ranks of the pipeline included; returns the norm ()."""
    if group is None:
        norm = nn.utils.clip_grad_norm_(parameters, max_norm)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    square = (norm.full_tensor() if isinstance(norm, DTensor) else norm).square()
    dist.all_reduce(square, group=group)
    norm = square.sqrt()
    nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm

"""torchtitan beside us: the same shapes, batch, precision and masks, compiled, one step of each in turns.

torchtitan is not a requirement of this project. Bring it into an ignored folder, without what it needs for more than a
model:

    python -m pip install --no-deps --target build/peer torchtitan==0.2.2
"""

import gc
import importlib.util
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import torch
from torch import nn

from tests.benchmarks.gpu.rows import RandomRows
from tests.benchmarks.gpu.stepping import CUDA, DEVICE, DOCUMENT_TOKENS, FLASH4, Shape, clock, trainer
from tests.benchmarks.timing import seconds, table
from torchladder import models

FOLDER = Path("build/peer")
SHAPES = [Shape("1b", 8192, 4), Shape("1b", 32768, 1)] if CUDA else [Shape("debug", 256, 2)]
EOS = 2
US, THEM = "torchladder", "torchtitan"


@dataclass(frozen=True)
class Contestant:
    """One of the two, with one of its kernels."""

    who: str
    kernel: str
    masks: tuple[str, ...]
    shape: Shape

    def __str__(self) -> str:
        return f"torchtitan beside {self.shape}, {'+'.join(self.masks)}, {self.who} {self.kernel}"

    @contextmanager
    def step(self, layers: int | None = None) -> Iterator[Callable[[], None]]:
        """Yields one training step, of a model of that many layers."""
        if self.who == US:
            few = () if layers is None else ("--model.n_layers", str(layers))
            with trainer(self.shape, *few, masks=self.masks, kernel=self.kernel) as run:
                yield run.train_step
            return
        config = models.registry.flavors("llama")[self.shape.flavor]
        theirs = [_their_step(replace(config, n_layers=layers or config.n_layers), self)]
        yield lambda: theirs[0]()
        theirs.clear()  # whoever still holds the step holds no memory of the device
        torch._dynamo.reset()
        gc.collect()
        if CUDA:
            torch.cuda.empty_cache()


def contestants() -> list[Contestant]:
    """Returns who runs beside whom, the most important first."""
    if not CUDA:
        return [Contestant(US, "fold", ("causal",), SHAPES[0]), Contestant(THEM, "sdpa", ("causal",), SHAPES[0])]
    kernels = [
        (("causal",), [(US, "fold"), (THEM, "sdpa"), (US, "flex"), (THEM, "flex")]),
        (("document",), [(US, "flash" if FLASH4 else "varlen"), (THEM, "flex"), (US, "flex"), (THEM, "varlen")]),
    ]
    return [
        Contestant(who, kernel, masks, shape)
        for shape in SHAPES
        for masks, of_both in kernels
        for who, kernel in of_both
    ]


def is_here() -> bool:
    """Whether torchtitan is in ``FOLDER``."""
    return (FOLDER / "torchtitan").is_dir()


def run() -> dict[str, Any]:
    """Prints and returns the ratio of tokens per second, ours over the faster of theirs; empty without torchtitan."""
    if not is_here():
        print(f"torchtitan is not in {FOLDER}: python -m pip install --no-deps --target {FOLDER} torchtitan==0.2.2\n")
        return {}
    speeds: dict[Contestant, float] = {}
    for one in contestants():
        if clock.allows(str(one)):
            with one.step() as step:
                taken = seconds({"step": step}, turns=3)["step"]
            speeds[one] = one.shape.batch * one.shape.seq_len / taken
            print(f"{one}: {speeds[one]:,.0f} tokens/s")
    results = [
        {
            "shape": str(one.shape),
            "masks": "+".join(one.masks),
            "kernel": one.kernel,
            "ours": speed,
            "theirs": theirs,
            "ratio": speed / max(theirs.values()),
        }
        for one, speed in speeds.items()
        if one.who == US and (theirs := _of_them(one, speeds))
    ]
    rows = [
        [
            f"{r['shape']}, {r['masks']}, {r['kernel']}",
            f"{r['ours']:,.0f}",
            ", ".join(f"{kernel} {speed:,.0f}" for kernel, speed in r["theirs"].items()),
            f"{r['ratio']:.2f}",
        ]
        for r in results
    ]
    table(["beside torchtitan", "tokens/s", "theirs", "ratio"], rows)
    return {"results": results}


def _of_them(ours: Contestant, speeds: dict[Contestant, float]) -> dict[str, float]:
    """Returns the speeds of their kernels at our shape and masks."""
    same = ((one, speed) for one, speed in speeds.items() if (one.shape, one.masks) == (ours.shape, ours.masks))
    return {one.kernel: speed for one, speed in same if one.who == THEM}


def _their_step(config: Any, one: Contestant) -> Callable[[], None]:
    """Returns one training step of their model as their trainer takes it on one device."""
    theirs = _load()
    args = theirs.TransformerModelArgs(
        dim=config.dim,
        n_layers=config.n_layers,
        n_heads=config.n_heads,
        n_kv_heads=config.kv_heads,
        vocab_size=config.vocab_size,
        multiple_of=256 if config.dim >= 256 else 64,
        rope_theta=config.rope_theta,
        max_seq_len=one.shape.seq_len,
        attn_type=one.kernel,
        attn_mask_type="causal" if one.masks == ("causal",) else "block_causal",
    )
    with DEVICE:
        model = theirs.Transformer(args)
    with torch.no_grad():
        model.init_weights()
    loss_of: Any = theirs.cross_entropy_loss
    if CUDA:
        for name, block in model.layers.named_children():
            model.layers.register_module(name, torch.compile(block, fullgraph=True))
        loss_of = torch.compile(loss_of)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=CUDA)
    batch = RandomRows(
        seq_len=one.shape.seq_len,
        dp_rank=0,
        local_batch_size=one.shape.batch,
        global_batch_size=one.shape.batch,
        vocab_size=config.vocab_size,
        document_tokens=DOCUMENT_TOKENS * ("document" in one.masks),
    ).batch
    tokens, labels = batch.tokens.to(DEVICE), batch.labels.to(DEVICE)
    tokens[tokens == EOS] = EOS + 1  # their documents end with a token
    ends = (batch.positions[:, 1:] == 0).to(DEVICE)
    tokens[:, :-1][ends] = EOS
    tokenizer = types.SimpleNamespace(eos_id=EOS)

    def step() -> None:
        optimizer.zero_grad()
        attn_mask = model.get_attention_masks(tokens, tokenizer) if one.kernel != "sdpa" else None
        with torch.autocast(DEVICE.type, torch.bfloat16):
            loss = loss_of(model(tokens, attn_mask), labels) / labels.numel()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
        optimizer.step()

    return step


def _load() -> types.SimpleNamespace:
    """Imports their model alone: the packages around it import what this comparison does not need."""
    if str(FOLDER) not in sys.path:
        sys.path.insert(0, str(FOLDER))
        if importlib.util.find_spec("datasets") is None:  # imported with the model, not used by it
            sys.modules |= {"datasets": MagicMock(), "datasets.distributed": MagicMock()}
        for name in ("torchtitan", "torchtitan.models", "torchtitan.models.llama3"):
            package = types.ModuleType(name)
            package.__path__ = [str(FOLDER.joinpath(*name.split(".")))]
            sys.modules[name] = package
    from torchtitan.components.loss import cross_entropy_loss
    from torchtitan.models.llama3.model.args import TransformerModelArgs
    from torchtitan.models.llama3.model.model import Transformer

    return types.SimpleNamespace(
        cross_entropy_loss=cross_entropy_loss, TransformerModelArgs=TransformerModelArgs, Transformer=Transformer
    )

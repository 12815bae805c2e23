"""torchtitan beside us: the same shapes, batch, precision and masks, compiled, one step of each in turns.

torchtitan is not a requirement of this project. Bring it into an ignored folder, without what it needs for more than a
model:

    python -m pip install --no-deps --target build/peer torchtitan==0.2.2
"""

import gc
import importlib.util
import sys
import types
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import torch
from torch import nn

from tests.benchmarks.gpu.stepping import CUDA, DEVICE, FLASH4, Shape, clock, trainer, wait
from tests.benchmarks.timing import seconds, table

FOLDER = Path("build/peer")
SHAPES = [Shape("1b", 8192, 4), Shape("1b", 32768, 1)] if CUDA else [Shape("debug", 256, 2)]
EOS = 2


def run() -> dict[str, Any]:
    """Prints and returns the ratio of tokens per second, ours over theirs; empty where torchtitan is not there."""
    if not (FOLDER / "torchtitan").is_dir():
        print(f"torchtitan is not in {FOLDER}: python -m pip install --no-deps --target {FOLDER} torchtitan==0.2.2\n")
        return {}
    results = []
    for shape in SHAPES:
        for masks in [("causal",), ("document",)] if CUDA else [("causal",)]:
            if clock.allows(f"torchtitan beside {shape}, {'+'.join(masks)}"):
                results += _beside(shape, masks)
    rows = [
        [f"{r['shape']}, {r['masks']}, {r['kernel']}", f"{r['ours']:,.0f}", f"{r['theirs']:,.0f}", f"{r['ratio']:.2f}"]
        for r in results
    ]
    table(["beside torchtitan", "tokens/s", "theirs", "ratio"], rows)
    return {"results": results}


def _beside(shape: Shape, masks: tuple[str, ...]) -> list[dict[str, Any]]:
    """Measures our kernels and their two, and compares ours with the faster of theirs."""
    tokens = shape.batch * shape.seq_len
    ours, theirs = {}, {}
    of_documents = "flash" if FLASH4 else "varlen"
    kernels = ("fold" if masks == ("causal",) else of_documents, "flex") if CUDA else ("fold",)
    for kernel in kernels:
        with trainer(shape, masks=masks, kernel=kernel) as run:
            ours[kernel] = tokens / seconds({"step": _timed(run.train_step)}, turns=3)["step"]
            batch, config = next(run.loader), run.model.config
    for kind in (("sdpa", "flex") if masks == ("causal",) else ("flex", "varlen")) if CUDA else ("sdpa",):
        theirs[kind] = tokens / seconds({"step": _timed(_step(config, shape, kind, masks, batch))}, turns=3)["step"]
        gc.collect()
        if CUDA:
            torch.cuda.empty_cache()
    best = max(theirs, key=lambda kind: theirs[kind])
    return [
        {
            "shape": str(shape),
            "masks": "+".join(masks),
            "kernel": kernel,
            "ours": speed,
            "theirs": theirs[best],
            "their_kernel": best,
            "all_theirs": theirs,
            "ratio": speed / theirs[best],
        }
        for kernel, speed in ours.items()
    ]


def _timed(step: Any) -> Any:
    def timed() -> None:
        step()
        wait()

    return timed


def _step(config: Any, shape: Shape, kind: str, masks: tuple[str, ...], batch: Any) -> Any:
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
        max_seq_len=shape.seq_len,
        attn_type=kind,
        attn_mask_type="causal" if masks == ("causal",) else "block_causal",
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
    tokens, labels = batch.tokens.to(DEVICE), batch.labels.to(DEVICE)
    tokens[tokens == EOS] = EOS + 1  # their documents end with a token
    ends = (batch.positions[:, 1:] == 0).to(DEVICE)
    tokens[:, :-1][ends] = EOS
    tokenizer = types.SimpleNamespace(eos_id=EOS)

    def step() -> None:
        optimizer.zero_grad()
        attn_mask = model.get_attention_masks(tokens, tokenizer) if kind != "sdpa" else None
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

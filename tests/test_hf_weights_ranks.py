"""Ranks that share a model each load their shard of a Hugging Face folder, and save one together."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from torchladder import models
from torchladder.models.hf import hf_weights
from torchladder.models.hf.adapter import HFMetadata
from torchladder.models.hf.hf_folder import HFFolder

pytest.importorskip("safetensors")

V = 67  # does not divide
SIZES = {"dim": 36, "n_layers": 2, "n_heads": 6, "n_kv_heads": 2, "head_dim": 6, "ffn_dim": 50}
MODELS = {
    "llama": lambda rows: models.Llama(models.LlamaConfig(**SIZES, vocab_size=rows), seq_len=16),
    "qwen3": lambda rows: models.Qwen3(models.Qwen3Config(**SIZES, vocab_size=rows, tie_embeddings=True), seq_len=16),
}


def rank_main(rank, root):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{root / 'store'}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    for name, make in MODELS.items():
        for rows in (V, V + 8):
            with torch.device("meta"):
                model = make(rows)
            for block in model.layers.values():
                fully_shard(block, mesh=mesh)
            fully_shard(model, mesh=mesh)
            model.to_empty(device="cpu")
            hf_weights.load_hf_weights(model, root / name)
            whole = make(rows)
            hf_weights.load_hf_weights(whole, root / name)
            for one, other in zip(model.parameters(), whole.parameters(), strict=True):
                assert torch.equal(one.full_tensor(), other)
            hf_weights.save_hf_weights(
                model, root / f"{name}-{rows}", HFMetadata(16), torch.float32, is_writer=rank == 0
            )
    dist.barrier()
    dist.destroy_process_group()


def test_ranks_load_and_save_their_shards(tmp_path):
    for name, make in MODELS.items():
        model = make(V)
        model.init_weights(0)
        for folder in (name, f"{name}-{V}", f"{name}-{V + 8}"):
            (tmp_path / folder).mkdir()
        hf_weights.save_hf_weights(model, tmp_path / name, HFMetadata(16), torch.float32, is_writer=True)
    processes.spawn(rank_main, args=(tmp_path,), nprocs=2)
    for name in MODELS:
        first, same, more = (HFFolder(tmp_path / folder) for folder in (name, f"{name}-{V}", f"{name}-{V + 8}"))
        assert (first.config, more.config["vocab_size"]) == (same.config, V + 8)
        for tensor, kept in first.tensors.items():
            assert torch.equal(same.read_tensor(tensor), first.read_tensor(tensor))
            assert torch.equal(more.read_tensor(tensor)[: kept.shape[0]], first.read_tensor(tensor))

"""Initial weights and loss do not depend on the sharding: four ranks, sizes that do not divide."""

import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from torchladder import models
from torchladder.distributed.tensor_parallel import apply_tensor_parallel

CONFIG = models.LlamaConfig(dim=36, n_layers=2, n_heads=6, n_kv_heads=2, ffn_dim=50, vocab_size=67)
TIED = models.LlamaConfig(**{**vars(CONFIG), "tie_embeddings": True})
SIZES = {"dim": 36, "n_layers": 2, "n_heads": 6, "n_kv_heads": 2, "head_dim": 8, "ffn_dim": 50, "vocab_size": 67}
CASES = [
    (models.Llama, CONFIG),
    (models.Llama, TIED),
    (models.Qwen3, models.Qwen3Config(**SIZES)),
    (models.Gemma3, models.Gemma3Config(**SIZES)),
    (models.Olmo2, models.Olmo2Config(**SIZES)),
]


def sharded(family, config, tensor_parallel):
    """Returns a model from meta, sharded with FSDP2 over the data-parallel ranks; optionally also tensor-parallel."""
    with torch.device("meta"):
        model = family(config, seq_len=16)
    mesh = init_device_mesh("cpu", (4,))
    if tensor_parallel:
        both = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
        mesh = both["data"]
        apply_tensor_parallel(model, model.parallel_plan(), both["tensor"], loss_parallel=True)
    for block in model.layers.values():
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model.to_empty(device="cpu")
    model.init_weights(0)
    return model


def rank_main(rank, store):
    os.environ["OMP_NUM_THREADS"] = "1"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=4)
    tokens = torch.randint(67, (2, 16), generator=torch.Generator().manual_seed(0))
    for family, config in CASES:
        whole = family(config, seq_len=16)
        whole.init_weights(0)
        expected = whole(tokens, None, tokens)
        expected.backward()
        for tensor_parallel in (False, True):
            model = sharded(family, config, tensor_parallel)
            assert model.num_parameters() == whole.num_parameters()
            assert model.flops(7, 9) == whole.flops(7, 9)
            for one, other in zip(model.parameters(), whole.parameters(), strict=True):
                assert torch.equal(one.full_tensor(), other)
            loss = model(tokens, None, tokens)
            torch.testing.assert_close(loss, expected)
            loss.backward()
            for (name, one), other in zip(model.named_parameters(), whole.parameters(), strict=True):
                torch.testing.assert_close(one.grad.full_tensor(), other.grad, atol=1e-5, rtol=1e-4, msg=name)
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="needs torch.distributed")
def test_weights_and_loss_do_not_depend_on_the_layout(tmp_path):
    processes.spawn(rank_main, args=(tmp_path / "store",), nprocs=4)

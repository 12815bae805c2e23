"""All of it on one GPU: FSDP2 over a mesh of one, flex, compiled blocks, activation checkpointing, float8.

python -m pytest tests/gpu
"""

import importlib.util

import pytest
import torch
import torch.distributed as dist
from torch._dynamo.utils import counters
from torch.distributed.device_mesh import init_device_mesh

from torchladder import mask, models
from torchladder.distributed import float8, parallelize
from torchladder.distributed.activation_checkpoint import ActivationCheckpointConfig
from torchladder.distributed.float8 import Float8Config
from torchladder.distributed.mesh import Degrees, Mesh, ParallelismConfig
from torchladder.distributed.parallelize import CompileConfig, ParallelizeConfig, Precision
from torchladder.models import attention
from torchladder.registry import ConfigError

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")

CUDA = torch.device("cuda", 0)
LENGTH = 1024
MASKS = ["document", "chunk"]
WINDOWS = [8, 33, 128, 500, 1024]
CONFIG = models.LlamaConfig(dim=256, n_layers=3, n_heads=4, n_kv_heads=2, ffn_dim=512, vocab_size=512)
HALF = Precision(torch.bfloat16, torch.float32)
COMPILED = CompileConfig(enable=True, components=["model", "loss"])
BY_OP = ActivationCheckpointConfig("selective", "op")
NATIVE = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)


@pytest.fixture(scope="module")
def one():
    """A mesh of a single rank to which FSDP2 is applied."""
    dist.init_process_group("cpu:gloo,cuda:nccl", store=dist.HashStore(), rank=0, world_size=1)
    yield Mesh(Degrees(1, 1, 1, 1), fsdp_mesh=init_device_mesh("cuda", (1,), mesh_dim_names=("shard",)))
    dist.destroy_process_group()


def batch(window):
    """The same random tokens for every window: five steps are enough to learn some of them by heart."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(512, (2, LENGTH), generator=generator).to(CUDA)
    positions = torch.arange(LENGTH, dtype=torch.int32).repeat(2, 1)
    positions[1, 300:] -= 300
    return tokens, mask.from_names(MASKS, positions, window)


def train(mesh, offload=False, **settings):
    """Returns the losses over a few windows, and the number of graphs compiled for them."""
    torch._dynamo.reset()
    counters.clear()
    kernel = attention.build_kernel("flex", MASKS, CUDA)
    with torch.device("meta"):
        model = models.Llama(CONFIG, kernel.attention, LENGTH)
    config = ParallelizeConfig(ParallelismConfig(), offload=offload, **settings)
    parallelize.parallelize_model(model, model.parallel_plan(), mesh, config, kernel.saved_ops)
    parallelize.materialize(model, CUDA, offload)
    model.init_weights(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    if after := float8.post_optimizer_hook(model, config.float8):
        optimizer.register_step_post_hook(after)
    losses = []
    for window in WINDOWS:
        tokens, start = batch(window)
        loss = model(tokens, kernel.prepare(start, CUDA), tokens.roll(-1, dims=1)) / tokens.numel()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, counters["stats"]["unique_graphs"]


def test_compiling_and_activation_checkpointing_change_no_loss(one):
    plain, _ = train(one)
    for settings in (
        {"compile": COMPILED},
        {"activation_checkpoint": BY_OP},
        {"compile": COMPILED, "activation_checkpoint": BY_OP},
    ):
        losses, graphs = train(one, **settings)
        assert losses[0] == pytest.approx(plain[0], rel=1e-5), settings
        assert losses == pytest.approx(plain, rel=1e-3), settings  # Adam's first steps amplify rounding
        if "compile" in settings:
            assert graphs == 2  # one for all blocks and windows, one for the loss
    assert plain[-1] < plain[0]


def test_half_precision_follows_full(one):
    full, _ = train(one)
    half, _ = train(one, precision=HALF, compile=COMPILED, activation_checkpoint=BY_OP)
    assert half == pytest.approx(full, rel=0.02)


def test_offloaded_weights_give_the_same_losses(one):
    plain, _ = train(one, precision=HALF)
    losses, _ = train(one, precision=HALF, offload=True)
    assert losses == pytest.approx(plain, rel=5e-3)  # AdamW rounds differently on a CPU, and its first steps amplify it


@pytest.mark.skipif(not importlib.util.find_spec("torchao"), reason="needs torchao")
@pytest.mark.parametrize(
    "config",
    [
        {"recipe_name": "tensorwise"},
        {"recipe_name": "tensorwise", "enable_fsdp_float8_all_gather": True},
        {"enable_fsdp_float8_all_gather": True, "precompute_float8_dynamic_scale_for_fsdp": True},
        {"recipe_name": "rowwise"},
        {"recipe_name": "rowwise_with_gw_hp"},
    ],
)
@pytest.mark.skipif(not NATIVE, reason="needs compute capability 9.0")
def test_float8_with_all_the_rest(one, config):
    made = Float8Config(enable=True, **config)
    made.check(CUDA, torch.bfloat16)
    half, _ = train(one, precision=HALF, compile=COMPILED, activation_checkpoint=BY_OP)
    losses, graphs = train(one, precision=HALF, compile=COMPILED, activation_checkpoint=BY_OP, float8=made)
    assert losses == pytest.approx(half, rel=0.03)
    assert losses != half
    assert graphs == 2


def test_float8_needs_bfloat16():
    with pytest.raises(ConfigError, match=r"bfloat16|compute capability"):
        Float8Config(enable=True).check(CUDA, torch.float32)


@pytest.mark.parametrize("first", [0, 256, 768])
def test_flex_attends_with_the_last_queries_of_a_row(first):
    _, start = batch(300)
    generator = torch.Generator(CUDA).manual_seed(0)
    shapes = [(2, heads, tokens, 64) for heads, tokens in ((4, LENGTH - first), (2, LENGTH), (2, LENGTH))]
    found = []
    for name in ("flex", "dense"):
        kernel = attention.build_kernel(name, MASKS, CUDA, tokens_per_rank=256)
        q, k, v = (
            torch.randn(shape, device=CUDA, generator=generator.manual_seed(i)) for i, shape in enumerate(shapes)
        )
        inputs = [x.requires_grad_() for x in (q, k, v)]
        out = kernel.attention(*inputs, kernel.prepare(start, CUDA, first))
        found.append([out, *torch.autograd.grad(out.square().sum(), inputs)])
    for ours, reference in zip(*found, strict=True):
        assert (ours - reference).norm() / reference.norm() < 0.005

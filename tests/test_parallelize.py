"""Parallelisms on a single rank, and the errors for options that cannot work."""

import importlib.util

import pytest
import torch
from torch import nn

from torchladder import models
from torchladder.distributed import activation_checkpoint, float8, parallelize, tensor_parallel
from torchladder.distributed.activation_checkpoint import ActivationCheckpointConfig
from torchladder.distributed.float8 import Float8Config
from torchladder.distributed.mesh import Degrees, Mesh, ParallelismConfig
from torchladder.distributed.parallelize import CompileConfig, ParallelizeConfig
from torchladder.models.attention.sdpa import SdpaKernel
from torchladder.registry import ConfigError

CONFIG = models.LlamaConfig(dim=32, n_layers=4, n_heads=4, n_kv_heads=2, ffn_dim=48, vocab_size=64)
CPU = torch.device("cpu")
SINGLE_RANK = Mesh(Degrees(1, 1, 1, 1))


def llama():
    return models.Llama(CONFIG, SdpaKernel.attention, 64)


def parallelized(config):
    model = llama()
    parallelize.parallelize_model(model, model.parallel_plan(), SINGLE_RANK, config, SdpaKernel.saved_ops)
    return model


# --- activation checkpointing ----------------------------------------------------------------------------------------


def computed_in_backward(option):
    """Returns how many matrix products and attentions one block computes in backward."""
    mode = option if option in ("none", "full") else "selective"
    config = ActivationCheckpointConfig(mode=mode, selective_ac_option=option if mode == "selective" else "2")
    again = {"mm": 0, "sdpa": 0}

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            name = function.name().split("::")[-1].split(".")[0]
            if name in again:
                again[name] += 1
            return function(*args, **(kwargs or {}))

    model = llama()
    model.init_weights(0)
    block = activation_checkpoint.apply_activation_checkpoint(model.layers["0"], 0, config, SdpaKernel.saved_ops)
    x = torch.randn(2, 64, 32, requires_grad=True)
    loss = block(x, torch.zeros(2, 64, dtype=torch.int32)).sum()
    with Count():
        loss.backward()
    return again


def test_saved_results_are_not_recomputed():
    backward = computed_in_backward("none")  # two for each of the 7 products in forward
    assert backward == {"mm": 14, "sdpa": 0}
    assert computed_in_backward("full") == {"mm": 14 + 6, "sdpa": 1}  # the last product is not recomputed
    assert computed_in_backward("op") == {"mm": 14 + 3, "sdpa": 0}


@pytest.mark.parametrize(
    ("option", "blocks"), [("1", [0, 1, 2, 3]), ("2", [0, 2]), ("3", [0, 3]), ("op", [0, 1, 2, 3])]
)
def test_which_blocks_are_recomputed(option, blocks):
    config = ActivationCheckpointConfig("selective", option)
    assert [layer for layer in range(4) if config.recomputes(layer)] == blocks


@pytest.mark.parametrize("option", ["0", "-1", "ops", "1.5"])
def test_invalid_selective_options(option):
    with pytest.raises(ConfigError, match="selective_ac_option"):
        ActivationCheckpointConfig("selective", option)


# --- float8 ----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not importlib.util.find_spec("torchao"), reason="needs torchao")
def test_float8_converts_layers_that_are_large_enough_and_not_filtered():
    config = Float8Config(enable=True, emulate=True, filter_fqns=["layers.1.", "o_proj"], min_features=32)
    made = float8.convert_to_float8(model := llama(), config, sharded=False)
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    # k_proj and v_proj have 2 heads of 8 features: fewer outputs than 32.
    expected = {name for name in names if not any(part in name for part in ("layers.1.", "o_proj", "k_proj", "v_proj"))}
    assert set(made) == expected
    assert {type(model.get_submodule(name)).__name__ for name in made} == {"Float8Linear"}


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({}, ["cpu does not support float8", "emulate"]),
        ({"emulate": True, "enable_fsdp_float8_all_gather": True}, ["single rank"]),
        ({"enable_fsdp_float8_all_gather": True, "recipe_name": "rowwise"}, ["tensorwise"]),
        ({"precompute_float8_dynamic_scale_for_fsdp": True}, ["enable_fsdp_float8_all_gather"]),
    ],
)
def test_float8_options_that_cannot_work(config, words):
    def use():
        made = Float8Config(enable=True, **config)
        made.check(CPU, torch.bfloat16)
        float8.convert_to_float8(llama(), made, sharded=False)

    with pytest.raises(ConfigError) as error:
        use()
    for word in words:
        assert word in str(error.value)


# --- tensor parallelism and offload ----------------------------------------------------------------------------------


def test_async_tensor_parallelism_needs_cuda_and_the_compiler():
    asked = ParallelismConfig(tensor_parallel_degree=2, enable_async_tensor_parallel=True)
    for device, compiled, word in ((CPU, True, "CUDA"), (torch.device("cuda"), False, "compile.enable")):
        with pytest.raises(ConfigError, match=word):
            parallelize.check_parallelize_config(
                SINGLE_RANK, ParallelizeConfig(asked, compile=CompileConfig(compiled)), device
            )
    parallelize.check_parallelize_config(
        SINGLE_RANK, ParallelizeConfig(asked, compile=CompileConfig(True)), torch.device("cuda")
    )


def test_offload_needs_fsdp():
    with pytest.raises(ConfigError, match="single rank"):
        parallelize.check_parallelize_config(
            SINGLE_RANK, ParallelizeConfig(ParallelismConfig(), offload=True), torch.device("cuda")
        )


def test_a_parallel_plan_uses_known_styles():
    with pytest.raises(ConfigError, match="sequential"):
        tensor_parallel.apply_tensor_parallel(llama(), {"norm": "sequential"}, mesh=None, loss_parallel=True)


@pytest.mark.parametrize("components", [["model"], ["loss"], ["model", "loss"]])
def test_components_are_compiled(components):
    model = parallelized(ParallelizeConfig(ParallelismConfig(), compile=CompileConfig(True, components, "eager")))
    blocks = [block._compiled_call_impl is not None for block in model.layers.values()]
    assert blocks == ["model" in components] * 4
    assert (model.head._compiled_call_impl is not None) == ("loss" in components)

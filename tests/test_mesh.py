"""Degrees of parallelism: which combinations are valid, and the errors for those that are not."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchladder.distributed import mesh
from torchladder.distributed.mesh import ParallelismConfig
from torchladder.registry import ConfigError


def config(replicate=1, shard=-1, context=1, tensor=1, **more):
    return ParallelismConfig(
        data_parallel_replicate_degree=replicate,
        data_parallel_shard_degree=shard,
        context_parallel_degree=context,
        tensor_parallel_degree=tensor,
        **more,
    )


sizes = st.integers(1, 4)


@given(sizes, sizes, sizes, sizes)
def test_the_shard_degree_takes_the_remaining_ranks(replicate, shard, context, tensor):
    ranks = replicate * shard * context * tensor
    found = mesh.degrees(config(replicate, -1, context, tensor), ranks)
    assert found == mesh.degrees(config(replicate, shard, context, tensor), ranks)
    assert found.dp * found.model_parallel == ranks


@pytest.mark.parametrize(
    ("degrees", "ranks", "words"),
    [
        (config(shard=4), 8, ["data_parallel_shard_degree 4", "8 ranks", "data_parallel_shard_degree 8"]),
        (config(shard=4), 8, ["tensor_parallel_degree 2", "context_parallel_degree 2"]),
        (config(tensor=3), 8, ["tensor_parallel_degree 1 or 2 or 4 or 8"]),
        (config(shard=3, tensor=3), 8, ["none fits, change two"]),
    ],
)
def test_degrees_whose_product_is_not_the_number_of_ranks(degrees, ranks, words):
    with pytest.raises(ConfigError) as error:
        mesh.degrees(degrees, ranks)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("degrees", "heads", "seq_len", "words"),
    [
        (config(tensor=3), (12, 4), 12, ["tensor_parallel_degree = 3", "12, 4", "1, 2, 4"]),
        (config(context=3), (4,), 256, ["context_parallel_degree = 3", "256", "1, 2, 4, 8"]),
        (config(context=4, tensor=8), (8,), 100, ["tensor_parallel_degree = 8", "100 / 4", "1, 5, 25"]),
    ],
)
def test_degrees_that_do_not_divide_the_model(degrees, heads, seq_len, words):
    with pytest.raises(ConfigError) as error:
        mesh.check_degrees(degrees, heads, seq_len)
    for word in words:
        assert word in str(error.value)


def test_degrees_that_divide_pass():
    mesh.check_degrees(config(context=4, tensor=2), (12, 4), 256)


@pytest.mark.parametrize(
    "bad", [{"tensor": 0}, {"shard": 0}, {"enable_async_tensor_parallel": True}, {"fsdp_reshard_after_forward": "no"}]
)
def test_invalid_degrees(bad):
    with pytest.raises(ConfigError, match="parallelism"):
        config(**bad)


def test_reshard_after_forward_default_is_refused_with_the_value_to_use():
    with pytest.raises(ConfigError, match=r"fsdp_reshard_after_forward = 'default'.* Use 'always'"):
        config(fsdp_reshard_after_forward="default")

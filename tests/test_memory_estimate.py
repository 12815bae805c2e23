"""The memory and traffic estimate of a layout on a fake process group, against real tensors and arithmetic."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from torchladder import config, models
from torchladder.commands import plan as command
from torchladder.distributed import activation_memory, fake_ranks
from torchladder.distributed.activation_checkpoint import ActivationCheckpointConfig, apply_activation_checkpoint
from torchladder.models.attention.sdpa import SdpaKernel
from torchladder.registry import ConfigError
from torchladder.training import run_plan as plans
from torchladder.training.memory_estimate import MemoryEstimator
from torchladder.training.traffic_estimate import estimate_traffic

CONFIGS = Path(__file__).parents[1] / "train_configs"
LLAMA = ["--job.config_file", str(CONFIGS / "llama1b_dm8.toml"), "--model.n_layers", "4"]
WEIGHTS = 2 * 32_000 * 2048 + 2048 + 4 * (2048 * (2 * 2048 + 2 * 256 + 3 * 5632) + 2 * 2048)
TENSOR, CONTEXT = "--parallelism.tensor_parallel_degree", "--parallelism.context_parallel_degree"


def estimate(ranks, *argv):
    plan = plans.make_plan(config.load([*LLAMA, "--training.local_batch_size", "1", *argv]), ranks)
    with fake_ranks.fake_process_group(ranks):
        made = MemoryEstimator(plan)
        return made, made.memory(), estimate_traffic(made)


def test_activations_on_meta_are_those_of_a_real_block():
    shape = models.LlamaConfig(dim=32, n_layers=1, n_heads=4, n_kv_heads=2, ffn_dim=48, vocab_size=64)
    attn_mask = torch.zeros(2, 64, dtype=torch.int32)
    found = {}
    for device in ("meta", "cpu"):
        with torch.device(device):
            model = models.Llama(shape, SdpaKernel.attention, 64)
            x = torch.empty(2, 64, 32, requires_grad=True)
        kept = {}

        def keep(saved, kept=kept):
            kept[saved.untyped_storage()._cdata] = saved.untyped_storage()
            return saved

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved):
            model.layers["0"](x, attn_mask)
        weights = sum(parameter.numel() * 4 for parameter in model.layers["0"].parameters())
        found[device] = sum(storage.nbytes() for storage in kept.values()) - weights - attn_mask.nbytes
        if device == "meta":
            counted = activation_memory.activation_bytes(model.layers["0"], x, attn_mask, SdpaKernel.saved_ops)
    assert counted["none"] == found["meta"] == found["cpu"]
    assert counted["full"] == x.nbytes
    assert counted["full"] < counted["op"] < counted["none"]


@pytest.mark.parametrize("mode", ["none", "op"])
def test_compiled_activations_on_meta_are_those_of_a_real_block(mode):
    shape = models.LlamaConfig(dim=64, n_layers=1, n_heads=4, n_kv_heads=2, ffn_dim=96, vocab_size=64)
    attn_mask = torch.zeros(2, 64, dtype=torch.int32)

    def make(device):
        with torch.device(device):
            model = models.Llama(shape, SdpaKernel.attention, 64).to(torch.bfloat16)
            return model.layers["0"], torch.zeros(2, 64, 64, dtype=torch.bfloat16, requires_grad=True)

    block, x = make("meta")
    counted = activation_memory.compiled_activation_bytes(block, x, attn_mask, SdpaKernel.saved_ops)
    assert counted["full"] == x.nbytes
    assert counted["full"] < counted["op"] < counted["none"]

    block, x = make("cpu")
    known = {tensor.untyped_storage()._cdata for tensor in (*block.parameters(), *block.buffers(), attn_mask)}
    kept = {x.untyped_storage()._cdata: x.untyped_storage()}

    def keep(saved):
        if saved.untyped_storage()._cdata not in known:
            kept[saved.untyped_storage()._cdata] = saved.untyped_storage()
        return saved

    checkpointing = ActivationCheckpointConfig("selective", "op") if mode == "op" else ActivationCheckpointConfig()
    block = apply_activation_checkpoint(block, 0, checkpointing, SdpaKernel.saved_ops)
    torch._dynamo.reset()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved):
        torch.compile(block, backend="aot_eager_decomp_partition", fullgraph=True)(x, attn_mask)
    assert counted[mode] == sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize(
    ("argv", "measured"),
    [
        (["--training.seq_len", "8192", "--training.local_batch_size", "4"], 56.9),
        (["--training.seq_len", "32768", "--training.local_batch_size", "1"], 56.9),
        (["--training.seq_len", "8192", "--training.local_batch_size", "4", "--float8.enable"], 42.3),
    ],
)
def test_the_memory_is_what_an_h200_took(argv, measured):
    # Llama 1B, compiled, bfloat16, no recomputation, one rank: docs/performance.md. With float8 it took 45.1 GiB, of
    # which the second half of an fp32 residual stream is 2.8.
    plan = plans.make_plan(
        config.load([*LLAMA, *argv, "--training.global_batch_size", "-1", "--model.n_layers", "22", "--compile.enable"])
    )
    with fake_ranks.fake_process_group(1):
        estimated = MemoryEstimator(plan).memory().total
    assert estimated / 2**30 == pytest.approx(measured, rel=0.05)


def test_a_moving_average_is_fp32_and_sharded_like_the_weights():
    (_, plain, _), (_, averaged, _) = estimate(8), estimate(8, "--ema.enable")
    _, half, _ = estimate(8, "--ema.enable", "--training.dtype", "bfloat16")
    assert (plain.ema, averaged.ema) == (0, averaged.parameters)
    assert half.ema == 2 * half.parameters
    assert averaged.total == plain.total + averaged.ema


def test_all_degrees_divide_the_memory():
    _, one, none = estimate(1)
    assert one.parameters == 4 * WEIGHTS
    assert not any(dataclasses.astuple(none))
    for argv in ([], [TENSOR, "2"], [CONTEXT, "4"], [TENSOR, "4", CONTEXT, "2"]):
        made, memory, _ = estimate(64, *argv)
        # Shards are padded to whole rows, and norms are replicated on tensor-parallel ranks.
        assert memory.parameters == pytest.approx(one.parameters / 64, rel=0.01)
        assert memory.optimizer == 2 * memory.parameters
        assert made.memory(made.layout).total == pytest.approx(memory.total, rel=0.01)
    copies = "--parallelism.data_parallel_replicate_degree"
    assert estimate(64, copies, "4")[1].parameters == pytest.approx(one.parameters / 16, rel=0.01)


def test_tensor_and_context_parallelism_and_checkpointing_save_activations():
    _, alone, _ = estimate(8)
    _, tensor, _ = estimate(8, TENSOR, "4")
    _, rows, _ = estimate(8, CONTEXT, "4")
    assert alone.activations / 4 < tensor.activations < alone.activations / 2
    assert alone.activations / 4 < rows.activations < alone.activations / 2
    modes = [estimate(8, "--activation_checkpoint.mode", mode)[1].activations for mode in ("none", "selective", "full")]
    assert modes == sorted(modes, reverse=True)
    assert len(set(modes)) == 3


def test_traffic():
    _, _, shard = estimate(8, "--training.global_batch_size", "16")  # 2 micro-batches
    # Per micro-batch, two all-gathers in bfloat16 and one reduce-scatter in float32 of seven eighths.
    assert shard.shard == 2 * (2 + 2 + 4) * WEIGHTS * 7 // 8
    _, _, copies = estimate(8, "--parallelism.data_parallel_replicate_degree", "2", "--training.global_batch_size", "8")
    assert copies.replicate == 2 * 4 * (WEIGHTS // 4) // 2
    _, _, rows = estimate(8, CONTEXT, "8", "--training.global_batch_size", "1")
    # Rank 0 sends its 1,024 keys and values of 4 heads of 64 to seven others, in 4 layers, and receives gradients.
    assert rows.context == 2 * 4 * 7 * 1024 * 2 * 4 * 64 * 2
    short = ["--curriculum.name", "constant", "--curriculum.window", "1024"]
    assert estimate(8, CONTEXT, "8", "--training.global_batch_size", "1", *short)[2].context == 0


def test_the_error_for_a_layout_that_does_not_fit_lists_those_that_do(capsys):
    argv = [*LLAMA, "--world-size", "256", "--training.global_batch_size", "1024"]
    with pytest.raises(ConfigError, match="GiB, more than --gpu-memory 8GiB") as error:
        command.run([*argv, "--gpu-memory", "8GiB"])
    assert not dist.is_initialized()
    offers = re.findall(r"([\d.]+) GiB with (.*)", str(error.value))
    assert len(offers) == 3
    for size, settings in offers:
        assert command.run([*argv, "--json", "--gpu-memory", "8GiB", *settings.split()]) == 0
        memory = json.loads(capsys.readouterr().out)["memory_per_rank"]
        assert sum(memory.values()) / 2**30 == pytest.approx(float(size), rel=0.02)
    with pytest.raises(ConfigError, match="use more ranks"):
        command.run([*argv, "--gpu-memory", "1MiB"])


@pytest.mark.parametrize("argv", [["--gpu-memory", "80"], ["--gpu-memory", "lots"], ["--world-size", "0"]])
def test_invalid_memory_sizes(argv):
    with pytest.raises(ConfigError, match=argv[0]):
        command.run([*LLAMA, *argv])


def test_muon_keeps_one_number_per_weight_of_a_matrix_and_exchanges_it_in_bfloat16():
    made, memory, sent = estimate(2)
    muon, muon_memory, muon_sent = estimate(2, "--optimizer.name", "Muon")
    matrices = WEIGHTS - 2 * 32_000 * 2048 - 2048 - 4 * 2 * 2048  # without embedding, head and norms
    assert made.plan.state_bytes - muon.plan.state_bytes == 4 * matrices // 2  # a rank's shard in fp32
    assert memory.optimizer - muon_memory.optimizer == 4 * matrices // 2
    assert muon_sent.shard - sent.shard == 2 * (2 * matrices // 2) // 2  # half of the shard in bf16, there and back


PIPELINE = ["--parallelism.pipeline_parallel_degree", "2", "--training.local_batch_size", "4"]


def test_the_ranks_of_a_pipeline(tmp_path, capsys):
    picture = tmp_path / "schedule.png"
    argv = [*LLAMA, "--model.n_layers", "8", *PIPELINE, "--training.global_batch_size", "16"]
    assert command.run([*argv, "--world-size", "8", "--json", "--plot-pipeline", str(picture)]) == 0
    assert picture.stat().st_size > 10_000
    found = json.loads(capsys.readouterr().out)
    first, last = found["pipeline"]["ranks"]
    block, vocabulary = (WEIGHTS - 2 * 32_000 * 2048 - 2048) // 4, 32_000 * 2048
    assert (first["parameters"], last["parameters"]) == (4 * block + vocabulary, 4 * block + vocabulary + 2048)
    assert (first["layers"], last["stages"]) == (["0", "1", "2", "3"], [1])
    assert (first["micro_batches_in_flight"], last["micro_batches_in_flight"]) == (2, 1)
    # The first stage has no head: it waits for the second.
    idle = found["pipeline"]["idle"]
    assert idle["1F1B"] == pytest.approx(idle["GPipe"])
    assert idle["1F1B"] > 1 / 5
    assert list(idle) == ["1F1B", "GPipe", "Interleaved1F1B", "ZBVZeroBubble"]
    memory = found["memory_per_rank"]
    assert sum(memory.values()) == max(first["memory"], last["memory"])
    assert memory["parameters"] == pytest.approx(4 * last["parameters"] / 4, rel=0.01)  # fp32, sharded over 4
    # The output of a stage in bfloat16, of 4 rows, one way.
    assert found["sent_per_rank_and_step"]["pipeline"] == 4 * 8192 * 2048 * 2
    assert command.run([*argv, "--world-size", "8"]) == 0
    text = capsys.readouterr().out
    assert "2 stages of 4, 4 layers on 2 ranks, 1F1B over 4 micro-batches of 1 row: " in text
    assert re.search(r"\n +1 +1 +4 to 7 +[\d,]+ +1 +[\d.]+ GiB", text)
    with pytest.raises(ConfigError, match=r"--plot-pipeline: the run has no pipeline"):
        command.run([*LLAMA, "--plot-pipeline", str(picture)])


def test_more_ranks_in_a_pipeline_need_less_memory():
    memory = [
        estimate(8, *PIPELINE, "--parallelism.pipeline_parallel_degree", degree)[1].total for degree in ("2", "4")
    ]
    assert memory == sorted(memory, reverse=True)
    by_schedule = [
        estimate(8, *PIPELINE, "--parallelism.pipeline_parallel_schedule", schedule)[1].activations
        for schedule in ("1F1B", "GPipe")
    ]
    assert by_schedule[1] > 1.5 * by_schedule[0]


ZBV = ["--parallelism.pipeline_parallel_schedule", "ZBVZeroBubble"]
BY_OP = ["--activation_checkpoint.mode", "selective", "--activation_checkpoint.selective_ac_option", "op"]
BY_OP += ["--compile.no_enable"]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--model.tie_embeddings", "True"], "model.tie_embeddings: not with pipeline parallelism"),
        (["--training.local_batch_size", "1"], "does not take 1 micro-batch .* training.local_batch_size to 2 or 3"),
        ([PIPELINE[0], "3"], "Change one degree: .*pipeline_parallel_degree 1 or 2 or 4 or 8"),
        ([*ZBV, "--compile.no_enable"], "needs parallelism.fsdp_reshard_after_forward = 'never'"),
        (ZBV, "compile.enable: not with parallelism.pipeline_parallel_schedule = 'ZBVZeroBubble'"),
        ([*ZBV, *BY_OP], "selective_ac_option = 'op': not with parallelism.pipeline_parallel_schedule"),
        ([PIPELINE[0], "1", *ZBV], "pipeline_parallel_schedule needs a pipeline_parallel_degree of 2 or more"),
    ],
)
def test_a_pipeline_that_cannot_be_is_refused(argv, words):
    with pytest.raises(ConfigError, match=words):
        plans.make_plan(config.load([*LLAMA, *PIPELINE, "--training.global_batch_size", "16", *argv]), 8)

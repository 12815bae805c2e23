"""The result does not depend on the layout: losses of 20 steps of a curriculum over documents, and gradients."""

import importlib.util
import shutil

import layouts
import pytest
import torch

from torchladder import models
from torchladder.distributed import context_parallel, mesh, parallelize
from torchladder.distributed.mesh import ParallelismConfig
from torchladder.distributed.parallelize import ParallelizeConfig
from torchladder.models import attention
from torchladder.models.attention.sdpa import SdpaKernel

CONFIG = models.LlamaConfig(dim=36, n_layers=2, n_heads=6, n_kv_heads=2, ffn_dim=51, vocab_size=67)
TIED = models.LlamaConfig(**{**vars(CONFIG), "tie_embeddings": True})
CAPPED = models.LlamaConfig(**{**vars(TIED), "logit_softcap": 1.5})
"""Also trained with a z-loss."""

REPLICATE = "--parallelism.data_parallel_replicate_degree"
CONTEXT = "--parallelism.context_parallel_degree"
TENSOR = "--parallelism.tensor_parallel_degree"
ROWS = "--training.local_batch_size"
PIPELINE, SCHEDULE = "--parallelism.pipeline_parallel_degree", "--parallelism.pipeline_parallel_schedule"
GATHERED_ONCE = ["--parallelism.fsdp_reshard_after_forward", "never"]
SAVING = ["--checkpoint.enable", "--checkpoint.interval", "10"]

TWO = {
    "FSDP2 on 2 ranks": [ROWS, "2"],
    "replicate on 2 ranks": [ROWS, "2", REPLICATE, "2"],
    "TP2": [TENSOR, "2"],
    "CP2": [CONTEXT, "2"],
}
FOUR = {
    "HSDP 2x2": [ROWS, "1", REPLICATE, "2"],
    "TP2 x FSDP2": [ROWS, "2", TENSOR, "2", *SAVING],
    "CP2 x FSDP2": [ROWS, "2", CONTEXT, "2"],
    "CP2 x TP2": [CONTEXT, "2", TENSOR, "2"],
}

RECOMPUTED = ["--activation_checkpoint.mode", "full"]
BY_OP = ["--activation_checkpoint.mode", "selective", "--activation_checkpoint.selective_ac_option", "op"]
COMPILED = ["--compile.enable", "--compile.backend", "aot_eager", "--compile.components", "model", "loss"]
FLOAT8 = ["--float8.enable", "--float8.emulate", "--training.steps", "3"]
GATHERED = ["--float8.enable_fsdp_float8_all_gather", "--float8.precompute_float8_dynamic_scale_for_fsdp"]
SLIDING = [
    *("--model.n_layers", "4", "--model.layer_types", "sliding_attention", "full_attention"),
    *("--attention.sliding_attention.masks", "document", "sliding", "--attention.sliding_attention.window", "40"),
    *("--model.layer_rope_theta", "sliding_attention", "100"),
    *("--model.attention_sinks", "sliding_attention"),
]
MIXED = {
    2: {
        "FSDP2, two types, compiled, by operation": [ROWS, "2", *SLIDING, *COMPILED, *BY_OP],
        "TP2, two types": [TENSOR, "2", *SLIDING],
        "CP2, two types, compiled": [CONTEXT, "2", *SLIDING, *COMPILED],
        "PP2, two types, compiled": [PIPELINE, "2", *SLIDING, *COMPILED, *BY_OP],
        "PP2 GPipe, two types": [
            PIPELINE,
            "2",
            SCHEDULE,
            "GPipe",
            ROWS,
            "2",
            "--training.global_batch_size",
            "4",
            *SLIDING,
        ],
        "PP2 interleaved, two types": [PIPELINE, "2", SCHEDULE, "Interleaved1F1B", *SLIDING],
        "PP2 ZBV, two types": [PIPELINE, "2", SCHEDULE, "ZBVZeroBubble", *GATHERED_ONCE, *RECOMPUTED, *SLIDING],
    },
    4: {
        "TP2 x FSDP2, two types": [ROWS, "2", TENSOR, "2", *SLIDING],
        "CP2 x TP2, two types": [CONTEXT, "2", TENSOR, "2", *SLIDING],
        "PP2 x FSDP2, two types": [PIPELINE, "2", ROWS, "2", *SLIDING],
        "PP2 interleaved x TP2, two types": [PIPELINE, "2", SCHEDULE, "Interleaved1F1B", TENSOR, "2", *SLIDING],
        "PP2 ZBV x FSDP2, two types": [PIPELINE, "2", SCHEDULE, "ZBVZeroBubble", *GATHERED_ONCE, ROWS, "2", *SLIDING],
        "PP2 x CP2, two types": [PIPELINE, "2", CONTEXT, "2", *SLIDING],
        "PP4, two types": [PIPELINE, "4", *SLIDING],
    },
}
WINDOW = ["--attention.sliding_attention.masks", "document", "sliding", "--attention.sliding_attention.window", "40"]
FAMILIES = {"Gemma 3": ["--model.name", "gemma3", *WINDOW], "OLMo 3": ["--model.name", "olmo3", *WINDOW]}
SPLIT = {f"TP2, compiled, {name}": [TENSOR, "2", *COMPILED, *argv] for name, argv in FAMILIES.items()}
SAME = {
    "every second block recomputed": [ROWS, "2", "--activation_checkpoint.mode", "selective"],
    "compiled, by operation": [ROWS, "2", *COMPILED, *BY_OP],
    "TP2, compiled, by operation": [TENSOR, "2", *COMPILED, *BY_OP],
    "CP2, compiled, by operation": [CONTEXT, "2", *COMPILED, *BY_OP],
}
ROUNDED = {
    "float8 tensorwise, gathered": [ROWS, "2", *FLOAT8, *GATHERED],
    "float8 rowwise": [ROWS, "2", *FLOAT8, "--float8.recipe_name", "rowwise"],
    "float8 tensorwise, TP2": [TENSOR, "2", *FLOAT8],
}
if not importlib.util.find_spec("torchao"):
    ROUNDED = {}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The runs of every layout, and of one rank."""
    folder = tmp_path_factory.mktemp("layouts")
    one = {"one": [], "one, two types": SLIDING, **{f"one, {name}": argv for name, argv in FAMILIES.items()}}
    for ranks, runs in ((1, one), (2, {**TWO, **SAME, **ROUNDED, **MIXED[2], **SPLIT}), (4, {**FOUR, **MIXED[4]})):
        layouts.launch(layouts.train, ranks, folder, runs)
    return folder


@pytest.mark.parametrize("layout", [*TWO, *FOUR, *MIXED[2], *MIXED[4], *SPLIT])
def test_the_losses_of_a_layout_are_those_of_one_rank(folder, layout):
    model = next((name for name in ("two types", *FAMILIES) if name in layout), "")
    reference = f"one, {model}" if model else "one"
    for key, first, later in (("loss", 1e-6, 1e-4), ("grad_norm", 1e-5, 1e-3)):
        one, many = (layouts.losses(folder / name, key) for name in (reference, layout))
        apart = {step: abs(many[step] / one[step] - 1) for step in one}
        print(f"| {layout} | {key} | {apart[1]:.1e} | {apart[20]:.1e} |")
        assert apart[1] <= first
        assert max(apart.values()) <= later


@pytest.mark.parametrize("how", SAME)
def test_activation_checkpointing_and_compiling_change_no_loss(folder, how):
    one, other = layouts.losses(folder / "one"), layouts.losses(folder / how)
    assert max(abs(other[step] / one[step] - 1) for step in one) <= 1e-5
    if "compiled" in how:  # one graph for all blocks and one or two for the loss: no window adds one
        assert int((folder / how / "graphs").read_text()) <= 3


@pytest.mark.parametrize("layout", [*MIXED[2], *MIXED[4]])
def test_layers_of_two_types_save_the_same_attention_in_every_layout(folder, layout):
    for key in ("attention_saved", "flops"):
        one, many = (layouts.losses(folder / name, key) for name in ("one, two types", layout))
        assert many == one
    if "compiled" in layout:  # a graph for each type of block, the loss in one or two
        assert int((folder / layout / "graphs").read_text()) <= 4


@pytest.mark.parametrize("how", ROUNDED)
def test_float8_changes_losses_a_little(folder, how):
    one, other = layouts.losses(folder / "one"), layouts.losses(folder / how)
    apart = [abs(other[step] / one[step] - 1) for step in other]
    assert len(apart) == 3
    assert 1e-6 < max(apart) < 2e-2


def test_a_tensor_parallel_checkpoint_resumes_on_one_rank(folder):
    shutil.copytree(folder / "TP2 x FSDP2", folder / "continued")
    layouts.launch(layouts.train, 1, folder, {"continued": [*SAVING, "--checkpoint.load_step", "10"]})
    one, other = layouts.losses(folder / "one"), layouts.losses(folder / "continued")
    assert list(other) == list(one)
    assert max(abs(other[step] / one[step] - 1) for step in one) <= 1e-4


# --- gradients -------------------------------------------------------------------------------------------------------


def rows(batch=4, length=16):
    """Returns rows with uneven labels: a single one in the first half of the batch, all in the second."""
    tokens = torch.randint(67, (batch, length), generator=torch.Generator().manual_seed(0))
    labels = tokens.roll(-1, dims=1).clone()
    labels[: batch // 2] = -100
    labels[0, 5] = 3
    return tokens, labels


def whole(config):
    model = models.Llama(config, seq_len=16)
    model.init_weights(0)
    tokens, labels = rows()
    loss, z_loss = losses_of(model, tokens, None, labels)
    loss.backward()
    return model, loss, z_loss


def losses_of(model, *batch):
    """Returns the loss and the z-loss in it, per label."""
    multiplier = 0.1 if model.config.logit_softcap else 0.0
    sums = model(*batch, z_loss_multiplier=multiplier)
    return [x / 33 for x in (sums if multiplier else (sums, sums.detach()))]


def parallelized(ranks, config, parallelism):
    """Returns the model on a layout, its mesh and its slice of rows."""
    found = mesh.build(mesh.degrees(parallelism, ranks.world_size), ranks.rank, "cpu")
    shard = context_parallel.ContextShard(found, seq_len=16)
    with torch.device("meta"):
        model = models.Llama(config, shard.wrap_attention(SdpaKernel.attention), seq_len=16)
        model.set_position_offset(shard.offset)
    parallelize.parallelize_model(
        model, model.parallel_plan(), found, ParallelizeConfig(parallelism), SdpaKernel.saved_ops
    )
    model.to_empty(device="cpu")
    model.init_weights(0)
    return model, found, shard


def compare(ranks, cases):
    tokens, labels = rows()
    kernel = attention.build_kernel("sdpa", ["causal"], "cpu")
    for config, settings in cases:
        one, *expected = whole(config)
        model, found, here = parallelized(ranks, config, ParallelismConfig(**settings))
        share = len(tokens) // found.degrees.dp
        mine = slice(found.dp_rank * share, (found.dp_rank + 1) * share)
        attn_mask = here.prepare_mask(kernel.prepare, torch.zeros(share, 16, dtype=torch.int32), torch.device("cpu"))
        loss, z_loss = losses_of(model, here(tokens[mine]), attn_mask, here(labels[mine]))
        loss.backward()
        for own, reference in zip((loss, z_loss), expected, strict=True):
            assert ranks.sum(own.item(), found.degrees.tp) == pytest.approx(reference.item(), rel=1e-6)
        assert sum(parameter.numel() for parameter in model.parameters()) == one.num_parameters()
        for (name, own), reference in zip(model.named_parameters(), one.parameters(), strict=True):
            assert torch.equal(own.full_tensor(), reference), f"{name} begins otherwise under {settings}"
            torch.testing.assert_close(own.grad.full_tensor(), reference.grad, atol=1e-6, rtol=1e-4)
        norm, reference = (torch.nn.utils.clip_grad_norm_(m.parameters(), 1.0) for m in (model, one))
        torch.testing.assert_close(norm.full_tensor(), reference)
        logits = one(tokens, None)
        torch.testing.assert_close(model(here(tokens[mine]), attn_mask), here(logits[mine]), atol=1e-5, rtol=1e-4)


def test_gradients_with_uneven_labels_uneven_shards_and_tied_weights_are_those_of_one_rank():
    tensor = {"tensor_parallel_degree": 2}
    off = {**tensor, "disable_loss_parallel": True}
    cases = [(config, settings) for config in (CONFIG, TIED) for settings in (tensor, off)]
    cases += [
        (CAPPED, tensor),
        (CAPPED, off),
        (CONFIG, {}),
        (TIED, {"data_parallel_replicate_degree": 2}),
        (CONFIG, {"context_parallel_degree": 4}),
    ]
    layouts.launch(compare, 4, [*cases, (TIED, {**tensor, "context_parallel_degree": 2})])


def test_gradients_of_eight_ranks_with_all_parallelisms_are_those_of_one_rank():
    every = {"tensor_parallel_degree": 2, "context_parallel_degree": 2, "data_parallel_replicate_degree": 2}
    layouts.launch(compare, 8, [(CONFIG, every), (TIED, {**every, "data_parallel_replicate_degree": 1})])

"""A pipeline against the whole model: gradients, losses, validation, probes, samples, checkpoints, Hugging Face."""

import shutil

import layouts
import pytest
import torch
from torch import nn

from torchladder import models
from torchladder.distributed import mesh, parallelize
from torchladder.distributed.mesh import ParallelismConfig
from torchladder.distributed.parallelize import ParallelizeConfig
from torchladder.distributed.pipeline import MicroBatch, Pipeline, clip_grad_norm_
from torchladder.distributed.pipeline_layout import STAGES_PER_RANK, pipeline_layout
from torchladder.registry import ConfigError

CONFIG = models.LlamaConfig(dim=32, n_layers=4, n_heads=4, n_kv_heads=2, ffn_dim=48, vocab_size=67)
ROWS = 8


def batch(length=16):
    """Returns rows with uneven labels: none in the first, a single one in the second, all in the others."""
    tokens = torch.randint(67, (ROWS, length), generator=torch.Generator().manual_seed(0))
    labels = tokens.roll(-1, dims=1).clone()
    labels[:2] = -100
    labels[1, 5] = 3
    return tokens, labels


def whole(max_norm=1e9):
    model = models.Llama(CONFIG, seq_len=16)
    model.init_weights(0)
    tokens, labels = batch()
    loss = model(tokens, None, labels) / 97
    loss.backward()
    return model, loss, nn.utils.clip_grad_norm_(model.parameters(), max_norm)


def pipeline(ranks, schedule):
    reshard = "never" if schedule == "ZBVZeroBubble" else "always"
    parallelism = ParallelismConfig(
        pipeline_parallel_degree=2, pipeline_parallel_schedule=schedule, fsdp_reshard_after_forward=reshard
    )
    found = mesh.build(mesh.degrees(parallelism, ranks.world_size), ranks.rank, "cpu")
    layout = pipeline_layout(parallelism, [str(number) for number in range(4)], ROWS)
    with torch.device("meta"):
        model = models.Llama(CONFIG, seq_len=16)
    model.keep_stage(*layout.part_of(found.pp_rank))
    arguments = model.parallel_plan(), found, ParallelizeConfig(parallelism), ()
    stages = parallelize.parallelize_model(model, *arguments, layout)
    parallelize.materialize(model, torch.device("cpu"), offload=False)
    model.init_weights(0)
    return model, Pipeline(layout, stages, found.pp_group, torch.device("cpu"), torch.float32, CONFIG.dim, 1), found


def compare(ranks):
    reference, loss, norm = whole()
    expected = dict(reference.named_parameters())
    tokens, labels = batch()
    micro_batches = [MicroBatch(tokens[i : i + 1], None, labels[i : i + 1]) for i in range(ROWS)]
    for schedule in STAGES_PER_RANK:
        model, running, found = pipeline(ranks, schedule)
        for repetition in range(2):  # accumulates, and the schedule is used again
            losses = running.forward_backward(micro_batches, lambda total: (total / 97, total.detach() / 97))
            assert len(losses) == (ROWS if running.is_last else 0)
            if running.is_last:
                assert losses[0] == 0
                assert float(sum(losses)) == pytest.approx(loss.item(), rel=1e-6)
            for name, parameter in model.named_parameters():
                gradient = parameter.grad.full_tensor() / (repetition + 1)
                assert torch.allclose(gradient, expected[name].grad, rtol=1e-4, atol=1e-7), (schedule, name)
        parameters = list(model.parameters())
        found_norm = clip_grad_norm_(parameters, 0.5, found.pp_group)
        assert found_norm.item() == pytest.approx(2 * norm.item(), rel=1e-5)
        assert clip_grad_norm_(parameters, 1e9, found.pp_group).item() == pytest.approx(0.5, rel=1e-4)

        for length in (16, 7):  # of any shape, and without a gradient
            outputs = running.forward([MicroBatch(tokens[:3, :length], None), MicroBatch(tokens[3:4, :length], None)])
            if running.is_last:
                logits = reference(tokens[:4, :length], None)
                assert torch.allclose(torch.cat(outputs), logits, atol=1e-5)
            shape = 1, length, 67
            logits = running.broadcast(outputs[1] if outputs else None, shape, torch.float32)
            assert torch.allclose(logits, reference(tokens[3:4, :length], None), atol=1e-5)
        assert all(hasattr(parameter, "full_tensor") for parameter in model.parameters())  # sharded again

        model.zero_grad()
        running.forward_backward(micro_batches, lambda total: (total * torch.nan, total))
        assert all(parameter.grad.full_tensor().isnan().any() for parameter in model.parameters())


def test_gradients_losses_and_logits_are_those_of_the_whole_model():
    layouts.launch(compare, 2)


def test_a_model_that_ties_its_embedding_or_has_no_stages_is_refused():
    tied = models.LlamaConfig(**{**vars(CONFIG), "tie_embeddings": True})
    with pytest.raises(ConfigError, match=r"model\.tie_embeddings: not with pipeline parallelism"):
        models.Llama(tied).keep_stage(["0"], first=True, last=False)

    class Plain(models.Model):
        forward = init_weights = parallel_plan = head_counts = flops = lambda self: None

    with pytest.raises(ConfigError, match=r"Plain does not implement keep_stage"):
        Plain().keep_stage(["0"], first=True, last=False)


# --- whole runs ------------------------------------------------------------------------------------------------------

PIPELINE, SCHEDULE = "--parallelism.pipeline_parallel_degree", "--parallelism.pipeline_parallel_schedule"
SAVING = ["--checkpoint.enable", "--checkpoint.interval", "4", "--checkpoint.last_save_in_hf"]
EVERYTHING = [
    *("--model.n_layers", "4", "--training.steps", "8", "--training.global_batch_size", "4", *SAVING),
    *("--validation.enable", "--validation.freq", "4", "--validation.probes", "copy", "--validation.windows", "64"),
    *(
        "--samples.prompts",
        "def f",
        "--samples.temperature",
        "0",
        "--samples.freq",
        "4",
        "--samples.max_new_tokens",
        "8",
    ),
    *("--ema.enable", "--ema.decay", "0.5", "--training.context_weight_exponent", "0.3"),
]
ACCUMULATED = [*EVERYTHING, PIPELINE, "2", "--training.local_batch_size", "2", "--validation.steps", "4"]
INTERLEAVED = [*EVERYTHING, PIPELINE, "2", SCHEDULE, "Interleaved1F1B"]
FROM_HF = ["--model.n_layers", "4", "--training.steps", "2", "--checkpoint.enable", "--checkpoint.initial_load_in_hf"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run on one rank, runs in a pipeline, and each continued at step 4 in another layout."""
    folder = tmp_path_factory.mktemp("pipeline")
    exported = ["--checkpoint.initial_load_path", str(folder / "one" / "checkpoint" / "step-8-hf")]
    layouts.launch(layouts.train, 1, folder, {"one": EVERYTHING, "one from HF": [*FROM_HF, *exported]})
    runs = {"PP2, accumulated": ACCUMULATED, "PP2 from HF": [*FROM_HF, *exported, PIPELINE, "2"]}
    layouts.launch(layouts.train, 2, folder, runs)
    for source, target in (
        ("PP2, accumulated", "again"),
        ("PP2, accumulated", "PP2 to one"),
        ("one", "one to PP2 interleaved"),
    ):
        shutil.copytree(folder / source, folder / target)
    newest = ["--checkpoint.load_step", "4"]
    layouts.launch(layouts.train, 1, folder, {"PP2 to one": [*EVERYTHING, *newest]})
    resumed = {"again": [*ACCUMULATED, *newest], "one to PP2 interleaved": [*INTERLEAVED, *newest]}
    layouts.launch(layouts.train, 2, folder, resumed)
    return folder


def measured(folder):
    """Returns what a run reported, without speeds and memory."""
    keys = ("loss", "grad_norm", "accuracy", "attention_saved", "flops", "lr")
    return [
        {key: value for key, value in line.items() if key == "step" or key.endswith(keys)}
        for line in layouts.lines(folder)
    ]


@pytest.mark.parametrize("run", ["PP2, accumulated", "PP2 to one", "one to PP2 interleaved"])
def test_a_run_in_a_pipeline_reports_what_one_rank_does(folder, run):
    one, other = measured(folder / "one"), measured(folder / run)
    assert {"validation_loss", "ema_validation_loss", "copy_accuracy"} <= {key for line in one for key in line}
    assert len(one) == len(other)
    for expected, found in zip(one, other, strict=True):
        assert found == pytest.approx(expected, rel=1e-5)
    assert (folder / run / "samples.txt").read_text() == (folder / "one" / "samples.txt").read_text()


def test_a_pipeline_resumes_bit_for_bit(folder):
    assert measured(folder / "again") == measured(folder / "PP2, accumulated")


def test_a_pipeline_exports_to_hugging_face_and_starts_from_it(folder):
    safetensors = pytest.importorskip("safetensors.torch")
    one, other = (
        safetensors.load_file(folder / run / "checkpoint" / "step-8-hf" / "model.safetensors")
        for run in ("one", "PP2, accumulated")
    )
    assert one.keys() == other.keys()
    assert all(torch.allclose(one[name], other[name], atol=1e-5) for name in one)
    assert layouts.losses(folder / "PP2 from HF") == pytest.approx(layouts.losses(folder / "one from HF"), rel=1e-6)

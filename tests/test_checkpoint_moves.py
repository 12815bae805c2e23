"""Runs that go on from a checkpoint: under another layout of four ranks, and on the same two, bit for bit.

All moves between five layouts, in a few minutes:

    python tests/test_checkpoint_moves.py
"""

import shutil
import tempfile
from dataclasses import replace
from itertools import permutations
from pathlib import Path

import layouts
import pytest
import torch
from torch.distributed.tensor import DTensor

from torchladder import config
from torchladder.distributed.mesh import ParallelismConfig
from torchladder.training import run_plan as plans
from torchladder.training.trainer import Trainer

RUN = [
    *layouts.CONFIG,
    *("--model.dim", "36", "--model.n_heads", "6", "--model.n_kv_heads", "2", "--model.n_layers", "1"),
    *("--model.ffn_dim", "51", "--model.vocab_size", "259", "--model.tie_embeddings", "True"),  # odd sizes
    *("--training.seq_len", "64", "--training.global_batch_size", "4", "--training.local_batch_size", "1"),
    *("--lr_scheduler.warmup_steps", "1", "--metrics.no_enable_tensorboard", "--checkpoint.enable"),
]
LAYOUTS = {
    "FSDP4": {},
    "HSDP 2x2": {"data_parallel_replicate_degree": 2},
    "TP2 x FSDP2": {"tensor_parallel_degree": 2},
    "CP2 x FSDP2": {"context_parallel_degree": 2},
    "CP2 x TP2": {"context_parallel_degree": 2, "tensor_parallel_degree": 2},
}
MOVES = [
    ("FSDP4", "TP2 x FSDP2"),
    ("TP2 x FSDP2", "HSDP 2x2"),
    ("FSDP4", "CP2 x FSDP2"),
    ("CP2 x FSDP2", "FSDP4"),
]
SAVED, STEPS = 2, 4


def trainer(ranks, folder, settings, **degrees):
    job = replace(settings.job, dump_folder=str(folder))
    settings = replace(settings, job=job, parallelism=ParallelismConfig(**degrees))
    return Trainer(plans.make_plan(settings, ranks.world_size), ranks)


def gathered(run):
    """Returns whole weights and optimizer state, by name."""
    found = {}
    for name, weight in run.model.named_parameters():
        for key, value in {"weight": weight, **run.optimizer.state[weight]}.items():
            found[f"{name} {key}"] = value.full_tensor() if isinstance(value, DTensor) else value.detach().clone()
    return found


def copy(ranks, step, source, target):
    """Gives a run one checkpoint of another."""
    if ranks.is_rank0:
        shutil.copytree(source / "checkpoint" / f"step-{step}", target / "checkpoint" / f"step-{step}")
    ranks.barrier()


def move(ranks, folder, moves):
    """Trains under each layout, then goes on under others from what it saved half-way."""
    argv = ["--training.steps", str(STEPS), "--validation.no_enable", "--checkpoint.interval", str(SAVED)]
    settings = config.load([*RUN, *argv])
    loads = replace(settings, checkpoint=replace(settings.checkpoint, load_only=True))
    for name in dict.fromkeys(name for name, _ in moves):
        run, kept = trainer(ranks, folder / name, settings, **LAYOUTS[name]), {}
        save = run.fault_tolerance.save

        def keep(state, blocking=False, run=run, kept=kept, save=save):
            kept[state.step] = gathered(run)
            save(state, blocking)

        run.fault_tolerance.save = keep
        run.train()
        for other in (other for one, other in moves if one == name):
            place = folder / f"{name} to {other}"
            copy(ranks, SAVED, folder / name, place)
            run = trainer(ranks, place, loads, **LAYOUTS[other])
            assert run.step == SAVED
            same(gathered(run), kept[SAVED])
            run.train()


def same(found, expected):
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(found[key], value), key


def apart(folder, one, other):
    """Returns how far the losses after a move are from those of the run that did not move."""
    expected, found = layouts.losses(folder / one), layouts.losses(folder / f"{one} to {other}")
    assert list(found) == list(range(SAVED + 1, STEPS + 1))
    return max(abs(found[step] / expected[step] - 1) for step in found)


@pytest.fixture(scope="module")
def moved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("moved")
    layouts.launch(move, 4, folder, MOVES)
    return folder


@pytest.mark.parametrize(("one", "other"), MOVES, ids=[" to ".join(names) for names in MOVES])
def test_a_run_moves_to_another_layout(moved, one, other):
    assert apart(moved, one, other) <= 1e-5


EVERYTHING = [
    *("--training.steps", "5", "--training.seq_len", "32", "--training.global_batch_size", "4"),
    *("--checkpoint.interval", "1", "--checkpoint.async_mode", "async", "--checkpoint.keep_latest_k", "0"),
    *("--phases", "{ from_step = 1, rope_theta = 5e3 }", "{ from_step = 3, window = 16, lr_factor = 0.5 }"),
    *("--validation.freq", "2", "--validation.steps", "1"),
    *("--samples.prompts", "import ", "--samples.freq", "2", "--samples.max_new_tokens", "2"),
]


def stay(ranks, folder):
    """Trains, then goes on from every step that was saved; the ends are equal in every bit."""
    settings = config.load([*RUN, *EVERYTHING])
    whole = trainer(ranks, folder / "whole", settings)
    whole.train()
    for step in range(1, 5):
        copy(ranks, step, folder / "whole", folder / str(step))
        run = trainer(ranks, folder / str(step), settings)
        assert run.step == step
        run.train()
        same(gathered(run), gathered(whole))


def test_two_ranks_go_on_bit_for_bit_from_every_step(tmp_path):
    layouts.launch(stay, 2, tmp_path)
    timed = {"tps", "seconds", "flops", "tokens", "mfu", "mfu_palm", "memory_gib"}
    told = {name: layouts.lines(tmp_path / name) for name in ("whole", "1", "2", "3", "4")}
    samples = {name: (tmp_path / name / "samples.txt").read_text().split("--- ") for name in told}
    assert [line["step"] for line in told["whole"] if "loss" in line] == [1, 2, 3, 4, 5]
    assert [line["step"] for line in told["whole"] if "loss" not in line] == [0, 2, 4, 5]
    assert [text.split("\n")[0] for text in samples["whole"]] == ["", "step 2", "step 4", "step 5"]
    for step in range(1, 5):
        later = [line for line in told["whole"] if line["step"] > step]
        for found, expected in zip(told[str(step)], later, strict=True):
            assert {key: found[key] for key in found.keys() - timed} == {
                key: expected[key] for key in expected.keys() - timed
            }
        assert samples[str(step)][1:] == samples["whole"][-len(samples[str(step)]) + 1 :]


if __name__ == "__main__":
    place = Path(tempfile.mkdtemp())
    every = list(permutations(LAYOUTS, 2))
    layouts.launch(move, 4, place, every)
    for pair in every:
        print(f"{' to '.join(pair):30} {apart(place, *pair):.1e}")
    shutil.rmtree(place)

"""A batch that changes during a run: every step's rows, against a slow reference that plays the run step by step."""

import math
import re
import shutil
from dataclasses import dataclass
from itertools import count
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import DEBUG, ROOT, lines, losses, run, start

from torchladder import config, data, train
from torchladder.batch_schedule import BatchSchedule, BatchSizeWarmup
from torchladder.data import SourceConfig
from torchladder.data.formats.indexed import IndexedWriter
from torchladder.data.mixing.source_history import SourceHistory
from torchladder.data.tokenizer import ByteTokenizer
from torchladder.optim import LRSchedulerConfig
from torchladder.registry import ConfigError
from torchladder.schedule import Phase, Schedule, change_batch
from torchladder.training.data_setup import build_loader
from torchladder.training.plan_report import summary_lines
from torchladder.training.run_plan import make_plan

STAGES = st.dictionaries(st.integers(1, 30), st.integers(1, 9), max_size=5)
SIZES = st.integers(1, 9)


def played(first, stages, steps=60):
    """The rows of each step, held until the next stage."""
    sizes = []
    for step in range(steps):
        first = stages.get(step, first)
        sizes.append(first)
    return sizes


# --- the rows of every step ------------------------------------------------------------------------------------------


@given(SIZES, STAGES, st.integers(0, 40), st.integers(0, 150))
def test_rows_are_counted_as_step_by_step(first, stages, step, rows):
    batch, sizes = BatchSchedule([(0, first), *sorted(stages.items())], seq_len=3), played(first, stages)
    assert [batch(at) for at in range(60)] == sizes
    assert batch.rows_before(step) == sum(sizes[:step])
    assert batch.tokens_before(step) == 3 * sum(sizes[:step])
    assert batch.rows_before(-2) == -2 * first
    before = [sum(sizes[:at]) for at in range(60)]
    if rows < before[-1]:
        assert batch.step_at(rows) == max(at for at in range(60) if before[at] <= rows)
        assert batch.steps_for(rows) == min(at for at in range(60) if before[at] >= rows)
        read = min(rows, before[-1] - before[step])
        assert batch.whole_steps(step, read) == max(x - before[step] for x in before[step:] if x - before[step] <= read)
    assert batch.sizes == sorted(set(sizes))
    assert batch.varies == (len(set(sizes)) > 1)


@given(SIZES, STAGES, st.integers(0, 30), SIZES)
def test_a_change_holds_from_its_step_on(first, stages, step, rows):
    batch = BatchSchedule([(0, first), *sorted(stages.items())]).changed(step, rows)
    assert [batch(at) for at in range(60)] == [*played(first, stages)[:step], *[rows] * (60 - step)]


@given(
    st.integers(1, 8), st.integers(1, 60), st.none() | st.integers(1, 20), st.integers(1, 400), st.booleans(),
    st.integers(1, 5),
)  # fmt: skip
def test_a_warmup_grows_as_megatron_counts_it(initial, more, increment, length, by_steps, seq_len):
    """The reference asks at every step which of the equal parts of the warmup has been reached."""
    target = initial + more
    length = {"steps": min(length, 50)} if by_steps else {"tokens": length}
    batch = BatchSizeWarmup(initial_batch_size=initial, increment=increment, **length).schedule(target, seq_len)
    sizes = [initial]
    while sizes[-1] < target:
        sizes.append(min(sizes[-1] + (increment or sizes[-1]), target))
    parts, rows = len(sizes) - 1, 0
    for step in range(80):
        passed = step if by_steps else rows * seq_len
        reached = min(passed * parts // next(iter(length.values())), parts)
        assert batch(step) == sizes[reached]
        rows += batch(step)


PHASES = st.dictionaries(st.integers(0, 59), SIZES, max_size=4)


@given(SIZES, PHASES, st.data())
def test_phases_in_tokens_count_the_batches_of_those_before(first, phases, draw):
    sizes = played(first, phases)
    made = []
    for step in sorted(phases):
        tokens = draw.draw(st.integers(10 * sum(sizes[: step - 1]) + 1, 10 * sum(sizes[:step])) if step else st.just(0))
        made.append(Phase(from_tokens=tokens, global_batch_size=phases[step], rope_theta=1e4))
    schedule = Schedule(lambda _: 8, lambda _: 1.0, made, 60, change_batch(BatchSchedule.constant(first, 10), made, 60))
    assert schedule.phase_steps == sorted(phases)
    assert [schedule(step).global_batch_size for step in range(60)] == sizes


def test_the_learning_rate_may_follow_the_batch():
    for scaling, factor in (("none", 1.0), ("sqrt", math.sqrt(2)), ("seesaw", 1 / math.sqrt(2))):
        assert LRSchedulerConfig(batch_size_scaling=scaling).batch_factor(2.0) == pytest.approx(factor)
        assert LRSchedulerConfig(batch_size_scaling=scaling).batch_factor(1.0) == 1.0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(increment=4), "batch_size_warmup.increment needs batch_size_warmup.initial_batch_size"),
        (dict(initial_batch_size=4), "exactly one of steps and tokens"),
        (dict(initial_batch_size=4, steps=3, tokens=3), "exactly one of steps and tokens"),
        (dict(initial_batch_size=0, steps=3), "batch_size_warmup.initial_batch_size = 0: must be 1 or more"),
        (dict(initial_batch_size=8, steps=3), "initial_batch_size = 8: must be below training.global_batch_size = 8"),
    ],
)
def test_a_warmup_that_cannot_be(settings, message):
    with pytest.raises(ConfigError, match=message):
        BatchSizeWarmup(**settings).schedule(8, 16)


# --- the data --------------------------------------------------------------------------------------------------------

DEFAULTS = {key: parameter.default for key, parameter in data.registry.parameters("rows").items()}
T = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two sources whose every token says which source and which token of it it is."""
    folder = tmp_path_factory.mktemp("sources")
    for source, name in enumerate("ab"):
        with IndexedWriter(folder / name, np.dtype(np.int32)) as writer:
            for at in range(0, 1600, 50):
                writer.add(np.arange(at, at + 50) + 10_000 * source)
    return folder


def load(folder, batch, **changes):
    facts = dict(seq_len=T, split="train", tokenizer=None, dp_rank=0, dp_degree=1, local_batch_size=1, steps=None)
    facts |= {"weight_changes": {}, "global_batch_size": 2 * 4, "batch_schedule": batch}
    facts |= {key: changes.pop(key) for key in list(changes) if key in facts}
    sources = [SourceConfig(path=f"{folder}/{name}.bin", label=name) for name in "ab"]
    base = {**DEFAULTS, "sources": sources, "cache_folder": str(folder / "cache"), "exclude": [], "domains": {}}
    return data.registry.build(SimpleNamespace(name="rows", **{**base, **changes}), **facts)


@given(
    SIZES, STAGES, st.sampled_from([(1, 1), (1, 4), (2, 1), (2, 2), (4, 1)]), st.integers(0, 12), st.integers(1, 4),
    st.lists(st.tuples(st.integers(0, 60), st.integers(0, 9)), max_size=2), st.dictionaries(
        st.integers(1, 12), st.sampled_from([[1.0, 3.0], [0.0, 1.0]]), max_size=2
    ),
)  # fmt: skip
@settings(max_examples=40)
def test_every_step_reads_the_rows_after_those_before_it(folder, first, stages, ranks, begin, more, skips, weights):
    """The reference reads row by row, and skips rows as it meets them; ranks begin at any step."""
    degree, local = ranks
    batch = BatchSchedule([(0, 4 * first), *((step, 4 * rows) for step, rows in sorted(stages.items()))])
    skips = [(row, row + length) for row, length in skips]
    options = {"skip_rows": skips, "weight_changes": dict(sorted(weights.items()))}
    one = load(folder, BatchSchedule.constant(1), weight_changes={
        batch.rows_before(step): given for step, given in options["weight_changes"].items()
    })  # fmt: skip
    kept = (row for row in count() if not any(low <= row <= high for low, high in skips))
    per_step = [[next(kept) for _ in range(batch(step))] for step in range(begin + more)]
    loaders = [
        load(folder, batch, dp_rank=rank, dp_degree=degree, local_batch_size=local, **options) for rank in range(degree)
    ]
    for step in range(begin, begin + more):
        for rank, loader in enumerate(loaders):
            if step == begin:
                loader.seek(per_step[begin][0], begin)
            assert loader.row == (per_step[step][0] if step == begin else max(per_step[step - 1]) + 1)
            share = batch(step) // degree
            read = [next(loader) for _ in range(share // local)]
            assert [row for part in read for row in part.rows] == per_step[step][rank * share : (rank + 1) * share]
            one.seek(per_step[step][rank * share])
            assert torch.equal(next(one).tokens[0], read[0].tokens[0])


def test_workers_are_replaced_in_the_middle_of_a_step(folder):
    batch = BatchSchedule([(0, 2), (2, 6)])
    loader, plain = (load(folder, batch) for _ in range(2))
    expected = [next(plain).rows for _ in range(16)]
    assert [next(loader).rows for _ in range(6)] == expected[:6]  # two of the six rows of step 2
    again = loader._restart_workers()
    loader._taken += 1
    assert [again.rows, *(next(loader).rows for _ in range(9))] == expected[6:]
    assert loader.row == 16


def test_sources_are_counted_by_the_rows_of_each_step(folder):
    batch = BatchSchedule([(0, 2), (10, 8), (20, 16)])
    loader = load(folder, batch, steps=30, weight_changes={15: [1.0, 3.0]})
    rows = [0, 2 * 10 + 8 * 5, 2 * 10 + 8 * 10 + 16 * 10]
    tokens = {(one.step, one.source): one.tokens for one in loader.usage()}
    assert tokens == {
        (0, "a"): rows[1] // 2 * T, (0, "b"): rows[1] // 2 * T,
        (15, "a"): (rows[2] - rows[1]) // 4 * T, (15, "b"): (rows[2] - rows[1]) * 3 // 4 * T,
    }  # fmt: skip
    assert any("from step 15: a 25.0%, b 75.0%" in line for line in loader.describe())
    assert any("a: 50.0% of the rows" in line and "an epoch every 400 rows" in line for line in loader.describe())
    assert loader.steps_for(1) == 39  # 260 rows in 30 steps, and the other 140 in 9
    with pytest.raises(ConfigError, match=r"the source a runs out at step 21 of 30"):
        load(folder, BatchSchedule([(0, 2), (10, 32)]), steps=30, repeat=False, weight_changes={})


def test_data_that_begins_at_a_step_counts_its_rows_from_there(folder):
    batch = BatchSchedule([(0, 2), (10, 8)])
    loader = load(folder, batch, first_step=8, steps=20)
    assert [next(loader).rows for _ in range(6)] == [(row,) for row in range(6)]
    assert sum(one.tokens for one in loader.usage()) == (2 * 2 + 8 * 10) * T
    current = loader.fingerprints()
    for step, row in ((8, 0), (9, 2), (10, 4), (12, 20)):
        SourceHistory({}, current, step, row, batch).check_first_step(moved=True)
    with pytest.raises(ConfigError, match=r"set data.first_step = 12 to begin at the first row, or 9 to continue at"):
        SourceHistory({}, current, 12, 18, batch).check_first_step(moved=True)


# --- plans -----------------------------------------------------------------------------------------------------------


def plan(*argv, ranks=1):
    return make_plan(config.load([*DEBUG, "--training.local_batch_size", "1", *argv]), ranks)


WARMUP = ["--training.global_batch_size", "8", "--batch_size_warmup.initial_batch_size", "2"]


def test_a_plan_counts_the_tokens_of_every_step():
    made = plan(*WARMUP, "--batch_size_warmup.steps", "4", "--phases", "{ from_step = 15, global_batch_size = 12 }")
    assert made.schedule.batch.stages == [(0, 2), (2, 4), (4, 8), (15, 12)]
    rows = 2 * 2 + 2 * 4 + 11 * 8 + 5 * 12
    assert made.num_tokens == rows * 256
    steps = [plan("--training.global_batch_size", str(made.schedule.batch(step))) for step in range(20)]
    assert made.flops_full_context == sum(one.flops_full_context // 20 for one in steps)
    assert "batch       rows: 2 from step 0, 4 from step 2, 8 from step 4, 12 from step 15" in summary_lines(made)
    plain = plan("--training.global_batch_size", "8")
    assert not [line for line in summary_lines(plain) if line.startswith("batch")]


def test_a_long_warmup_is_described_in_one_line():
    batch = BatchSizeWarmup(initial_batch_size=1, increment=1, steps=99).schedule(100, 8)
    assert str(batch).startswith("rows: 1 from step 0, 2 from step 1, 3 from step 2")
    assert str(batch).endswith("…, 100 from step 99")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--phases", "{ from_step = 3, global_batch_size = 7 }"],
         r"phases.global_batch_size = 7 is not a multiple of training.local_batch_size 1 x 2 data-parallel ranks = 2. "
         "Nearest: 6 or 8"),
        (["--batch_size_warmup.steps", "6", "--batch_size_warmup.increment", "3"],
         r"batch_size_warmup: the batch from step 3 on = 5 is not a multiple of .* Nearest: 4 or 6"),
        (["--batch_size_warmup.steps", "6", "--batch_size_warmup.initial_batch_size", "1"],
         r"batch_size_warmup.initial_batch_size = 1 is not a multiple of .* Nearest: 2 or 4"),
        (["--training.steps", "-1", "--training.epochs", "1",
          "--phases", "{ from_fraction = 0.5, global_batch_size = 16 }"],
         "set from_step or from_tokens, or training.steps"),
    ],
)  # fmt: skip
def test_batches_that_do_not_fit(argv, message):
    with pytest.raises(ConfigError, match=message):
        plan(*WARMUP, *([] if "warmup" in argv[0] else ["--batch_size_warmup.steps", "6"]), *argv, ranks=2)


# --- runs ------------------------------------------------------------------------------------------------------------

RAMP = [
    *("--training.steps", "7", "--training.seq_len", "64", "--training.local_batch_size", "1"),
    *(*WARMUP, "--batch_size_warmup.tokens", str(64 * 8), "--lr_scheduler.batch_size_scaling", "sqrt"),
    *(
        "--phases",
        "{ from_step = 5, global_batch_size = 4 }",
        "--validation.no_enable",
        "--curriculum.name",
        "constant",
    ),
    *("--checkpoint.enable", "--checkpoint.interval", "1", "--checkpoint.keep_latest_k", "0"),
    *("--lr_scheduler.warmup_steps", "0", "--lr_scheduler.decay_type", "constant"),
]
SIZES_OF_RAMP = [2, 2, 4, 8, 8, 4, 4]


@pytest.fixture(scope="module")
def ramp(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ramp")
    run(folder, *RAMP)
    return folder


def test_a_run_reports_the_batch_of_each_step(ramp):
    found = lines(ramp)
    assert [line["global_batch_size"] for line in found] == SIZES_OF_RAMP
    assert [line["tokens"] for line in found] == [64 * sum(SIZES_OF_RAMP[: step + 1]) for step in range(7)]
    assert [line["lr"] for line in found] == pytest.approx([8e-4 * math.sqrt(size / 8) for size in SIZES_OF_RAMP])
    assert (ramp / "ladder.png").exists()


@pytest.mark.parametrize("step", [1, 2, 3, 4, 5])
def test_a_run_resumes_across_a_change_bit_for_bit(ramp, tmp_path, step):
    shutil.copytree(ramp, tmp_path / "run")
    argv = [*RAMP, "--checkpoint.load_step", str(step), "--metrics.log_freq", "1"]
    assert [(x["loss"], x["tokens"]) for x in run(tmp_path / "run", *argv)] == [
        (x["loss"], x["tokens"]) for x in lines(ramp)
    ]


def test_two_ranks_read_what_one_does_and_resume_on_one(ramp, tmp_path):
    process = start(tmp_path, *RAMP, ranks=2)
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out[-3000:]
    assert losses(tmp_path) == pytest.approx(losses(ramp), rel=1e-5)
    again = run(tmp_path, *RAMP, "--checkpoint.load_step", "2", "--training.local_batch_size", "2")
    assert {line["step"]: line["loss"] for line in again} == pytest.approx(losses(ramp), rel=1e-5)
    assert [line["global_batch_size"] for line in again] == SIZES_OF_RAMP


def test_later_batches_may_change_and_earlier_ones_not(ramp, tmp_path, capsys):
    loading = ["--checkpoint.load_step", "4", "--checkpoint.load_only", "--job.dump_folder", str(ramp)]
    argv = [word for word in RAMP if "from_step" not in word and word != "--phases"]
    later = ["--phases", "{ from_step = 6, global_batch_size = 4 }"]
    assert train.main([*DEBUG, *argv, *later, *loading]) == 2
    said = capsys.readouterr().err
    assert "at step 5 the global batch size is 8, not 4" in said
    assert "To continue anyway: --checkpoint.accept_changes phases.global_batch_size" in said
    past = ["--phases", "{ from_step = 3, global_batch_size = 4 }"]
    assert train.main([*DEBUG, *argv, *past, *loading, "--checkpoint.accept_changes", "phases.global_batch_size"]) == 2
    said = capsys.readouterr().err
    assert "at step 3 the global batch size is 4, not 8; set it back, and let a phase with from_step = 4" in said
    assert "To continue" not in said
    warmup = ["--phases", "{ from_step = 5, global_batch_size = 4 }", "--batch_size_warmup.tokens", str(64 * 100)]
    assert train.main([*DEBUG, *argv, *warmup, *loading]) == 2
    assert "batch_size_warmup.tokens was 512, is 6400: at step 2 the global batch size is 2, not 4" in (
        capsys.readouterr().err
    )


def test_a_loader_that_reads_equal_steps_is_refused(monkeypatch):
    @dataclass
    class EqualSteps:
        global_batch_size: int

    monkeypatch.setitem(data.registry._components, "equal", EqualSteps)
    made = plan("--data.name", "equal", "--training.global_batch_size", "8")
    assert build_loader(made.config, made.batch, made.schedule).global_batch_size == 8
    made = plan("--data.name", "equal", *WARMUP, "--batch_size_warmup.steps", "4")
    with pytest.raises(ConfigError, match="'equal' reads the same number of rows in every step"):
        build_loader(made.config, made.batch, made.schedule, tokenizer=ByteTokenizer())


def test_the_batches_of_the_docs():
    """Megatron's numbers as a warmup, and Seesaw's doublings where a cosine would have halved the rate."""
    page = (ROOT / "docs" / "schedule.md").read_text()
    blocks = [block for block in re.findall(r"```toml\n(.*?)```", page, flags=re.DOTALL) if "batch_size" in block]
    warmup, seesaw = (config.load_text(block, "schedule.md") for block in blocks)
    assert [rows for _, rows in warmup.batch_schedule(64).stages] == [16, 32, 48, 64]
    schedule, steps = seesaw.schedule(128), seesaw.training.steps
    assert schedule.batch.tokens_before(steps - 1) < 100e9 <= schedule.batch.tokens_before(steps)
    for halvings, (first, rows) in enumerate(schedule.batch.stages):
        fraction = schedule.batch.tokens_before(first) / 100e9
        assert (1 + math.cos(math.pi * fraction)) / 2 == pytest.approx(2**-halvings, abs=1e-4)
        assert rows == 128 * 2**halvings
        if first:
            assert schedule(first).lr_factor == pytest.approx(2 ** (-halvings / 2))

"""Changes in the middle of a run: every source continues where it was, or the change is refused with the remedy."""

import json
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import DEBUG, losses, run

from torchladder import data, train
from torchladder.batch_schedule import BatchSchedule
from torchladder.data import SourceConfig
from torchladder.data.formats.indexed import IndexedWriter
from torchladder.data.mixing.interleave import PhasedInterleave
from torchladder.data.mixing.source_history import SourceHistory
from torchladder.registry import ConfigError

DEFAULTS = {key: parameter.default for key, parameter in data.registry.parameters("rows").items()}
T, G = 8, 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Sources whose every token says which source and which token of it it is."""
    folder = tmp_path_factory.mktemp("sources")
    for source, name in enumerate("abc"):
        with IndexedWriter(folder / name, np.dtype(np.int32)) as writer:
            for at in range(0, 1600, 50):
                writer.add(np.arange(at, at + 50) + 10_000 * source)
    return folder


def load(folder, weights=(1.0, 1.0), changes=None, steps=None, **other):
    sources = [
        SourceConfig(path=f"{folder}/{name}.bin", label=name, weight=weight)
        for name, weight in zip("abc", weights, strict=False)
    ]
    base = {**DEFAULTS, "sources": sources, "cache_folder": str(folder / "cache"), "exclude": [], "domains": {}}
    facts = {"seq_len": T, "split": "train", "tokenizer": None, "dp_rank": 0, "dp_degree": 1, "local_batch_size": G}
    facts |= {"global_batch_size": G, "steps": steps, "weight_changes": changes or {}}
    facts |= {key: other.pop(key) for key in list(other) if key in facts}
    return data.registry.build(SimpleNamespace(name="rows", **{**base, **other}), **facts)


def resume(old, new, step):
    """Continues ``new`` where ``old`` is after a step; returns its row."""
    row = new.resume_row(step, step * G - old.first_step * G, old.fingerprints(), moved=False)
    new.seek(row)
    return row


def read(loader, steps):
    return torch.cat([next(loader).tokens for _ in range(steps)])


WEIGHTS = st.lists(st.integers(0, 4), min_size=2, max_size=3).filter(any)
PHASES = st.dictionaries(st.integers(1, 9), WEIGHTS, max_size=2)


@given(WEIGHTS, PHASES, WEIGHTS, PHASES, st.integers(0, 10), st.booleans())
@settings(max_examples=100)
def test_a_change_that_is_accepted_loses_and_repeats_no_row(first, phases, later, more, step, same):
    """Against a slow count of what was read of each source."""
    if same:
        later, more = [*first, *[0] * (3 - len(first))], {**more, **phases}
        more = {at: weights for at, weights in more.items() if at in phases or at >= step}

    def build(weights, phases):
        phases = {at * G: [*of_phase, 0, 0][:3] for at, of_phase in sorted(phases.items())}
        interleave = PhasedInterleave([[*weights, 0, 0][:3], *phases.values()], [0, *phases])
        proportions = [", ".join(map(str, phase)) for phase in interleave.proportions]
        listed = [f"row {row}: {phase}" for row, phase in zip(phases, proportions[1:], strict=True)]
        prints = {"weights": proportions[0], "phases": "; ".join(listed), "sources": "x, y, z", "first_step": "0"}
        return interleave, prints | dict.fromkeys(("seed", "shuffle", "packing", "seq_len"), "")

    (before, saved), (after, current) = build(first, phases), build(later, more)
    row = step * G
    try:
        SourceHistory(saved, current, step, row, BatchSchedule.constant(G)).check("abc", after.counts(row), [1.0] * 3)
    except ConfigError:
        assert not same
        return
    seen = Counter()
    for at in range(row + 40):
        source, index = (before if at < row else after)(at)
        assert index == seen[source]
        seen[source] += 1


def test_other_weights_are_refused_with_the_phase_to_add(folder):
    """Without the phase, 18 rows of a source would be read twice, and 58 never."""
    old, new = load(folder), load(folder, (1.0, 4.0))
    take = read(old, 15)
    with pytest.raises(ConfigError, match=r"data\.weights has changed .* read, at 1/2, 1/2\.") as error:
        resume(old, new, 15)
    assert "from_step = 15\n    source_weights = [0.2, 0.8]" in str(error.value)
    assert "--data.first_step 15 --checkpoint.accept_changes data.weights data.first_step" in str(error.value)

    phased = load(folder, changes={15: [0.2, 0.8]}, steps=40)
    assert resume(old, phased, 15) == 60
    rows = torch.cat([take, read(phased, 25)])
    plain = load(folder, (1.0, 0.0001))  # the source alone, in its order
    of_first = [row for row in rows.tolist() if row[0] < 10_000]
    alone = [row for row in read(plain, 40).tolist() if row[0] < 10_000]
    assert of_first == alone[: len(of_first)]
    assert len(of_first) == 30 + 20


def test_a_source_is_added_at_the_end_and_read_from_a_phase_on(folder):
    old, new = load(folder), load(folder, (1.0, 1.0, 0.0), changes={5: [1, 1, 2]}, steps=40)
    assert resume(old, new, 5) == 20
    assert new.usage()[2].tokens == 0
    with pytest.raises(
        ConfigError, match=r"\[\[phases\]\]\n    from_step = 5\n    source_weights = \[0.25, 0.25, 0.5\]"
    ):
        resume(old, load(folder, (1.0, 1.0, 2.0)), 5)


def test_other_content_is_refused_once_it_has_been_read(folder):
    old = load(folder, (1.0, 0.0), changes={9: [1, 1]}, steps=40)
    swapped = load(folder, (1.0, 0.0), changes={9: [1, 1]}, steps=40)
    swapped._source_mix.corpora[1] = swapped._source_mix.corpora[0]
    assert resume(old, swapped, 9) == 36  # nothing of b has been read
    with pytest.raises(ConfigError, match=r"data\.sources: b has other content .*, after 2 of its rows"):
        resume(old, swapped, 10)


@pytest.mark.parametrize("change", [{"seed": 1}, {"shuffle": False}, {"packing": "pad"}, {"seq_len": 16}])
def test_another_order_is_refused_or_begins_at_a_step(folder, change):
    old, new = load(folder), load(folder, **change)
    with pytest.raises(ConfigError, match=f"data.{next(iter(change))} has changed .*--data.first_step 5 --checkpoint"):
        resume(old, new, 5)
    assert resume(old, new, 0) == 0
    assert resume(old, load(folder, first_step=5, **change), 5) == 0


def test_data_that_begins_at_a_step_is_planned_and_read_from_there(folder):
    settings = {"changes": {2: [3, 1], 6: [1, 3], 8: [0, 1]}, "steps": 12}
    late, fresh = (
        load(folder, first_step=5, **settings),
        load(folder, (3, 1), changes={1: [1, 3], 3: [0, 1]}, steps=7),
    )
    assert resume(load(folder, seed=3), late, 5) == 0
    assert torch.equal(read(late, 7), read(fresh, 7))
    assert [(one.step - 5, one.steps, one.source, one.tokens, one.epochs_before) for one in late.usage()] == [
        (one.step, one.steps, one.source, one.tokens, one.epochs_before) for one in fresh.usage()
    ]
    assert late.steps_for(2) == fresh.steps_for(2) + 5
    again = load(folder, first_step=5, **settings)
    assert resume(late, again, 7) == 2 * G
    assert torch.equal(read(again, 5), read(load(folder, first_step=5, **settings), 7)[2 * G :])


def test_data_that_begins_at_a_step_suffices_for_the_steps_from_there(folder):
    steps = 200 * 2 // G  # both sources of 200 rows, once
    load(folder, steps=30 + steps, first_step=30, repeat=False)
    with pytest.raises(ConfigError, match=f"runs out at step {30 + steps} of {31 + steps}"):
        load(folder, steps=31 + steps, first_step=30, repeat=False)
    with pytest.raises(ConfigError, match="runs out"):
        load(folder, steps=30 + steps, repeat=False)


@pytest.mark.parametrize(
    ("first_step", "step", "row", "words"),
    [
        (
            0,
            5,
            0,
            "first_step = 0, but step 5 reads row 0 of the data: set data.first_step = 5 to begin at the first row.",
        ),
        (5, 0, 0, "set data.first_step = 0 to begin at the first row."),
        (0, 3, 20, "set data.first_step = 3 to begin at the first row, or -2 to continue at row 20"),
        (0, 3, 22, "set data.first_step = 3 to begin at the first row."),
    ],
)
def test_step_and_row_fit_together(folder, first_step, step, row, words):
    loader = load(folder, first_step=first_step)
    with pytest.raises(ConfigError, match=words.replace("[", r"\[").replace(".", r"\.")):
        loader.resume_row(step, row, {}, moved=True)
    right = load(folder, first_step=step - row // G)
    if row % G == 0:
        assert right.resume_row(step, row, {}, moved=True) == row


def test_data_begins_before_the_run_ends(folder):
    with pytest.raises(ConfigError, match=r"data\.first_step = 9: the run has 9 steps"):
        load(folder, first_step=9, steps=9)


def text(path, words):
    path.write_text("\n".join(json.dumps({"text": f"{words} {i} " * 20}) for i in range(60)))
    return f'{{ path = "{path}", label = "{words}", repeat = false }}'


def test_a_run_switches_to_another_pack(tmp_path, capfd):
    """What is left of the run equals a run on the new pack alone; a restart continues in it."""
    one, two = text(tmp_path / "one.jsonl", "one"), text(tmp_path / "two.jsonl", "two")
    settings = ["--checkpoint.enable", "--checkpoint.interval", "1", "--validation.no_enable"]
    settings += ["--training.local_batch_size", "2", "--training.seq_len", "64", "--data.cache_folder", str(tmp_path)]
    run(tmp_path / "run", *settings, "--data.sources", one, "--training.steps", "2")
    swapped = [*settings, "--data.sources", two, "--training.steps", "4"]
    run(tmp_path / "run", *swapped, "--checkpoint.accept_changes", "data.sources", code=2)
    assert "add the new content as a source at the end of data.sources" in capfd.readouterr().err
    run(tmp_path / "run", *swapped, "--checkpoint.exclude_from_loading", "dataloader", code=2)
    assert "data.first_step = 0, but step 2 reads row 0 of the data: set data.first_step = 2" in capfd.readouterr().err
    accepted = [*swapped, "--data.first_step", "2", "--checkpoint.accept_changes", "data.sources", "data.first_step"]
    run(tmp_path / "run", *accepted)
    state = json.loads((tmp_path / "run" / "checkpoint" / "step-4" / "run.json").read_text())
    assert (state["row"], state["fingerprints"]["data.first_step"]) == (2 * 2, "2")

    before = losses(tmp_path / "run")
    run(tmp_path / "run", *swapped, "--data.first_step", "2", "--checkpoint.load_step", "3")
    assert losses(tmp_path / "run") == before
    assert train.main([*DEBUG, "--job.dump_folder", str(tmp_path / "new"), *accepted]) == 2
    assert "data.first_step = 2, but step 0 reads row 0 of the data" in capfd.readouterr().err

"""run.json: what is written is read back, and nothing else is taken for a run state."""

import hashlib
import json
import re
from dataclasses import fields
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from runs import run

from torchladder import checkpoint
from torchladder.checkpoint import RUN_STATE_FILE, RunState, step_folders
from torchladder.registry import ConfigError

COUNT = st.integers(0, 2**63)
TEXTS = st.dictionaries(st.text(), st.text(), max_size=3)
FLOAT = st.floats(allow_nan=False)
JSON = st.recursive(st.none() | st.booleans() | COUNT | FLOAT | st.text(), lambda one: st.lists(one, max_size=3))
STATES = st.builds(
    RunState,
    step=COUNT,
    row=COUNT,
    fingerprints=TEXTS,
    window=st.none() | COUNT,
    final_window=st.none() | COUNT,
    rope_theta=st.none() | FLOAT,
    post_step_pending=st.booleans(),
    validated_step=st.integers(-1, 2**63),
    bad_steps=st.dictionaries(st.text(), JSON, max_size=3),
    skipped_rows=st.lists(st.tuples(COUNT, COUNT), max_size=3),
    totals=st.dictionaries(st.text(), COUNT | FLOAT, max_size=3),
    excluded=st.lists(st.text(), max_size=3),
    versions=TEXTS,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("step-1")


@given(STATES)
def test_a_run_state_survives_json(folder, state):
    (folder / RUN_STATE_FILE).write_text(state.to_json())
    found = RunState.read(folder)
    assert found == state
    assert [type(getattr(found, one.name)) for one in fields(state)] == [
        type(getattr(state, one.name)) for one in fields(state)
    ]


def test_fields_with_defaults_may_be_missing(folder):
    (folder / RUN_STATE_FILE).write_text('{"step": 3, "row": 12}')
    assert RunState.read(folder) == RunState(step=3, row=12)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "EOF"),
        ("[1, 2]", "should be an object"),
        ('{"step": 3}', "row: Field required"),
        ('{"step": 3, "row": 1, "next_row": 4}', "next_row"),
        ('{"step": "three", "row": 1}', "step: "),
        ('{"step": 3, "row": 1.5}', "row: "),
        ('{"step": 3, "row": 1, "skipped_rows": [[1, 2, 3]]}', r"skipped_rows\.0"),
        ('{"step": 3, "row": 1, "pending": false, "fingerprints": {}}', "pending"),  # as versions before this one wrote
    ],
)
def test_another_schema_is_refused_with_the_name_of_the_file(folder, content, words):
    (folder / RUN_STATE_FILE).write_text(content)
    with pytest.raises(ConfigError, match=rf"{folder}/run\.json was written by another version .*{words}"):
        RunState.read(folder)


@given(STATES, st.sampled_from([one.name for one in fields(RunState)]), st.text(min_size=1))
def test_a_renamed_field_is_refused(folder, state, name, other):
    values = json.loads(state.to_json())
    if other in values:
        return
    values[other] = values.pop(name)
    (folder / RUN_STATE_FILE).write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=r"run\.json was written by another version"):
        RunState.read(folder)


def test_a_run_ends_with_a_message_when_its_run_state_is_of_another_version(tmp_path, capfd):
    settings = ["--checkpoint.enable", "--checkpoint.interval", "1", "--validation.no_enable"]
    run(tmp_path, *settings, "--training.steps", "1")
    path = tmp_path / "checkpoint" / "step-1"
    state = json.loads((path / RUN_STATE_FILE).read_text())
    (path / RUN_STATE_FILE).write_text(json.dumps({**state, "lifeline": {}}))
    names = step_folders.read_checksums(path)
    checkpoint.write_checksums(path, {name: hashlib.sha256((path / name).read_bytes()).hexdigest() for name in names})
    for steps in ("1", "2"):  # of a finished run, and of one that continues
        capfd.readouterr()
        run(tmp_path, *settings, "--training.steps", steps, code=2)
        said = capfd.readouterr().err
        assert f"{path}/run.json was written by another version of torchladder (lifeline" in said
        assert "checkpoint.initial_load_path" in said
        assert "Traceback" not in said
    run(tmp_path / "new", *settings, "--checkpoint.initial_load_path", str(path), "--training.steps", "1")


def test_the_docs_list_every_field():
    page = (Path(__file__).parents[1] / "docs" / "checkpoint.md").read_text()
    table = page[page.index("| key of `run.json`") :].split("\n\n")[0]
    listed = re.findall(r"`(\w+)`", " ".join(row.split("|")[1] for row in table.splitlines()[2:]))
    assert listed == [one.name for one in fields(RunState)]

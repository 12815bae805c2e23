"""torchladder inspect --row: what it shows is what the loader yields."""

import json
import re
from dataclasses import replace

import pytest
import torch

from tests.runs import DEBUG
from torchladder import commands, config
from torchladder.commands import inspect, inspect_row
from torchladder.data.dataloader import IGNORE_INDEX
from torchladder.data.formats.indexed import IndexedWriter
from torchladder.registry import ConfigError
from torchladder.training import data_setup
from torchladder.training.run_plan import make_plan

DOCUMENTS = ["one two three", "four", "five six", "seven eight nine ten", "end"]


@pytest.fixture
def settings(tmp_path):
    """Settings of a run over a few documents, each ended by the bytes tokenizer's eos token."""
    with IndexedWriter(tmp_path / "tokens", "uint16") as writer:
        for text in DOCUMENTS:
            writer.add([*text.encode(), 256])
    source = f'{{ path = "{tmp_path}/tokens.bin", label = "mine" }}'
    return [
        *DEBUG, "--data.sources", source, "--validation.no_enable", "--data.no_shuffle", "--training.seq_len", "32",
        "--training.local_batch_size", "2", "--training.global_batch_size", "4", "--training.steps", "5",
        "--job.dump_folder", str(tmp_path / "run"),
    ]  # fmt: skip


def shown(capsys, *argv):
    assert inspect.run([*argv, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("labels", ["labels_across_documents", "no_labels_across_documents"])
def test_rows_are_those_that_training_reads(settings, labels):
    made = make_plan(config.load([*settings, f"--data.{labels}", "--data.num_workers", "1"]))
    for packing in ("stream", "pad", "best_fit"):
        section = replace(made.config.data, packing=packing)
        plan = replace(made, config=replace(made.config, data=section))
        alone = replace(plan.config, data=replace(section, num_workers=0))
        loader = data_setup.build_loader(alone, plan.batch, plan.schedule)
        batches = [next(loader) for _ in range(6)]
        for row in range(12):
            view, batch = inspect_row.read_row(plan, None, row, "train"), batches[row // 2]
            assert view.tokens == batch.tokens[row % 2].tolist()
            assert view.labels == batch.labels[row % 2].tolist()
            assert view.starts == torch.nonzero(batch.positions[row % 2] == 0).flatten().tolist()
            assert (view.source, view.step, view.window) == ("mine", row // 4, plan.schedule.window(row // 4))


def test_documents_and_labels_are_named(settings, capsys):
    padded = [*settings, "--data.packing", "pad", "--data.no_labels_across_documents"]
    assert inspect.run(["--row", "0", *padded]) == 0
    said = capsys.readouterr().out
    assert said.startswith("row 0: from mine, read in step 0 (from 0) under a window of 8 tokens\n32 tokens, 25 labels")
    for line in (
        "0: 14 tokens, to 13, no label at 13",
        "one two three",
        "14: 5 tokens, to 18, no label at 18",
        "19: 9 tokens, to 27, no label at 27",
        "28: 4 padding, to 31, no label at 28-31",
    ):
        assert line in said
    view = shown(capsys, "--row", "0", *padded)
    assert view["texts"][1:3] == ["four", "five six"]
    assert view["labels"].count(IGNORE_INDEX) == 7


def test_a_long_document_is_shortened_and_ids_stand_for_text_without_a_tokenizer(monkeypatch, settings, capsys):
    monkeypatch.setattr(inspect_row, "MAX_SHOWN_TOKENS", 3)
    assert inspect.run(["--row=0", *settings]) == 0
    assert "one\n... 8 tokens ...\nee" in capsys.readouterr().out
    assert inspect.run(["--row", "0", *settings, "--tokenizer.name", "none", "--samples.prompts"]) == 0
    assert "111 110 101\n... 8 tokens ...\n101 101 256" in capsys.readouterr().out


def test_a_run_is_named_by_its_folder_and_skipped_rows_are_not_read(settings, capsys, tmp_path):
    settings = [*settings, "--data.skip_rows", "3", "4"]
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.toml").write_text(config.load(settings).to_toml())
    assert shown(capsys, str(tmp_path / "run"), "--row", "21")["step"] == 4
    plan = make_plan(config.load(settings))
    assert [inspect_row.read_row(plan, None, row, "train").step for row in (2, 5, 6, 9, 10)] == [0, 0, 1, 1, 2]
    for row, message in (
        (4, "--row 4: data.skip_rows leaves it out; the next one is 5."),
        (22, "--row 22: the run reads the rows 0 to 21 in 5 steps."),
        (-1, "--row -1: the run reads the rows 0 to 21"),
    ):
        with pytest.raises(ConfigError, match=re.escape(message)):
            inspect_row.read_row(plan, None, row, "train")
    assert commands.main(["inspect", str(tmp_path / "tokens"), "--row", "1"]) == 2
    assert "is neither the folder of one nor its config file" in capsys.readouterr().err


def test_validation_rows_end(settings, capsys):
    held_out = ["--validation.enable", "--data.validation_sources", settings[settings.index("--data.sources") + 1]]
    view = inspect_row.read_row(make_plan(config.load([*settings, *held_out])), None, 1, "validation")
    assert (view.step, view.window, len(view.tokens)) == (None, None, 32)
    assert commands.main(["inspect", "--row", "2", "--split", "validation", *settings, *held_out]) == 2
    assert "--row 2: the validation data has 2 rows, counted from 0." in capsys.readouterr().err

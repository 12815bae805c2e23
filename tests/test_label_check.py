"""Runs with nothing to learn from, or with nothing for a mask to do: they say so."""

import pytest
from runs import DEBUG, run

from torchladder import train
from torchladder.registry import ConfigError
from torchladder.training.label_check import LabelCheck

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")


def test_steps_without_labels_are_warned_of_once_and_end_the_run_at_a_report(caplog):
    check = LabelCheck(None, report_freq=3, steps=5, is_rank0=True)
    check(1, 0, 0)
    assert "step 1: no token of its rows, from row 0 on, has a label" in caplog.text
    caplog.clear()
    check(2, 4, 0)
    with pytest.raises(ConfigError, match=r"step 3: .*from row 8 on, has a label, and no earlier one had"):
        check(3, 8, 0)
    assert not caplog.text
    with pytest.raises(ConfigError, match="nothing to learn"):
        LabelCheck(None, report_freq=10, steps=5, is_rank0=True)(5, 16, 0)

    check = LabelCheck(None, report_freq=3, steps=9, is_rank0=True)
    check(1, 0, 7)
    for step in range(2, 10):
        check(step, 4 * step, 0)
    assert "step 2: no token of its rows, from row 8 on" in caplog.text


@pytest.fixture
def rows(tmp_path):
    """Writes rows of 32 tokens, which end a document at every 10th token; returns settings that train on them."""

    def rows(labels=None):
        tokens = [[256 if i % 10 == 9 else 32 + (i + row) % 90 for i in range(32)] for row in range(40)]
        columns = {"input_ids": tokens} | ({"labels": [[labels] * 32] * 40} if labels else {})
        parquet.write_table(pyarrow.table(columns), tmp_path / "rows.parquet")
        settings = ["--training.seq_len", "32", "--training.steps", "2", "--validation.no_enable"]
        return [*settings, "--data.cache_folder", str(tmp_path / "cache"), "--data.sources"]

    return rows


def test_data_whose_labels_are_all_masked_is_an_error(rows, tmp_path, capsys):
    settings = [*rows(labels=-100), f'{{ path = "{tmp_path}/rows.parquet", label = "math" }}']
    assert train.main([*DEBUG, "--job.dump_folder", str(tmp_path / "run"), *settings]) == 2
    shown = capsys.readouterr()
    assert "step 1: no token of its rows, from row 0 (of the source math) on, has a label" in shown.err
    validation = ["--validation.enable", "--data.validation_sources", f'{{ path = "{tmp_path}/rows.parquet" }}']
    assert train.main([*DEBUG, "--job.dump_folder", str(tmp_path / "run"), *settings, *validation]) == 2
    assert "no row of the validation data has a label" in capsys.readouterr().err


def test_document_masks_without_documents_are_warned_of(rows, tmp_path, capsys):
    settings = rows()
    run(tmp_path / "run", *settings, f'{{ path = "{tmp_path}/rows.parquet", label = "math" }}')
    shown = capsys.readouterr().out
    assert "begin inside 0% of the rows of math" in shown
    assert "'document' changes nothing in math" in shown
    assert "documents_by_eos = true" in shown
    run(tmp_path / "divided", *settings, f'{{ path = "{tmp_path}/rows.parquet", documents_by_eos = true }}')
    shown = capsys.readouterr().out
    assert "begin inside 100% of the rows" in shown
    assert "changes nothing" not in shown

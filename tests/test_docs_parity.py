"""The pages for users of ALLaM and TildeOpen: their commands in order, and the settings."""

import json
import re
import shlex

import numpy as np
import pytest

from tests.test_docs import ROOT
from tests.test_docs import commands as shown
from torchladder import commands, config
from torchladder.data.formats.indexed import IndexedTokens, IndexedWriter
from torchladder.registry import ConfigError
from torchladder.training.run_plan import make_plan


def page(name, folder, monkeypatch):
    """Writes the page's run.toml to a folder and returns the words of its commands."""
    path = ROOT / "docs" / name
    (folder / "run.toml").write_text(re.search(r"```toml\n(# run.toml.*?)```", path.read_text(), re.S)[1])
    monkeypatch.chdir(folder)
    return [shlex.split(command)[1:] for command in shown(path)]


def test_the_page_for_allam(tmp_path, monkeypatch, capsys):
    words = page("allam.md", tmp_path, monkeypatch)
    (tmp_path / "jsonl").mkdir()
    names = [f"{language}_{domain}_split_00" for language in ("en", "ar") for domain in ("books", "web")]
    for name in names:
        (tmp_path / "jsonl" / f"{name}.jsonl").write_text(f"{json.dumps({'text': 'words ' * 10})}\n" * 5)
    files = {
        "data": [f"{name}.bin" for name in names],
        "data_ratio": {"en": {"books": 2, "web": 1}, "ar": {"books": 3, "web": 1}},
        "lang_prob": {"en": 0.6, "ar": 0.4},
        "exclude_iterator": {"exclude_iterator_name": ["ar_web_split_00.bin"]},
    }
    for name, content in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    for command in words:
        assert commands.main(command) == 0, command
    said = capsys.readouterr()
    assert "0.400000    en_books_split_00: 305 tokens, 400,000 of 1,000,000 read" in said.err
    assert "ar_books_split_00" in said.out
    assert config.load_file(tmp_path / "run.toml").data.sources[0].split == "80,20,0"


def test_the_page_for_tildeopen(tmp_path, monkeypatch, capsys):
    words = page("tildeopen.md", tmp_path, monkeypatch)
    tokens = (31_790 - 2_000) * 8  # rows of 8 tokens, one a step
    for name in ("arxiv", "wiki"):
        with IndexedWriter(tmp_path / "slices" / name, np.dtype(np.int32)) as writer:
            for _ in range(10):
                writer.add(np.arange(tokens // 20 - 1))
    small = ["--model.flavor", "debug", "--model.vocab_size", "16384", "--training.seq_len", "8"]
    small += ["--training.local_batch_size", "1", "--training.global_batch_size", "1"]
    for command in words:
        assert commands.main([*command, *(small if "run.toml" in command else [])]) == 0, command
    assert IndexedTokens("packs/U1_1").num_tokens == tokens
    assert (tmp_path / "job-then.sbatch").exists()
    with pytest.raises(ConfigError, match="runs out at step 31,7"):
        make_plan(config.load(["--job.config_file", "run.toml", *small, "--training.steps", "31800"]))


def test_the_schedule_of_tilde_30b():
    loaded = config.load_file(ROOT / "train_configs" / "tilde_30b.toml")
    schedule = loaded.schedule(loaded.training.global_batch_size)
    peak = loaded.optimizer.lr
    steps = (1_999, 2_000, 339_085, 339_086, 423_857)
    rates = [peak * schedule(step).lr_factor for step in steps]
    assert rates == pytest.approx([1.8e-4, 1.6e-4, 1.6e-4, 1.6e-4, 8e-6], rel=1e-3)
    assert [schedule(step).max_norm for step in (0, 1_999, 2_000, 423_857)] == [0.4, 0.4, 0.5, 0.5]
    assert schedule(31_790).source_weights == {"U1": 0, "N": 1, "U3": 0}

"""The page for people who come from TeenyTinyLlama: its example, its settings and its two configs."""

import re
import shlex
import sys

import pytest

from tests.test_docs import ROOT
from tests.test_docs import commands as shown
from torchladder import commands, config, train
from torchladder.metrics import read_jsonl
from torchladder.training.run_plan import make_plan

PAGE = ROOT / "docs" / "teenytinyllama.md"
SHORT = [
    *("--training.steps", "2", "--training.seq_len", "32", "--training.mixed_precision_param", "float32"),
    *("--model.flavor", "debug", "--model.vocab_size", "300", "--compile.no_enable", "--samples.max_new_tokens", "2"),
    *("--metrics.energy_country", "", "--data.cache_folder", "cache"),
]


def test_the_example_leads_from_text_to_a_repository(tmp_path, monkeypatch, capsys):
    hub, uploads = pytest.importorskip("huggingface_hub"), []
    pytest.importorskip("safetensors")
    monkeypatch.setattr(hub.HfApi, "create_repo", lambda *_, **__: hub.RepoUrl("https://huggingface.co/me/teeny"))
    monkeypatch.setattr(hub.HfApi, "upload_folder", lambda _, **words: uploads.append(words))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train_configs").symlink_to(ROOT / "train_configs")
    (tmp_path / "corpus" / "pt").mkdir(parents=True)
    words = "era uma vez um modelo muito pequeno que lia português"
    for name, count in (("pt/a", 300), ("test", 3)):
        lines = (f'{{"text": "{words[i % 20 :]} {i}"}}\n' for i in range(count))
        (tmp_path / "corpus" / f"{name}.jsonl").write_text("".join(lines))
    (tmp_path / "run.toml").write_text(re.search(r"```toml\n(# run.toml.*?)```", PAGE.read_text(), re.S)[1])
    for command in shown(PAGE):
        command = command.replace("32000", "300").replace("0.01", "0.2").replace("458000", "2")
        words = shlex.split(command)
        if words[1] == "train":
            assert train.main([*words[2:], *SHORT]) == 0
            continue
        monkeypatch.setattr(sys, "argv", words)
        assert commands.main() == 0, command
    assert "perplexity" in capsys.readouterr().out
    assert [(words["repo_id"], str(words["folder_path"])) for words in uploads] == [("me/teeny", "models/teeny")]
    assert [line["step"] for line in read_jsonl(tmp_path / "outputs/teeny/metrics.jsonl")] == [0, 1, 2, 2]


@pytest.mark.parametrize(("name", "parameters", "tokens"), [("160m", 162_417_408, 3.8e9), ("460m", 468_239_360, 9.8e9)])
def test_the_configs_are_its_runs(name, parameters, tokens):
    settings = config.load_file(ROOT / "train_configs" / f"teenytinyllama_{name}.toml")
    short = config.load(
        ["--job.config_file", str(ROOT / "train_configs" / f"teenytinyllama_{name}.toml"), "--training.steps", "2"]
    )
    plan = make_plan(short)
    assert plan.num_parameters == parameters
    assert plan.tokens_per_step == 8192
    assert plan.tokens_per_step * settings.training.steps == pytest.approx(tokens, rel=0.02)
    optimizer, scheduler = settings.optimizer, settings.lr_scheduler
    assert (optimizer.lr, optimizer.beta1, optimizer.beta2, optimizer.eps) == (6e-4, 0.9, 0.999, 1e-8)
    assert (optimizer.weight_decay, scheduler.warmup_steps, scheduler.min_lr_factor) == (0.01, 10_000, 0.0)


def test_every_key_that_the_page_names_is_a_setting():
    settings = config.load_file(ROOT / "train_configs" / "debug.toml")
    rows = [cell for line in PAGE.read_text().splitlines() if line.startswith("|") for cell in line.split("|")[2:3]]
    keys = {key for cell in rows for key in re.findall(r"`([a-z_]+\.[a-z_]+)(?: =|`)", cell)}
    assert len(keys) > 30
    for key in keys - {"tokenizer.path"}:  # of the tokenizers that have a file
        section, name = key.split(".")
        assert hasattr(getattr(settings, section), name), key

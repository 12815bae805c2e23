"""The commands and the plugin that README and docs show, run as they stand there."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from torchladder import config, train
from torchladder.commands import main
from torchladder.training.run_plan import make_plan

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

# Long trainings are cut short, and what a page's reader would have prepared is replaced by what every machine has.
SHORT = [
    *("--training.steps", "2", "--training.seq_len", "64", "--validation.steps", "1", "--metrics.log_freq", "1"),
    *("--training.local_batch_size", "1", "--training.global_batch_size", "-1", "--lr_scheduler.warmup_steps", "1"),
    *("--model.flavor", "debug", "--model.vocab_size", "512", "--compile.no_enable", "--checkpoint.no_enable"),
    *("--model.dim", "32", "--model.n_layers", "1", "--model.ffn_dim", "32"),
    *("--tokenizer.name", "bytes", "--samples.max_new_tokens", "4", "--curriculum.name", "constant"),
    *("--data.sources", '{ name = "python-stdlib" }', "--data.validation_sources", "--attention.masks", "chunk"),
    *("--training.mixed_precision_param", "float32"),
]


def commands(page: Path) -> list[str]:
    """Returns the shell commands of a page: its ``sh`` blocks, line by line, continued lines joined."""
    blocks = re.findall(r"```sh\n(.*?)```", page.read_text(), flags=re.DOTALL)
    joined = "\n".join(blocks).replace("\\\n", " ")
    return [line.split("  #")[0].strip() for line in joined.splitlines() if line.strip() and not line.startswith("#")]


# What lies on a reader's disk is tested in test_docs_data.py.
SHOWN = [(page.name, command) for page in PAGES for command in commands(page) if "run.toml" not in command]


def test_the_readme_shows_its_two_commands():
    shown = commands(ROOT / "README.md")
    assert "./run_train.sh --job.config_file train_configs/quickstart.toml" in shown
    assert "./tests/run.sh" in shown


def test_the_quick_start_starts(tmp_path):
    """Through the script, in a process of its own."""
    words = next(shlex.split(command) for command in commands(ROOT / "README.md") if "quickstart" in command)
    result = subprocess.run(
        [*words, *SHORT, "--job.dump_folder", str(tmp_path)], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "NGPU": "1", "PYTHON": sys.executable},
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    assert (tmp_path / "ladder.png").exists()


@pytest.mark.parametrize(("page", "command"), [one for one in SHOWN if "run_train.sh" in one[1]])
def test_trainings_start(page, command, tmp_path, monkeypatch):
    """In this process, with what the script passes on."""
    monkeypatch.chdir(ROOT)
    words = shlex.split(command)
    script = words.index("./run_train.sh")
    assert all("=" in word for word in words[:script])
    assert train.main([*words[script + 1 :], *SHORT, "--job.dump_folder", str(tmp_path)]) == 0
    assert (tmp_path / "ladder.png").exists()


@pytest.mark.parametrize(("page", "command"), [one for one in SHOWN if one[1].startswith("torchladder plan")])
def test_plans_are_made(page, command, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert main(shlex.split(command)[1:]) == 0, capsys.readouterr().err


@pytest.mark.parametrize(
    "recipe", re.findall(r"```toml\n(.*?)```", (ROOT / "docs" / "recipes.md").read_text(), flags=re.DOTALL)
)
def test_recipes_make_plans(recipe):
    assert make_plan(config.load_text(recipe, "recipes.md")).num_parameters


def test_links_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_plugin_of_the_readme_works(tmp_path):
    text = (ROOT / "README.md").read_text()
    code = re.search(r"```python\n(# my_curriculum\.py\n.*?)```", text, flags=re.DOTALL)[1]
    toml = re.search(r"```toml\n(\[job\]\nplugins.*?)```", text, flags=re.DOTALL)[1]
    assert len([line for line in code.splitlines() if line.strip()]) <= 14
    (tmp_path / "my_curriculum.py").write_text(code)
    (tmp_path / "run.toml").write_text(f'{toml}\n[training]\nseq_len = 8192\n[attention]\nmasks = ["chunk"]\n')
    result = subprocess.run(
        [sys.executable, "-m", "torchladder", "plan", "--job.config_file", str(tmp_path / "run.toml"),
         "--curriculum.steps_per_stair", "500", "--at", "0,499,500,1000", "--json"],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert '"windows": {"0": 512, "499": 512, "500": 2048, "1000": 8192}' in result.stdout

"""Wrong inputs of every command: one message, exit code 2, and nothing written."""

import json
import platform
from pathlib import Path

import numpy as np
import pytest
import torch

from torchladder import __version__, commands, config, train
from torchladder.data.formats.indexed import IndexedWriter

DEBUG = f"--job.config_file {Path(__file__).parents[1] / 'train_configs' / 'debug.toml'}"


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working folder with an empty file and folder, a text, broken files, and a token file without its index."""
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    for name, content in (("empty", b""), ("empty.jsonl", b""), ("a.txt", b"some text " * 50), ("bad.toml", b"a = [")):
        Path(name).write_bytes(content)
    Path("latin1.toml").write_bytes(b"[job]\ndescription = '\xe9'\n")
    Path("alone.bin").write_bytes(b"\0\1" * 10)
    Path("ids.json").write_text(json.dumps({"vocab": 3}))
    with IndexedWriter(Path("tokens"), np.dtype(np.uint16)) as writer:
        writer.add(np.arange(20))
    return tmp_path


def call(words):
    """Returns the exit code of a command in this process."""
    name, *argv = words
    try:
        return train.main(argv) if name == "train" else commands.main(words)
    except SystemExit as end:
        return end.code


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("train --job.config_file missing.toml", "unknown config file 'missing.toml'"),
        ("train", "no settings. A first run: --job.config_file train_configs/quickstart.toml"),
        (
            "train my.toml",
            "unexpected 'my.toml'. A config file is named by --job.config_file my.toml",
        ),
        ("train DEBUG other.toml", "--job.config_file takes one file, not"),
        ("plan", "no settings. A first run: --job.config_file"),
        ("train --job.config_file folder", "folder: [Errno 21] Is a directory"),
        ("train --job.config_file bad.toml", "bad.toml: Invalid value"),
        ("train --job.config_file latin1.toml", "latin1.toml: byte 21 is not UTF-8: save the file as UTF-8"),
        ("train DEBUG --training.steps 0", "training.steps = 0: must be 1 or more"),
        ("train DEBUG --training.seq_len -1", "training.seq_len = -1: must be 1 or more"),
        ("train DEBUG --model.dim 0", "model.dim = 0: must be 1 or more"),
        ("train DEBUG --model.name lama", "unknown model 'lama'. Did you mean 'llama'?"),
        ("train DEBUG --compile.backend induktor", "unknown backend 'induktor' in compile.backend. Did you"),
        ("train DEBUG --job.plugins nope", "plugin 'nope' is not on the Python path"),
        ("train DEBUG --job.dump_folder empty", "job.dump_folder = 'empty': empty is a file"),
        ("train DEBUG --job.dump_folder empty/run", "empty is a file"),
        ("train DEBUG --validation.windows 999", "validation.windows = 999: a row has 256 tokens"),
        ("train DEBUG --data.num_workers -1", "data.num_workers = -1: must be 0 or more"),
        ("train DEBUG --data.sources {path='empty.jsonl'}", "the source empty.jsonl has 0 tokens"),
        ("train DEBUG --data.sources {path='folder'}", "'folder' matches no text file"),
        ("train DEBUG --data.sources {path='alone.bin'} --validation.no_enable", "alone.idx is missing"),
        ("train DEBUG --tokenizer.name huggingface --tokenizer.path empty", "empty is not JSON"),
        ("train DEBUG --model.hf_assets_path a.txt", "'a.txt' is not a Hugging Face folder"),
        ("train DEBUG --checkpoint.enable --checkpoint.folder no://x", "Protocol not known: no"),
        ("plan DEBUG --world-size 0", "--world-size 0: must be 1 or more"),
        ("plan DEBUG --gpu-memory much", "--gpu-memory much: must be a number with GiB"),
        ("plan DEBUG --at -1", "--at -1: the run has the steps 0 to 19"),
        ("plan DEBUG --plot folder", "the file name must end in .png"),
        ("prepare --input missing --output o --tokenizer bytes", "no file matches 'missing'"),
        ("prepare --input a.txt --output empty/x --tokenizer bytes", "the output folder empty cannot be written"),
        ("prepare --input a.txt --output o --tokenizer bytes --part-bytes 0", "--part-bytes 0: must be 1 or more"),
        ("tokenizer train --input empty.jsonl --output t --vocab-size 300", "there is no text to train"),
        ("tokenizer train --input a.txt --output t --vocab-size -5", "--vocab-size -5: must be 1 or more"),
        ("inspect folder", "folder.bin is missing"),
        ("inspect tokens --document 9", "--document 9: the dataset has 1 documents"),
        ("merge out alone.bin", "alone.idx is missing"),
        ("merge empty/out tokens", "empty: a file is where a folder should be"),
        ("convert from-hf missing --output o", "'missing' is not a Hugging Face folder"),
        ("convert to-hf folder --output o", "'folder' is not a complete checkpoint"),
        ("convert to-hf folder --output o --seq-len 0", "--seq-len 0: must be 1 or more"),
        ("generate --checkpoint empty --prompt x", "'empty' is neither a complete checkpoint"),
        ("generate --checkpoint empty --prompt x --top-p 2", "top_p = 2.0: must be above 0 and at most 1"),
        ("evaluate folder --files a.txt", "'folder' is not a run with a complete checkpoint"),
        ("slurm DEBUG --nodes 0", "--nodes 0: must be 1 or more"),
        ("slurm DEBUG --checkpoint.enable --output folder", "folder: a folder is where a file should be"),
        ("report missing", "missing: no such file; a run writes"),
        ("report", "the following arguments are required"),
        ("prepar", "unknown command 'prepar'. Did you mean 'prepare'?"),
    ],
)
def test_a_wrong_input_is_named(here, capsys, line, message):
    before = sorted(here.rglob("*"))
    assert call([word.replace("'", '"') for word in line.replace("DEBUG", DEBUG).split()]) == 2
    said = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert message.replace("'", '"') in said.replace("'", '"')
    assert "Traceback" not in said
    assert sorted(here.rglob("*")) == before


def test_the_version(capsys):
    assert commands.main(["--version"]) == 0
    assert (
        capsys.readouterr().out
        == f"torchladder {__version__}, torch {torch.__version__}, Python {platform.python_version()}\n"
    )


@pytest.mark.parametrize(
    ("words", "enabled"),
    [
        ("--checkpoint.enable", True),
        ("--checkpoint.enable true", True),
        ("--checkpoint.enable=True", True),
        ("--checkpoint.enable false", False),
        ("--checkpoint.enable=false", False),
        ("--checkpoint.no-enable", False),
        ("--data.repeat false --checkpoint.enable true", True),
    ],
)
def test_a_flag_may_have_a_value(words, enabled):
    loaded = config.load([*DEBUG.split(), *words.split()])
    assert loaded.checkpoint.enable is enabled
    assert loaded.data.repeat is ("--data.repeat" not in words)

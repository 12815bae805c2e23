"""Wrong inputs of every command: one message, exit code 2, and nothing written."""

import json
import platform
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from torchladder import __version__, commands, config, train
from torchladder.config import command_line
from torchladder.data.formats.indexed import IndexedWriter

DEBUG = f"--job.config_file {Path(__file__).parents[1] / 'train_configs' / 'debug.toml'}"


NEW = "--checkpoint.enable --job.dump_folder new"

PLUGIN = """
from torchladder import curriculum


@curriculum.register("wide")
def wide(window: float = 999):
    return lambda step: window
"""


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
    Path("utf16.toml").write_bytes("[training]\nsteps = 1\n".encode("utf-16"))
    Path("wide.py").write_text(PLUGIN)
    step = Path("run/checkpoint/step-7")
    step.mkdir(parents=True)
    for name in (".metadata", "run.json", "SHA256SUMS"):
        (step / name).touch()
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
        ("train --job.config_file utf16.toml", "utf16.toml: byte 0 is not UTF-8: save the file as UTF-8"),
        ("train DEBUG --training.steps 3 my.toml", "unexpected 'my.toml'. A config file is named by --job.config_file"),
        ("train --config my.toml", "the command line: instead of config, use job.config_file"),
        ("train DEBUG --dump_folder x", "instead of dump_folder, use job.dump_folder"),
        ("train DEBUG --training.dataset c4", "instead of training.dataset, use data.sources, such as"),
        ("train DEBUG --training.batch_size 4", "instead of training.batch_size, use training.local_batch_size"),
        (
            "train DEBUG --profiler.enable_profiling",
            "instead of [profiler] in profiler.enable_profiling, use",
        ),
        ("train DEBUG --training.stesp 4", "unknown key 'stesp' in --training.stesp. Did you mean 'steps'?"),
        ("train DEBUG --seqlen 4", "unknown option --seqlen. Did you mean --training.seq_len?"),
        (
            "train DEBUG --training.steps abc",
            "--training.steps: 'abc' is not an integer. Expected:",
        ),
        ("train DEBUG --optimizer.lr fast", "--optimizer.lr: 'fast' is not a number. Expected: --optimizer.lr FLOAT."),
        ("train DEBUG --model.n_layers 1.5", "--model.n_layers: ['1.5'] is of another type. Expected:"),
        ("train DEBUG --training.steps", "Missing value for argument '--training.steps'"),
        ("train DEBUG --checkpoint.enable maybe", "unexpected maybe: no option takes it"),
        ("train DEBUG --training.mixed_precision_param fp16", "Expected one of ('bfloat16', 'float32')."),
        ("train DEBUG --data.sources {path=docs}", "must be tables as in a file, such as"),
        ("train DEBUG --training.global_batch_size 6", "= 4. Nearest: 4 or 8."),
        ("train DEBUG --training.global_batch_size 2", "= 4. Nearest: 4 or 8."),
        ("train DEBUG --job.dump_folder run", "holds a run with checkpoints up to step 7, which this run would not"),
        ("train DEBUG --metrics.enable_wandb --job.dump_folder new", "needs the package wandb: pip install wandb"),
        ("train DEBUG --checkpoint.initial_load_path run", "checkpoint.initial_load_path needs checkpoint.enable"),
        (
            "train DEBUG NEW --checkpoint.initial_load_path run",
            "checkpoint; did you mean run/checkpoint/step-7",
        ),
        (
            "train DEBUG NEW --checkpoint.initial_load_path folder",
            "checkpoint; it is one step-N folder of a run",
        ),
        ("train DEBUG --job.plugins wide --curriculum.name wide", "curriculum 'wide' sets a window of 999"),
        (
            "train DEBUG --job.plugins wide --curriculum.name wide --curriculum.window 0.5",
            "window of 0.5: must be a whole",
        ),
        ("train DEBUG --validation.windows 9 --attention.masks causal --curriculum.name constant", "reads a window"),
        ("plan --wrold-size 8 DEBUG", "unknown option '--wrold-size'. Did you mean '--world-size'?"),
        ("plan DEBUG --world-size 3 --training.global_batch_size 4", "= 12. Nearest: 12 or 24."),
        ("slurm --ndoes 2 -- DEBUG", "unknown option '--ndoes'. Did you mean '--nodes'?"),
        (
            "prepare --input a.txt --output o --tokenizer bytes --validation-fraction 2",
            "2.0: must be 0 or more and below 1",
        ),
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
    assert call([word.replace("'", '"') for word in line.replace("DEBUG", DEBUG).replace("NEW", NEW).split()]) == 2
    said = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert message.replace("'", '"') in said.replace("'", '"')
    assert "Traceback" not in said
    assert sorted(here.rglob("*")) == before


def test_no_name_that_exists_here_is_called_foreign():
    options = set(command_line._options("", config.config_type({}, [])))
    assert not options & set(command_line.COUNTERPARTS)
    sections = {option.partition(".")[0] for option in options}
    assert not sections & set(command_line.SECTION_COUNTERPARTS)
    named = [text.split(",")[0].split(" ")[0] for text in command_line.COUNTERPARTS.values()]
    named = {name for name in named if re.fullmatch(r"[a-z_]+\.\w+", name) and not name.startswith("phases.")}
    assert named <= options


@pytest.mark.parametrize("command", ["plan", "slurm"])
def test_the_help_of_a_command_shows_the_settings_too(command, capsys):
    with pytest.raises(SystemExit) as end:
        commands.main([command, *DEBUG.split(), "--help"])
    shown = capsys.readouterr().out
    assert end.value.code == 0
    assert f"usage: torchladder {command}" in shown
    assert "--job.config_file STR" in shown
    assert "--curriculum.ramp" in shown  # of the curriculum that the file names


@pytest.mark.parametrize("rule", ["├────┤", "│ ──── │", " ---- "])
def test_a_box_becomes_a_line(rule):
    title = "╭─ Value error ──╮" if "─" in rule else f" Value error\n{rule}"
    box = (
        f"{title}\n│ Error parsing --a.b: two  │\n│ words. │\n{rule}\n│ Argument helptext: │\n│   --a.b INT │\n╰────╯\n"
    )
    assert command_line._first_sentence(box.replace("├", "│").replace("┤", "│")) == (
        "--a.b: two words. Expected: --a.b INT."
    )


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

"""The command line and the sbatch script: valid shell that saves, requeues and chains."""

import os
import subprocess
import sys

import pytest
from runs import DEBUG, ROOT

from torchladder import commands
from torchladder.commands import slurm
from torchladder.registry import ConfigError

RUN = [*DEBUG, "--checkpoint.enable"]


def tool(folder, name, script):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/usr/bin/env bash\n{script}\n")
    (folder / name).chmod(0o755)


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """Slurm's commands on one machine: sbatch numbers the jobs, srun runs locally, scontrol records its arguments."""
    tools = tmp_path / "tools"
    tool(tools, "sbatch", f'echo "$@" >> {tmp_path}/sbatch; echo $((100 + $(wc -l < {tmp_path}/sbatch)))')
    tool(tools, "srun", 'shift; "$@"')
    tool(tools, "scontrol", f'if [ "$1" = show ]; then echo here; else echo "$@" >> {tmp_path}/scontrol; fi')
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_chain_is_submitted(cluster):
    assert slurm.run(["--jobs", "3", "--submit", "--option", "partition=main", "--", *RUN]) == 0
    assert (cluster / "sbatch").read_text().splitlines() == [
        "--parsable job.sbatch",
        "--parsable --dependency=afterany:101 job.sbatch",
        "--parsable --dependency=afterany:102 job.sbatch",
    ]
    script = (cluster / "job.sbatch").read_text()
    assert "#SBATCH --signal=USR1@300\n" in script
    assert "#SBATCH --partition=main\n" in script
    assert subprocess.run(["bash", "-n", "job.sbatch"]).returncode == 0


def test_a_command_runs_after_each_job_of_the_chain(cluster):
    options = ["--option", "partition=main", "--option", "exclusive", "--then-option", "time=01:00:00"]
    then = ["--then", "echo 'a b' > result", *options]
    assert slurm.run(["--jobs", "2", "--submit", *then, "--", *RUN]) == 0
    assert (cluster / "sbatch").read_text().splitlines() == [
        "--parsable job.sbatch",
        "--parsable --dependency=afterany:101 job-then.sbatch",
        "--parsable --dependency=afterany:101 job.sbatch",
        "--parsable --dependency=afterany:103 job-then.sbatch",
    ]
    script = (cluster / "job-then.sbatch").read_text()
    assert [line for line in script.splitlines() if line.startswith("#SBATCH")] == [
        *("#SBATCH --job-name=torchladder-then", "#SBATCH --nodes=1", "#SBATCH --gpus-per-node=1"),
        *("#SBATCH --time=01:00:00", "#SBATCH --output=torchladder-then-%j.log", "#SBATCH --partition=main"),
        "#SBATCH --exclusive",
    ]
    assert subprocess.run(["./job-then.sbatch"]).returncode == 0
    assert (cluster / "result").read_text() == "a b\n"


@pytest.mark.parametrize(("ends", "code", "requeued"), [(75, 0, True), (0, 0, False), (1, 1, False)])
def test_only_an_interrupted_run_is_requeued(cluster, ends, code, requeued):
    slurm.run(["--nodes", "2", "--gpus", "4", "--", *RUN, "--job.description", "two words"])
    tool(cluster, "run_train.sh", f'echo "$NNODES $NGPU $RDZV_ENDPOINT" > env; printf "%s\\n" "$@" > argv; exit {ends}')
    environment = {**os.environ, "SLURM_JOB_ID": "1234", "SLURM_JOB_NODELIST": "here,there"}
    assert subprocess.run(["./job.sbatch"], env=environment).returncode == code
    assert (cluster / "env").read_text() == "2 4 here:29734\n"
    assert (cluster / "argv").read_text().splitlines()[-2:] == ["--job.description", "two words"]
    assert (cluster / "scontrol").exists() == requeued
    if requeued:
        assert (cluster / "scontrol").read_text() == "requeue 1234\n"


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--nodes", "0", "--", *RUN], "--nodes 0: must be 1 or more"),
        (["--then", " ", "--", *RUN], "--then is empty"),
        (["--then", "echo 'a", "--", *RUN], "--then: bash cannot parse"),
        (["--then-option", "time=1:00:00", "--", *RUN], "--then-option needs --then"),
        (["--", *DEBUG], r"resumes from a checkpoint; set --checkpoint\.enable"),
        (["--jobs", "2", "--", *RUN, "--checkpoint.load_step", "4"], "load_step"),
        (["--", *RUN, "--job.config_file", "nowhere.toml"], "nowhere.toml"),
    ],
)
def test_invalid_settings_fail_before_the_queue(cluster, argv, words):
    with pytest.raises(ConfigError, match=words):
        slurm.run(argv)
    assert not (cluster / "job.sbatch").exists()


def test_the_script_is_written_without_slurm(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ConfigError, match="sbatch is not on PATH"):
        slurm.run(["--output", str(tmp_path / "a.sbatch"), "--submit", "--", *RUN])
    assert str(ROOT / "train_configs") in (tmp_path / "a.sbatch").read_text()


def test_help_shows_an_example_that_works(cluster, capsys, monkeypatch):
    with pytest.raises(SystemExit):
        slurm.run(["--help"])
    example = capsys.readouterr().out.split("example:\n")[1].split("\n\n")[0]
    words = example.replace("\\\n", " ").split()
    assert words[:2] == ["torchladder", "slurm"]
    monkeypatch.chdir(ROOT)
    assert slurm.run(["--output", str(cluster / "job.sbatch"), *words[2:]]) == 0
    assert len((cluster / "sbatch").read_text().splitlines()) == 3


def test_help_lists_every_command(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["torchladder", "--help"])
    assert commands.main() == 0
    shown = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    assert (
        " ".join(shown)
        == "train plan prepare tokenizer inspect merge convert generate evaluate slurm report import-titan "
        "import-mixture"
    )


def test_an_unknown_command_is_answered_with_the_nearest(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["torchladder", "evalute"])
    assert commands.main() == 2
    assert "unknown command 'evalute'. Did you mean 'evaluate'?" in capsys.readouterr().err

"""The sbatch script: valid shell that saves, requeues and chains."""

import os
import subprocess

import pytest
from runs import DEBUG, ROOT

from torchladder.commands import slurm
from torchladder.registry import ConfigError

RUN = [*DEBUG, "--checkpoint.enable"]


def tool(folder, name, script):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/usr/bin/env bash\n{script}\n")
    (folder / name).chmod(0o755)


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """Slurm's commands, for one machine: sbatch numbers jobs, srun runs here, scontrol notes what it is told."""
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
        (["--nodes", "0", "--", *RUN], "--nodes = 0"),
        (["--", *DEBUG], "needs checkpoints"),
        (["--jobs", "2", "--", *RUN, "--checkpoint.load_step", "4"], "load_step"),
        (["--", *RUN, "--job.config_file", "nowhere.toml"], "nowhere.toml"),
    ],
)
def test_what_would_fail_in_the_queue_fails_here(cluster, argv, words):
    with pytest.raises(ConfigError, match=words):
        slurm.run(argv)
    assert not (cluster / "job.sbatch").exists()


def test_without_slurm_the_script_is_written_all_the_same(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ConfigError, match="sbatch is not on"):
        slurm.run(["--output", str(tmp_path / "a.sbatch"), "--submit", "--", *RUN])
    assert str(ROOT / "train_configs") in (tmp_path / "a.sbatch").read_text()

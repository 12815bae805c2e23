"""Writes an sbatch script for a run that saves before the time limit, requeues itself and resumes."""

from __future__ import annotations

import argparse
import shlex
import shutil
import subprocess
from pathlib import Path

from torchladder import config
from torchladder.commands.arguments import SettingsParser, check_positive
from torchladder.registry import ConfigError, require
from torchladder.resilience.interrupt import REQUEUE

EPILOG = """\
example:
  torchladder slurm --nodes 4 --gpus 8 --time 24:00:00 --option partition=main --jobs 3 --submit -- \\
      --job.config_file train_configs/llama1b_dm8.toml --checkpoint.enable

  submits three jobs of 24 hours, each starting when the previous one has ended. Arguments after -- go to
  ./run_train.sh; they are checked before the script is written, and checkpoints must be enabled.

  torchladder slurm --jobs 3 --then 'torchladder evaluate outputs/run --files val.jsonl' --submit -- ...

  also submits the command after each of the jobs, whether it has succeeded or not: one node, one GPU.
"""

SCRIPT = """\
#!/usr/bin/env bash
#SBATCH --job-name={name}
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node={gpus}
#SBATCH --time={time}
#SBATCH --signal=USR1@{notice}
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output={name}-%j.log
{options}
# Slurm sends SIGUSR1 to all processes of the step {notice} seconds before the time limit. The run saves a checkpoint
# and exits with {requeue_code}; the job is then requeued under the same id and resumes from that checkpoint.
set -uo pipefail
export NNODES={nodes} NGPU={gpus} LOG_RANK="${{LOG_RANK:-0}}"
head="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
export RDZV_ENDPOINT="$head:$((29500 + SLURM_JOB_ID % 1000))"

code=0
srun --kill-on-bad-exit=0 ./run_train.sh {train_argv} || code=$?
if [ "$code" -eq {requeue_code} ]; then
    scontrol requeue "$SLURM_JOB_ID" && exit 0
fi
exit "$code"
"""

THEN_SCRIPT = """\
#!/usr/bin/env bash
{options}
set -euo pipefail
{command}
"""


def run(argv: list[str]) -> int:
    """Writes the script; with --submit also submits it, as a chain of --jobs jobs."""
    parser = SettingsParser(
        prog="torchladder slurm",
        description=__doc__,
        usage="torchladder slurm [options] -- --job.config_file FILE [--section.key value ...]",
        epilog=EPILOG,
    )
    add = parser.add_argument
    add("--output", type=Path, default=Path("job.sbatch"), help="script to write (default: %(default)s)")
    add("--name", default="torchladder", help="job name (default: %(default)s)")
    add("--nodes", type=int, default=1, help="number of nodes (default: %(default)s)")
    add("--gpus", type=int, default=8, help="GPUs per node, one rank each (default: %(default)s)")
    add("--time", default="24:00:00", help="time limit of a job (default: %(default)s)")
    add("--notice", type=int, default=300, help="seconds before the time limit to save at (default: %(default)s)")
    add("--option", action="append", default=[], help="another sbatch option, such as partition=main; repeatable")
    add("--jobs", type=int, default=1, help="with --submit: length of the chain of jobs (default: %(default)s)")
    add("--then", metavar="CMD", help="shell command to run as another job after each job of the chain")
    text = "sbatch option of the --then jobs (default: nodes=1, gpus-per-node=1, --time and --option); repeatable"
    add("--then-option", action="append", default=[], help=text)
    add("--submit", action="store_true", help="submit the script with sbatch")
    arguments, train_argv = parser.parse(argv)
    require(arguments.then is not None or not arguments.then_option, "--then-option needs --then.")
    _check_shell_command(arguments.then)
    check_positive(arguments, "nodes", "gpus", "notice", "jobs")
    checkpoint = config.load(train_argv).checkpoint  # invalid settings fail now instead of in the queue
    require(
        checkpoint.enable and not checkpoint.load_only,
        "checkpoint.enable: a requeued job resumes from a checkpoint; set --checkpoint.enable, without load_only.",
    )
    require(
        checkpoint.load_step == -1 or arguments.jobs == 1,
        "checkpoint.load_step: every job of the chain would restart from that step; remove it.",
    )
    scripts = {arguments.output: _train_script(arguments, train_argv)}
    if arguments.then is not None:
        scripts[_then_path(arguments.output)] = _then_script(arguments)
    for path, script in scripts.items():
        path.write_text(script)
        path.chmod(0o755)
        print(f"wrote {path}")
    if arguments.submit:
        submit_jobs(*scripts, jobs=arguments.jobs)
    return 0


def _train_script(arguments: argparse.Namespace, train_argv: list[str]) -> str:
    return SCRIPT.format(
        **vars(arguments),
        options="".join(f"#SBATCH --{option}\n" for option in arguments.option),
        train_argv=shlex.join(train_argv),
        requeue_code=REQUEUE,
    )


def _check_shell_command(command: str | None) -> None:
    """Refuses a command that is empty, or that bash cannot parse."""
    require(command is None or bool(command.strip()), "--then is empty: name a command.")
    if command is not None:
        parsed = subprocess.run(["bash", "-n", "-c", command], capture_output=True, text=True)
        require(parsed.returncode == 0, f"--then: bash cannot parse this command: {parsed.stderr.strip()}")


def _then_path(script: Path) -> Path:
    return script.with_name(f"{script.stem}-then{script.suffix}")


def _then_script(arguments: argparse.Namespace) -> str:
    """Returns the script of the jobs that run after those of the chain; later options replace earlier ones."""
    name = f"{arguments.name}-then"
    options = {"job-name": name, "nodes": "1", "gpus-per-node": "1", "time": arguments.time, "output": f"{name}-%j.log"}
    for option in (*arguments.option, *arguments.then_option):
        key, _, value = option.partition("=")
        options[key] = value
    lines = [f"#SBATCH --{key}={value}" if value else f"#SBATCH --{key}" for key, value in options.items()]
    return THEN_SCRIPT.format(options="\n".join(lines), command=arguments.then)


def submit_jobs(script: Path, then: Path | None = None, *, jobs: int) -> list[str]:
    """Submits a chain of jobs, each depending on the end of the previous one; returns their ids.

    Args:
        script: of the jobs.
        then: the script to submit once for each job, to run after it whether it has succeeded or not: a job that waits
            for the success of one that fails never starts.
        jobs: length of the chain.

    Raises:
        ConfigError: there is no sbatch, or it fails.
    """
    if shutil.which("sbatch") is None:
        raise ConfigError(f"--submit: sbatch is not on PATH. {script} is written; submit it on a Slurm login node.")
    ids: list[str] = []
    for _ in range(jobs):
        ids.append(_submit(script, ids[-1] if ids else None))
        if then:
            _submit(then, ids[-1])
    return ids


def _submit(script: Path, previous: str | None) -> str:
    """Submits a job that starts when the previous one has ended; returns its id."""
    after = [f"--dependency=afterany:{previous}"] if previous else []
    result = subprocess.run(["sbatch", "--parsable", *after, str(script)], capture_output=True, text=True)
    if result.returncode:
        raise ConfigError(f"sbatch failed: {result.stderr.strip()}")
    submitted = result.stdout.strip().split(";")[0]
    print(f"submitted {submitted}{f', {script} after {previous}' if previous else ''}")
    return submitted

"""Writes an sbatch script for a run: it saves before its time is up, requeues itself, and may be chained."""

from __future__ import annotations

import argparse
import shlex
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from torchladder import config
from torchladder.registry import ConfigError
from torchladder.resilience.interrupt import REQUEUE

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
{extra}
# Slurm sends SIGUSR1 to all processes of the step {notice} seconds before the time is up. The run saves and ends with
# {code}; then the job goes back into the queue under the same id, and continues from what was saved.
set -uo pipefail
export NNODES={nodes} NGPU={gpus} LOG_RANK="${{LOG_RANK:-0}}"
head="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
export RDZV_ENDPOINT="$head:$((29500 + SLURM_JOB_ID % 1000))"

code=0
srun --kill-on-bad-exit=0 ./run_train.sh {argv} || code=$?
if [ "$code" -eq {code} ]; then
    scontrol requeue "$SLURM_JOB_ID" && exit 0
fi
exit "$code"
"""


@dataclass(frozen=True)
class SlurmJob:
    """What sbatch is told of a run."""

    name: str
    nodes: int
    gpus: int
    time: str
    notice: int
    options: list[str]
    argv: list[str]

    def script(self) -> str:
        """Returns the sbatch script."""
        return SCRIPT.format(
            name=self.name,
            nodes=self.nodes,
            gpus=self.gpus,
            time=self.time,
            notice=self.notice,
            extra="".join(f"#SBATCH --{option}\n" for option in self.options),
            argv=shlex.join(self.argv),
            code=REQUEUE,
        )


def run(argv: list[str]) -> int:
    """Writes the script, and with --submit hands it to sbatch, --jobs times, each after the one before."""
    parser = argparse.ArgumentParser(
        prog="torchladder slurm",
        description=__doc__,
        usage="torchladder slurm [options] -- --job.config_file FILE [--section.key value ...]",
        allow_abbrev=False,
    )
    parser.add_argument("--output", type=Path, default=Path("job.sbatch"), help="script to write")
    parser.add_argument("--name", default="torchladder", help="the job's name")
    parser.add_argument("--nodes", type=int, default=1, help="machines")
    parser.add_argument("--gpus", type=int, default=8, help="GPUs of each machine: ranks on it")
    parser.add_argument("--time", default="24:00:00", help="time limit of one job")
    parser.add_argument("--notice", type=int, default=300, help="seconds before the limit at which the run saves")
    parser.add_argument("--option", action="append", default=[], help="a further sbatch option, such as partition=main")
    parser.add_argument("--jobs", type=int, default=1, help="with --submit: jobs, each afterany of the one before")
    parser.add_argument("--submit", action="store_true", help="hand the script to sbatch")
    arguments, rest = parser.parse_known_args(argv)
    rest = rest[1:] if rest[:1] == ["--"] else rest
    _check(arguments, rest)
    job = SlurmJob(
        name=arguments.name,
        nodes=arguments.nodes,
        gpus=arguments.gpus,
        time=arguments.time,
        notice=arguments.notice,
        options=arguments.option,
        argv=rest,
    )
    arguments.output.write_text(job.script())
    arguments.output.chmod(0o755)
    print(f"wrote {arguments.output}")
    if arguments.submit:
        submit(arguments.output, arguments.jobs)
    return 0


def submit(script: Path, jobs: int) -> list[str]:
    """Hands a script to sbatch, ``jobs`` times, each to begin when the one before has ended in any way.

    Raises:
        ConfigError: sbatch is not here, or refuses.
    """
    if shutil.which("sbatch") is None:
        raise ConfigError("--submit: sbatch is not on this machine's path. The script is written; submit it elsewhere.")
    ids: list[str] = []
    for _ in range(jobs):
        after = [f"--dependency=afterany:{ids[-1]}"] if ids else []
        result = subprocess.run(["sbatch", "--parsable", *after, str(script)], capture_output=True, text=True)
        if result.returncode:
            raise ConfigError(f"sbatch refused: {result.stderr.strip()}")
        ids.append(result.stdout.strip().split(";")[0])
        print(f"submitted {ids[-1]}{f', after {ids[-2]}' if after else ''}")
    return ids


def _check(arguments: argparse.Namespace, rest: list[str]) -> None:
    for name in ("nodes", "gpus", "notice", "jobs"):
        if getattr(arguments, name) < 1:
            raise ConfigError(f"--{name} = {getattr(arguments, name)}: must be 1 or more.")
    settings = config.load(rest)  # an error in the settings is better met here than in the queue
    if not settings.checkpoint.enable or settings.checkpoint.load_only:
        raise ConfigError("a job that goes on needs checkpoints: set --checkpoint.enable.")
    if settings.checkpoint.load_step != -1 and arguments.jobs > 1:
        raise ConfigError("checkpoint.load_step would take every job of the chain back to that step: leave it out.")

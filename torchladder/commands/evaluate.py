"""Measures loss on files, probes or lm-eval tasks for all checkpoints of runs; finished evaluations are skipped."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import torch

from torchladder import plots, probes
from torchladder.commands.arguments import (
    CommandParser,
    add_on_error_option,
    add_weight_options,
    check_positive,
    weights_from_args,
)
from torchladder.commands.eval_progress import EvalProgress
from torchladder.commands.eval_tables import print_losses, print_probe, print_tasks
from torchladder.inference.evaluation import eval_jobs
from torchladder.inference.evaluation.eval_files import EvalFiles, expand_paths
from torchladder.inference.evaluation.eval_jobs import EvalJob, Job, SplitBy
from torchladder.inference.evaluation.eval_slices import EvalSlices
from torchladder.inference.evaluation.harness_jobs import TASKS, HarnessJob
from torchladder.inference.evaluation.harness_tasks import load_tasks
from torchladder.inference.evaluation.probe_jobs import PROBES, ProbeInput, ProbeJob, default_contexts
from torchladder.inference.evaluation.probe_scores import ProbeRun
from torchladder.inference.evaluation.result_table import DISTANCES, EVALUATIONS, ResultTable
from torchladder.inference.trained_model import TrainedModel, UnreadableCheckpointError
from torchladder.models.attention.sdpa import SdpaKernel
from torchladder.registry import ConfigError, require

EPILOG = """
examples:
  torchladder evaluate outputs/run --files val/en.jsonl val/de.jsonl
      evaluates all checkpoints of the run and adds the results to outputs/run/evaluation.csv
  torchladder evaluate outputs/run models/exported --files val --context 512 2048 --stride 256 --output results.csv
  torchladder evaluate outputs/run --probes needle copy --context 512 2048 --plot probes.png
      measures recall over long distances and adds the results to outputs/run/probes.csv
  torchladder evaluate outputs/run --tasks hellaswag,piqa my_task.yaml --limit 500
      evaluates tasks of the lm-evaluation-harness and adds the results to outputs/run/tasks.csv

files: .txt, .md and .py are one document each, .jsonl and .json have one per line, .csv and .parquet one per row; each
may be compressed (.gz, .zst, .bz2, .xz). Token files are .bin (with .idx beside it) or .parquet.

exit code: 1 if a checkpoint is damaged; the others are evaluated anyway.
"""


def run(argv: list[str]) -> int:
    """Evaluates; returns 1 if a checkpoint is damaged and 130 after Ctrl-C."""
    parser = CommandParser(prog="torchladder evaluate", description=__doc__, epilog=EPILOG)
    add = parser.add_argument
    add("models", nargs="+", type=Path, metavar="MODEL", help="run folder, checkpoint step-N, or Hugging Face folder")
    add("--files", nargs="+", metavar="PATH", help="files, folders or globs to evaluate on; the text of probes")
    text = f"instead of losses on files, measure probes (default: all): {', '.join(probes.registry.names())}"
    add("--probes", nargs="*", metavar="NAME", help=text)
    add("--probe-rows", type=int, metavar="N", help="rows of --probes per depth or distance (default: 16)")
    text = "instead of losses on files, tasks of the lm-evaluation-harness: names, globs or .yaml files"
    add("--tasks", nargs="+", metavar="TASK", help=text)
    add("--num-fewshot", type=int, metavar="N", help="examples before each question of --tasks (default: the task's)")
    text = "documents of each task, or a fraction of them below 1 (default: all)"
    add("--limit", type=float, metavar="N", help=text)
    add("--seed", type=int, metavar="N", help="of the rows of --probes (default: 0)")
    text = "maximum tokens read at once (default: training.seq_len; for probes a quarter, a half and all of it)"
    add("--context", nargs="+", type=int, metavar="N", help=text)
    add("--stride", type=int, metavar="N", help="tokens from one slice of a document to the next (default: --context)")
    add("--by-position", action="store_true", help="also report loss by position")
    add("--by-distance", action="store_true", help="also report loss by distance from the document's start")
    add("--batch-tokens", type=int, default=16384, metavar="N", help="tokens per batch (default: %(default)s)")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the weights (default: %(default)s)")
    add_weight_options(parser)
    add("--text-key", metavar="KEY", help="key or column of the text (default: as in the run)")
    add_on_error_option(parser)
    parser.set_defaults(on_error=None)  # to refuse it where no document is read
    add("--bos", action=argparse.BooleanOptionalAction, help="begin documents with bos (default: as in the run)")
    text = "refuse tokens that another tokenizer has written (default: as in the run)"
    add("--check-tokenizer", action=argparse.BooleanOptionalAction, help=text)
    text = "fraction of a text's tokens that may be unknown (default: as in the run)"
    add("--max-unknown-fraction", type=float, metavar="F", help=text)
    text = ".csv or .jsonl to add to (default: evaluation.csv, distances.csv, probes.csv or tasks.csv in MODEL's run)"
    add("--output", type=Path, metavar="FILE", help=text)
    add("--plot", type=Path, metavar="FILE", help="also plot the results (.png, .svg, .pdf)")
    arguments = parser.parse_args(argv)
    _slices(arguments.context or [], arguments.stride)  # refuses invalid ones before anything is read
    check_positive(arguments, "batch_tokens", "probe_rows")
    require((arguments.seed or 0) >= 0, f"--seed {arguments.seed}: must be 0 or more.")
    _check_mode(arguments)
    arguments.on_error = arguments.on_error or "error"
    arguments.probe_rows, arguments.seed = arguments.probe_rows or 16, arguments.seed or 0
    if arguments.plot:
        plots.check_plot_path(arguments.plot)
    try:
        return _run(arguments)
    except KeyboardInterrupt:
        print("interrupted; run the same command again to continue", file=sys.stderr)
        return 130


def _check_mode(arguments: argparse.Namespace) -> None:
    """Raises ``ConfigError`` for options that do not fit together."""
    if arguments.tasks is not None:
        names = ("files", "probes", "probe_rows", "seed", "stride", "by_position", "by_distance", "plot")
        for name in (*names, "text_key", "on_error", "check_tokenizer", "max_unknown_fraction"):
            unset = getattr(arguments, name) is None or getattr(arguments, name) is False  # a seed of 0 is set
            require(unset, f"--{name.replace('_', '-')} does not apply to --tasks.")
        shots, limit = arguments.num_fewshot, arguments.limit
        require(shots is None or shots >= 0, f"--num-fewshot {shots}: must be 0 or more.")
        if limit is not None:
            counts = 0 < limit < 1 or (limit >= 1 and limit.is_integer())
            require(counts, f"--limit {limit:g}: must be a number of documents, or a fraction between 0 and 1.")
        return
    for name in "num_fewshot", "limit":
        require(getattr(arguments, name) is None, f"--{name.replace('_', '-')} applies only to --tasks.")
    if arguments.probes is None:
        for name in "probe_rows", "seed":
            require(getattr(arguments, name) is None, f"--{name.replace('_', '-')} applies only to --probes.")
        text = "nothing to evaluate: name text or tokens with --files, or use --probes or --tasks."
        require(bool(arguments.files), text)
        require(
            not (arguments.by_position and arguments.by_distance),
            "--by-position and --by-distance fill different tables: evaluate once with each.",
        )
        return
    for name in "stride", "by_position", "by_distance":
        require(getattr(arguments, name) in (None, False), f"--{name.replace('_', '-')} does not apply to --probes.")


def _run(arguments: argparse.Namespace) -> int:
    keys = ("text_key", "on_error", "bos", "check_tokenizer", "max_unknown_fraction")
    files = None
    if arguments.files:
        files = EvalFiles(expand_paths(arguments.files), **{key: getattr(arguments, key) for key in keys})
    choice = weights_from_args(arguments)
    models: list[TrainedModel] = []
    errors: list[UnreadableCheckpointError] = []
    for path in dict.fromkeys(arguments.models):
        readable, unreadable = TrainedModel.find_all(path, max(arguments.context or [0]) or None, choice)
        models += readable
        errors += unreadable
    name, schema = ("distances.csv", DISTANCES) if arguments.by_distance else ("evaluation.csv", EVALUATIONS)
    if arguments.probes is not None:
        name, schema = "probes.csv", PROBES
    if arguments.tasks is not None:
        name, schema = "tasks.csv", TASKS
    outputs = [arguments.output or trained.run_folder / name for trained in models]
    tables = {path: ResultTable(path, schema) for path in dict.fromkeys(outputs)}
    targets = [(trained, tables[output]) for trained, output in zip(models, outputs, strict=True)]
    jobs: Sequence[Job]
    if arguments.tasks is not None:
        jobs = _task_jobs(arguments, targets)
    elif arguments.probes is None:
        assert files is not None
        jobs = _loss_jobs(arguments, files, targets)
    else:
        jobs = _probe_jobs(arguments, files, targets)
    errors += _evaluate(jobs, arguments.batch_tokens, "tokens" if arguments.tasks is None else "requests")
    rows = eval_jobs.finished_rows(jobs)
    if errors and not rows:
        raise errors[0]
    for error in errors:
        print(f"warning: skipped a checkpoint: {error}", file=sys.stderr)
    if arguments.tasks is not None:
        finished = {row["fingerprint"] for row in rows}
        rows = [row for table in tables.values() for row in table.rows() if row["fingerprint"] in finished]
        print_tasks(rows)  # the scores of groups, too
    elif arguments.probes is None:
        print_losses([row for row in rows if row[schema.key[-1]] is None])
    else:
        for (checkpoint, probe), group in groupby(rows, key=lambda row: (row["checkpoint"], row["probe"])):
            print_probe(f"{checkpoint}  {probe}", list(group))
    print(f"details: {', '.join(map(str, tables))}")
    if arguments.plot:
        (plots.plot_evaluations if arguments.probes is None else plots.plot_probes)(arguments.plot, rows)
        print(f"wrote {arguments.plot}")
    return 1 if errors else 0


def _loss_jobs(
    arguments: argparse.Namespace, files: EvalFiles, targets: Sequence[tuple[TrainedModel, ResultTable]]
) -> list[EvalJob]:
    jobs = []
    for trained, table in targets:
        contexts = arguments.context or [min(trained.max_seq_len, trained.config.training.seq_len)]
        split_by: SplitBy = "distance" if arguments.by_distance else "position" if arguments.by_position else ""
        for documents in files.open_for(trained):
            jobs += [
                EvalJob(trained, documents, slices, arguments.dtype, split_by, table)
                for slices in _slices(contexts, arguments.stride)
            ]
    return jobs


def _probe_jobs(
    arguments: argparse.Namespace, files: EvalFiles | None, targets: Sequence[tuple[TrainedModel, ResultTable]]
) -> list[ProbeJob]:
    known = probes.registry.build_all(arguments.probes or probes.registry.names(), [])  # plugins' probes, too
    needs_text = [name for name, probe in known.items() if probe.needs_text and files is None]
    if arguments.probes and needs_text:
        raise ConfigError(f"the probe {needs_text[0]!r} is made of your own text: name files with --files.")
    if needs_text:
        print(f"without --files, these probes are left out: {', '.join(needs_text)}", file=sys.stderr)
    names = [name for name in known if name not in needs_text]
    contexts = {trained: arguments.context or default_contexts(trained, names) for trained, _ in targets}
    probes.registry.build_all(names, [context for chosen in contexts.values() for context in chosen])
    inputs = ProbeInput(files, max(map(max, contexts.values()), default=0))
    label = " ".join(arguments.files) if arguments.files else None
    jobs = []
    for trained, table in targets:
        tokens, special_known = inputs.tokens_for(trained)
        for name in names:
            for context in dict.fromkeys(contexts[trained]):
                rows = ProbeRun(name, context, arguments.probe_rows, tokens, arguments.seed)
                jobs.append(ProbeJob(trained, rows, label, special_known, arguments.dtype, table))
    return jobs


def _task_jobs(arguments: argparse.Namespace, targets: Sequence[tuple[TrainedModel, ResultTable]]) -> list[HarnessJob]:
    names = [name for words in arguments.tasks for name in words.split(",") if name]
    require(bool(names), "--tasks: name at least one task.")
    tasks = load_tasks(names, arguments.num_fewshot, arguments.limit)
    return [
        HarnessJob(trained, task, context, arguments.bos, arguments.dtype, table)
        for trained, table in targets
        for task in tasks
        for context in dict.fromkeys(arguments.context or [min(trained.max_seq_len, trained.config.training.seq_len)])
    ]


def _slices(contexts: Sequence[int], stride: int | None) -> list[EvalSlices]:
    return [EvalSlices(context, context if stride is None else stride) for context in dict.fromkeys(contexts)]


def _evaluate(jobs: Sequence[Job], batch_tokens: int, unit: str) -> list[UnreadableCheckpointError]:
    """Runs the unfinished jobs; returns the errors of unreadable checkpoints."""
    remaining, errors = eval_jobs.unfinished(jobs), []
    with EvalProgress(remaining, unit=unit) as progress:
        if len(remaining) < len(jobs):
            progress.log(f"{len(jobs) - len(remaining)} of {len(jobs)} evaluations are already finished")
        for line in _notices(remaining):
            progress.log(line)
        for trained, group in groupby(remaining, key=lambda job: job.trained):
            model_jobs = list(group)
            try:
                trained.verify()
                max_context = max(job.context for job in model_jobs)
                loaded = trained.load(SdpaKernel.attention, max_context, getattr(torch, model_jobs[0].dtype))
            except UnreadableCheckpointError as error:
                errors.append(error)
                progress.skip(model_jobs)
                continue
            for job in model_jobs:
                if not eval_jobs.unfinished([job]):  # another process has finished it in the meantime
                    progress.skip([job])
                    continue
                progress.begin(job)
                try:
                    rows = job.compute(loaded, batch_tokens, progress.advance)
                except torch.OutOfMemoryError:
                    raise ConfigError(
                        f"--batch-tokens {batch_tokens} and a context of {job.context} need more memory than "
                        f"{loaded.device} has. Reduce one of them, or use --dtype bfloat16."
                    ) from None
                job.table.add(rows)
                progress.end(job, rows)
            del loaded  # so that memory holds one model at a time
    return errors


def _notices(jobs: Sequence[Job]) -> list[str]:
    lines = []
    for job in jobs:
        if job.context > job.trained.max_seq_len:
            lines.append(
                f"context {job.context:,}: longer than the rows in training ({job.trained.max_seq_len:,}); "
                "the model has not seen the positions beyond"
            )
        lines += job.notices()
    return list(dict.fromkeys(lines))

"""Tasks of EleutherAI's lm-evaluation-harness (the package lm-eval), by name or from a local YAML file."""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torchladder.registry import ConfigError, require

FEWSHOT_SEED = 1234
"""Seed of the few-shot examples, the harness's default."""

DEFAULT_MAX_NEW_TOKENS = 256
"""Tokens to generate for a task that does not say how many, as in the harness."""

GENERATION_SETTINGS = frozenset({"until", "max_gen_toks", "do_sample", "temperature", "top_p"})
"""Keys of ``generation_kwargs`` that decoding knows."""


@dataclass(frozen=True, eq=False)
class HarnessTask:
    """A task, group or tag of the harness.

    Attributes:
        name: as given on the command line.
        limit: documents of each task, or a fraction of them below 1; None: all.
        loaded: what ``TaskManager.load`` returned, with the few-shot examples set.
        fingerprint: hash of all requests and metrics.
        num_requests: texts to score or to continue.
        longest_generation: tokens that a request may generate; 0 if none generates.
    """

    name: str
    limit: float | None
    loaded: Any
    fingerprint: str
    num_requests: int
    longest_generation: int

    @property
    def metrics(self) -> list[tuple[str, str, str]]:
        """The task, metric and filter of each result that single tasks have."""
        return [
            (name, metric, chosen["name"])
            for name, task in self.loaded["tasks"].items()
            for chosen in (task.config.filter_list or [{"name": "none"}])
            for metric in task.aggregation()
        ]

    def evaluate(self, model: Any) -> Any:
        """Returns the harness's results of a model with its interface ``LM``."""
        from lm_eval.evaluator import evaluate  # an optional package

        _seed_examples(self.loaded)  # so that every model sees the same
        return evaluate(model, self.loaded, limit=self.limit, log_samples=False)


def load_tasks(names: Sequence[str], num_fewshot: int | None, limit: float | None) -> list[HarnessTask]:
    """Loads tasks with their data and builds their requests.

    Args:
        names: names of tasks, groups or tags, globs over them, or YAML files.
        num_fewshot: examples before each question; None: as each task defines.
        limit: documents of each task, or a fraction of them below 1; None: all.

    Raises:
        ConfigError: lm-eval is not installed, a task is unknown or cannot be loaded, or it does not have this setting.
    """
    try:
        from lm_eval.tasks import TaskManager  # an optional package
    except ImportError:
        raise ConfigError("--tasks needs the package lm-eval: pip install 'torchladder[eval]'.") from None
    for name in names:
        is_missing_file = Path(name).suffix in (".yaml", ".yml") and not Path(name).is_file()
        require(not is_missing_file, f"--tasks {name}: no such file.")
    # Reading the index of all tasks takes seconds; files of single tasks do not need it.
    manager = TaskManager(include_defaults=not all(map(_is_single_task, names)))
    known = [one for name in names for one in ([name] if Path(name).is_file() else _find(name, manager))]
    return [_load(name, manager, num_fewshot, limit) for name in dict.fromkeys(known)]


def generation_settings(given: dict[str, Any]) -> dict[str, Any]:
    """Returns the ``generation_kwargs`` of a request with the harness's defaults; raises ``ConfigError`` for others."""
    from lm_eval.models.utils import normalize_gen_kwargs  # an optional package

    settings = dict(normalize_gen_kwargs(given, DEFAULT_MAX_NEW_TOKENS))
    unknown = sorted(settings.keys() - GENERATION_SETTINGS)
    known = ", ".join(sorted(GENERATION_SETTINGS))
    require(not unknown, f"--tasks: generation_kwargs has {', '.join(unknown)}. Known: {known}.")
    return settings


def _is_single_task(name: str) -> bool:
    path = Path(name)
    return path.is_file() and not re.search(r"^group:", path.read_text(encoding="utf-8"), re.MULTILINE)


def _find(pattern: str, manager: Any) -> list[str]:
    found = manager.match_tasks([pattern])
    if not found:
        nearest = difflib.get_close_matches(pattern, manager.all_tasks, n=5)
        hint = f" Nearest: {', '.join(nearest)}." if nearest else ""
        raise ConfigError(
            f"--tasks: unknown task {pattern!r}.{hint} `lm-eval ls tasks` lists all; a custom one is a .yaml file."
        )
    return list(found)


def _load(name: str, manager: Any, num_fewshot: int | None, limit: float | None) -> HarnessTask:
    from lm_eval.evaluator_utils import get_sample_size  # an optional package

    try:
        loaded = manager.load([name])
        for task_name, task in loaded["tasks"].items():
            _set_fewshot(task_name, task, num_fewshot)
        _seed_examples(loaded)
        for task in loaded["tasks"].values():
            task.build_all_requests(limit=get_sample_size(task, limit), rank=0, world_size=1)
    except ConfigError:
        raise
    except Exception as error:  # of the file, of its functions, or of the Hub: the harness has no type for them
        cause = (str(error).strip().splitlines() or ["no reason given"])[0]
        raise ConfigError(f"--tasks: the task {name!r} cannot be loaded: {type(error).__name__}: {cause}") from error
    digest, lengths, count = hashlib.sha256(version("lm-eval").encode()), [0], 0
    for task_name, task in loaded["tasks"].items():
        require(not getattr(task, "MULTIMODAL", False), f"--tasks: {task_name} has images: the models read text only.")
        unsafe = f"--tasks: {task_name} runs code that the model writes, which is refused."
        require(not getattr(task, "UNSAFE_CODE", False) and not task.get_config("unsafe_code"), unsafe)
        require(bool(task.instances), f"--tasks: the task {task_name} has no documents.")
        requests = [[one.request_type, one.repeats, *one.args] for one in task.instances]
        definition = [task_name, task.dump_config().get("metric_list"), task.config.filter_list, requests]
        digest.update(json.dumps(definition, default=str).encode())
        count += sum(one.repeats for one in task.instances)
        generations = [one.args[1] for one in task.instances if one.request_type == "generate_until"]
        lengths += [int(generation_settings(given)["max_gen_toks"]) for given in generations]
    return HarnessTask(name, limit, loaded, digest.hexdigest(), count, max(lengths))


def _set_fewshot(name: str, task: Any, num_fewshot: int | None) -> None:
    default = task.get_config("num_fewshot")
    if num_fewshot is not None:
        fixed = default == 0 and num_fewshot > 0
        require(not fixed, f"--num-fewshot {num_fewshot}: the task {name} is defined without examples (num_fewshot 0).")
        task.set_config(key="num_fewshot", value=num_fewshot)
    elif default is None:
        task.set_config(key="num_fewshot", value=0)


def _seed_examples(loaded: Any) -> None:
    for task in loaded["tasks"].values():
        task.set_fewshot_seed(seed=FEWSHOT_SEED)

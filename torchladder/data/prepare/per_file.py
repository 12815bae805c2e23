"""Prepares each file of an input as a separate dataset, for mixtures whose sources are single files."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from torchladder.data.prepare.dataset_builder import prepare_dataset
from torchladder.data.prepare.executor import Executor
from torchladder.data.prepare.metadata import DatasetMetadata
from torchladder.data.prepare.tasks import PrepareConfig, expand_inputs
from torchladder.data.text.compression import inner_suffix
from torchladder.registry import require


def prepare_each(config: PrepareConfig, executor: Executor) -> Iterator[tuple[str, DatasetMetadata]]:
    """Yields the prefix and the metadata of each file's dataset, and of its held-out documents, once it is complete.

    A file ``en/a.jsonl.gz`` of a folder becomes ``OUTPUT/en/a``. Finished datasets are kept, as are finished parts.

    Args:
        config: ``output`` is a folder; ``shard`` chooses files.
        executor: runs the tasks of a file.

    Raises:
        ConfigError: as ``prepare_dataset``, or two files have one output.
    """
    folder = Path(config.output)
    require(not folder.is_file(), f"--output {folder} is a file: with --per-file it is the folder of the pairs.")
    files = expand_inputs(config.inputs)
    outputs: dict[str, Path] = {}
    for path, name in files.items():
        prefix = str(folder / name[: name.lower().rindex(inner_suffix(path))])
        first = outputs.setdefault(prefix, path)
        require(
            first is path,
            f"{first} and {path} would both become {prefix}.bin: name the folder that contains both, rename one, or "
            "prepare them in two commands.",
        )
    index, count = config.shard or (0, 1)
    splits: tuple[Literal["train", "validation"], ...] = (
        ("validation", "train") if config.validation_fraction else ("train",)
    )
    held_out = 0
    for prefix, path in list(outputs.items())[index::count]:
        for split in splits:
            of_file = dataclasses.replace(config, output=prefix, shard=None, split=split)
            done = prepare_dataset(of_file, executor, {path: files[path]})
            held_out += done.documents if split == "validation" else 0
            yield of_file.prefix, done
    require(
        held_out > 0 or not config.validation_fraction or config.shard is not None,
        f"--validation-fraction {config.validation_fraction:g} holds out no document of this input: raise it.",
    )

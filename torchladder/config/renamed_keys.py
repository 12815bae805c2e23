"""Keys that had another name once: whoever still uses one is told what it is called now."""

from __future__ import annotations

from collections.abc import Iterable

from torchladder.registry import ConfigError

RENAMED = {
    "data.phases": "a top-level [[phases]] (--phases on the command line)",
    "experimental.custom_import": "job.plugins, a list of modules",
    "phases.weights": "phases.source_weights",
    "phases.from_share": "phases.from_fraction",
    "resilience.norm_deviations": "resilience.sigma_factor",
}


def check(keys: Iterable[str], place: str) -> None:
    """Refuses keys, ``section.key``, that have been renamed.

    Raises:
        ConfigError: one of them is; the message has the new name.
    """
    for key in keys:
        if key in RENAMED:
            raise ConfigError(f"{place}: {key} is now {RENAMED[key]}.")

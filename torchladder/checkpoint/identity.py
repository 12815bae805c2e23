"""Whether a checkpoint is of this run: fingerprints of data, tokenizer and settings, compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torchladder.registry import ConfigError, unknown_name


def check(saved: Mapping[str, str], now: Mapping[str, str], accepted: Sequence[str]) -> None:
    """Compares the fingerprints of a checkpoint with the run's.

    Raises:
        ConfigError: one differs that is not accepted, or an accepted name is none of them; or nothing was saved.
    """
    if not saved:
        raise ConfigError(
            "the checkpoint is of no run, it holds weights alone: checkpoint.initial_load_model_only = true loads them."
        )
    for name in accepted:
        if name not in now:
            raise unknown_name("entry of checkpoint.accept_changes", name, now)
    for name, value in now.items():
        if saved.get(name) != value and name not in accepted:
            raise ConfigError(
                f"{name} is not what it was when the checkpoint was saved ({saved.get(name)} then, {value} now). "
                f"To continue all the same: --checkpoint.accept_changes {name}"
            )

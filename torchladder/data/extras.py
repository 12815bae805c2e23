"""Optional packages: what to say where one is missing."""

from __future__ import annotations

from torchladder.registry import ConfigError


def missing(package: str, extra: str, what: str) -> ConfigError:
    """Returns the error for a package that is not installed, with the extra that brings it."""
    return ConfigError(f"{what} needs the package {package}: pip install 'torchladder[{extra}]'.")

"""Optional packages: the error for a missing one."""

from __future__ import annotations

from torchladder.registry import ConfigError


def missing_package(package: str, extra: str, what: str) -> ConfigError:
    """Returns the error for a package that is not installed, with the extra that installs it."""
    return ConfigError(f"{what} needs the package {package}: pip install 'torchladder[{extra}]'.")

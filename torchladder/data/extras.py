"""Packages that only an extra installs."""

from __future__ import annotations

import importlib
from typing import Any

from torchladder.registry import ConfigError


def import_extra(name: str, extra: str, what: str) -> Any:
    """Imports ``name`` as ``import name`` does: of ``a.b`` it returns ``a``.

    Raises:
        ConfigError: the package is not installed; names the extra that installs it, and ``what`` needs it.
    """
    package = name.partition(".")[0]
    try:
        imported = importlib.import_module(package)
        importlib.import_module(name)
    except ImportError:
        raise ConfigError(
            f"{what} needs the package {package}: pip install {package}, of the extra torchladder[{extra}]."
        ) from None
    return imported

"""Text that every machine has, so that a first run or an experiment needs no download: what Python has installed."""

from __future__ import annotations

import ast
import hashlib
import os
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from torchladder.data.sources import Document, TextSource, register_text
from torchladder.data.text.text_files import TextFiles
from torchladder.registry import require

SITE_PACKAGES = ("site-packages", "dist-packages")
MIN_PROSE = 200  # characters: shorter documents are names more than sentences


@register_text("python-stdlib")
def python_stdlib() -> TextSource:
    """The running interpreter's standard library, a document per ``.py`` file: about 1,800 documents, 31 MB."""
    # Some test files use other encodings, and many __init__.py are empty.
    return TextFiles("python-stdlib", _python_files("stdlib"), on_error="repair", report=False)


@register_text("python-packages")
def python_packages() -> TextSource:
    """The standard library and all installed packages, a document per ``.py`` file, each text once.

    With torch and what it needs, about 10,000 documents and 150 MB; more with more packages.
    """
    return InstalledFiles("python-packages", _all_python_files(), on_error="repair", report=False)


@register_text("python-docs")
def python_docs() -> TextSource:
    """The docstrings of the standard library and of all installed packages, a document per ``.py`` file: prose."""
    return Docstrings("python-docs", _all_python_files(), on_error="repair", report=False)


@dataclass(frozen=True)
class InstalledFiles(TextFiles):
    """Files of packages, which hold copies of one another: of equal texts only the first is a document.

    What is made of the same files differs by source, so the name is a part of the keys.
    """

    def stamp(self) -> str:
        return f"{self.name}-{super().stamp()}"

    def fingerprint(self) -> str:
        return f"{self.name}-{super().fingerprint()}"

    def documents(self) -> Iterator[Document]:
        seen: set[bytes] = set()
        for document in super().documents():
            digest = hashlib.sha256(document.text.encode()).digest()
            if digest not in seen:
                seen.add(digest)
                yield document


@dataclass(frozen=True)
class Docstrings(InstalledFiles):
    """The docstrings of each file as one document; files with hardly any are left out."""

    def documents(self) -> Iterator[Document]:
        for document in super().documents():
            text = "\n\n".join(_docstrings(document.text))
            if len(text) >= MIN_PROSE:
                yield document._replace(text=text)


def _python_files(scheme: str) -> tuple[tuple[str, Path], ...]:
    """Returns name and path of each ``.py`` file under a folder of the installation (``sysconfig``), in order."""
    root = sysconfig.get_paths()[scheme]
    found = []
    for folder, inner, names in os.walk(root):
        inner[:] = [name for name in inner if name not in (*SITE_PACKAGES, "__pycache__")]
        found += [Path(folder, name) for name in names if name.endswith(".py")]
    require(bool(found), f"this interpreter has no .py files in {root}.")
    return tuple(sorted((path.relative_to(root).as_posix(), path) for path in found))


def _all_python_files() -> tuple[tuple[str, Path], ...]:
    packages = tuple((f"site-packages/{name}", path) for name, path in _python_files("purelib"))
    return _python_files("stdlib") + packages


def _docstrings(source: str) -> Iterator[str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's strings
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):  # templates, other versions of Python
        return
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(tree):
        if isinstance(node, documented) and (docstring := ast.get_docstring(node)):
            yield docstring

"""Tokenizer files: finding them, recognizing their kind, and loading a tokenizer from one."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

from torchladder.data.disk_cache import cache_path
from torchladder.data.tokenizer.tokenizer_registry import Tokenizer, registry, tokenizer_formats
from torchladder.registry import ConfigError


def file_names() -> list[str]:
    """Returns the names of tokenizer files in a folder; the first one that exists is the folder's tokenizer."""
    return sorted({known.file_name for known in tokenizer_formats.values()} - {""})


def find_file(path: str | Path) -> Path:
    """Returns the tokenizer file of a path: itself, or the one in a folder.

    Raises:
        ConfigError: there is none.
    """
    place = Path(path).expanduser()
    if place.is_dir():
        found = [place / name for name in file_names() if (place / name).is_file()]
        if not found:
            raise ConfigError(f"the folder {str(path)!r} holds no tokenizer. Known: {', '.join(file_names())}.")
        return found[0]
    if not place.is_file():
        raise ConfigError(f"the tokenizer {str(path)!r} is not a file or folder.")
    return place


def recognize_kind(content: bytes) -> str:
    """Returns the registered tokenizer that reads a file with this content, empty if none does."""
    return next((name for name, known in tokenizer_formats.items() if known.recognize(content)), "")


def kind_hint(content: bytes, kind: str) -> str:
    """Returns a sentence for the error of ``kind`` that names the tokenizer that does read the content."""
    other = recognize_kind(content)
    return f' It looks like a file for tokenizer.name = "{other}".' if other not in ("", kind) else ""


def load_tokenizer(name: str, bos_token: str = "", eos_token: str = "") -> Tokenizer:
    """Returns the tokenizer of a file or folder, whose content decides the kind, or a kind without a file (``bytes``).

    Args:
        name: a file, a folder with one, or a registered name.
        bos_token: the token that begins a document, for kinds with that key (``tokenizer.json``).
        eos_token: the token that ends a document, for kinds with that key.

    Raises:
        ConfigError: there is no such file, it is damaged or of no known kind, or the kind has no such key.
    """
    settings = {key: token for key, token in (("bos_token", bos_token), ("eos_token", eos_token)) if token}
    if name in registry.names() and "path" not in registry.parameters(name):
        kind = name
    else:
        kind = recognize_kind(find_file(name).read_bytes())
        settings["path"] = name
    if not kind:
        known = ", ".join(sorted(tokenizer_formats))
        raise ConfigError(f"{name!r} is no tokenizer file of a known kind. Known: {known}.")
    parameters = registry.parameters(kind)
    if settings.keys() - parameters:
        raise ConfigError(f"{name!r} is a {kind} tokenizer with its own bos and eos: drop --bos-token and --eos-token.")
    defaults = {key: parameter.default for key, parameter in parameters.items()}
    section = SimpleNamespace(name=kind, **(defaults | settings))
    tokenizer = registry.build(section, texts=lambda: iter(()), cache=cache_path())
    if tokenizer is None:
        raise ConfigError(f"{name!r} is no tokenizer: name a file, a folder or bytes.")
    return tokenizer

"""Uploads an exported folder to a model repository on the Hugging Face Hub."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torchladder.data.extras import import_extra
from torchladder.registry import ConfigError


class HubRepository:
    """A model repository on the Hub; it is created now if it does not exist, so that a refusal comes before the work.

    The token is that of ``hf auth login`` or of the variable HF_TOKEN.

    Args:
        name: ``owner/name``, or ``name`` for the owner of the token.
        private: whether a new repository is private.

    Raises:
        ConfigError: huggingface_hub is not installed, the name is invalid, or the Hub refuses or cannot be reached.
    """

    def __init__(self, name: str, private: bool) -> None:
        api = import_extra("huggingface_hub", "hub", "--push-to-hub").HfApi()
        with _as_config_error(name):
            self.name = api.create_repo(name, private=private, exist_ok=True).repo_id
        self._api = api

    def upload(self, folder: Path) -> str:
        """Uploads all files of a folder as one commit; returns the commit's address.

        Raises:
            ConfigError: the Hub refuses or cannot be reached; says how to upload the folder later.
        """
        with _as_config_error(self.name, f" {folder} is complete, upload it with: hf upload {self.name} {folder}"):
            commit = self._api.upload_folder(
                repo_id=self.name, folder_path=folder, commit_message="Upload a torchladder checkpoint"
            )
        return str(commit)


@contextmanager
def _as_config_error(name: str, after: str = "") -> Iterator[None]:
    try:
        yield
    except Exception as error:  # of the HTTP client as well, which no class of huggingface_hub is a base of
        if getattr(getattr(error, "response", None), "status_code", None) in (401, 403):
            why = "the token may not write there. Log in with hf auth login, or set HF_TOKEN to a token that may write"
        else:
            why = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise ConfigError(f"--push-to-hub {name}: {why.rstrip('.')}.{after}") from error

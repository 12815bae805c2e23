"""Uploads to a stand-in for the Hub."""

import sys

import pytest
import torch

from torchladder import checkpoint, commands, models
from torchladder.commands import convert
from torchladder.models.hf import hf_weights
from torchladder.models.hf.adapter import HFMetadata

hub = pytest.importorskip("huggingface_hub")
pytest.importorskip("safetensors")


class Denied(OSError):
    """What the client raises for an HTTP status."""

    def __init__(self, status):
        super().__init__(f"{status} Client Error. (Request ID: Root=1)\n\nmore\nlines")
        self.response = type("Response", (), {"status_code": status})()


@pytest.fixture
def calls(monkeypatch):
    """What reaches the Hub."""
    made = []

    class Api:
        def create_repo(self, name, private, exist_ok):
            hub.utils.validate_repo_id(name)
            made.append(("create", name, private, exist_ok))
            return hub.RepoUrl(f"https://huggingface.co/{name if '/' in name else f'me/{name}'}")

        def upload_folder(self, repo_id, folder_path, commit_message):
            made.append(("upload", repo_id, {file.name for file in folder_path.iterdir()}))
            return f"https://huggingface.co/{repo_id}/commit/1"

    monkeypatch.setattr(hub, "HfApi", Api)
    made.append(Api)
    return made


@pytest.fixture(scope="module")
def step(tmp_path_factory):
    """A checkpoint."""
    folder = tmp_path_factory.mktemp("step")
    model = models.LlamaConfig(dim=32, n_layers=1, n_heads=2, ffn_dim=32, vocab_size=64)
    (folder / "hf").mkdir()
    hf_weights.save_hf_weights(
        models.Llama(model, seq_len=8), folder / "hf", HFMetadata(64), torch.float32, is_writer=True
    )
    assert convert.run(["from-hf", str(folder / "hf"), "--output", str(folder / "run")]) == 0
    assert checkpoint.is_complete(folder / "run" / "checkpoint" / "step-0")
    return folder / "run" / "checkpoint" / "step-0"


def call(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["torchladder", "convert", "to-hf", *map(str, words)])
    return commands.main()


@pytest.mark.parametrize(("more", "private"), [([], False), (["--private"], True)])
def test_an_exported_folder_is_uploaded(step, tmp_path, monkeypatch, capsys, calls, more, private):
    words = [step, "--output", tmp_path / "out", "--push-to-hub", "tiny", *more]
    assert call(monkeypatch, *words) == 0
    files = {file.name for file in (tmp_path / "out").iterdir()}
    assert calls[1:] == [("create", "tiny", private, True), ("upload", "me/tiny", files)]
    assert {"config.json", "model.safetensors"} <= files
    assert "https://huggingface.co/me/tiny/commit/1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("me/tiny", Denied(401), "the token may not write there. Log in with hf auth login, or set HF_TOKEN to"),
        ("me/tiny", Denied(500), "500 Client Error. (Request ID: Root=1)."),
        ("me/tiny", ConnectionError("no route to host"), "no route to host."),
        ("me//tiny", None, "Repo id must be in the form"),
    ],
)
def test_a_refusal_is_one_line_before_the_conversion(step, tmp_path, monkeypatch, capsys, calls, name, error, message):
    def refuse(*_, **__):
        raise error

    if error is not None:
        monkeypatch.setattr(calls[0], "create_repo", refuse)
    assert call(monkeypatch, step, "--output", tmp_path / "out", "--push-to-hub", name) == 2
    shown = capsys.readouterr().err.strip()
    assert f"--push-to-hub {name}: {message}" in shown
    assert len(shown.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_what_could_not_be_uploaded_is_kept(step, tmp_path, monkeypatch, capsys, calls):
    def refuse(*_, **__):
        raise Denied(403)

    monkeypatch.setattr(calls[0], "upload_folder", refuse)
    assert call(monkeypatch, step, "--output", tmp_path / "out", "--push-to-hub", "me/tiny") == 2
    assert f"upload it with: hf upload me/tiny {tmp_path / 'out'}" in capsys.readouterr().err
    assert (tmp_path / "out" / "config.json").exists()


def test_the_error_names_the_extra(step, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert call(monkeypatch, step, "--output", tmp_path / "out", "--push-to-hub", "me/tiny") == 2
    assert "pip install huggingface_hub, of the extra torchladder[hub]" in capsys.readouterr().err
    assert call(monkeypatch, step, "--output", tmp_path / "out", "--private") == 2
    assert "--private needs --push-to-hub" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()

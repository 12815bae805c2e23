"""Prepared tokens and the run's tokenizer: another one is refused, an unknown one reported, a row shown as text."""

import json
import logging
import struct
import textwrap
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from torchladder import data, train
from torchladder.commands import evaluate, prepare
from torchladder.data import SourceConfig
from torchladder.data.formats.indexed import IndexedWriter
from torchladder.data.tokenizer import TokenizerTrainingConfig, load_tokenizer, train_tokenizer
from torchladder.registry import ConfigError

DEFAULTS = {key: parameter.default for key, parameter in data.registry.parameters("rows").items()}
TEXT = Path(textwrap.__file__).read_text()
FACTS = dict(seq_len=16, split="train", dp_rank=0, dp_degree=1, local_batch_size=2, global_batch_size=4, steps=2)
FACTS |= {"weight_changes": {}, "tokenizer": None, "vocab_size": 512}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Two tokenizers of enough tokens, and a text prepared with the first of them."""
    root = tmp_path_factory.mktemp("root")
    for size in (400, 420):
        (root / f"t{size}").mkdir()
        for name, content in train_tokenizer([TEXT], TokenizerTrainingConfig(vocab_size=size)).items():
            (root / f"t{size}" / name).write_bytes(content)
    (root / "a.txt").write_text(TEXT)
    words = ["--input", str(root / "a.txt"), "--output", str(root / "tokens"), "--tokenizer", str(root / "t400")]
    assert prepare.run([*words, "--workers", "1"]) == 0
    return root


def load(root, path="tokens.bin", **changes):
    facts = {key: changes.pop(key, value) for key, value in FACTS.items()}
    base = {"sources": [SourceConfig(path=str(root / path))], "validation_sources": [], "exclude": []}
    base |= {"domains": {}, "languages": {}, "skip_rows": [], "cache_folder": str(root / "cache")}
    return data.registry.build(SimpleNamespace(name="rows", **{**DEFAULTS, **base, **changes}), **facts)


def test_tokens_of_another_tokenizer_are_refused(root, caplog):
    one, other = (load_tokenizer(str(root / name)) for name in ("t400", "t420"))
    plain = next(load(root, tokenizer=one))
    named = rf"tokens\.bin was written with the tokenizer .*t400 \(400 tokens, {one.fingerprint[:26]}\), not with the "
    named += rf"run's \(420 tokens, {other.fingerprint[:26]}\).*data\.check_tokenizer = false"
    for split in ("train", "validation"):
        held = [SourceConfig(path=str(root / "tokens.bin"))] if split == "validation" else []
        with pytest.raises(ConfigError, match=named):
            load(root, tokenizer=other, split=split, validation_sources=held)
    with caplog.at_level(logging.WARNING):
        accepted = next(load(root, tokenizer=other, check_tokenizer=False))
    assert "was written with the tokenizer" in caplog.text
    assert accepted.tokens.equal(plain.tokens)


def test_without_a_tokenizer_the_models_vocabulary_is_compared(root):
    assert load(root)
    with pytest.raises(ConfigError, match=r"400 tokens, .* vocab_size is 399\. Set model\.vocab_size to 400"):
        load(root, vocab_size=399)


def test_the_report_shows_the_text_of_the_first_row(root):
    one = load_tokenizer(str(root / "t400"))
    loader = load(root, tokenizer=one)
    loader.seek(4)
    *_, row = loader.describe()
    assert row == f"  row 4 begins with {one.decode(next(loader).tokens[0].tolist())[:80]!r}"
    loader = load(root)
    *_, row = loader.describe()
    assert row == f"  row 0 begins with the tokens {' '.join(map(str, next(loader).tokens[0].tolist()))}"
    assert not any("cannot be verified" in line for line in loader.describe())


def test_tokens_without_metadata_are_reported(root):
    with IndexedWriter(root / "foreign", np.dtype(np.uint16)) as writer:
        writer.add([1] * 40)
    (root / "chunk.bin").write_bytes(struct.pack("<7sQBQ40H", b"LITPKDS", 1, 8, 40, *[2] * 40))
    for path in ("foreign.bin", "chunk.bin"):
        loader = load(root, path, tokenizer=load_tokenizer(str(root / "t400")))
        assert f"  the tokenizer of {root / path} is unknown and cannot be verified" in loader.describe()


def test_a_run_and_an_evaluation_refuse_with_one_line(root, tmp_path, capsys):
    (tmp_path / "run.toml").write_text(
        f"[model]\nflavor = 'debug'\nvocab_size = 512\n[tokenizer]\nname = 'sentencepiece'\npath = '{root}/t420'\n"
        f"[data]\nsources = [{{path = '{root}/tokens.bin'}}]\n[validation]\nenable = false\n"
        f"[training]\nsteps = 1\nseq_len = 16\nlocal_batch_size = 1\n[job]\ndump_folder = '{tmp_path}/run'\n"
        "[checkpoint]\nenable = true\n"
    )
    words = ["--job.config_file", str(tmp_path / "run.toml")]
    assert train.main(words) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(f"torchladder: {root}/tokens.bin was written with the tokenizer {root}/t400 (400 tokens")
    assert train.main([*words, "--data.no_check_tokenizer"]) == 0
    files = [str(tmp_path / "run"), "--files", str(root / "tokens.bin"), "--output", str(tmp_path / "out.csv")]
    assert evaluate.run(files) == 0  # accepted, as in its run
    with pytest.raises(ConfigError, match=r"not with the run's \(420 tokens"):
        evaluate.run([*files, "--check-tokenizer"])


def test_metadata_of_a_merge_without_a_tokenizer_says_nothing(root):
    about = json.loads((root / "tokens.json").read_text())
    for suffix in (".bin", ".idx"):
        (root / f"copy{suffix}").write_bytes((root / f"tokens{suffix}").read_bytes())
    (root / "copy.json").write_text(json.dumps(about | {"tokenizer": {}}))
    loader = load(root, "copy.bin", tokenizer=load_tokenizer(str(root / "t420")))
    assert any("cannot be verified" in line for line in loader.describe())

import gzip
import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from torchladder.commands import inspect, merge, prepare, tokenizer
from torchladder.data.formats.indexed import IndexedTokens, IndexedWriter
from torchladder.registry import ConfigError


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working folder with text in two languages."""
    monkeypatch.chdir(tmp_path)
    for language, line in [("en", "the quick brown fox"), ("de", "der schnelle braune Fuchs")]:
        (tmp_path / "data" / language).mkdir(parents=True)
        for number in range(2):
            lines = [json.dumps({"body": f"{line} {number} {i}\n" * (i + 1)}) for i in range(20)]
            content = "\n".join(lines).encode()
            (tmp_path / "data" / language / f"{number}.jsonl.gz").write_bytes(gzip.compress(content))
    return tmp_path


def prepared(*extra, output="tokens/all"):
    words = "--input data/en data/de/*.gz --text-key body --tokenizer bytes --workers 1"
    return prepare.run([*words.split(), "--output", output, *extra])


def test_prepare_reports_what_it_wrote(here, capsys):
    assert prepared() == 0
    said = capsys.readouterr().out
    assert "tokens/all.bin: 80 documents" in said
    assert "as uint16; bos: no token, eos: 256" in said
    pair = IndexedTokens("tokens/all")
    assert bytes(pair[0][:-1].tolist()).decode() == "the quick brown fox 0 0\n"
    assert bytes(pair[79][:25].tolist()).decode() == "der schnelle braune Fuchs"
    assert prepared() == 0  # nothing to do
    assert prepared("--no-eos", "--overwrite") == 0
    assert IndexedTokens("tokens/all").num_tokens == pair.num_tokens - 80


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--shard", "2"], "--shard 2: must be I/N"),
        (["--shard", "2/2"], "N shards are numbered 0/N to N-1/N"),
        (["--executor", "rey"], "unknown executor 'rey'. Did you mean 'ray'"),
        (["--bos"], "no bos token"),
        (["--eos-token", "</s>"], "with its own bos and eos"),
        (["--tokenizer", "none.json"], "'none.json' is not a file or folder"),
        (["--text-key", "txt"], r"0\.jsonl\.gz:1: text_key: unknown key 'txt'"),
        (["--workers", "0"], "--workers 0: must be 1 or more"),
    ],
)
def test_prepare_refuses(here, extra, message):
    with pytest.raises(ConfigError, match=message):
        prepared(*extra)
    assert not list(here.glob("tokens/*.bin"))


@pytest.mark.parametrize("command", [prepare, merge, inspect, tokenizer])
def test_help_and_wrong_options(command, capsys):
    with pytest.raises(SystemExit) as end:
        command.run(["--help"])
    assert end.value.code == 0
    said = " ".join(capsys.readouterr().out.split())
    assert " ".join(command.__doc__.split()) in said
    assert f"torchladder {command.__name__.split('.')[-1]} " in said.split("example")[1]
    with pytest.raises(SystemExit) as end:
        command.run(["--no-such-option"])
    assert end.value.code == 2


def test_an_interrupt_is_reported(here, capsys, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare, "prepare_dataset", interrupted)
    assert prepared() == 130
    assert "run the same command again to continue" in capsys.readouterr().err


def test_ctrl_c_ends_all_workers_with_one_line(here):
    # A shell starts jobs in the background with the signal ignored, and children inherit that.
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    lines = [json.dumps({"text": "many words " * 100}) + "\n"] * 20_000
    for number in range(4):
        (here / "data" / f"{number}.jsonl").write_text("".join(lines))
    words = "prepare --input data/*.jsonl --output tokens/all --tokenizer bytes --workers 2 --part-bytes 100000"
    command = [sys.executable, "-m", "torchladder", *words.split()]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    signal.signal(signal.SIGINT, previous)
    while process.poll() is None and not (here / "tokens" / "all.parts").is_dir():
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does, while workers start
    _, said = process.communicate()
    assert process.returncode == 130
    assert said.strip() == (
        "torchladder: interrupted; finished parts are kept in tokens/all.parts; run the same command again to continue"
    )


def test_shards_are_merged(here, capsys):
    prepared()
    for number in range(3):
        prepared("--shard", f"{number}/3", output="tokens/part")
    shards = sorted(str(path) for path in here.glob("tokens/part-*.*"))
    assert len(shards) == 9
    shards = [path for path in shards if not path.endswith(".json")]  # what a glob over both files of a pair gives
    assert merge.run(["tokens/merged", *shards]) == 0
    assert "tokens/merged.bin: 80 documents" in capsys.readouterr().out
    for suffix in ("bin", "idx", "json"):
        assert (here / f"tokens/merged.{suffix}").read_bytes() == (here / f"tokens/all.{suffix}").read_bytes()


def test_a_merge_of_tokens_without_metadata_is_inspected(here, capsys):
    prepared()
    for name in ("one", "two"):
        for suffix in ("bin", "idx"):
            (here / f"tokens/{name}.{suffix}").write_bytes((here / f"tokens/all.{suffix}").read_bytes())
    assert merge.run(["tokens/both", "tokens/one.bin", "tokens/two.bin"]) == 0
    assert inspect.run(["tokens/both"]) == 0
    assert "tokenizer: unknown" in capsys.readouterr().out


def test_inspect_shows_and_verifies(here, capsys):
    prepared()
    capsys.readouterr()
    assert inspect.run(["tokens/all.bin", "--document", "1"]) == 0
    said = capsys.readouterr().out
    for part in ("80 documents", "uint16", "tokenizer: bytes, 257 tokens", "eos 256", "4 files", "the quick", "█"):
        assert part in said
    assert "checksums: verified" in said
    assert inspect.run(["tokens/all", "--json"]) == 0
    about = json.loads(capsys.readouterr().out)
    assert about["documents"] == 80 == sum(documents for _, _, documents, _ in about["histogram"])
    assert about["tokens"] == sum(tokens for _, _, _, tokens in about["histogram"])
    assert [context for context, _, _ in about["contexts"]] == [1024 << power for power in range(8)]
    lengths = IndexedTokens("tokens/all").lengths.astype(np.int64)
    assert lengths.max() < 1024
    seen = (lengths * (lengths + 1) // 2).sum() / lengths.sum()
    assert all(row[1:] == [0.0, pytest.approx(seen)] for row in about["contexts"])
    assert re.search(rf"131,072 +0.0% +{seen:,.0f}", said)

    content = bytearray((here / "tokens/all.bin").read_bytes())
    content[5] ^= 1
    (here / "tokens/all.bin").write_bytes(content)
    assert inspect.run(["tokens/all"]) == 1
    assert "checksums: MISMATCH, tokens/all.bin" in capsys.readouterr().out
    assert inspect.run(["tokens/all", "--no-checksums"]) == 0
    assert "checksums: not verified" in capsys.readouterr().out


def test_inspect_of_a_dataset_without_metadata(here, capsys):
    with IndexedWriter("x", "uint16") as writer:
        for document in ([], [1], [7] * 300):
            writer.add(document)
    assert inspect.run(["x", "--document", "2"]) == 0
    said = capsys.readouterr().out
    assert "document 2, first 200 tokens (pass --tokenizer to decode): 7 7 7" in said
    assert "checksums: none" in said
    with pytest.raises(ConfigError, match="--document 3: the dataset has 3 documents"):
        inspect.run(["x", "--document", "3"])
    with IndexedWriter("y", "uint16"):
        pass
    assert inspect.run(["y"]) == 0
    assert "0 documents" in capsys.readouterr().out


def test_a_tokenizer_is_trained_and_used(here, capsys):
    words = "train --input data --text-key body --output tokenizers/mine --vocab-size 300"
    assert tokenizer.run(words.split()) == 0
    assert "tokenizers/mine: 300 tokens" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="already exists; --overwrite replaces it"):
        tokenizer.run(words.split())
    model = (here / "tokenizers/mine/tokenizer.model").read_bytes()
    assert tokenizer.run([*words.split(), "--overwrite"]) == 0
    assert (here / "tokenizers/mine/tokenizer.model").read_bytes() == model
    record = json.loads((here / "tokenizers/mine/training.json").read_text())
    assert record["documents"] == 80
    assert record["normalization"] == "none"
    assert prepared("--tokenizer", "tokenizers/mine", "--bos") == 0
    capsys.readouterr()
    inspect.run(["tokens/all"])
    said = capsys.readouterr().out
    assert "bos 1, eos 2" in said
    assert "the quick brown fox 0 0" in said
    with pytest.raises(ConfigError, match="was written with the tokenizer sentencepiece"):
        inspect.run(["tokens/all", "--tokenizer", "bytes"])


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("--vocab-size 100000", "no tokenizer with vocab_size 100000"),
        ("--kind byte-bpe --vocab-size 100000", "no tokenizer with vocab_size 100000"),
        ("--character-coverage 1.5", "--character-coverage 1.5: must be above 0"),
        ("--kind byte-bpe --character-coverage 0.9", "not for byte-bpe"),
        ("--normalization nfc", "unknown normalization for bpe 'nfc'"),
        ("--special-tokens <a> <a>", "--special-tokens <a> <a>: must be different"),
        ("--sample-chars 0", "--sample-chars 0: must be 1 or more"),
        ("--vocab-size 0", "--vocab-size 0: must be 1 or more"),
    ],
)
def test_training_refuses(here, extra, message):
    with pytest.raises(ConfigError, match=message):
        tokenizer.run([*["train", "--input", "data", "--text-key", "body", "--output", "tok"], *extra.split()])
    assert not (here / "tok").exists()


PER_FILE = ["--text-key", "body", "--tokenizer", "bytes", "--workers", "1", "--output", "tokens", "--per-file"]


def test_each_file_becomes_a_pair(here, capsys):
    words = ["--input", "data", *PER_FILE, "--validation-fraction", "0.2"]
    assert prepare.run(words) == 0
    names = sorted(path.relative_to(here / "tokens").as_posix() for path in here.glob("tokens/**/*.bin"))
    of_files = [f"{language}/{number}" for language in ("de", "en") for number in (0, 1)]
    assert names == [f"{name}{split}.bin" for name in of_files for split in ("-validation", "")]
    assert capsys.readouterr().out.count("documents") == 8
    together = [word for word in words if word != "--per-file"]
    assert prepare.run([*together, "--output", "whole"]) == 0  # holds out the same documents
    counts = [len(IndexedTokens(f"tokens/{name}-validation")) for name in of_files]
    assert sum(counts) == len(IndexedTokens("whole-validation")) > 0
    written = (here / "tokens/en/1.bin").stat().st_mtime_ns
    (here / "tokens/de/0.json").unlink()  # as if the command had been killed before it
    (here / "tokens/de/0.idx").unlink()
    assert prepare.run(words) == 0
    assert (here / "tokens/en/1.bin").stat().st_mtime_ns == written
    assert (here / "tokens/de/0.json").exists()


def test_shards_of_pairs_are_files(here):
    for number in range(3):
        assert prepare.run(["--input", "data", *PER_FILE, "--shard", f"{number}/3"]) == 0
        assert len(list(here.glob("tokens/**/*.bin"))) == [2, 3, 4][number]


def test_two_files_of_one_pair_are_refused(here):
    words = ["--input", "data/en", "data/de", *PER_FILE]
    with pytest.raises(ConfigError, match=r"would both become tokens/0\.bin: name the folder that contains both"):
        prepare.run(words)
    (here / "tokens").write_text("")
    with pytest.raises(ConfigError, match="--output tokens is a file"):
        prepare.run(words)


def test_documents_without_an_eos_get_it(here, capsys):
    with IndexedWriter(here / "pair", np.dtype(np.uint16)) as writer:
        for document in ([5, 6], [7, 2], [], [2], [9]):
            writer.add(document)
    assert merge.run(["ended", "pair.bin", "--append-eos", "2"]) == 0
    ended = IndexedTokens("ended")
    assert [ended[number].tolist() for number in range(5)] == [[5, 6, 2], [7, 2], [], [2], [9, 2]]
    assert "eos: 2" in capsys.readouterr().out
    assert inspect.run(["ended"]) == 0
    assert "tokenizer: unknown" in capsys.readouterr().out
    assert merge.run(["again", "ended", "--append-eos", "2"]) == 0
    assert (here / "again.bin").read_bytes() == (here / "ended.bin").read_bytes()
    prepared("--no-eos", output="none")
    assert merge.run(["some", "none", "--append-eos", "256"]) == 0
    prepared(output="all")
    assert (here / "some.bin").read_bytes() == (here / "all.bin").read_bytes()


@pytest.mark.parametrize(
    ("eos", "message"),
    [
        ("-1", "must be the id of a token"),
        ("257", "their tokenizer has 257 tokens"),
        ("7", "already end with the token"),
    ],
)
def test_an_eos_that_cannot_be(here, eos, message):
    prepared(*([] if eos == "7" else ["--no-eos"]))
    with pytest.raises(ConfigError, match=message):
        merge.run(["ended", "tokens/all", f"--append-eos={eos}"])

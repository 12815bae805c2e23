"""torchladder import-mixture: the probabilities of ALLaM's script, and every entry imported or named."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchladder import commands, config
from torchladder.data.formats.indexed import IndexedWriter
from torchladder.data.mixing.mixture_import import MixtureImport, Shard
from torchladder.registry import ConfigError

NAMES = [
    "en_books_split_00_text_document_dc=2_sc=2_tc=1000.bin",
    "en_code_split_00_text_document_dc=2_sc=2_tc=3000.bin",
    "ar_books_split_00_text_document_dc=2_sc=2_tc=500.bin",
    "ar_trans-web_split_00_text_document_dc=2_sc=2_tc=700.bin",
    "ar_poems_split_00_text_document_dc=2_sc=2_tc=10.bin",
]
RATIO = {"en": {"books": 1, "code": 2}, "ar": {"books": 3}, "trans-web": 2.5, "news": 4}
PROBABILITIES = {"en": 3, "ar": 1, "fr": 2}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    files = {
        "data.json": [*NAMES, NAMES[0].replace(".bin", ".idx"), "notes.txt"],
        "data_ratio.json": RATIO,
        "lang_prob.json": PROBABILITIES,
        "exclude_iterator.json": {"exclude_iterator_name": [NAMES[2], "gone.bin"]},
    }
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_files_of_a_recipe_are_read_as_they_are(folder, capsys):
    argv = ["--data-signature", "data.json", "--folder", "/data", "--data-ratio", "data_ratio.json"]
    argv += ["--lang-prob", "lang_prob.json", "--exclude", "exclude_iterator.json", "--total-tokens", "10000"]
    assert commands.main(["import-mixture", *argv, "--output", "mixture.toml"]) == 0
    said = capsys.readouterr().err
    text = (folder / "mixture.toml").read_text()
    data = config.load_file(folder / "mixture.toml").data
    assert [(one.language, one.domain) for one in data.sources] == [
        ("en", "books"), ("en", "code"), ("ar", "books"), ("ar", "trans-web"),
    ]  # fmt: skip
    assert data.sources[0].path == f"/data/{NAMES[0]}"
    assert data.domains == {"en": {"books": 1, "code": 2}, "ar": {"trans-web": 2.5}}
    assert data.languages == {"en": 3, "ar": 1}
    assert data.exclude == [NAMES[2].removesuffix(".bin")]
    assert "0.107143    en_books_split_00" in said  # 1000 of 7000, times 3/4
    assert "1,000 tokens, 1,071 of 10,000 read, 1.07 epochs" in said
    for sentence in (
        "notes.txt: not a .bin file of tokens",
        "gone: excluded, but no shard has this name",
        "left out, its domain poems has no multiplier",
        "the probability of fr = 2: no shard of it is read",
        "the multiplier news = 4: no shard of it is read",
        "the multiplier ar.books = 3: no shard of it is read",
    ):
        assert sentence in said
        assert sentence in text
    assert commands.main(["import-mixture", *argv, "--output", "mixture.toml"]) == 2
    assert "mixture.toml exists" in capsys.readouterr().err


def test_shards_are_found_on_disk_and_counted_there(tmp_path, monkeypatch, capsys):
    for name, count in (("a/en_web_0", 30), ("b/en_web_0", 10)):  # one name in two folders
        with IndexedWriter(tmp_path / name, np.dtype(np.int32)) as writer:
            writer.add(np.arange(count))
    (tmp_path / "ratio.json").write_text('{"en": 2}')  # of all its domains
    monkeypatch.chdir(tmp_path)
    assert commands.main(["import-mixture", "--files", "*/*.bin", "--data-ratio", "ratio.json"]) == 0
    shown = capsys.readouterr()
    data = config.load_text(shown.out, "shown").data
    assert [one.title for one in data.sources] == ["a/en_web_0", "b/en_web_0"]
    assert data.domains == {"en": {"web": 2}}
    assert "0.750000    en_web_0: 30 tokens" in shown.err


shards = st.lists(
    st.builds(
        lambda number, language, domain, tokens: Shard(f"{language}_{domain}_{number}", language, domain, tokens),
        st.integers(0, 10**6), st.sampled_from(["en", "ar"]), st.sampled_from(["web", "math"]), st.integers(1, 10**6),
    ),
    min_size=1, max_size=6, unique_by=lambda shard: shard.prefix,
)  # fmt: skip
numbers = st.floats(0.25, 8)
ratios = st.fixed_dictionaries(
    {name: st.fixed_dictionaries({"web": numbers, "math": numbers}) for name in ("en", "ar")}
)


@given(shards, ratios, st.fixed_dictionaries({"en": numbers, "ar": numbers}))
def test_probabilities_are_those_of_the_script(shards, ratio, probabilities):
    """The reference is the script's formula; probabilities of languages without shards are left out."""
    present = {shard.language for shard in shards}
    total = sum(probabilities[language] for language in present)
    weighted = {one: one.tokens * ratio[one.language][one.domain] for one in shards}
    shown = MixtureImport(shards, ratio, probabilities).table()
    for shard in shards:
        of_language = sum(weighted[one] for one in shards if one.language == shard.language)
        expected = weighted[shard] / of_language * probabilities[shard.language] / total
        (line,) = (line for line in shown if line.endswith(f"  {shard.name}: {shard.tokens:,} tokens"))
        assert math.isclose(float(line.split()[0]), expected, abs_tol=1e-6)


@pytest.mark.parametrize(
    ("ratio", "probabilities", "words"),
    [
        ({"web": -1}, {}, "the data ratios: web = -1 must be a number, 0 or more"),
        ({"en": {"web": "2"}}, {}, "the data ratios of en: web = '2'"),
        ({}, {"en": {"web": 1}}, "the language probabilities: en = "),
        ({}, {"ar": 1}, "its language 'en' has no probability"),
        ({"math": 1}, {}, "no shard is left to read"),
        ({"web": 0}, {}, "no shard is left to read"),
    ],
)
def test_numbers_that_cannot_be(ratio, probabilities, words):
    with pytest.raises(ConfigError, match=words):
        MixtureImport([Shard("en_web", "en", "web", 1)], ratio, probabilities)


def test_names_and_files_that_cannot_be(folder, capsys):
    (folder / "bad.json").write_text("[1]")
    (folder / "worse.json").write_text("{")
    (folder / "plain.json").write_text('["plain.bin"]')
    for argv, words in (
        (["--data-signature", "bad.json"], "must be a JSON list of the names"),
        (["--data-signature", "worse.json"], "worse.json is not JSON"),
        (["--data-signature", "plain.json"], "'plain' does not say its language and domain"),
        (["--data-signature", "data.json", "--exclude", "bad.json"], "exclude_iterator_name"),
        (["--data-signature", "data.json", "--lang-prob", "nowhere.json"], "nowhere.json"),
        (["--files", "nowhere"], "no file matches"),
    ):
        assert commands.main(["import-mixture", *argv]) == 2
        assert words in capsys.readouterr().err

"""Text that a tokenizer has no token for: counted exactly, shown, and refused above a fraction."""

import json
import unicodedata
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

from torchladder.commands import inspect, prepare
from torchladder.data.prepare.cached_tokens import tokenize_cached
from torchladder.data.prepare.document_encoder import DocumentEncoder
from torchladder.data.prepare.text_counts import TextCounts
from torchladder.data.text import text_files
from torchladder.data.tokenizer import ByteTokenizer, load_tokenizer
from torchladder.registry import ConfigError

ENGLISH = "the quick brown fox jumps over a lazy dog and runs away\n" * 20
KINDS = ["sentencepiece", "WordLevel", "WordPiece", "BPE with unk", "BPE", "BPE of bytes", "BPE with ▁"]


def train(folder: Path, kind: str) -> str:
    """Writes a tokenizer that knows the letters of ENGLISH only."""
    folder.mkdir()
    if kind == "sentencepiece":
        with open(folder / "tokenizer.model", "wb") as file:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(ENGLISH.splitlines()), model_writer=file, vocab_size=60, minloglevel=2,
                hard_vocab_limit=False,
            )  # fmt: skip
        return str(folder)
    library = pytest.importorskip("tokenizers")
    name, _, variant = kind.partition(" ")
    unk = {"unk_token": "<unk>"} if name != "BPE" or variant == "with unk" else {}
    tokenizer = library.Tokenizer(getattr(library.models, name)(**unk))
    pre = {"of bytes": library.pre_tokenizers.ByteLevel(), "with ▁": library.pre_tokenizers.Metaspace()}
    tokenizer.pre_tokenizer = pre.get(variant, library.pre_tokenizers.Whitespace())
    special = ["</s>", *unk.values()]
    trainer = getattr(library.trainers, f"{name.replace('BPE', 'Bpe')}Trainer")
    tokenizer.train_from_iterator([ENGLISH], trainer(special_tokens=special, show_progress=False, vocab_size=90))
    tokenizer.save(str(folder / "tokenizer.json"))
    return str(folder)


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    root = tmp_path_factory.mktemp("tokenizers")
    return {kind: train(root / str(number), kind) for number, kind in enumerate(KINDS)}


def count(tokenizer, *texts):
    return DocumentEncoder(tokenizer)(list(texts), str).counts


@pytest.mark.parametrize("kind", KINDS)
def test_unknown_text_is_counted(places, kind):
    tokenizer = load_tokenizer(places[kind])
    known = count(tokenizer, "the quick fox", "a lazy dog")
    assert (known.text_bytes, known.unknown_fraction, known.unknown_words) == (23, 0, [])
    some = count(tokenizer, "the quick fox", "the Привет dog", "ж 😀")
    ids = [token for text in ("the quick fox", "the Привет dog", "ж 😀") for token in tokenizer.encode(text)]
    assert some.text_tokens == len(ids)  # without eos
    if tokenizer.unk is None:
        assert (some.unknown_tokens, some.dropped_characters) == (0, 8)
    else:
        assert (some.unknown_tokens, some.dropped_characters) == (ids.count(tokenizer.unk), 0)
        assert some.unknown_tokens >= 3
    assert some.unknown_words == ["Привет", "ж", "😀"]
    with pytest.raises(ConfigError, match=r"x: the tokenizer does not know \d+\.\d% of .*'Привет', 'ж', '😀'"):
        some.check("x", 0.01, "setting")
    some.check("x", 1.0, "setting")


def test_what_covers_all_bytes_knows_every_text(places, tmp_path):
    library = pytest.importorskip("tokenizers")
    content = json.loads(Path(places["BPE of bytes"], "tokenizer.json").read_text())
    missing = sorted(set(library.pre_tokenizers.ByteLevel.alphabet()) - content["model"]["vocab"].keys())
    content["model"]["vocab"] |= {symbol: 1000 + number for number, symbol in enumerate(missing)}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    for tokenizer in (load_tokenizer(str(tmp_path)), ByteTokenizer()):
        assert count(tokenizer, "Привет 😀\n").unknown_fraction == 0


def test_a_dropped_character_is_one_without_a_token(places):
    tokenizer = load_tokenizer(places["BPE"])

    @given(st.text(st.characters(codec="utf-8") | st.sampled_from("thequick жй"), max_size=20))
    def check(text):
        dropped = [letter for letter in text if not letter.isspace() and not tokenizer.encode(letter)]
        assert list(tokenizer.dropped(text)) == dropped

    check()


def test_unk_that_ends_documents_counts_in_texts_only(places, monkeypatch):
    tokenizer = load_tokenizer(places["WordLevel"])
    monkeypatch.setattr(tokenizer, "eos", tokenizer.unk)
    assert count(tokenizer, "the fox", "a dog").unknown_tokens == 0
    assert count(tokenizer, "the Ж", "a dog").unknown_tokens == 1


@given(st.lists(st.tuples(*[st.integers(0, 9)] * 4, st.lists(st.sampled_from("abcdefgh"), max_size=9)), max_size=6))
def test_sums_do_not_depend_on_the_parts(parts):
    counts = [TextCounts(*numbers, list(dict.fromkeys(words))[:5]) for *numbers, words in parts]
    halves = [sum(half, TextCounts()) for half in (counts[:3], counts[3:])]
    assert sum(counts, TextCounts()) == sum(halves, TextCounts())


def test_prepare_refuses_keeps_its_parts_and_accepts(places, tmp_path, capsys):
    (tmp_path / "en.txt").write_text(ENGLISH)
    (tmp_path / "ru.txt").write_text("Привет мир\n" * 5)
    words = ["--input", str(tmp_path), "--output", str(tmp_path / "out"), "--workers", "1"]
    words += ["--tokenizer", places["WordLevel"]]
    with pytest.raises(ConfigError, match=r"10 of 250 tokens are its unknown token, .*'Привет', 'мир'.*--max"):
        prepare.run(words)
    assert not (tmp_path / "out.bin").exists()
    assert prepare.run([*words, "--max-unknown-fraction", "0.04"]) == 0
    assert "continuing: 1 of 1 parts exist" in capsys.readouterr().err  # nothing is tokenized again
    about = json.loads((tmp_path / "out.json").read_text())["text_counts"]
    assert about == {
        "text_bytes": len(ENGLISH) + 5 * 20, "text_tokens": 250, "unknown_tokens": 10, "dropped_characters": 0,
        "unknown_words": ["Привет", "мир"],
    }  # fmt: skip
    assert inspect.run([str(tmp_path / "out")]) == 0
    assert "text: 1,220 bytes, 4.88 bytes per token, 4.00% unknown" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="10 of 250 tokens"):
        prepare.run(words)  # what was accepted before
    with pytest.raises(ConfigError, match=r"--max-unknown-fraction = 2\.0: must be from 0 to 1"):
        prepare.run([*words, "--max-unknown-fraction", "2"])


def test_most_of_a_large_text_need_not_be_read_to_refuse_it(places, tmp_path, monkeypatch):
    monkeypatch.setattr("torchladder.data.prepare.document_encoder.BATCH_CHARS", 100)
    (tmp_path / "ru.jsonl").write_text('{"text": "Привет"}\n' * 500)
    seen = []
    tokenizer = load_tokenizer(places["BPE"])
    encode = tokenizer.encode_batch
    monkeypatch.setattr(tokenizer, "encode_batch", lambda texts, threads: seen.extend(texts) or encode(texts, threads))
    with pytest.raises(ConfigError, match="characters became no token"):
        tokenize_cached(text_files.text(str(tmp_path / "ru.jsonl")), tokenizer, tmp_path / "cache")
    assert len(seen) < 50


def test_the_cache_knows_what_was_accepted(places, tmp_path):
    (tmp_path / "a.txt").write_text("the quick fox Привет")
    source, tokenizer = text_files.text(str(tmp_path / "a.txt")), load_tokenizer(places["sentencepiece"])
    folder = tokenize_cached(source, tokenizer, tmp_path / "cache", 0.0, max_unknown_fraction=1.0)
    assert json.loads((folder / "settings.json").read_text())["text_counts"]["unknown_words"] == ["Привет"]
    with pytest.raises(ConfigError, match=r"for example in 'Привет'.*data\.max_unknown_fraction \(now 0\.01\)"):
        tokenize_cached(source, tokenizer, tmp_path / "cache", 0.0)
    with pytest.raises(ConfigError, match=r"data\.max_unknown_fraction = -1: must be from 0 to 1"):
        tokenize_cached(source, tokenizer, tmp_path / "cache", 0.0, max_unknown_fraction=-1)


def test_normalized_letters_are_known(places, tmp_path):
    library = pytest.importorskip("tokenizers")
    tokenizer = library.Tokenizer.from_file(f"{places['BPE']}/tokenizer.json")
    tokenizer.normalizer = library.normalizers.Sequence([library.normalizers.NFD(), library.normalizers.StripAccents()])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(str(tmp_path / "tokenizer.json"))
    assert loaded.dropped("thé " + unicodedata.normalize("NFD", "é") + "ж") == "ж"

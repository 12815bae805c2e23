import itertools
from types import SimpleNamespace

import pytest
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st

from torchladder.data import tokenizer
from torchladder.registry import ConfigError

TEXTS = [f"def f{i}(self):\n    if x:\n\treturn {i} * 'ab c'\n\n\n        # naïve café\n" * 5 for i in range(60)]
HARD = [
    "",
    " ",
    "   leading and trailing   ",
    "\n\n\t\tx\r\n\r",
    "def f():\n        return 1\n",
    "😀👩‍👩‍👧 é 中文 العربية",
    "\x00\x01\x1b[0m\x7f\x85\u2028",
    "▁literal ▁▁ mark▁",
    "▁",
    "<s></s><unk><0x0A>",
    "\u2047 ⁇ \u2585",
    "\ufeffbom",
    "e\u0301 ﬁ ① Ａ",
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return tokenizer.sentencepiece(lambda: iter(TEXTS), tmp_path_factory.mktemp("cache"), vocab_size=400)


def exact(part, text):
    ids = part.encode(text)
    assert part.decode(ids) == text
    assert part.encode_batch(["x", text])[1].tolist() == ids
    assert all(0 <= token < part.vocab_size for token in ids)
    assert part.eos not in ids


@pytest.mark.parametrize("text", HARD)
def test_hard_texts_come_back(trained, text):
    exact(trained, text)
    exact(tokenizer.Bytes(), text)


@given(st.text(alphabet=st.one_of(st.characters(codec="utf-8"), st.sampled_from(" \n\t▁a<"))))
@example("▁ ▁")
@settings(max_examples=300, deadline=None)
def test_any_text_comes_back(trained, text):
    exact(trained, text)
    exact(tokenizer.Bytes(), text)


def test_indentation_is_few_tokens(trained):
    assert len(trained.encode("        ")) < 8


@given(st.lists(st.integers(-5, 500)))
def test_any_ids_decode(trained, ids):
    assert isinstance(trained.decode(ids), str)
    assert isinstance(tokenizer.Bytes().decode(ids), str)


def test_special_ids_leave_no_trace(trained):
    assert trained.decode([trained.bos, *trained.encode("ab"), trained.eos, 0]) == "ab"
    assert tokenizer.Bytes().decode([97, 256, 98]) == "ab"


def test_bytes_are_built_without_settings(tmp_path):
    part = tokenizer.registry.build(SimpleNamespace(name="bytes"), texts=None, cache=tmp_path)
    assert (part.vocab_size, part.eos, part.bos) == (257, 256, None)
    assert tokenizer.registry.parameters("bytes") == {}


def test_training_is_deterministic_and_cached(tmp_path, monkeypatch):
    first = tokenizer.sentencepiece(lambda: iter(TEXTS), tmp_path / "a", vocab_size=400)
    second = tokenizer.sentencepiece(lambda: iter(TEXTS), tmp_path / "b", vocab_size=400)
    assert first.fingerprint == second.fingerprint
    other = tokenizer.sentencepiece(lambda: iter(TEXTS), tmp_path / "a", vocab_size=380)
    assert other.fingerprint != first.fingerprint
    monkeypatch.setattr(tokenizer, "_train", None)  # would raise if it were called
    again = tokenizer.sentencepiece(lambda: iter(TEXTS), tmp_path / "a", vocab_size=400)
    assert again.fingerprint == first.fingerprint


def test_other_texts_are_another_tokenizer(tmp_path, trained):
    other = tokenizer.sentencepiece(lambda: iter(TEXTS[:-1]), tmp_path, vocab_size=400)
    assert other.fingerprint != trained.fingerprint


def test_a_model_file_is_loaded(tmp_path, trained):
    tokenizer.sentencepiece(lambda: iter(TEXTS), tmp_path, vocab_size=400)
    model = next(tmp_path.rglob("*.model"))
    loaded = tokenizer.sentencepiece(lambda: iter(()), tmp_path, path=str(model))
    assert loaded.vocab_size == 400
    assert loaded.fingerprint == trained.fingerprint
    assert tokenizer.sentencepiece(lambda: iter(()), tmp_path, path=str(model), vocab_size=400).eos == loaded.eos
    with pytest.raises(ConfigError, match=r"vocab_size is 4096, but .* has 400"):
        tokenizer.sentencepiece(lambda: iter(()), tmp_path, path=str(model), vocab_size=4096)


def test_a_model_that_adds_a_space_keeps_its_way(tmp_path):
    with open(tmp_path / "m.model", "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(TEXTS), model_writer=file, vocab_size=340, byte_fallback=True, minloglevel=2
        )
    loaded = tokenizer.sentencepiece(lambda: iter(()), tmp_path, path=str(tmp_path / "m.model"))
    original = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "m.model"))
    assert loaded.encode("a ▁b") == original.encode("a ▁b")
    assert loaded.encode_batch(["a ▁b", "if x"])[0].tolist() == original.encode("a ▁b")


def test_errors_name_the_file(tmp_path):
    with pytest.raises(ConfigError, match=r"'none\.model' is not a file"):
        tokenizer.sentencepiece(lambda: iter(()), tmp_path, path="none.model")
    (tmp_path / "x.model").write_bytes(b"not a model")
    with pytest.raises(ConfigError, match=r"x\.model is no SentencePiece model"):
        tokenizer.sentencepiece(lambda: iter(()), tmp_path, path=str(tmp_path / "x.model"))


def test_too_little_text_is_an_error_and_leaves_no_model(tmp_path):
    with pytest.raises(ConfigError, match="vocab_size 4096 can be trained on these texts"):
        tokenizer.sentencepiece(lambda: iter(["a b c"]), tmp_path)
    with pytest.raises(ConfigError, match="no text to train"):
        tokenizer.sentencepiece(lambda: iter(()), tmp_path)
    assert not list(tmp_path.rglob("*.model"))


@given(st.lists(st.integers(0, 40), max_size=60), st.integers(1, 100))
def test_the_sample_is_spread_and_bounded(sizes, budget):
    texts = [f"{i:03}" + "x" * size for i, size in enumerate(sizes)]
    original, tokenizer.BUDGET = tokenizer.BUDGET, budget
    try:
        sample = tokenizer._sample(texts)
    finally:
        tokenizer.BUDGET = original
    assert sum(map(len, sample)) <= budget
    assert bool(sample) == bool(texts)
    numbers = [int(text[:3]) for text in sample if len(text) >= 3]
    assert len({b - a for a, b in itertools.pairwise(numbers)}) <= 1  # one stride


@given(st.text(alphabet="ab \n\r\u2028", max_size=300), st.integers(1, 20))
def test_paragraphs_are_the_text(text, limit):
    assert "".join(tokenizer._paragraphs(text, limit)) == text

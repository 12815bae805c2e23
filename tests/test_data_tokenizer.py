import base64
import itertools
import json
import pickle
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st

from torchladder.data import tokenizer
from torchladder.data.tokenizer import tokenizer_registry, tokenizer_training
from torchladder.data.tokenizer.tiktoken import _split_long
from torchladder.registry import ConfigError

TEXTS = [f"def f{i}(self):\n    if x:\n\treturn {i} * 'ab c'\n\n\n        # naïve café\n" * 5 for i in range(60)]
PROSE = Path(textwrap.__file__).read_text().split("\n\n")
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
    exact(tokenizer.ByteTokenizer(), text)


@given(st.text(alphabet=st.one_of(st.characters(codec="utf-8"), st.sampled_from(" \n\t▁a<"))))
@example("▁ ▁")
@settings(max_examples=300, deadline=None)
def test_any_text_comes_back(trained, text):
    exact(trained, text)
    exact(tokenizer.ByteTokenizer(), text)


def test_indentation_is_few_tokens(trained):
    assert len(trained.encode("        ")) < 8


@given(st.lists(st.integers(-5, 500)))
def test_any_ids_decode(trained, ids):
    assert isinstance(trained.decode(ids), str)
    assert isinstance(tokenizer.ByteTokenizer().decode(ids), str)


def test_special_ids_leave_no_trace(trained):
    assert trained.decode([trained.bos, *trained.encode("ab"), trained.eos, 0]) == "ab"
    assert tokenizer.ByteTokenizer().decode([97, 256, 98]) == "ab"


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
    monkeypatch.setattr(tokenizer_training, "train_tokenizer", None)  # would raise if it were called
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
    with pytest.raises(ConfigError, match=r"x\.model is not a SentencePiece model"):
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
    sample = tokenizer_training.sample_texts(texts, budget)
    assert sum(map(len, sample)) <= budget
    assert bool(sample) == bool(texts)
    numbers = [int(text[:3]) for text in sample if len(text) >= 3]
    assert len({b - a for a, b in itertools.pairwise(numbers)}) <= 1  # one stride


@given(st.text(alphabet="ab \n\r\u2028", max_size=300), st.integers(1, 20))
def test_paragraphs_are_the_text(text, limit):
    assert "".join(tokenizer_training._paragraphs(text, limit)) == text


# --- files of other formats -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def byte_bpe():
    return tokenizer.train_tokenizer(PROSE, tokenizer.TokenizerTrainingConfig(kind="byte-bpe", vocab_size=600))


@pytest.fixture(scope="module")
def ranks(byte_bpe):
    """A rank file of the same merges: what a token's text stands for as bytes, by rank."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spelled = {chr(byte): byte for byte in printable}
    rest = [byte for byte in range(256) if byte not in printable]
    spelled |= {chr(256 + number): byte for number, byte in enumerate(rest)}
    vocabulary = json.loads(byte_bpe["tokenizer.json"])["model"]["vocab"]
    tokens = [bytes(spelled[letter] for letter in token) for token in sorted(vocabulary, key=vocabulary.get)[2:]]
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens))


@pytest.fixture(scope="module")
def places(tmp_path_factory, byte_bpe, ranks):
    """Paths of one tokenizer of each format."""
    folder = tmp_path_factory.mktemp("tokenizers")
    unigram = tokenizer.train_tokenizer(PROSE, tokenizer.TokenizerTrainingConfig(kind="unigram", vocab_size=600))
    for name, files in {"json": byte_bpe, "unigram": unigram, "llama3": {"tokenizer.model": ranks}}.items():
        (folder / name).mkdir()
        for file, content in files.items():
            (folder / name / file).write_bytes(content)
    return {name: str(folder / name) for name in ("json", "unigram", "llama3")} | {"bytes": "bytes"}


FORMATS = ["json", "unigram", "llama3", "bytes"]


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("text", [*HARD, "<|end_of_text|><|begin_of_text|>"])
def test_hard_texts_come_back_from_every_format(places, name, text):
    exact(tokenizer.load_tokenizer(places[name]), text)


@pytest.mark.parametrize("name", FORMATS)
def test_any_text_comes_back_from_every_format(places, name):
    part = tokenizer.load_tokenizer(places[name])

    @given(st.text(alphabet=st.one_of(st.characters(codec="utf-8"), st.sampled_from(" \n\t▁a<"))))
    @settings(max_examples=60, deadline=None)
    def check(text):
        exact(part, text)

    check()


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_sent_to_workers(places, name):
    part = tokenizer.load_tokenizer(places[name])
    sent = pickle.loads(pickle.dumps(part))
    assert sent.fingerprint == part.fingerprint
    assert (sent.bos, sent.eos, sent.vocab_size) == (part.bos, part.eos, part.vocab_size)
    many = [ids.tolist() for ids in part.encode_batch(HARD, threads=2)]
    assert many == [ids.tolist() for ids in sent.encode_batch(HARD)] == [part.encode(text) for text in HARD]


@pytest.mark.parametrize("name", FORMATS)
def test_special_ids_leave_no_trace_in_any_format(places, name):
    part = tokenizer.load_tokenizer(places[name])
    ends = [end for end in (part.bos, part.eos) if end is not None]
    assert part.decode([*ends, *part.encode("ab"), *ends, part.vocab_size + 7, -1]) == "ab"


def test_ranks_and_merges_give_the_same_tokens(places):
    merges, ranks = tokenizer.load_tokenizer(places["json"]), tokenizer.load_tokenizer(places["llama3"])
    assert (merges.bos, merges.eos, merges.vocab_size) == (0, 1, 600)
    assert (ranks.bos, ranks.eos, ranks.vocab_size) == (598, 599, 598 + 256)  # Llama 3's has 256 special ones on top
    for text in [*PROSE[:3], *HARD]:
        assert [token - 2 for token in merges.encode(text)] == ranks.encode(text)


def test_long_runs_are_cut_as_llama3_cuts_them():
    run = _split_long("a" * 60_000 + " " * 25_001 + "b")
    assert [len(part) for part in run] == [25_000, 25_000, 35_000, 2]
    assert [len(part) for part in _split_long("ab " * 200_000)] == [400_000, 200_000]
    assert _split_long("") == []


def test_a_very_long_word_comes_back(places):
    text = "x" * 100_000 + "\n" * 60_000
    exact(tokenizer.load_tokenizer(places["llama3"]), text)


def test_the_parts_of_a_run_config_read_each_format(places, tmp_path):
    for name, part in (("huggingface", "json"), ("tiktoken", "llama3"), ("sentencepiece", "unigram")):
        section = {key: p.default for key, p in tokenizer.registry.parameters(name).items()}
        built = tokenizer.registry.build(
            SimpleNamespace(name=name, **{**section, "path": places[part]}), texts=None, cache=tmp_path
        )
        assert built.fingerprint == tokenizer.load_tokenizer(places[part]).fingerprint


def test_a_wrong_format_says_which_one_it_is(places, tmp_path):
    with pytest.raises(ConfigError, match=r'looks like a file for tokenizer.name = "huggingface"'):
        tokenizer.sentencepiece(lambda: iter(()), tmp_path, path=places["json"])
    with pytest.raises(ConfigError, match=r'looks like a file for tokenizer.name = "tiktoken"'):
        tokenizer.huggingface(places["llama3"])
    with pytest.raises(ConfigError, match=r"holds no tokenizer. Known: tokenizer\.json, tokenizer\.model"):
        tokenizer.load_tokenizer(str(tmp_path))


def test_the_end_of_a_tokenizer_json(places, tmp_path):
    content = json.loads(Path(places["json"], "tokenizer.json").read_text())
    for token in content["added_tokens"]:
        token["content"] = token["content"].replace("<|end_of_text|>", "<|stop|>")
    content["model"]["vocab"]["<|stop|>"] = content["model"]["vocab"].pop("<|end_of_text|>")
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match="does not say which token ends a document: set eos_token"):
        tokenizer.load_tokenizer(str(file))
    assert tokenizer.load_tokenizer(str(file), eos_token="<|stop|>").eos == 1
    with pytest.raises(ConfigError, match=r"unknown token of .* '<\|stp\|>'. Did you mean '<\|stop\|>'"):
        tokenizer.load_tokenizer(str(file), eos_token="<|stp|>")
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": {"content": "<|stop|>"}, "bos_token": None})
    )
    assert (tokenizer.load_tokenizer(str(file)).eos, tokenizer.load_tokenizer(str(file)).bos) == (1, 0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"YQ== 0\nYg== x\n", r"x\.model:2 is not a token and its rank"),
        (b"YQ== 0\nYg== 2\n", "do not count from 0"),
        (b"YQ== 0\nYg== 1\n", "lacks tokens of single bytes"),
    ],
)
def test_a_damaged_rank_file_is_named(tmp_path, content, message):
    (tmp_path / "x.model").write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        tokenizer.load_tokenizer(str(tmp_path / "x.model"))


def test_a_damaged_tokenizer_json_is_named(tmp_path):
    no_tokens = '{"model": {"type": "BPE", "vocab": {}, "merges": []}}'
    for content, message in [("{", "is not JSON"), ("{}", "is not a tokenizer.json"), (no_tokens, "has no tokens")]:
        (tmp_path / "x.json").write_text(content)
        with pytest.raises(ConfigError, match=rf"x\.json {message}"):
            tokenizer.load_tokenizer(str(tmp_path / "x.json"))


def test_an_empty_tokenizer_json_is_named(tmp_path):
    (tmp_path / "tokenizer.json").touch()
    with pytest.raises(ConfigError, match=r"tokenizer\.json is not JSON"):
        tokenizer.huggingface(str(tmp_path))
    with pytest.raises(ConfigError, match="is not a tokenizer file of a known kind"):
        tokenizer.load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("value", [["<|end_of_text|>"], 1, {"content": ["x"]}])
def test_special_tokens_of_a_config_that_are_no_text(places, tmp_path, value):
    (tmp_path / "tokenizer.json").write_bytes(Path(places["json"], "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": value}))
    with pytest.raises(ConfigError, match=r"tokenizer_config\.json: eos_token is .*: set tokenizer\.eos_token to one"):
        tokenizer.load_tokenizer(str(tmp_path))
    assert tokenizer.load_tokenizer(str(tmp_path), eos_token="<|end_of_text|>").eos == 1


def test_a_word_that_a_vocabulary_without_unk_lacks_is_named(tmp_path):
    library = pytest.importorskip("tokenizers")
    made = library.Tokenizer(library.models.WordLevel({"a": 0, "b": 1, "</s>": 2}))
    made.pre_tokenizer = library.pre_tokenizers.Whitespace()
    made.save(str(tmp_path / "tokenizer.json"))
    loaded = tokenizer.load_tokenizer(str(tmp_path))
    assert loaded.encode("a b") == [0, 1]
    for encode in (lambda: loaded.encode("a dog b"), lambda: loaded.encode_batch(["a", "a dog b"])):
        with pytest.raises(ConfigError, match=r"tokenizer\.json cannot encode 'dog': .*Use a tokenizer"):
            encode()


@pytest.mark.parametrize(
    ("package", "extra", "name"), [("tokenizers", "hf", "json"), ("tiktoken", "tiktoken", "llama3")]
)
def test_a_missing_package_names_the_extra(places, monkeypatch, package, extra, name):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=rf"needs the package {package}: .*torchladder\[{extra}\]"):
        tokenizer.load_tokenizer(places[name])


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bpe", "unigram", "byte-bpe"])
def test_training_is_reproducible(kind):
    settings = tokenizer.TokenizerTrainingConfig(
        kind=kind, vocab_size=500, special_tokens=["<pad>", "<|user|>"], split_digits=True
    )
    files = tokenizer.train_tokenizer(PROSE, settings)
    assert files == tokenizer.train_tokenizer(PROSE, settings)
    assert files != tokenizer.train_tokenizer(PROSE[1:], settings)


@pytest.mark.parametrize("kind", ["bpe", "unigram", "byte-bpe"])
def test_special_tokens_digits_and_normalization(tmp_path, kind):
    settings = tokenizer.TokenizerTrainingConfig(
        kind=kind, vocab_size=500, special_tokens=["<pad>"], split_digits=True, normalization="nfkc"
    )
    for name, content in tokenizer.train_tokenizer(PROSE, settings).items():
        (tmp_path / name).write_bytes(content)
    part = tokenizer.load_tokenizer(str(tmp_path))
    assert part.vocab_size == 500
    assert part.decode(part.encode("<pad>")) == "<pad>"  # as text, not as the token
    assert len(part.encode("1234")) >= 4
    assert part.decode(part.encode("ﬁ")) == "fi"


def test_the_sample_reads_so_many_characters_of_the_texts():
    texts = [str(number) * 10 for number in range(10)]
    assert tokenizer_training.sample_texts(texts, 1000) == texts
    assert tokenizer_training.sample_texts(texts, 1000, max_read_chars=25) == texts[:3]


def test_a_run_on_tokens_needs_no_tokenizer():
    assert tokenizer.registry.get("none")() is None


# --- a kind of one's own ----------------------------------------------------------------------------------------------


@pytest.fixture
def own_kind(monkeypatch):
    """A tokenizer of a plugin: its file is the line that the vocabulary consists of."""
    monkeypatch.setattr(tokenizer.registry, "_components", dict(tokenizer.registry._components))
    monkeypatch.setitem(tokenizer_registry.tokenizer_formats, "letters", None)

    @tokenizer.register("letters", "letters.txt", lambda content: content.startswith(b"LETTERS "))
    def letters(path: str, upper: bool = False) -> tokenizer.Tokenizer:
        return Letters(tokenizer_registry.find_tokenizer_file(path).read_text().split()[1], upper)

    class Letters(tokenizer.Tokenizer):
        def __init__(self, alphabet: str, upper: bool) -> None:
            self.alphabet, self.bos, self.eos = alphabet.upper() if upper else alphabet, None, len(alphabet)
            self.vocab_size, self.fingerprint = len(alphabet) + 1, f"letters {alphabet} {upper}"

        def encode(self, text: str) -> list[int]:
            return [self.alphabet.index(letter) for letter in text]

        def decode(self, ids: list[int]) -> str:
            return "".join(self.alphabet[token] for token in ids if token < self.eos)


def test_a_kind_of_a_plugin_is_recognized_by_its_file(own_kind, tmp_path):
    (tmp_path / "letters.txt").write_text("LETTERS abc\n")
    assert tokenizer_registry.file_names() == ["letters.txt", "tokenizer.json", "tokenizer.model"]
    assert tokenizer_registry.recognize_kind(b"LETTERS xyz") == "letters"
    for name in (tmp_path, tmp_path / "letters.txt"):
        loaded = tokenizer.load_tokenizer(str(name))
        assert (loaded.encode("cab"), loaded.fingerprint) == ([2, 0, 1], "letters abc False")
    with pytest.raises(ConfigError, match="is a letters tokenizer with its own bos and eos"):
        tokenizer.load_tokenizer(str(tmp_path), eos_token="x")
    with pytest.raises(ConfigError, match=r'looks like a file for tokenizer\.name = "letters"'):
        tokenizer.tiktoken(str(tmp_path))


def test_what_is_no_tokenizer_lists_the_kinds(tmp_path):
    (tmp_path / "x").write_text("nothing of that kind")
    with pytest.raises(ConfigError, match=r"known kind\. Known: huggingface, sentencepiece, tiktoken"):
        tokenizer.load_tokenizer(str(tmp_path / "x"))
    with pytest.raises(ConfigError, match="'none' is not a tokenizer"):
        tokenizer.load_tokenizer("none")
    with pytest.raises(ConfigError, match="bytes tokenizer with its own"):
        tokenizer.load_tokenizer("bytes", bos_token="x")

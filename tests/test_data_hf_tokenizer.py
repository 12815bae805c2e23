"""Tokenizers in exported folders: transformers reads the same ids and special tokens."""

import base64
import io
import json
import logging
from functools import cache
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

from torchladder.commands import tokenizer as command
from torchladder.data import tokenizer
from torchladder.data.tokenizer.hf_tokenizer import HARD_TEXTS, export_tokenizer

tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")
tiktoken = pytest.importorskip("tiktoken")

PAGES = sorted((Path(__file__).parents[1] / "docs").glob("*.md"))
TEXTS = [page.read_text() for page in PAGES] + [
    "你好 Привет é 🙂"
] * 40  # so many that the characters are in every vocabulary
SPM = {"byte_fallback": True, "normalization_rule_name": "identity", "remove_extra_whitespaces": False}
OWN = {
    "bpe": {"kind": "bpe", "special_tokens": ["<pad>", "<|mine|>"]},
    "unigram": {"kind": "unigram", "special_tokens": ["<pad>"]},
    "nfkc": {"kind": "bpe", "normalization": "nfkc", "split_digits": True},
    "nmt": {"kind": "unigram", "normalization": "nmt_nfkc"},
    "byte-bpe": {"kind": "byte-bpe", "special_tokens": ["<unk>", "<s>", "</s>", "<pad>"]},
}
FOREIGN = {
    "llama": {"model_type": "bpe", "split_digits": True, "allow_whitespace_only_pieces": True, **SPM},
    "gemma": {"model_type": "bpe", "add_dummy_prefix": False, "user_defined_symbols": ["\n\n", "▁▁▁", "<u>"], **SPM},
    "default": {"model_type": "unigram"},
    "t5": {"model_type": "unigram", "pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1},
}
ROLES = {"default": (1, 2, 0, None), "llama": (1, 2, 0, None), "gemma": (1, 2, 0, None), "t5": (None, 1, 2, 0)}
ROLES |= {"bpe": (1, 2, 0, 3), "unigram": (1, 2, 0, 3), "nfkc": (1, 2, 0, None), "nmt": (1, 2, 0, None)}
ROLES |= {"byte-bpe": (0, 1, 2, 5), "bytes": (None, 256, None, None), "tiktoken": (300, 301, None, None)}
"""Kind -> ids of the tokens that begin and end a document, of the unknown one and of padding."""


@cache
def trained_files(kind):
    """The files of a small tokenizer of a kind."""
    if kind in OWN:
        return tokenizer.train_tokenizer(TEXTS, tokenizer.TokenizerTrainingConfig(vocab_size=700, **OWN[kind]))
    if kind in FOREIGN:
        model, lines = io.BytesIO(), iter([line for text in TEXTS for line in text.splitlines()])
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines, model_writer=model, vocab_size=700, minloglevel=2, **FOREIGN[kind]
        )
        return {"tokenizer.model": model.getvalue()}
    merged = [b"th", b"the", b"  ", b"    ", b"in", b"ing", b"\n\n", "é".encode(), "你".encode()[:2], "你".encode()]
    words = [b"x%d" % number for number in range(300 - 256 - len(merged))]
    tokens = [*(bytes([byte]) for byte in range(256)), *merged, *words]
    lines = [b"%s %d\n" % (base64.b64encode(token), rank) for rank, token in enumerate(tokens)]
    return {"tokenizer.model": b"".join(lines)} if kind == "tiktoken" else {}


def load(kind, folder):
    for name, content in trained_files(kind).items():
        (folder / name).write_bytes(content)
    return tokenizer.load_tokenizer("bytes" if kind == "bytes" else str(folder))


def as_folder(exported, folder):
    """Writes an export with a config.json, and opens it in transformers."""
    folder.mkdir()
    for name, content in exported.files.items():
        (folder / name).write_bytes(content)
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 1000, **exported.token_ids}
    config |= {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    (folder / "config.json").write_text(json.dumps(config))
    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("kind", [*OWN, *FOREIGN, "bytes", "tiktoken"])
def test_transformers_reads_the_ids_and_special_tokens_of_each_kind(tmp_path, caplog, kind):
    own = load(kind, tmp_path)
    exported = export_tokenizer(own, own.files())
    # The library composes several marks on one letter in another order; that is reported, not silent.
    reported = [text for text in HARD_TEXTS if repr(text) in caplog.text]
    assert [text[:9] for text in reported] == {"nfkc": ["combining"], "nmt": ["combining", "pieces: ▁"]}.get(kind, [])
    found = as_folder(exported, tmp_path / "hf")
    texts = [text for text in HARD_TEXTS if text not in reported]
    for text in texts:
        ids = own.encode(text)
        assert found(text, add_special_tokens=False, split_special_tokens=True)["input_ids"] == ids, text
        assert found.decode(ids, skip_special_tokens=True) == own.decode(ids)
    assert (found.bos_token_id, found.eos_token_id, found.unk_token_id, found.pad_token_id) == ROLES[kind]
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(tmp_path / "hf"))
    for config in (model.config, model.generation_config):
        assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == tuple(
            ROLES[kind][role] for role in (0, 1, 3)
        )
    # Training from the exported folder has the same ids, whichever of its files is read.
    again = tokenizer.load_tokenizer(str(tmp_path / "hf"))
    assert [again.encode(text) for text in texts] == [own.encode(text) for text in texts]
    assert (again.bos, again.eos) == (own.bos, own.eos)


@pytest.mark.parametrize("kind", ["bpe", "nfkc", "llama", "gemma", "bytes", "tiktoken"])
def test_any_text_has_the_same_ids_in_a_tokenizer_json(tmp_path, kind):
    own = load(kind, tmp_path)
    written = tokenizers.Tokenizer.from_str(own.tokenizer_json().decode())
    written.encode_special_tokens = True
    pieces = st.sampled_from(["the ", "  ", "\n", "\t", "é", "你", "🙂", "▁", "<s>", "<u>", "a", "1", "x1", "<0x0A>"])

    @given(st.lists(pieces | st.text(st.characters(codec="utf-8"), max_size=3), max_size=12).map("".join))
    def check(text):
        text = text if kind != "nfkc" else text.encode("ascii", "ignore").decode()
        assert written.encode(text, add_special_tokens=False).ids == own.encode(text)

    check()


def test_settings_of_special_tokens_reach_every_file(tmp_path):
    files = dict(trained_files("byte-bpe"))
    files["special_tokens_map.json"] = b'{"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}'
    files["generation_config.json"] = b'{"bos_token_id": 0, "eos_token_id": [1], "temperature": 0.6}'
    files["tokenizer_config.json"] = json.dumps(
        {**json.loads(files["tokenizer_config.json"]), "chat_template": "{{ x }}", "tokenizer_class": "LlamaTokenizer",
         "pad_token": {"content": "<pad>"}, "add_prefix_space": True}
    ).encode()  # fmt: skip
    (tmp_path / "tokenizer.json").write_bytes(files["tokenizer.json"])
    own = tokenizer.load_tokenizer(str(tmp_path), "<s>", "</s>")
    exported = export_tokenizer(own, files)
    found = as_folder(exported, tmp_path / "hf")
    assert (found.bos_token_id, found.eos_token_id, found.pad_token_id, found.chat_template) == (3, 4, 5, "{{ x }}")
    assert exported.token_ids == {"bos_token_id": 3, "eos_token_id": 4, "pad_token_id": 5}
    generation = transformers.GenerationConfig.from_pretrained(tmp_path / "hf")
    assert (generation.bos_token_id, generation.eos_token_id, generation.temperature) == (3, 4, 0.6)
    assert found("hello", add_special_tokens=False)["input_ids"] == own.encode("hello")
    several = {**files, "generation_config.json": b'{"eos_token_id": [1, 4]}'}
    assert json.loads(export_tokenizer(own, several).files["generation_config.json"])["eos_token_id"] == [1, 4]


def test_other_ids_are_reported_with_the_texts(tmp_path, caplog):
    own = load("byte-bpe", tmp_path)
    own.encode = lambda text: [9] if "hello" in text else type(own).encode(own, text)
    with caplog.at_level(logging.WARNING):
        export_tokenizer(own, own.files())
    assert "other ids than the tokenizer of the run for 1 of 16 test texts: 'hello world'" in caplog.text


def test_no_tokenizer_and_one_without_a_file_are_exported_as_such(caplog):
    class Mine(tokenizer.ByteTokenizer):
        def tokenizer_json(self):
            return None

    assert export_tokenizer(None, {}) == ({}, {"bos_token_id": None, "eos_token_id": None})
    assert export_tokenizer(Mine(), {}) == ({}, {"bos_token_id": None, "eos_token_id": 256})
    assert "Mine has no tokenizer.json" in caplog.text


def test_a_trained_byte_bpe_has_all_special_tokens(tmp_path, capsys):
    (tmp_path / "text.txt").write_text("\n".join(TEXTS))
    special = ["--special-tokens", "<unk>", "<s>", "</s>", "<pad>"]
    words = ["train", "--input", str(tmp_path / "text.txt"), "--output", str(tmp_path / "out"), "--kind", "byte-bpe"]
    assert command.run([*words, "--vocab-size", "400", *special]) == 0
    found = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (found.unk_token, found.pad_token, found.bos_token) == ("<unk>", "<pad>", "<|begin_of_text|>")

"""The tokenizer of an exported Hugging Face folder: transformers reads the ids and the special tokens of the run."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any, NamedTuple

from torchladder.data.extras import import_extra
from torchladder.data.tokenizer.huggingface import PAD, UNK, load_json, token_text
from torchladder.data.tokenizer.tokenizer_registry import Tokenizer

logger = logging.getLogger(__name__)

KEPT_KEYS = (
    "add_bos_token",
    "add_eos_token",
    "additional_special_tokens",
    "extra_special_tokens",
    "chat_template",
    "clean_up_tokenization_spaces",
    "model_max_length",
    "padding_side",
    "truncation_side",
    "cls_token",
    "mask_token",
    "pad_token",
    "sep_token",
    "unk_token",
)
"""Keys of a ``tokenizer_config.json`` that no id of a text depends on, unlike others."""
OLDER_FILES = ("special_tokens_map.json", "added_tokens.json")
"""Files whose content is in tokenizer.json and tokenizer_config.json."""
HARD_TEXTS = (
    "hello world",
    "  two leading spaces,  double ones and a trailing one ",
    "line\nbreaks\n\n\n with\r\nboth\r\rkinds",
    "\ttab\t\ttabs",
    "déjà vu, naïve, Åse, mañana",
    "combining: e\u0301 n\u0303 a\u0323\u0308",
    "你好，世界。日本語の文 한국어",
    "🙂 👩\u200d👩\u200d👧 🇱🇻",
    "Привет, мир",
    "bytes: \x07 \u200b \ufeff \U0010ffff",
    "0 1 12 123 1234 3.14 1,000,000 2026-11-26 ½",
    "compatibility: ﬁ Ａ ™ ①",
    "pieces: ▁ ▁▁ <0x0A> <unk> <s> </s> <pad>",
    "if x == y:\n        return {'a': [1, 2]}  # indented",
    "aaaaaaaaaaaaaaa ------------- ======",
)
"""Texts on which tokenizers of the same vocabulary differ."""


class ExportedTokenizer(NamedTuple):
    """A tokenizer as a Hugging Face folder has it.

    Attributes:
        files: name -> content.
        token_ids: entries of config.json, such as ``eos_token_id``; None where there is no such token.
    """

    files: dict[str, bytes]
    token_ids: dict[str, Any]


def export_tokenizer(tokenizer: Tokenizer | None, files: Mapping[str, bytes]) -> ExportedTokenizer:
    """Returns the tokenizer that transformers reads with the same ids; logs a warning if it reads other ids.

    Args:
        tokenizer: of the run; None for none.
        files: those of its folder, by their usual names.

    Raises:
        ConfigError: a file is damaged, or the package tokenizers is missing.
    """
    if tokenizer is None:  # explicit, because transformers has defaults for missing ids
        return ExportedTokenizer(dict(files), {"bos_token_id": None, "eos_token_id": None})
    token_ids: dict[str, Any] = {"bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.eos}
    content = files.get("tokenizer.json") or tokenizer.tokenizer_json()
    if content is None:
        logger.warning("%s has no tokenizer.json, so the exported folder has no tokenizer.", type(tokenizer).__name__)
        return ExportedTokenizer(dict(files), token_ids)
    exported = import_extra("tokenizers", "hf", "exporting a tokenizer").Tokenizer.from_str(content.decode())
    _compare(tokenizer, exported)
    special = {token.content: number for number, token in exported.get_added_tokens_decoder().items() if token.special}
    old = _entries(files, "special_tokens_map.json") | _entries(files, "tokenizer_config.json")
    config = {key: old[key] for key in KEPT_KEYS if key in old}
    for role, usual in (("unk_token", UNK), ("pad_token", PAD)):
        names = [token_text(config, role, "tokenizer_config.json"), *(name for name in usual if name in special)]
        config.pop(role, None)
        if found := [name for name in names if name and exported.token_to_id(name) is not None]:
            config[role] = found[0]
    for role, number in (("bos_token", tokenizer.bos), ("eos_token", tokenizer.eos)):
        if number is not None:
            config[role] = exported.id_to_token(number)
    if "pad_token" in config:
        token_ids["pad_token_id"] = exported.token_to_id(config["pad_token"])
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False} | config
    written = {name: file for name, file in files.items() if name not in OLDER_FILES}
    written |= {"tokenizer.json": content, "tokenizer_config.json": json.dumps(config, indent=2).encode()}
    if "generation_config.json" in files:
        generation = _with_token_ids(_entries(files, "generation_config.json"), token_ids)
        written["generation_config.json"] = json.dumps(generation, indent=2).encode()
    return ExportedTokenizer(written, token_ids)


def _compare(tokenizer: Tokenizer, exported: Any) -> None:
    exported.encode_special_tokens = True  # as text, as in training
    special = " ".join(token.content for token in exported.get_added_tokens_decoder().values())
    texts = [*HARD_TEXTS, special[:1000]]
    encoded = exported.encode_batch(texts, add_special_tokens=False)
    differing = [text for text, found in zip(texts, encoded, strict=True) if found.ids != tokenizer.encode(text)]
    if differing:
        logger.warning(
            "the exported tokenizer.json has other ids than the tokenizer of the run for %d of %d test texts: %s. "
            "Encode texts for the exported model with torchladder.",
            len(differing), len(texts), ", ".join(map(repr, differing)),
        )  # fmt: skip


def _entries(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    return load_json(files[name], name) if name in files else {}


def _with_token_ids(generation: dict[str, Any], token_ids: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a generation_config.json that ends texts at the tokenizer's token, perhaps among others."""
    ends = generation.get("eos_token_id")
    kept = {"eos_token_id": ends} if isinstance(ends, list) and token_ids["eos_token_id"] in ends else {}
    return {**generation, **token_ids, **kept}

"""Writes tokenizers of other kinds as a ``tokenizer.json`` with the same ids, which transformers reads."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any, TypeVar

from sentencepiece import sentencepiece_model_pb2

from torchladder.data.extras import import_extra

Text = TypeVar("Text", str, bytes)
SPACE = "▁"
"""How SentencePiece writes a space inside its pieces."""
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""Types of pieces in a SentencePiece model (sentencepiece_model.proto)."""
UNIGRAM, BPE = 1, 2
"""Types of models in a SentencePiece model."""


def from_ranks(ranks: Mapping[bytes, int], pattern: str, special_tokens: Sequence[str]) -> bytes:
    """Returns the ``tokenizer.json`` of byte-level BPE.

    Args:
        ranks: token -> its id and its rank; all single bytes are among them.
        pattern: regular expression that splits a text into words; empty for none.
        special_tokens: tokens after those, in order of their ids.
    """
    library = import_extra("tokenizers", "hf", "a tokenizer.json")
    letters = _byte_letters()
    written = {token: "".join(letters[byte] for byte in token) for token in ranks}
    merges = [(written[left], written[right]) for left, right in _merges(ranks, ranks)]
    vocab = {written[token]: rank for token, rank in ranks.items()}
    tokenizer = library.Tokenizer(library.models.BPE(vocab, merges, ignore_merges=True))
    split = [library.pre_tokenizers.Split(library.Regex(pattern), behavior="isolated")] if pattern else []
    as_bytes = library.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = library.pre_tokenizers.Sequence([*split, as_bytes])
    tokenizer.decoder = library.decoders.ByteLevel()
    tokenizer.add_special_tokens([library.AddedToken(token, normalized=False) for token in special_tokens])
    return tokenizer.to_str(pretty=True).encode()


def from_sentencepiece(model: bytes, literal_space: bool) -> bytes:
    """Returns the ``tokenizer.json`` of a SentencePiece model.

    Args:
        model: content of a .model file, BPE or unigram.
        literal_space: whether a literal U+2581 in a text is no space but a character without a piece.
    """
    library = import_extra("tokenizers", "hf", "a tokenizer.json")
    proto: Any = sentencepiece_model_pb2.ModelProto.FromString(model)  # type: ignore[attr-defined]
    space = " " if literal_space else SPACE  # with a space as itself, no text has the characters of another one
    names = [piece.piece.replace(SPACE, space) if piece.type != CONTROL else piece.piece for piece in proto.pieces]
    tokenizer = library.Tokenizer(_model(library, proto, names))
    tokenizer.normalizer = library.normalizers.Sequence([*_normalizers(library, proto.normalizer_spec, space)])
    decoders = library.decoders
    spaces = [decoders.Replace(SPACE, " ")] if space == SPACE else []
    dummy = [decoders.Strip(" ", 1, 0)] if proto.normalizer_spec.add_dummy_prefix else []
    tokenizer.decoder = decoders.Sequence([*spaces, decoders.ByteFallback(), decoders.Fuse(), *dummy])
    for name, piece in zip(names, proto.pieces, strict=True):
        if piece.type in (CONTROL, UNKNOWN, USER_DEFINED):
            token = library.AddedToken(name, normalized=False, special=piece.type != USER_DEFINED)
            (tokenizer.add_tokens if piece.type == USER_DEFINED else tokenizer.add_special_tokens)([token])
    return tokenizer.to_str(pretty=True).encode()


def _model(library: ModuleType, proto: Any, names: list[str]) -> Any:
    trainer = proto.trainer_spec
    if trainer.model_type == UNIGRAM:
        # No text becomes a control, unknown or byte piece by its name: their scores lose against all others.
        lowest = min(piece.score for piece in proto.pieces) - 1000
        scores = [piece.score if piece.type in (NORMAL, USER_DEFINED) else lowest for piece in proto.pieces]
        return library.models.Unigram(
            [*zip(names, scores, strict=True)], unk_id=trainer.unk_id, byte_fallback=trainer.byte_fallback
        )
    normal = {
        name: -piece.score for name, piece in zip(names, proto.pieces, strict=True) if piece.type in (NORMAL, UNUSED)
    }
    return library.models.BPE(
        {name: number for number, name in enumerate(names)},
        [*_merges(normal, normal)],
        unk_token=names[trainer.unk_id],
        fuse_unk=True,
        byte_fallback=trainer.byte_fallback,
    )


def _normalizers(library: ModuleType, spec: Any, space: str) -> Iterator[Any]:
    normalizers = library.normalizers
    if spec.precompiled_charsmap:
        if spec.name.startswith("nmt"):  # turns both into spaces; the library would map the two as one character
            yield normalizers.Replace("\r\n", "\n\r")
        yield normalizers.Precompiled(spec.precompiled_charsmap)
    if spec.remove_extra_whitespaces:
        yield normalizers.Replace(library.Regex("^ +| +$"), "")
        yield normalizers.Replace(library.Regex(" {2,}"), " ")
    if spec.add_dummy_prefix:
        yield normalizers.Prepend(" ")
    if space != " ":
        yield normalizers.Replace(" ", space)


def _merges(ranks: Mapping[Text, float], parts: Collection[Text]) -> Iterator[tuple[Text, Text]]:
    """Yields the pairs of parts that make a token, by the token's rank."""
    for token in sorted(ranks, key=ranks.__getitem__):
        for cut in range(1, len(token)):
            if token[:cut] in parts and token[cut:] in parts:
                yield token[:cut], token[cut:]


def _byte_letters() -> list[str]:
    """Returns the printable character for each byte in byte-level BPE (GPT-2's ``bytes_to_unicode``)."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]

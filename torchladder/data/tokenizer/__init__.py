"""Text to token ids and back: tokenizers by name, from files of the usual formats, and their training."""

from __future__ import annotations

from torchladder.data.dataloader import Tokenizer
from torchladder.data.tokenizer import tokenizer_files, train_tokenizer
from torchladder.data.tokenizer.byte_tokenizer import ByteTokenizer, register, registry
from torchladder.data.tokenizer.huggingface import HuggingFace, huggingface
from torchladder.data.tokenizer.sentencepiece import VOCAB_SIZE, SentencePiece, sentencepiece
from torchladder.data.tokenizer.tiktoken import Tiktoken, tiktoken
from torchladder.data.tokenizer.train_tokenizer import Training, train

__all__ = [
    "VOCAB_SIZE",
    "ByteTokenizer",
    "HuggingFace",
    "SentencePiece",
    "Tiktoken",
    "Training",
    "huggingface",
    "load",
    "register",
    "registry",
    "sentencepiece",
    "tiktoken",
    "train",
    "train_tokenizer",
]


def load(name: str, bos_token: str = "", eos_token: str = "") -> Tokenizer:
    """Returns the tokenizer that a word means: ``bytes``, or a file or folder, whose content tells its format.

    Args:
        name: ``bytes``, a ``tokenizer.json``, a SentencePiece ``.model``, a tiktoken rank file, or a folder with one.
        bos_token: for a ``tokenizer.json``, the token that may begin a document, where it does not tell.
        eos_token: the same for the token that ends one.

    Raises:
        ConfigError: there is no such file, it is damaged, or a token is named for a format that names its own.
    """
    kind = name if name == "bytes" else tokenizer_files.kind(tokenizer_files.content(name))
    if kind == "huggingface":
        return huggingface(str(tokenizer_files.find(name)), bos_token, eos_token)
    if bos_token or eos_token:
        raise tokenizer_files.names_its_own(name, kind)
    if kind == "bytes":
        return ByteTokenizer()
    return tiktoken(name) if kind == "tiktoken" else SentencePiece(tokenizer_files.content(name), name)

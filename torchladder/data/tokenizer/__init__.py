"""Text to token ids and back: tokenizers by name, read from files of the usual formats or trained."""

from torchladder.data.tokenizer.byte_tokenizer import ByteTokenizer
from torchladder.data.tokenizer.huggingface import huggingface
from torchladder.data.tokenizer.sentencepiece import sentencepiece
from torchladder.data.tokenizer.tiktoken import tiktoken
from torchladder.data.tokenizer.tokenizer_registry import Tokenizer, load_tokenizer, register, registry
from torchladder.data.tokenizer.tokenizer_training import TokenizerTrainingConfig, train_tokenizer

__all__ = [
    "ByteTokenizer",
    "Tokenizer",
    "TokenizerTrainingConfig",
    "huggingface",
    "load_tokenizer",
    "register",
    "registry",
    "sentencepiece",
    "tiktoken",
    "train_tokenizer",
]

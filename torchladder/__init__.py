"""Pretraining of language models on a context-length curriculum, PyTorch-native."""

__version__ = "0.1.0"

"""Formats of tokens on disk. Each registers itself in ``data.sources``."""

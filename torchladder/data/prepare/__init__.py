"""Tokenizes text: on first use into the cache, or ahead of time with many processes."""

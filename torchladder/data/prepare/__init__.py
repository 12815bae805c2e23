"""Text to tokens: on first use into the cache, or ahead of time by many processes."""

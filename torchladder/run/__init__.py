"""A run: its parts, put together from its settings."""

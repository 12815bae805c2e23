"""Hugging Face: one adapter per family of models, conversion of weights and of config.json in both directions."""

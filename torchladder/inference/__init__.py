"""Trained models: opened from a run, a checkpoint or a Hugging Face folder; evaluated, decoded, exported."""

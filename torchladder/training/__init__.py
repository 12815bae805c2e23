"""A training run: its plan, the trainer, validation and samples, fault tolerance."""

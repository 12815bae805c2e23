"""Distributed training: process group, device mesh, and the parallelisms that a model is trained with."""

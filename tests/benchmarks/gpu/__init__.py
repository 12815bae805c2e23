"""Proof and speed on one GPU: ``python -m tests.benchmarks.gpu`` runs all parts, or the ones that it is given."""

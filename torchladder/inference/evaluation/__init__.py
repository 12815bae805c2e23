"""Evaluation: the loss of trained models on files, document by document, collected in a table."""

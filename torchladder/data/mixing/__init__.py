"""Mixes sources: the proportion of each, the source of every row, and what a run reads of each."""

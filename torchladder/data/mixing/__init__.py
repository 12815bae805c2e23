"""Which source each row is of, and what a run takes of each."""

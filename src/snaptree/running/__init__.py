"""Carrying out plans: the executor, the journal, recovery, locks, progress."""

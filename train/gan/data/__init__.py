"""Data sets: from archives to batches. Imports nothing: the processes that decode need no torch."""

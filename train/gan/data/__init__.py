"""Data sets: from archives to batches."""

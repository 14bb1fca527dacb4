"""Other spectral norms: models that have them become fastsn's (convert), and so do their checkpoints (state_dict)."""

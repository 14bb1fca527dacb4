"""Conversion from other spectral norms: of models (``convert``) and of checkpoints (``state_dict``)."""

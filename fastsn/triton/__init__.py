"""Triton kernels: the list ops of fastsn/ops/ in a constant number of launches. Imported when first needed."""

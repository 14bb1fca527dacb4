"""The GAN training engine of the papers' recipes: one file per reason to change."""

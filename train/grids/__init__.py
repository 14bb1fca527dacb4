"""What the papers, and this repository, compare: each file has a dict GRIDS of grids by name."""

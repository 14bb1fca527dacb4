"""A whole model at once: step and fuse (scopes), and what is done outside of training (tools)."""

"""Functions on whole models: ``step`` and ``fuse`` (scopes), and those outside of training (tools)."""

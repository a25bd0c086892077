"""One file a model family: its config, its name table."""

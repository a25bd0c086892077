"""One file a model family: its config, its name table, the logical axes of its parameters."""

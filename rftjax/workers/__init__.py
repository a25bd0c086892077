"""Worker processes: they run user code, so that no fault of it reaches training."""

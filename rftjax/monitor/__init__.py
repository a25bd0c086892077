"""Records of a run: metrics, rollouts, progress, loggers, and alarms on the metrics."""

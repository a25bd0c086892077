"""Turns rows of a dataset into a seeded, resumable stream of tasks."""

from rftjax.tasks.stream import TaskStream, check_overlap, load, overlap, read, split

__all__ = ["TaskStream", "check_overlap", "load", "overlap", "read", "split"]

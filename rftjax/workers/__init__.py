"""Processes that run user code."""

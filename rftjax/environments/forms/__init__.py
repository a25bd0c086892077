"""Environments as other libraries write them, found out by looking at the object; none is needed for the others."""

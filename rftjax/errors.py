"""The one error class for what a user can put right."""

from __future__ import annotations


class UserError(ValueError):
    """A mistake in what the user gave: one line with the field, its value, the rule and the way out.

    The command line prints its text alone. Any other exception is a fault of rftjax or of the machine and keeps its
    traceback.
    """


class NotFinite(UserError):
    """A number that must be finite is not: what holds it must not be kept."""

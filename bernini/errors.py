"""The error for people: what was wrong, where, what to do. The command line prints it and exits with 2."""

from __future__ import annotations


class UserError(ValueError):
    """Something about the input that only the person who gave it can mend."""

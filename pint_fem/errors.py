"""Errors a user meets."""

__all__ = ["InputError"]


class InputError(ValueError):
    """Bad input from the user; the command line prints it as one line."""

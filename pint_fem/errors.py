"""The exceptions that this package raises on purpose."""

__all__ = ["InputError"]


class InputError(ValueError):
    """Bad input from the user; the command line prints it as one line."""

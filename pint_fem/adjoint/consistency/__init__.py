"""Checks that all ranks hold the same problem, the same control and the same user data."""

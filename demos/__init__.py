"""Narrated runs."""

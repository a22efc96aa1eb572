"""Predicted times of time solvers over that of sequential stepping, from measured times of a step."""

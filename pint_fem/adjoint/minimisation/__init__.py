"""Minimisation of the reduced functional: its objective in an inner product, checkpoints, calls of the optimisers."""

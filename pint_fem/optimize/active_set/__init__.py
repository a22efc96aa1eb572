"""Primal-dual active sets: the semi-smooth Newton method within bounds and for sparse minimisers."""

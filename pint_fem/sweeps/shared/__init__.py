"""Sweeps of several evolutions with the same operators: one factor, and one solve for all of them."""

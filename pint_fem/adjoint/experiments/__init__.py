"""Functionals that are sums over several experiments, which are divided over groups of ranks."""

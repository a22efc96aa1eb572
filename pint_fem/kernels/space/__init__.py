"""Solves over several ranks in space on blocks of states: substructuring, conjugate gradients and multigrid."""

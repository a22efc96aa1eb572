"""Solves over several ranks in space on blocks of states: by substructuring, or by multigrid and conjugate gradients."""

"""ParaDiag for the sweeps: the linear systems of its frequencies, and its solvers."""

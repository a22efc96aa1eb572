"""One-shot optimisation: the control moves while state and adjoint are still being solved for."""

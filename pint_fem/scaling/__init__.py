"""Predicted run times on many ranks: the solver's own code on virtual ranks with clocks, and a planner.

Requires numpy, mpi4py and greenlet; the calibration of a finite element problem requires Firedrake.
"""

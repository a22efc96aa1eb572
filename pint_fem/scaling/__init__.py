"""What P ranks would do: the solver's own code on virtual ranks with clocks, and a planner on top.

Needs numpy, mpi4py and greenlet; calibrating a finite element problem needs Firedrake.
"""

"""Solves with a factor for many right-hand sides at once, as the stages of steps contain them."""

import numpy as np

from pint_fem.kernels.lanes.program import STATE, StepProgram
from pint_fem.kernels.steps import execution
from pint_fem.propagators.recursion import append_solve


def solutions(factor, B, *, transposed=False):
    """Own values ``(k, n)`` of the solutions for right-hand sides ``B``."""
    size, comm = factor.matrix.getLocalSize()[0], factor.matrix.comm.tompi4py()
    program = StepProgram({"whole": slice(0, size)}, size)
    append_solve(program, STATE, factor, transposed=transposed)
    X = np.empty((len(B), 1, size))
    execution(program, comm).run(np.ascontiguousarray(B), X)
    return X[:, 0]

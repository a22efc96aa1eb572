"""How many evaluations, gradients and Hessian actions TAO's optimisers need for a control problem.

They minimise our functional in the place of a serial tape's, which is the same discrete functional; what they would
take with the tape follows from its time per call. pyadjoint passes functionals to TAO likewise (``TAOSolver``), but for
controls with one value per step, which are spread over ranks in time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
from firedrake.petsc import PETSc

from pint_fem.adjoint.minimisation.bounds_and_constraints import bound_arrays
from pint_fem.adjoint.riesz import ControlInner
from problems.control import ControlProblem

__all__ = ["Counts", "count_calls"]

MOST_ITERATIONS = 500


@dataclass(frozen=True)
class Counts:
    """Calls of an optimiser.

    Attributes
    ----------
    evaluations, gradients, hessians : int
    iterations : int
    value : float
        J in the end.
    converged : bool
    """

    evaluations: int
    gradients: int
    hessians: int
    iterations: int
    value: float
    converged: bool


class _Scaled:
    """The functional in coordinates :math:`y = \\sqrt{w} z`, w the weights of the lumped inner product, in which the
    gradient's Euclidean norm is that of the control space; it counts its calls.
    """

    def __init__(self, problem: ControlProblem):
        self.of = problem.rf.problem
        weights = ControlInner(problem.rf.layout, "lumped").weights
        self.root = np.sqrt(weights)
        self.counts = Counts(0, 0, 0, 0, 0.0, False)
        self._z = np.zeros_like(self.root)

    def value_and_gradient(self, tao: PETSc.TAO, y: PETSc.Vec, g: PETSc.Vec) -> float:
        """J and its gradient."""
        self._z = y.array_r / self.root
        self.counts = replace(self.counts, evaluations=self.counts.evaluations + 1, gradients=self.counts.gradients + 1)
        value = float(self.of.value(self._z))
        g.array[:] = self.of.derivative(self._z) / self.root
        return value

    def hessian(self, tao: PETSc.TAO, y: PETSc.Vec, H: PETSc.Mat, P: PETSc.Mat) -> None:
        """Move the products to a point."""
        self._z = y.array_r / self.root

    def mult(self, H: PETSc.Mat, x: PETSc.Vec, y: PETSc.Vec) -> None:
        """The Hessian's product, as PETSc calls it."""
        self.counts = replace(self.counts, hessians=self.counts.hessians + 1)
        y.array[:] = self.of.hessian_action(self._z, x.array_r / self.root) / self.root


def count_calls(problem: ControlProblem, name: str, gradient_norm: float, say: Callable[[str], object]) -> Counts:
    """Minimise by one of TAO's methods from zero, and count its calls (collective).

    Parameters
    ----------
    problem
        The posed problem.
    name
        TAO's type: ``"lmvm"``, ``"nls"``, ``"blmvm"``, ``"bntl"``.
    gradient_norm
        At which it stops.
    say
        Prints a line on the first rank.
    """
    comm, scaled = problem.spacetime.comm, _Scaled(problem)
    start = PETSc.Vec().createMPI((len(scaled.root), PETSc.DETERMINE), comm=comm)
    options = {
        "tao_type": name,
        "tao_gatol": max(gradient_norm, 1e-12),
        "tao_grtol": 0.0,
        "tao_gttol": 0.0,
        "tao_max_it": MOST_ITERATIONS,
        "tao_max_funcs": 4 * MOST_ITERATIONS,
        "tao_lmvm_mat_lmvm_hist_size": 50,
        "tao_blmvm_mat_lmvm_hist_size": 50,
        # the default starts with up to five more evaluations, and stops at steps of 1e-6
        f"tao_{name}_init_type": "direction" if name.startswith("bn") else "constant",
    }
    tao = PETSc.TAO().create(comm=comm)
    with _in_database(options):
        if problem.bounds is not None:
            sides = [
                np.broadcast_to(side, scaled.root.shape) * scaled.root
                for side in bound_arrays(problem.rf, problem.bounds)
            ]
            limits = [start.duplicate() for _ in sides]
            for limit, side in zip(limits, sides, strict=True):
                limit.array[:] = np.clip(side, PETSc.NINFINITY, PETSc.INFINITY)
            tao.setVariableBounds(*limits)
        tao.setObjectiveGradient(scaled.value_and_gradient, None)
        matrix = PETSc.Mat().createPython((start.sizes, start.sizes), context=scaled, comm=comm)
        matrix.setOption(PETSc.Mat.Option.SYMMETRIC, True)
        matrix.setUp()
        tao.setHessian(scaled.hessian, matrix, matrix)
        tao.setFromOptions()
        if name in ("nls", "bntl"):
            ksp = tao.getKSP()
            ksp.setType("stcg" if name == "bntl" else "cg")
            ksp.getPC().setType("none")
            ksp.setTolerances(rtol=1e-2, max_it=1000)
        tao.solve(start)
    iterations, value, *_ = tao.getSolutionStatus()
    converged = tao.getConvergedReason() > 0
    say(f"  {name}: {iterations} iterations, J {value:.8g}")
    counts = replace(scaled.counts, iterations=iterations, value=float(value), converged=converged)
    tao.destroy()
    return counts


@contextmanager
def _in_database(options: dict) -> Iterator[None]:
    """Options in PETSc's database for a while; those that are there keep their values."""
    database = PETSc.Options()
    added = {key: value for key, value in options.items() if not database.hasName(key)}
    for key, value in added.items():
        database[key] = value
    try:
        yield
    finally:
        for key in added:
            database.delValue(key)

r"""What of a linear-quadratic optimal control problem is the same in all steps.

The steps :math:`u_n = \Phi u_{n-1} + \Psi z_n + g_n` of a linear evolution with constant operators, whose controls have
one value per step and loads that do not depend on time; the second derivatives :math:`Q_n` of the misfits at the time
points, which are sums of matrices with weights; and the second derivative ``R`` of the regularisation for a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise

import numpy as np
from firedrake import assemble
from firedrake.petsc import PETSc
from mpi4py import MPI

from pint_fem.errors import InputError
from pint_fem.evolution.tableaux import DIRK
from pint_fem.kernels.arrays import own_size
from pint_fem.kernels.block_operator import BlockOperator
from pint_fem.kkt.control_weights import ControlWeights
from pint_fem.misfits.base import Misfit
from pint_fem.paradiag.stage_shifts import limit_at_infinity
from pint_fem.propagators.linear import LinearPropagator
from pint_fem.sweeps.sweeps import Sweeps

__all__ = ["ControlModel", "require_model", "require_regular_frequencies"]


def require_model(sweeps: Sweeps) -> LinearPropagator:
    """The propagator of an evolution that has a KKT system with circulant preconditioners.

    Raises
    ------
    InputError
        On every rank, with what the evolution has instead, as the end of a sentence.
    """
    evolution, propagator = sweeps.evolution, sweeps.propagators[0]
    static = [c.name() for c in evolution.parameters if c not in evolution.stepwise]
    if not isinstance(propagator, LinearPropagator) or not propagator.is_affine:
        raise InputError("the evolution is not linear with constant operators")
    if evolution.initial_control is not None or static:
        names = ", ".join(map(repr, static)) or "the initial condition"
        raise InputError(f"a control has no value in each step: {names}")
    if sweeps.intervals is not None:
        raise InputError("states are stored at C-points only (storage='C')")
    if evolution.controls_move:
        raise InputError("the control's part of the load depends on time")
    if evolution.boundary_controls is not None and evolution.boundary_controls.depends_on_time:
        raise InputError("boundary values with controls depend on time")
    require_regular_frequencies(propagator.dirk, evolution.nsteps)
    return propagator


def require_regular_frequencies(dirk: DIRK, nsteps: int) -> None:
    """Refuse schemes that change the sign of boundary values in each step, with the frequency of that sign."""
    if nsteps % 2 and abs(1 + limit_at_infinity(dirk.A, dirk.b)) < 1e-9:
        raise InputError("for the implicit midpoint rule the number of steps has to be even")


class ControlModel:
    """The operators of a problem that are the same in all steps (collective).

    Parameters
    ----------
    sweeps
        The sweeps of an evolution for which :func:`require_model` returns.
    misfits
        Its misfits, bound, each with a matrix (:meth:`~pint_fem.misfits.base.Misfit.second_derivative`).
    weights
        The regularisation.

    Attributes
    ----------
    propagator : LinearPropagator
        The steps.
    nsteps, size, control_size : int
        Steps; own numbers of a state and of the controls of a step.
    is_invariant : bool
        Whether the misfits are the same at all points but the last.

    Raises
    ------
    InputError
        If a misfit is not quadratic or has no such matrix.
    """

    def __init__(self, sweeps: Sweeps, misfits: Sequence[Misfit], weights: ControlWeights):
        self.sweeps, self.spacetime, self.slab = sweeps, sweeps.spacetime, sweeps.slab
        self.propagator, self.weights = self._required_propagator(sweeps), weights
        self.nsteps, self.size = sweeps.evolution.nsteps, sweeps.evolution.state_size
        self.control_size = sweeps.evolution.control_size
        self._terms: list[tuple[BlockOperator, float, float]] = []  # matrix, weight at most points, and at the last
        self.is_invariant = True
        for misfit in misfits:
            found = misfit.second_derivative() if misfit.quadratic else None
            if found is None:
                raise InputError(f"{type(misfit).__name__} has no second derivative that is a matrix times a weight")
            matrix, own = found
            weight = self._all_points(own)
            inner = weight[1:-1]
            usual = float(np.median(inner)) if len(inner) else float(weight[-1])
            if len(inner) and np.abs(inner - usual).max() > 1e-12 * np.abs(weight).max(initial=0):
                self.is_invariant, usual = False, float(np.mean(weight[1:]))
            self._terms.append((BlockOperator(matrix), usual, float(weight[-1])))

    def _required_propagator(self, sweeps: Sweeps) -> LinearPropagator:
        """The steps, which are those of a linear evolution with constant operators."""
        return require_model(sweeps)

    def _all_points(self, own: np.ndarray) -> np.ndarray:
        """The weights of all points from those of the local points, ``(N + 1,)`` (collective over time)."""
        out = np.zeros(self.nsteps + 1)
        first = 0 if self.slab.is_first else 1
        out[self.slab.lo + first : self.slab.hi + 1] = own[first:]
        total = np.empty_like(out)
        self.spacetime.time_comm.Allreduce(out, total, op=MPI.SUM)
        return total

    @property
    def misfit_matrices(self) -> list[tuple[PETSc.Mat, float]]:
        """The matrices of the misfits, and their weights at most points."""
        return [(operator.matrix, usual) for operator, usual, _ in self._terms]

    # -- the operators -------------------------------------------------------------------------------------------------
    def misfit(self, rows: np.ndarray) -> np.ndarray:
        """``Q u`` of rows ``(k, n)`` (collective over space)."""
        return self._weighted(rows, [usual for _, usual, _ in self._terms])

    @property
    def differs_at_end(self) -> bool:
        """Whether the second derivative at the last point is another one."""
        return any(usual != last for _, usual, last in self._terms)

    def end_difference(self, rows: np.ndarray) -> np.ndarray:
        """``(Q_N - Q) u`` of rows ``(k, n)`` (collective over space)."""
        return self._weighted(rows, [last - usual for _, usual, last in self._terms])

    def _weighted(self, rows: np.ndarray, weights: Sequence[float]) -> np.ndarray:
        out, rows = np.zeros(rows.shape), np.ascontiguousarray(rows, float)
        for (operator, *_), weight in zip(self._terms, weights, strict=True):
            if weight:
                out += weight * operator(rows)
        return out

    @cached_property
    def free(self) -> np.ndarray:
        """Which own unknowns of a state have no condition, bool ``(n,)``."""
        free = np.ones(self.size, bool)
        free[self.propagator.bc_rows] = False
        return free

    @cached_property
    def matrices(self) -> tuple[PETSc.Mat, PETSc.Mat | None]:
        """The assembled ``M`` and ``K`` without conditions; ``None`` where the evolution has no ``K``."""
        M, K = self.propagator.evolution.linear_operators()
        assembled = lambda form: assemble(form, mat_type="aij").petscmat
        return assembled(M), None if K.empty() else assembled(K)

    @cached_property
    def fields(self) -> list[slice]:
        """Places of the fields of a mixed state among the own numbers of a state."""
        V = self.sweeps.evolution.V
        ends = np.cumsum([0, *(own_size(sub) for sub in V.subspaces)]) if len(V) > 1 else [0, self.size]
        return [slice(int(a), int(b)) for a, b in pairwise(ends)]

    @cached_property
    def _data(self):
        return self.sweeps.data(np.zeros((self.slab.k, self.control_size)))

    def step(self, rows: np.ndarray, *, transposed: bool = False) -> np.ndarray:
        """``Phi u`` or ``Phi^T u`` of rows ``(k, n)`` (collective over space)."""
        rows = np.ascontiguousarray(rows, float)
        out = np.empty(rows.shape)
        (self.propagator.apply_transposed if transposed else self.propagator.apply)(rows, out)
        return out

    def control_effect_of_one_step(self, z: np.ndarray) -> np.ndarray:
        """``Psi z`` of rows of controls ``(rows, nz)``, ``(rows, n)`` (collective over space)."""
        data = self._data._replace(t=np.repeat(self._data.t[:1], len(z)), z=z)
        return np.array(self.propagator.control_forcing(data, z))

    def control_gram(self, rows: np.ndarray) -> np.ndarray:
        """``F R^-1 F^T`` times rows ``(k, n)``, with the operator ``F`` from controls to loads (collective over
        space).
        """
        return self.load(self.weights.solve(self.load_transposed(rows)))

    def load(self, z: np.ndarray) -> np.ndarray:
        """The loads ``F z`` of rows of controls ``(k, nz)``, ``(k, n)`` (collective over space)."""
        out, evolution = np.zeros((len(z), self.size)), self.propagator.evolution
        for part, operator in zip(evolution.split_controls(z), evolution.control_operators, strict=True):
            if operator is not None and operator.terms and len(z):
                out += np.array([operator.terms[0](row) for row in part])
        return out

    def load_transposed(self, rows: np.ndarray) -> np.ndarray:
        """``F^T`` times rows ``(k, n)``, ``(k, nz)`` (collective over space)."""
        out, evolution = np.zeros((len(rows), self.control_size)), self.propagator.evolution
        for part, operator in zip(evolution.split_controls(out), evolution.control_operators, strict=True):
            if operator is not None and operator.terms:
                part[...] = operator.terms[0].transposed_rows(np.ascontiguousarray(rows))
        return out

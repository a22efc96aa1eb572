r"""KKT systems of evolutions with operators averaged over the steps, as preconditioners.

At a state and control the residual of a step is linearised to :math:`M_n \dot u + K_n u - F_n z`. With the averages of
the three matrices over some steps (:class:`~pint_fem.sweeps.frequencies.systems.AveragedSystems`, as ParaDiag does)
and the second derivatives of misfits and regularisation, all steps are the same: this is an optimal control problem of
a linear evolution. Its KKT system is solved with its skew-circulant preconditioner (:mod:`pint_fem.kkt`), frequency by
frequency as a sparse system of stages, controls and multipliers. The controls of its solution for a right-hand side
``(0, r, 0)`` are the product of ``r`` with the inverse of a positive definite Hessian, which preconditions conjugate
gradients for the true one. Second derivatives of the steps, which may be indefinite, are left out.

Averages and factors are used for later states and controls as long as conjugate gradients converge quickly.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import ufl
from firedrake import Function, assemble, derivative
from firedrake.petsc import PETSc
from irksome.ufl.deriv import TimeDerivative
from pyadjoint.tape import stop_annotating
from scipy.sparse import block_diag, csr_matrix, hstack
from scipy.sparse.linalg import splu
from ufl.algorithms import expand_derivatives

from pint_fem.adjoint.problem import ReducedProblem
from pint_fem.collective import collectively
from pint_fem.errors import InputError
from pint_fem.kernels.arrays import get, is_real
from pint_fem.kkt.circulant import CirculantKKT
from pint_fem.kkt.control_weights import ControlWeights
from pint_fem.kkt.coupled.matrices import own_rows, stage_operators
from pint_fem.kkt.coupled.systems import CoupledSystems
from pint_fem.kkt.model import ControlModel, require_regular_frequencies
from pint_fem.kkt.scheme import StageCoefficients
from pint_fem.kkt.transform import SkewCirculant
from pint_fem.misfits.base import Misfit
from pint_fem.paradiag.options import ParaDiagOptions
from pint_fem.sweeps.frequencies.systems import AveragedSystems
from pint_fem.sweeps.sweeps import Sweeps

__all__ = ["AveragedKKT", "AveragedModel", "AveragedOperators"]

SLOW = 4
"""KKT solves at an iterate above which operators are averaged again at the next one."""
MEMORY = 2e9
"""Bytes of factors that a rank keeps."""


class AveragedOperators(AveragedSystems):
    """The averages of the linearised steps' matrices ``M``, ``K`` and ``F`` over some steps (collective).

    Parameters
    ----------
    sweeps
        Those of the evolution, on a grid with one rank in space.

    Attributes
    ----------
    M, K, F : csr_matrix
        The last averages, ``(n, n)``, ``(n, n)`` and ``(n, nz)``, without boundary conditions.
    """

    def __init__(self, sweeps: Sweeps):
        evolution = sweeps.evolution
        super().__init__(evolution, sweeps.spacetime, sweeps.slab, ParaDiagOptions(), {})
        form = ufl.replace(evolution.residual, {TimeDerivative(evolution.u): self._rate})
        self._loads = [_Load(form, control) for control in evolution.parameters]
        self.M = self.K = self.F = csr_matrix((0, 0))

    def average(self, z: np.ndarray, U: np.ndarray) -> None:
        """Average at the controls of the own steps and states ``(k + 1, n)``."""
        self._average(z, U)

    def _linearise(self, z: np.ndarray, U: np.ndarray, i: int) -> None:
        """Assemble the operators of the own step ``i``."""
        super()._linearise(z, U, i)
        with stop_annotating():
            for load in self._loads:
                load.assemble()

    def _values(self) -> list[np.ndarray | None]:
        """The entries of ``M``, ``K`` and the loads of each control."""
        return [*super()._values(), *(load.values for load in self._loads)]

    def _use(self, averages: list[np.ndarray | None]) -> None:
        """Make the matrices of averaged entries."""
        n = self.evolution.state_size
        given = []
        for values, matrix in zip(averages[:2], self._matrices, strict=True):
            if values is None:
                given.append(csr_matrix((n, n)))
            else:
                indptr, indices, _ = matrix.getValuesCSR()
                given.append(csr_matrix((values, indices, indptr), shape=(n, n)))
        self.M, self.K = given
        parts = [load.matrix(values) for load, values in zip(self._loads, averages[2:], strict=True)]
        self.F = csr_matrix(hstack(parts, format="csr"))


class _Load:
    """The derivative of the load by a control, a sparse matrix or, for a real number, a column."""

    def __init__(self, form: ufl.Form, control: Function):
        space = control.function_space()
        self._column = is_real(space)
        direction = Function(space).assign(1.0) if self._column else None
        load = derivative(-form, control, direction) if self._column else derivative(-form, control)
        load = expand_derivatives(load)
        if load.empty():
            raise InputError(f"control {control.name()!r} is not in the residual")
        self._form, self._made = load, None
        self.values: np.ndarray | None = None

    def assemble(self) -> None:
        """Assemble at the present values of all functions."""
        if self._column:
            self.values = get(assemble(self._form))
            return
        self._made = assemble(self._form, mat_type="aij", tensor=self._made)
        self._pattern = own_rows(self._made.petscmat)
        self.values = self._pattern.data

    def matrix(self, values: np.ndarray) -> csr_matrix:
        """The matrix of other entries."""
        if self._column:
            return csr_matrix(values[:, None])
        return csr_matrix((values, self._pattern.indices, self._pattern.indptr), shape=self._pattern.shape)


class AveragedModel(ControlModel):
    """An optimal control problem of a linear evolution with averaged operators.

    Parameters
    ----------
    sweeps
        Sweeps of the evolution, whose propagator has ``dirk`` and ``bc_rows``.
    misfits
        Its misfits.
    weights
        The regularisation.
    operators
        The averages, made before.
    """

    def __init__(
        self, sweeps: Sweeps, misfits: Sequence[Misfit], weights: ControlWeights, operators: AveragedOperators
    ):
        super().__init__(sweeps, misfits, weights)
        self.move_to(operators)

    def _required_propagator(self, sweeps: Sweeps) -> Any:
        """The steps, of which only the scheme and the rows of conditions are used."""
        return sweeps.propagators[0]

    def move_to(self, operators: AveragedOperators) -> None:
        """Set other averages."""
        dirk, dt = self.propagator.dirk, self.sweeps.evolution.dt
        self._h = dirk.diagonal * dt
        S, M, _ = stage_operators(operators.M, operators.K, operators.F, self.free, self._h)
        self._scheme, self._mass = StageCoefficients.of(dirk), M.ways[0]
        self._factors = {h: splu(operator.ways[0].tocsc()) for h, operator in S.items()}

    def step(self, rows: np.ndarray, *, transposed: bool = False) -> np.ndarray:
        """``Phi u`` or ``Phi^T u`` of rows ``(k, n)``."""
        w0, w, e0, e = self._scheme
        u, solves, M = np.asarray(rows, float).T, [self._factors[h] for h in self._h], self._mass
        stages: list[np.ndarray] = []
        if not transposed:
            for i, factor in enumerate(solves):
                W = w0[i] * u + sum(w[i, j] * stages[j] for j in range(i))
                stages.append(factor.solve(M @ W))
            return np.ascontiguousarray((e0 * u + sum(a * U for a, U in zip(e, stages, strict=True))).T)
        out, bars = e0 * u, [a * u for a in e]
        for i in reversed(range(len(solves))):
            W = M.T @ solves[i].solve(np.ascontiguousarray(bars[i]), "T")
            out = out + w0[i] * W
            for j in range(i):
                bars[j] = bars[j] + w[i, j] * W
        return np.ascontiguousarray(out.T)


class AveragedKKT:
    """Solves with KKT systems of averaged operators for right-hand sides of the controls (collective).

    Parameters
    ----------
    problem
        The functional of one evolution.

    Attributes
    ----------
    updates : int
        How often operators have been averaged.

    Raises
    ------
    InputError
        On every rank, where there is no such system; the message is the reason.
    """

    def __init__(self, problem: ReducedProblem):
        _require(problem)
        self._problem, sweeps = problem, problem.sweeps
        self._operators = collectively(problem.spacetime.comm, "averaged operators", AveragedOperators, sweeps)
        controls = problem.evolution.parameters
        forms = [[of(c) for c in controls] for of in (problem.regularisation_hessian, problem.rate_hessian)]
        given = sweeps.evolution, *forms
        self._weights = collectively(problem.spacetime.comm, "regularisation", ControlWeights, *given)
        dt, blocks = sweeps.evolution.dt, [_block(w) for w in self._weights.matrices]
        rates = [
            csr_matrix(block.shape) if w is None else _block(w)
            for w, block in zip(self._weights.rate_matrices, blocks, strict=True)
        ]
        self._R = dt * csr_matrix(block_diag(blocks))
        self._R_time = dt * csr_matrix(block_diag(rates)) if self._weights.has_rates else None
        self._model: AveragedModel | None = None
        self._kkt: CirculantKKT | None = None
        self._solves = 0

    @property
    def updates(self) -> int:
        """How often operators have been averaged."""
        return self._operators.updates

    def move_to(self, u: np.ndarray, z: np.ndarray) -> None:
        """Set the state and the control of an iterate; operators are averaged where the last ones were not near."""
        if self._kkt is None or self._solves > SLOW:
            self._average(u, z)
        self._solves = 0

    def _average(self, u: np.ndarray, z: np.ndarray) -> None:
        """Average operators and make the systems."""
        problem, sweeps = self._problem, self._problem.sweeps
        self._operators.average(problem.layout.steps(z), u)
        if self._model is None:
            self._model = AveragedModel(sweeps, problem.misfits, self._weights, self._operators)
        else:
            self._model.move_to(self._operators)
        if self._kkt is not None:
            self._kkt.systems.release()
        model, of = self._model, self._operators
        Q = sum((w * own_rows(matrix) for matrix, w in model.misfit_matrices), csr_matrix(of.M.shape))
        given = of.M, of.K, of.F, Q, self._R
        systems = CoupledSystems(
            model.propagator.dirk, model.nsteps, *given, dt=sweeps.evolution.dt, R_time=self._R_time, free=model.free,
            memory=MEMORY,
        )  # fmt: skip
        comm, bounds = sweeps.spacetime.time_comm, sweeps.slab.bounds
        transform = SkewCirculant(model.nsteps, model.size, comm=comm, bounds=bounds)
        self._kkt = CirculantKKT(model, systems, transform)

    def solve(self, c: np.ndarray) -> tuple[np.ndarray, int, float]:
        """The controls of the solution for a dual vector ``(layout.size,)`` of the controls, iterations and residual.

        Raises
        ------
        SolverFailure
            On every rank, where the iteration does not converge.
        """
        layout = self._problem.layout
        solution = self._kkt.solve(c=np.ascontiguousarray(layout.steps(c)))
        self._solves += 1
        return layout.from_steps(solution.z), solution.iterations, solution.residual


def _block(weight: PETSc.Mat | float) -> csr_matrix:
    """The second derivative of the regularisation by a control, a matrix or a number."""
    return own_rows(weight) if isinstance(weight, PETSc.Mat) else csr_matrix([[weight]])


def _require(problem: ReducedProblem) -> None:
    """Refuse problems without KKT systems of averaged operators."""
    ev, regularisation = problem.sweeps.evolution, problem.regularisation
    static = [c.name() for c in ev.parameters if c not in ev.stepwise]
    if static or ev.initial_control is not None or not ev.parameters:
        names = ", ".join(map(repr, static)) or "the initial condition"
        raise InputError(f"the control {names} is not one with a value in each step")
    if problem.spacetime.space_size > 1:
        raise InputError("there are several ranks in space")
    if ev.boundary_controls is not None or ev.nullspace is not None:
        raise InputError("a control is in boundary values, or there is a nullspace")
    if not (hasattr(problem.sweeps.propagators[0], "dirk") and hasattr(problem.sweeps.propagators[0], "bc_rows")):
        raise InputError(f"{type(problem.sweeps.propagators[0]).__name__} has no stages of a Runge-Kutta method")
    if not all(misfit.quadratic and misfit.second_derivative() is not None for misfit in problem.misfits):
        raise InputError("a misfit has no second derivative that is a matrix times a weight")
    if regularisation is None or not regularisation.quadratic or regularisation.coupled:
        raise InputError("there is no regularisation, or it is not quadratic, or it couples controls")
    require_regular_frequencies(problem.sweeps.propagators[0].dirk, ev.nsteps)

r"""Steps of linear evolutions: operators assembled once, one factorisation per stage coefficient, blocks of states.

For :math:`M \dot u + K u = f(t, z)` with constant :math:`M, K` and :math:`f` affine in the control. With :math:`h_i =
a_{ii} \Delta t`,

.. math::  S_i U_i = M W_i + b_i , \quad S_i = M + h_i K, \quad b_i = h_i f(t_i, z),

on the free degrees of freedom, and the boundary values of time :math:`t_i` on the others (``S`` has unit rows and
columns there, ``M`` zero rows, and ``b`` carries the lifting; the rows' adjoints are those of the boundary values).
``W`` and the step follow from :class:`~pint_fem.evolution.tableaux.DIRK`. Where the evolution eliminates a field,
stages are solved as in :mod:`~pint_fem.propagators.elimination`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import copy
from functools import cached_property
from typing import Any

import numpy as np
from firedrake import Constant, assemble
from firedrake.petsc import PETSc
from irksome.tableaux.ButcherTableaux import ButcherTableau

from pint_fem.collective import all_ranks
from pint_fem.errors import InputError
from pint_fem.evolution.evolution import Evolution
from pint_fem.evolution.fields import Fields
from pint_fem.evolution.tableaux import DIRK
from pint_fem.kernels.arrays import boundary_rows
from pint_fem.kernels.compressed_vectors import MOST
from pint_fem.kernels.direct import added, matrix_bytes
from pint_fem.kernels.factor import Factor, is_symmetric
from pint_fem.kernels.lanes.program import StepProgram
from pint_fem.kernels.multigrid import Geometry
from pint_fem.kernels.regularity import regular_factor
from pint_fem.kernels.steps import Steps, execution
from pint_fem.propagators.base import FEPropagator, StepData
from pint_fem.propagators.elimination import EliminatedRecursion
from pint_fem.propagators.loads import StageLoads
from pint_fem.propagators.recursion import MatrixRecursion, StepPrograms

__all__ = ["LinearPropagator", "chunks"]


class LinearPropagator(FEPropagator):
    """Steps of a linear evolution with constant operators, by cached factors on blocks of states.

    Parameters
    ----------
    evolution, stride, tableau
        As for every propagator.

    Attributes
    ----------
    dirk, bc_rows : DIRK, ndarray
        Coefficients of the integrator, and own rows with a condition.
    factors : dict
        Factors of the stages' matrices by ``a_ii dt``.
    fields : Fields or None
        Blocks of the operators where a field is eliminated.
    stores_loads : bool
        Whether loads that depend on time are stored, one for each step and stage, or compressed; set before the first
        step.

    Raises
    ------
    InputError
        If the evolution is not linear with constant operators, or a stage's matrix is singular.
    """

    is_linear = is_affine = True
    _like: Factor | None = None  # a factor of a matrix with the same pattern
    _times: dict[str, dict]  # measured times of the programs

    def __init__(self, evolution: Evolution, *, stride: int = 1, tableau: ButcherTableau | None = None):
        super().__init__(evolution, stride=stride, tableau=tableau)
        self._require_operators()
        self._times = getattr(self, "_times", {})
        self.stores_loads = True
        self.dirk = DIRK(self.tableau)
        self.bc_rows = boundary_rows(self.evolution.bcs, self.evolution.V)
        self.steps_of_stage = self.dirk.diagonal * self.dt
        self.fields: Fields | None = self._fields()
        self.factors: dict[float, Factor] = {}
        self._programs, self._comm = self._recursion(), self.evolution.V.mesh().comm
        self._forward: Steps = self._execution("forward", self._programs.forward())
        self._backward: Steps = self._execution("backward", self._programs.backward())

    def _require_operators(self) -> None:
        """Raise where the evolution has no operators of the kind that steps are made for."""
        if self.evolution.linear_operators() is None:
            raise InputError("the evolution is not linear with constant operators: use the form propagator")

    def _execution(self, name: str, program: StepProgram) -> Steps:
        """The execution of one of the propagator's programs."""
        return execution(program, self._comm, self._times.setdefault(name, {}))

    def for_evolution(self, evolution: Evolution) -> LinearPropagator:
        """The propagator of a private evolution that differs in loads and boundary values only, with the same matrices
        and factors.
        """
        made = copy(self)
        made.evolution = evolution
        vars(made).pop("loads", None)
        vars(evolution)["fields"] = self.evolution.fields
        return made

    def _fields(self) -> Fields | None:
        """The blocks of the operators where a field is eliminated."""
        return self.evolution.fields

    def _recursion(self) -> StepPrograms:
        """Factor the stages' matrices, and make the recursion."""
        ev = self.evolution
        given = self.dirk, self.steps_of_stage, self.bc_rows, ev.boundary_controls is None
        if self.fields is not None:
            for h in dict.fromkeys(self.steps_of_stage):
                self._factor(h, self.fields.complement(h))
            return EliminatedRecursion(self.fields, self.factors, *given)
        self.M = self._factor_stages()
        # a rank of space without conditions takes part in the transposition, too
        symmetric_mass = self.M.isSymmetric(0.0) and all_ranks(ev.V.mesh().comm, not len(self.bc_rows))
        self.M.zeroRows((self.bc_rows + self.M.getOwnershipRange()[0]).astype(PETSc.IntType), diag=0.0)
        self.MT = self.M if symmetric_mass else self.M.transpose(PETSc.Mat())
        return MatrixRecursion(self.M, self.MT, self.factors, *given)

    def _factor_stages(self) -> PETSc.Mat:
        """Factor the matrices of the stages; a copy of the mass matrix without conditions."""
        ev = self.evolution
        M, K = ev.linear_operators()
        parts = [assemble(form, mat_type="aij").petscmat for form in (M, K) if not form.empty()]
        symmetric = all(is_symmetric(part) for part in parts)
        for h in dict.fromkeys(self.steps_of_stage):
            matrix = assemble(M + Constant(h) * K, bcs=ev.bcs, mat_type="aij").petscmat
            self._factor(h, matrix, symmetric=symmetric, geometry=Geometry(ev.V, ev.bcs), nullspace=ev.nullspace)
        return assemble(M, mat_type="aij").petscmat.copy()

    def _factor(self, h: float, matrix: PETSc.Mat, **given: Any) -> None:
        """Factor a matrix, by default one of the field that is not eliminated, for the stages with ``a_ii dt = h``."""
        if not given:
            fields = self.fields
            given = dict(symmetric=fields.symmetric, geometry=fields.geometry, nullspace=fields.nullspace)
        like = next(iter(self.factors.values()), self._like)
        self.factors[h] = regular_factor(self.evolution, matrix, given.pop("nullspace"), like=like, **given)

    def solve_within(self, tolerance: float | None) -> None:
        """Set the tolerance of iterative solvers, as :meth:`FEPropagator.solve_within`."""
        for factor in self.factors.values():
            factor.solve_within(tolerance)

    def shifted_parts(self, h: float) -> tuple[PETSc.Mat, ...]:
        """The matrices of which ParaDiag's systems are sums, for a stage with ``a_ii dt = h``.

        Returns
        -------
        tuple of PETSc.Mat
            ``S`` (regular: :mod:`~pint_fem.kernels.nullspace`) and ``M``; where a field is eliminated :math:`S_a`,
            :math:`M_a` and :math:`-G X`.
        """
        if self.fields is None:
            return self.factors[h].matrix, self.M
        return self.fields.regular_part(h), self.fields.matrices["M"], self.fields.stiffness()

    @cached_property
    def loads(self) -> StageLoads:
        """The loads of the stages; compiled and assembled when first used (collective over space)."""
        return StageLoads(self.evolution, self.dirk, self.dt, self.bc_rows, store=self.stores_loads)

    # -- on states -----------------------------------------------------------------------------------------------------
    def apply(self, u: np.ndarray, out: np.ndarray, loads: Callable[[slice, int], np.ndarray] | None = None) -> None:
        """Write the step without forcing, or with given loads, to ``out``.

        Parameters
        ----------
        u, out
            States ``(k, n)``.
        loads
            Loads ``(rows, n)`` of a slice of the steps in a stage.
        """
        if loads is None:
            self._forward.run(u, out[:, None])
            return
        for rows in chunks(len(u)):
            given = [loads(rows, i)[:, None] for i in range(self.dirk.stages)]
            self._forward.run(u[rows], out[rows, None], None, given)

    def apply_transposed(self, lam: np.ndarray, out: np.ndarray, stages: np.ndarray | None = None) -> None:
        """Write the transposed step to ``out``.

        Parameters
        ----------
        lam, out
            Adjoints ``(k, n)``.
        stages
            If given, ``(stages, k, n)``, takes the adjoints of the stages' right-hand sides.
        """
        self._backward.run(lam, out[:, None], None, () if stages is None else list(stages[:, :, None]))

    def transposed_with_stages(self, lam: np.ndarray, out: np.ndarray, stages: np.ndarray) -> None:
        """Take transposed steps one after another from each of ``k`` adjoints ``(k, n)``: results ``(k, steps, n)`` and
        the adjoints of the stages' right-hand sides ``(stages, k, steps, n)``.
        """
        self._backward.run(lam, out, None, list(stages))

    def advance(
        self,
        u: np.ndarray,
        out: np.ndarray,
        added: np.ndarray | None = None,
        *,
        transposed: bool = False,
        single: bool = False,
    ) -> None:
        """Take homogeneous steps one after another from each of ``k`` states, ``out[:, j] = Phi_u out[:, j-1] +
        added[:, j]``, or transposed ones.

        Parameters
        ----------
        u
            States ``(k, n)``.
        out, added
            Results ``(k, steps, n)``, and what is added to them, or ``None``.
        transposed
            Whether the steps are transposed.
        single
            Whether single precision is enough; :attr:`error_of_single_precision` is that of a step.
        """
        steps = self._backward if transposed else self._forward
        (steps.in_single if single else steps).run(u, out, added)

    @cached_property
    def error_of_single_precision(self) -> float:
        """The largest difference of a step and its transpose in single precision for smooth states, relative to their
        norms (collective over space when first used).
        """
        worst, comm, shape = 0.0, self.evolution.V.mesh().comm, (1, 1, self.evolution.state_size)
        size = lambda a: np.sqrt(comm.allreduce(float(np.vdot(a, a))))
        for transposed in (False, True):
            smooth, single = np.empty((1, 4, shape[-1])), np.empty(shape)
            self.advance(np.cos(np.arange(shape[-1]) ** 2)[None], smooth, transposed=transposed)
            self.advance(smooth[:, 2], single, transposed=transposed, single=True)
            start = size(smooth[:, 2])
            worst = max(worst, size(single[0] - smooth[:, 3]) / start if start > 0 else 0.0)
        return worst if np.isfinite(worst) else np.inf

    def sweep(self, U: np.ndarray, G: np.ndarray | None, *, transposed: bool = False) -> None:
        """Take homogeneous steps one after another in place, ``U[i+1] = Phi_u U[i] + G[i]``, or transposed ones, of a
        state ``U[i]`` ``(n,)`` or of several ``(batch, n)``.
        """
        u, rest = (U[:1], U[None, 1:]) if U.ndim == 2 else (U[0], U[1:].swapaxes(0, 1))
        if G is not None:
            G = G[None] if U.ndim == 2 else G.swapaxes(0, 1)
        self.advance(u, rest, G, transposed=transposed)

    def lane_seconds(self) -> dict[int, float] | None:
        """Measured seconds of a step of as many states at once as kernels are compiled for; ``None`` where steps are
        taken by PETSc, for one state after another.
        """
        return getattr(self._forward, "seconds", None)

    # -- forcing -------------------------------------------------------------------------------------------------------
    def update_data(self, changed: set) -> bool:
        """Discard loads; ``False`` where data of the operators have changed."""
        if changed & self.evolution.operator_data:
            return False
        if changed and "loads" in vars(self):
            self.loads.update_data()
        return True

    def forcing(self, data: StepData) -> np.ndarray:
        """The affine part ``Phi(0, z)`` of each step, ``(k, n)``; a broadcast row where all are the same."""
        return self._forced(data, data.z, affine=True)

    def control_forcing(self, data: StepData, dz: np.ndarray) -> np.ndarray:
        """The derivative ``Phi_z dz`` of each step, ``(k, n)``; a broadcast row where all are the same."""
        return self._forced(data, dz, affine=False)

    def _forced(self, data: StepData, z: np.ndarray | None, *, affine: bool) -> np.ndarray:
        """The ends of steps from zero with loads of controls, and the affine part where asked."""
        k, n, ev = len(data.t), self.evolution.state_size, self.evolution
        affine = affine and not ev.is_homogeneous
        if (affine and ev.depends_on_time) or (z is not None and z.ndim == 2):
            out = np.empty((k, n))
            loads = self.loads.of_steps(data.t, z, affine=affine)
            self.apply(np.broadcast_to(np.zeros(n), out.shape), out, loads)
            return out
        rows, weights = self._responses(data, z, affine)
        if not weights:
            return np.broadcast_to(rows[0], (k, n))
        out = np.tile(rows[0], (k, 1))
        for w, row in zip(weights, rows[1:], strict=True):
            for i in range(k):  # a product of matrices may round a row with the number of rows
                out[i] += w[i] * row
        return out

    def _responses(self, data: StepData, z: np.ndarray | None, affine: bool) -> tuple[np.ndarray, list[np.ndarray]]:
        """Ends ``(1 + terms, n)`` of steps from zero, with the loads that are the same in all steps and with each other
        term of weight 1; and the weights of these terms in each step.
        """
        terms = self.loads.terms(data.t) if z is not None else []
        same, moving = ([t for t in terms if t.constant == constant] for constant in (True, False))
        loads = np.zeros((self.dirk.stages, 1 + len(moving), self.evolution.state_size))
        for i, h in enumerate(self.steps_of_stage):
            if affine and len(data.t):
                loads[i, 0] += self.loads.affine(data.t[0], i)
            for row, group in enumerate([same, *([t] for t in moving)]):
                for term in group:
                    if i in term.stages:
                        loads[i, row] += self.loads.of_term(term, z, h)
        out = np.empty(loads.shape[1:])
        self.apply(np.zeros_like(out), out, lambda rows, i: loads[i, rows])
        return out, [term.weights for term in moving]

    # -- the interface -------------------------------------------------------------------------------------------------
    def step(self, data: StepData, u: np.ndarray, out: np.ndarray) -> None:
        """Write ``Phi(u)`` of each step to ``out``."""
        self.apply(u, out, self.loads.of_steps(data.t, data.z, affine=True))

    def tangent(self, data: StepData, du: np.ndarray, dz: np.ndarray | None, out: np.ndarray) -> None:
        """Write ``Phi_u du + Phi_z dz`` of each step to ``out``."""
        self.apply(du, out, None if dz is None else self.loads.of_steps(data.t, dz, affine=False))

    def adjoint(self, data: StepData, lam: np.ndarray, out: np.ndarray) -> None:
        """Write ``Phi_u^T lam`` of each step to ``out``."""
        self.apply_transposed(lam, out)

    def control_adjoint(self, data: StepData, lam: np.ndarray) -> np.ndarray:
        """``Phi_z^T lam``; for a static control the adjoints are summed before the one solve for each term."""
        if not self.evolution.per_step:
            return self.control_adjoint_of_sums(data, self.control_sums(data, lam))
        terms, adjoints = self.loads.terms(data.t), self.stage_adjoints(lam)
        out = np.zeros((len(lam), self.evolution.control_size))
        for row, gz in enumerate(out):
            for term in terms:
                gz += term.weights[row] * self.loads.pull_back(term, adjoints[:, row])
        return out

    def control_sums(self, data: StepData, lam: np.ndarray) -> np.ndarray:
        """Sums of the adjoints of some steps, weighted as each term of the loads is, ``(terms, n)``."""
        terms = self.loads.terms(data.t)
        sums = [np.add.reduce(lam if term.constant else term.weights[:, None] * lam, axis=0) for term in terms]
        return np.array(sums).reshape(len(terms), self.evolution.state_size)

    def control_adjoint_of_sums(self, data: StepData, sums: np.ndarray) -> np.ndarray:
        """``Phi_z^T lam`` summed over all steps, ``(nz,)``, from the sums of :meth:`control_sums`."""
        adjoints = self.stage_adjoints(sums)
        parts = (self.loads.pull_back(term, adjoints[:, row]) for row, term in enumerate(self.loads.terms(data.t)))
        return sum(parts, np.zeros(self.evolution.control_size))

    def stage_adjoints(self, lam: np.ndarray) -> np.ndarray:
        """Adjoints ``(stages, k, n)`` of the stages' right-hand sides from those of the ends ``(k, n)``."""
        adjoints = np.zeros((self.dirk.stages, *lam.shape))
        self.apply_transposed(lam, np.empty(lam.shape), adjoints)
        return adjoints

    def second_order(
        self, data: StepData, du: np.ndarray, dz: np.ndarray | None, lam: np.ndarray, end: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Zero, as the step is affine."""
        return np.zeros_like(lam), self._collect([np.zeros(self.evolution.control_size)] * len(lam))

    # -- memory --------------------------------------------------------------------------------------------------------
    def data_nbytes(self, count: int) -> int:
        """Bytes of loads for ``count`` steps."""
        stages = rows = self.dirk.stages
        if self.evolution.depends_on_time:
            rows = stages * count if self.stores_loads else min(MOST, stages * count)
        if self.evolution.is_homogeneous:
            rows = 0
        return 8 * self.evolution.state_size * rows

    def work_nbytes(self, count: int) -> int:
        """Bytes of work memory in a call with ``count`` steps, which all propagators share."""
        return max(self._forward.work_nbytes(count), self._backward.work_nbytes(count))

    def operator_nbytes(self, count: int) -> dict[str, int]:
        """Bytes of matrices and factors on this rank by part, independent of ``count``."""
        if self.fields is not None:
            matrices = self.fields.held if self.stride == 1 else []  # levels share them
        else:
            matrices = [self.M] if self.MT is self.M else [self.M, self.MT]
        parts = [{"matrices": sum(map(matrix_bytes, matrices))}, *(factor.nbytes for factor in self.factors.values())]
        return added(*parts, self._forward.nbytes, self._backward.nbytes)


def chunks(count: int) -> Iterator[slice]:
    """Slices of states whose loads and stages are in memory at the same time."""
    for first in range(0, count, _CHUNK):
        yield slice(first, min(first + _CHUNK, count))


_CHUNK = 64
"""Number of states of such a slice."""

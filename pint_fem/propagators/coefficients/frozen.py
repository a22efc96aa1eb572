"""Steps with the operators of one value of the controls, which are assembled and factored with what others have found.

Patterns, tensors and the order of elimination do not depend on the values of controls, so that another value costs the
assembly of ``M`` and ``K`` and a numerical factorisation.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
from firedrake.assemble import get_assembler
from firedrake.petsc import PETSc

from pint_fem.evolution.control_operators import MatrixOperator
from pint_fem.evolution.evolution import Evolution
from pint_fem.evolution.fields import Fields
from pint_fem.kernels.direct import added, matrix_bytes
from pint_fem.kernels.factor import is_symmetric
from pint_fem.kernels.multigrid import Geometry
from pint_fem.kernels.steps import Steps
from pint_fem.propagators.coefficients.loads import CoefficientLoads
from pint_fem.propagators.leapfrog import LeapfrogPropagator
from pint_fem.propagators.linear import LinearPropagator

__all__ = ["FrozenLeapfrog", "FrozenSteps", "OperatorMatrices"]


class OperatorMatrices:
    """The matrices ``M`` and ``K`` without conditions, at the values that an evolution's controls have.

    Parameters
    ----------
    evolution
        A private evolution with :attr:`~pint_fem.evolution.evolution.Evolution.affine_parts`.
    """

    def __init__(self, evolution: Evolution):
        parts = evolution.affine_parts
        forms = [form for form in (parts.M, parts.K) if not form.empty()]
        self._assemblers = [get_assembler(form, mat_type="aij") for form in forms]
        self._tensors: list[Any] = [None] * len(forms)

    def assemble(self) -> tuple[PETSc.Mat, PETSc.Mat]:
        """``M`` and ``K``, which are valid until the next call (collective over space)."""
        pairs = zip(self._assemblers, self._tensors, strict=True)
        self._tensors = [assembler.assemble(tensor=tensor) for assembler, tensor in pairs]
        M, *rest = (tensor.petscmat for tensor in self._tensors)
        if rest:
            return M, rest[0]
        K = M.copy()
        K.zeroEntries()
        return M, K


class FrozenSteps(LinearPropagator):
    """Steps with the operators of one value of the controls.

    Parameters
    ----------
    evolution, stride, tableau
        As for every propagator.
    matrices
        ``M`` and ``K`` without conditions, which are copied.
    loads
        The loads of the stages.
    like
        Steps with the operators of other controls, whose order of elimination and measured times are used.

    Raises
    ------
    InputError
        If a stage's matrix is singular or not finite.
    """

    def __init__(
        self,
        evolution: Evolution,
        *,
        stride: int,
        tableau: Any,
        matrices: tuple[PETSc.Mat, PETSc.Mat],
        loads: CoefficientLoads,
        like: FrozenSteps | None = None,
    ):
        self._matrices, self._times = matrices, {} if like is None else like._times
        self._like = None if like is None else next(iter(like.factors.values()))
        super().__init__(evolution, stride=stride, tableau=tableau)
        self.lifting = self._lifting(loads)
        self.loads = loads  # in the place of those that a linear propagator makes
        self._matrices, self._like = (), None

    def _require_operators(self) -> None:
        """Nothing: the operators are given."""

    def _fields(self) -> Fields | None:
        """The blocks of the given operators where a field is eliminated."""
        fields = self.evolution.fields
        return None if fields is None else fields.with_operators(*self._matrices)

    def _stage_matrix(self, h: float) -> PETSc.Mat:
        """``M + h K`` without conditions."""
        M, K = self._matrices
        S = M.copy()
        S.axpy(h, K, structure=PETSc.Mat.Structure.DIFFERENT_NONZERO_PATTERN)
        return S

    def _lifting(self, loads: CoefficientLoads) -> dict[float, MatrixOperator]:
        """The operators ``S`` without conditions that lift boundary values, by ``a_ii dt``."""
        if not loads.has_values:
            return {}
        return {h: MatrixOperator(self._stage_matrix(h), self.bc_rows) for h in dict.fromkeys(self.steps_of_stage)}

    def _factor_stages(self) -> PETSc.Mat:
        """Factor the matrices of the stages; a copy of the mass matrix without conditions."""
        ev = self.evolution
        M, symmetric = self._matrices[0], all(map(is_symmetric, self._matrices))
        rows = (self.bc_rows + M.getOwnershipRange()[0]).astype(PETSc.IntType)
        for h in dict.fromkeys(self.steps_of_stage):
            S = self._stage_matrix(h)
            S.zeroRowsColumns(rows, diag=1.0)
            self._factor(h, S, symmetric=symmetric, geometry=Geometry(ev.V, ev.bcs), nullspace=ev.nullspace)
        return M.copy()

    # -- stages --------------------------------------------------------------------------------------------------------
    @cached_property
    def _first_stages(self) -> Steps:
        return self._execution("first stages", self._programs.first_stages())

    @cached_property
    def _with_sources(self) -> Steps:
        return self._execution("sources", self._programs.backward(sources=True))

    def stage_values(
        self, u: np.ndarray, ends: np.ndarray, loads: Sequence[np.ndarray]
    ) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """The stages of steps whose ends are given.

        Parameters
        ----------
        u, ends
            States at the starts and the ends of the steps, ``(k, n)``.
        loads
            Loads of the stages but the last, ``(k, n)`` each.

        Returns
        -------
        tuple of list of ndarray
            The stages' values ``U`` and their differences ``U - W`` from the base values, ``(k, n)`` for each stage.
        """
        dirk, last = self.dirk, self.dirk.stages - 1
        U: list[np.ndarray] = [np.empty(u.shape) for _ in range(last)]
        D: list[np.ndarray] = []
        if last:
            given = [*(load[:, None] for load in loads), None, *(stage[:, None] for stage in U)]
            self._first_stages.run(u, np.empty_like(u)[:, None], None, given)
        for i in range(dirk.stages):
            W = u
            for j in range(i):
                if dirk.alpha[i, j]:
                    W = W + dirk.alpha[i, j] * D[j]
            if i < last:
                D.append(U[i] - W)
            elif dirk.stiffly_accurate:
                U.append(ends)
                D.append(ends - W)
            else:
                step = ends - u
                for j in range(i):
                    step -= dirk.beta[j] * D[j]
                step /= dirk.beta[i]
                D.append(step)
                U.append(W + step)
        return U, D

    def transposed_with_sources(
        self, lam: np.ndarray, rhs: np.ndarray, bases: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """The transposed step with sources in its stages.

        Parameters
        ----------
        lam
            Adjoints ``(k, n)`` of the ends.
        rhs, bases
            What is added to the right-hand sides of the transposed stages and to the adjoints of their base values,
            ``(stages, k, n)``.

        Returns
        -------
        tuple of ndarray
            Adjoints of the starts ``(k, n)`` and of the stages' right-hand sides ``(stages, k, n)``.
        """
        out, adjoints = np.empty_like(lam), np.zeros(rhs.shape)
        states = [*adjoints[:, :, None], *rhs[:, :, None], *bases[:, :, None]]
        self._with_sources.run(lam, out[:, None], None, states)
        return out, adjoints

    def operator_nbytes(self, count: int) -> dict[str, int]:
        """Bytes of matrices and factors on this rank by part, independent of ``count``."""
        made = [vars(self).get(name) for name in ("_first_stages", "_with_sources")]
        lifting = {"matrices": sum(matrix_bytes(operator.matrix) for operator in self.lifting.values())}
        return added(super().operator_nbytes(count), lifting, *(steps.nbytes for steps in made if steps is not None))


class FrozenLeapfrog(FrozenSteps, LeapfrogPropagator):
    """Leapfrog steps; where the step is not stable for the controls, an ``InputError`` is raised."""

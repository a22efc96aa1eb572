r"""Steps of evolutions that are linear for given controls, some of which are in the operators, and their derivatives.

For :math:`M(z) \dot u + K(z) u = f(t, z)`, with ``f`` affine in the controls, the stages of a step satisfy

.. math::  R_i = M (U_i - W_i) + h_i (K U_i - f(t_i, z)) = 0

on the free degrees of freedom. For one value of ``z`` all steps have the same operators, and everything is done as for
sources (:class:`~pint_fem.propagators.linear.LinearPropagator`). In a direction :math:`\delta z`, with the matrices
:math:`\delta M = M'(z)[\delta z]` and :math:`\delta K` and the adjoints :math:`p_i` of the stages' right-hand sides,

* the tangent has the loads :math:`-\delta M (U_i - W_i) - h_i\,\delta K\, U_i` in all steps and stages;
* the derivative by ``z`` is :math:`-\sum p_i^T (M'(z)[\cdot] (U_i - W_i) + h_i K'(z)[\cdot] U_i)`, which requires of
  the slabs of all steps their sums of products in each cell only;
* the second-order adjoint has the sources :math:`-(\delta M + h_i \delta K)^T p_i` in the transposed stages and
  :math:`\delta M^T p_i` in the adjoints of :math:`W_i`, and its derivative by ``z`` the same contractions.

All of them are evaluated for many steps at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import copy
from typing import NamedTuple

import numpy as np
from irksome.tableaux.ButcherTableaux import ButcherTableau
from mpi4py import MPI

from pint_fem.errors import InputError
from pint_fem.evolution.cell_spaces import CellUnknowns
from pint_fem.evolution.evolution import Evolution
from pint_fem.evolution.tableaux import DIRK
from pint_fem.kernels.arrays import boundary_rows
from pint_fem.propagators.base import FEPropagator, StepData
from pint_fem.propagators.coefficients.derivatives import OperatorDerivatives
from pint_fem.propagators.coefficients.frozen import FrozenSteps, OperatorMatrices
from pint_fem.propagators.coefficients.loads import CoefficientLoads
from pint_fem.propagators.coefficients.sums import ControlSums, Direction, Stages

__all__ = ["CoefficientPropagator"]

_CHUNK = 64
"""Steps whose stages are in memory at the same time."""


def _has_controlled_loads(evolution: Evolution) -> bool:
    """Whether controls are in the load or in boundary values."""
    return bool(any(evolution.control_operators)) or evolution.boundary_controls is not None


class _Cached(NamedTuple):
    """The steps of a value of the controls ``(nz,)``."""

    z: np.ndarray
    steps: FrozenSteps


class CoefficientPropagator(FEPropagator):
    """Steps of an evolution that is linear with constant operators for each value of its static controls.

    The operators are those of the controls given last to :meth:`update`, or in the data of a call.

    Parameters
    ----------
    evolution, stride, tableau
        As for every propagator.

    Attributes
    ----------
    frozen : FrozenSteps
        The steps with the present operators.
    dirk, bc_rows : DIRK, ndarray
        Coefficients of the integrator, and own rows with a condition.
    outdated : bool
        Whether data of the operators have changed, so that another propagator replaces this one.

    Raises
    ------
    InputError
        If the evolution is not of this kind.
    """

    is_linear = True
    _kind: type[FrozenSteps] = FrozenSteps

    def __init__(self, evolution: Evolution, *, stride: int = 1, tableau: ButcherTableau | None = None):
        super().__init__(evolution, stride=stride, tableau=tableau)
        ev = self.evolution
        if not ev.has_controlled_operators:
            raise InputError(
                "the evolution is not linear with operators that depend on static controls: use the linear propagator, "
                "or the form propagator"
            )
        self.dirk, self.bc_rows = DIRK(self.tableau), boundary_rows(ev.bcs, ev.V)
        self.stores_loads = True
        self._matrices = OperatorMatrices(ev)
        fields = [i for i in range(len(ev.V)) if ev.fields is None or i != ev.eliminate]
        unknowns = CellUnknowns(ev.V, fields)
        parts = ev.affine_parts
        given = dict(evolution=ev, unknowns=unknowns, bc_rows=self.bc_rows, fields=fields)
        self._of_M, self._of_K = (
            None if form.empty() or not set(form.coefficients()) & set(parts.in_operators)
            else OperatorDerivatives(form, **given)
            for form in (parts.M, parts.K)
        )  # fmt: skip
        self._loads: CoefficientLoads | None = None
        self._cached: list[_Cached] = []
        self._controls_load = _has_controlled_loads(ev)
        self.outdated = False
        self._shared: CoefficientPropagator | None = None  # whose operators are used
        self._of_shared: FrozenSteps | None = None
        self._own: FrozenSteps | None = None

    # -- operators -----------------------------------------------------------------------------------------------------
    @property
    def loads(self) -> CoefficientLoads:
        """The loads of the stages; compiled and assembled when first used (collective over space)."""
        if self._loads is None:
            given = self.evolution, self.dirk, self.dt, self.bc_rows
            self._loads = CoefficientLoads(*given, store=self.stores_loads)
        return self._loads

    @property
    def frozen(self) -> FrozenSteps:
        """The steps with the present operators; at first those of the controls' own values (collective over space)."""
        if self._shared is not None:
            steps = self._shared.frozen
            if self._of_shared is not steps:
                self._of_shared, self._own = steps, steps.for_evolution(self.evolution)
                vars(self._own)["loads"] = self.loads
                self.loads.set_operators(steps.lifting)
            return self._own
        if not self._cached:
            self.update(self.evolution.get_controls())
        return self._cached[0].steps

    def for_evolution(self, evolution: Evolution) -> CoefficientPropagator:
        """The propagator of a private evolution that differs in loads and boundary values only and has the same
        controls, with the operators of this one.
        """
        made = copy(self)
        made.evolution, made._loads, made._cached = evolution, None, []
        made._shared = self if self._shared is None else self._shared
        made._of_shared = made._own = None
        made.outdated = False
        made._controls_load = _has_controlled_loads(evolution)
        vars(evolution)["fields"] = self.evolution.fields
        return made

    def update(self, z: np.ndarray | None) -> bool:
        """Assemble and factor the operators of a control ``(nz,)``, unless it is one of the last two (collective over
        space).

        Returns
        -------
        bool
            Whether the operators have changed.

        Raises
        ------
        ArithmeticError
            If a matrix is singular or not finite for this control, or an explicit step not stable.
        """
        if self._shared is not None:
            self._shared.update(z)
            changed = self._of_shared is not self._shared.frozen
            if changed and z is not None:
                self.evolution.put_controls(z)
            return changed and self.frozen is not None
        if z is None:
            return False
        same = [np.array_equal(cached.z, z) for cached in self._cached]
        comm = self.evolution.V.mesh().comm
        if comm.size > 1:  # the parts of all ranks in space are those of the same control
            votes = np.array(same, dtype=np.int32)
            comm.Allreduce(MPI.IN_PLACE, votes, op=MPI.MIN)
            same = votes.astype(bool).tolist()
        if same and same[0]:
            return False
        found = self._cached.pop(same.index(True)) if any(same) else self._factored(z)
        self._cached.insert(0, found)
        del self._cached[2:]
        self.evolution.put_controls(z)
        self.loads.set_operators(found.steps.lifting)
        return True

    def _factored(self, z: np.ndarray) -> _Cached:
        """The steps of a control, with the order of elimination of earlier ones."""
        ev = self.evolution
        ev.put_controls(z)
        like = None
        if self._cached:
            like = self._cached[0].steps
            del self._cached[1:]  # not three of them in memory
        try:
            steps = self._kind(
                ev, stride=self.stride, tableau=self.tableau, matrices=self._matrices.assemble(), loads=self.loads,
                like=like,
            )  # fmt: skip
        except InputError as error:  # a matter of this control, for which the optimiser has another one
            raise ArithmeticError(f"operators at this control: {error}") from error
        return _Cached(z.copy(), steps)

    def update_data(self, changed: set) -> bool:
        """Discard loads; ``False`` where data of the operators have changed."""
        if self._shared is not None and self._shared.outdated:
            return False
        if changed & self.evolution.operator_data:
            self.outdated = True
            return False
        if changed and self._loads is not None:
            self._loads.update_data()
        return True

    # -- homogeneous steps with the present operators ------------------------------------------------------------------
    def apply(self, u: np.ndarray, out: np.ndarray, loads: Callable[[slice, int], np.ndarray] | None = None) -> None:
        """Write the step without forcing, or with given loads, to ``out`` (as of a linear propagator)."""
        self.frozen.apply(u, out, loads)

    def apply_transposed(self, lam: np.ndarray, out: np.ndarray) -> None:
        """Write the transposed step to ``out``, for adjoints ``(k, n)``."""
        self.frozen.apply_transposed(lam, out)

    def advance(
        self,
        u: np.ndarray,
        out: np.ndarray,
        added: np.ndarray | None = None,
        *,
        transposed: bool = False,
        single: bool = False,
    ) -> None:
        """Take homogeneous steps one after another from each of some states (as of a linear propagator)."""
        self.frozen.advance(u, out, added, transposed=transposed, single=single)

    def sweep(self, U: np.ndarray, G: np.ndarray | None, *, transposed: bool = False) -> None:
        """Take homogeneous steps one after another in place (as of a linear propagator)."""
        self.frozen.sweep(U, G, transposed=transposed)

    @property
    def error_of_single_precision(self) -> float:
        """The largest difference of a step in single precision (collective over space when first used)."""
        return self.frozen.error_of_single_precision

    def lane_seconds(self) -> dict[int, float] | None:
        """Measured seconds of a step by the number of states at once; ``None`` where steps are taken by PETSc."""
        return self.frozen.lane_seconds()

    # -- stages of given states ----------------------------------------------------------------------------------------
    def _chunks(self, data: StepData) -> Iterator[tuple[slice, StepData]]:
        """Slices of steps whose stages are in memory at once, and their data."""
        for first in range(0, len(data.t), _CHUNK):
            rows = slice(first, min(first + _CHUNK, len(data.t)))
            yield rows, data.part(rows)

    def _stages(self, u: np.ndarray, ends: np.ndarray | None, loads: Callable[[slice, int], np.ndarray]) -> Stages:
        """The stages of steps from ``u`` to ``ends`` (by default the steps' results) with given loads."""
        if ends is None:
            ends = np.empty_like(u)
            self.frozen.apply(u, ends, loads)
        first = [loads(slice(0, len(u)), i) for i in range(self.frozen.dirk.stages - 1)]
        return Stages(*self.frozen.stage_values(u, ends, first))

    def _stages_of(self, data: StepData) -> Callable[[slice], Stages]:
        """The stages of a slice of the steps of a block at its states."""
        loads = self.loads.of_steps(data.t, data.z, affine=True)

        def stages(rows: slice) -> Stages:
            part = data.part(rows)
            first = rows.start
            own = lambda inside, i: loads(slice(first + inside.start, first + inside.stop), i)
            return self._stages(part.u, part.ends, own)

        return stages

    def _set_controls(self) -> None:
        """Set the controls in the forms of derivatives to those of the present operators: other levels have the same
        functions, and a control whose operators could not be factored may be in them.
        """
        owner = self if self._shared is None else self._shared
        if owner._cached:
            owner.evolution.put_controls(owner._cached[0].z)

    def _direction(self, dz: np.ndarray | None) -> Direction:
        """The matrices of a direction of the controls."""
        self._set_controls()
        if dz is None:
            return Direction(None, None)
        at = (self._shared or self).frozen
        return Direction(*(None if of is None else of.matrices(dz, at) for of in (self._of_M, self._of_K)))

    def _tangent_loads(
        self, data: StepData, stages: Stages, along: Direction, dz: np.ndarray | None
    ) -> Callable[[slice, int], np.ndarray]:
        """The loads of a tangent in the direction ``dz``, as a function of a slice of the steps and the stage."""
        steps = self.frozen.steps_of_stage
        given = None if dz is None else self.loads.of_steps(data.t, dz, affine=False)

        def loads(rows: slice, i: int) -> np.ndarray:
            out = None
            if along.K is not None:
                out = along.K.product(stages.U[i][rows])
                out *= -steps[i]
            if along.M is not None:
                product = along.M.product(stages.D[i][rows])
                out = -product if out is None else np.subtract(out, product, out=out)
            if out is None:
                shape = rows.stop - rows.start, self.evolution.state_size
                return np.zeros(shape) if given is None else given(rows, i)
            return out if given is None or not self._controls_load else np.add(out, given(rows, i), out=out)

        return loads

    # -- the interface -------------------------------------------------------------------------------------------------
    def forcing(self, data: StepData) -> np.ndarray:
        """The affine part ``Phi(0, z)`` of each step, ``(k, n)``; a broadcast row where all are the same."""
        self.update(data.z)
        return self.frozen.forcing(data)

    def control_forcing(self, data: StepData, dz: np.ndarray) -> np.ndarray:
        """The derivative ``Phi_z dz`` of each step at the states in ``data``, ``(k, n)``."""
        out = np.empty((len(data.t), self.evolution.state_size))
        self.tangent(data, np.broadcast_to(np.zeros(out.shape[1]), out.shape), dz, out)
        return out

    def step(self, data: StepData, u: np.ndarray, out: np.ndarray) -> None:
        """Write ``Phi(u)`` of each step to ``out``."""
        self.update(data.z)
        self.frozen.step(data, u, out)

    def tangent(self, data: StepData, du: np.ndarray, dz: np.ndarray | None, out: np.ndarray) -> None:
        """Write ``Phi_u du + Phi_z dz`` of each step to ``out``."""
        self.update(data.z)
        if dz is None:
            self.frozen.apply(du, out)
            return
        along, stages = self._direction(dz), self._stages_of(data)
        for rows, part in self._chunks(data):
            self.frozen.apply(du[rows], out[rows], self._tangent_loads(part, stages(rows), along, dz))

    def adjoint(self, data: StepData, lam: np.ndarray, out: np.ndarray) -> None:
        """Write ``Phi_u^T lam`` of each step to ``out``."""
        self.update(data.z)
        self.frozen.apply_transposed(lam, out)

    # -- derivatives by the controls -----------------------------------------------------------------------------------
    def control_adjoint(self, data: StepData, lam: np.ndarray) -> np.ndarray:
        """``Phi_z^T lam`` summed over the block, ``(nz,)``."""
        return self.control_adjoint_of_sums(data, self.control_sums(data, lam))

    def control_sums(self, data: StepData, lam: np.ndarray) -> np.ndarray:
        """Sums over the steps of what the derivative by the controls requires (:class:`ControlSums`), a vector."""
        self.update(data.z)
        sums, stages = self._sums(), self._stages_of(data)
        for rows, part in self._chunks(data):
            sums.add(self.frozen.stage_adjoints(lam[rows]), stages(rows), part.t)
        return sums.vector

    def _sums(self, vector: np.ndarray | None = None) -> ControlSums:
        """Sums over steps, from given ones or from zero."""
        return ControlSums(self._of_M, self._of_K, self.loads, self.frozen.steps_of_stage, vector)

    def zero_control_sums(self, data: StepData) -> np.ndarray:
        """Sums of no adjoints, shaped as those of :meth:`control_sums`."""
        return self._sums().vector

    def control_adjoint_of_sums(self, data: StepData, sums: np.ndarray) -> np.ndarray:
        """``Phi_z^T lam`` summed over all steps, ``(nz,)``, from the sums of :meth:`control_sums`."""
        self.update(data.z)
        self._set_controls()
        return self._sums(sums.copy()).gradient()

    def second_order(
        self, data: StepData, du: np.ndarray, dz: np.ndarray | None, lam: np.ndarray, end: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Derivatives of :meth:`adjoint` and :meth:`control_adjoint` in a direction at fixed ``lam``."""
        self.update(data.z)
        steps, dirk, along = self.frozen, self.frozen.dirk, self._direction(dz)
        deferred = end is not None and dirk.stiffly_accurate
        out, sums, stages_of = np.empty_like(lam), self._sums(), self._stages_of(data)
        cached = {} if data.computed is None else data.computed
        first, is_new = self._sums(cached.get("products")), "products" not in cached
        for rows, part in self._chunks(data):
            stages, p = stages_of(rows), steps.stage_adjoints(lam[rows])
            loads = self._tangent_loads(part, stages, along, dz)
            tangents = self._stages(du[rows], part.tangent_ends, loads)
            rhs, bases = np.zeros(p.shape), np.zeros(p.shape)
            for i, h in enumerate(steps.steps_of_stage):  # the matrices' rows with conditions are zero
                if along.M is not None:
                    along.M.transposed(p[i], bases[i])
                    rhs[i] -= bases[i]
                if along.K is not None:
                    rhs[i] -= h * along.K.transposed(p[i])
            if deferred:
                end[rows] = rhs[-1]
                rhs[-1] = 0.0
            if deferred and dirk.stages == 1:
                out[rows] = bases[0]
            else:
                out[rows], dp = steps.transposed_with_sources(np.zeros_like(lam[rows]), rhs, bases)
                sums.add(dp, stages, part.t)
            sums.add(p, tangents, part.t, loads=False)
            if is_new:
                first.add(p, stages, part.t, loads=False)
        cached["products"] = first.vector
        z_bar = sums.gradient()
        return out, z_bar if dz is None else z_bar + first.second(dz)

    # -- memory --------------------------------------------------------------------------------------------------------
    def data_nbytes(self, count: int) -> int:
        """Bytes of loads for ``count`` steps."""
        return self.frozen.data_nbytes(count) * (2 if self.loads.has_values and self.stores_loads else 1)

    def work_nbytes(self, count: int) -> int:
        """Bytes of work memory in a call with ``count`` steps, which all propagators share."""
        return self.frozen.work_nbytes(count)

    def operator_nbytes(self, count: int) -> dict[str, int]:
        """Bytes of matrices and factors on this rank by part, of the last two controls."""
        own = self.frozen.operator_nbytes(count)
        derivatives = sum(of.nbytes for of in (self._of_M, self._of_K) if of is not None)
        return {part: 2 * size for part, size in own.items()} | {"kernels": 2 * own.get("kernels", 0) + derivatives}

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

from collections.abc import Callable

import numpy as np
from irksome.tableaux.ButcherTableaux import ButcherTableau

from pint_fem.evolution.cell_spaces import CellUnknowns
from pint_fem.evolution.evolution import Evolution
from pint_fem.propagators.base import StepData
from pint_fem.propagators.coefficients.derivatives import OperatorDerivatives
from pint_fem.propagators.coefficients.present_operators import PresentOperators
from pint_fem.propagators.coefficients.sums import ControlSums, Direction, Stages
from pint_fem.propagators.linear import chunks

__all__ = ["CoefficientPropagator"]


class CoefficientPropagator(PresentOperators):
    """Steps of an evolution that is linear with constant operators for each value of its static controls.

    The operators are those of the controls given last to :meth:`update`, or in the data of a call.

    Parameters
    ----------
    evolution, stride, tableau
        As for every propagator.

    Raises
    ------
    InputError
        If the evolution is not of this kind.
    """

    def __init__(self, evolution: Evolution, *, stride: int = 1, tableau: ButcherTableau | None = None):
        super().__init__(evolution, stride=stride, tableau=tableau)
        ev, parts = self.evolution, self.evolution.affine_parts
        fields = [i for i in range(len(ev.V)) if ev.fields is None or i != ev.eliminate]
        given = dict(evolution=ev, unknowns=CellUnknowns(ev.V, fields), bc_rows=self.bc_rows, fields=fields)
        found = [form for form in (parts.M, parts.K) if not form.empty()]
        found = [form for form in found if set(form.coefficients()) & set(parts.in_operators)]
        of = {form: made for form in found if not (made := OperatorDerivatives(form, **given)).vanish}
        self._of_M, self._of_K = of.get(parts.M), of.get(parts.K)

    # -- stages of given states ----------------------------------------------------------------------------------------
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
        for rows in chunks(len(data.t)):
            part = data.part(rows)
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
        for rows in chunks(len(data.t)):
            sums.add(self.frozen.stage_adjoints(lam[rows]), stages(rows), data.t[rows])
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
        for rows in chunks(len(data.t)):
            part = data.part(rows)
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

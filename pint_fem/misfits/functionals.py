"""Misfits that are UFL functionals of the state at a time: summed over all steps, or at the final time.

Data in the forms are copied when a reduced functional is made; new values are read by its ``update_data()`` only.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable

import numpy as np
import ufl
from firedrake import Function, TestFunction, TrialFunction, action, derivative
from firedrake.assemble import get_assembler
from firedrake.petsc import PETSc
from ufl.algorithms import expand_derivatives, extract_coefficients

from pint_fem.errors import InputError
from pint_fem.evolution.evolution import Evolution
from pint_fem.evolution.private_copies import data_of
from pint_fem.evolution.quadrature import with_fixed_degrees
from pint_fem.kernels.arrays import get, put
from pint_fem.misfits.base import BlockMisfit
from pint_fem.misfits.quadratic import QuadraticFunctional, row_products
from pint_fem.spacetime import Slab, SpaceTime

__all__ = ["RunningMisfit", "TerminalMisfit"]


class _FormMisfit(BlockMisfit):
    r"""The sum :math:`\sum_n w_n\, j(u_n, t_n)` of a UFL functional ``j``; its observation of a point is ``j`` itself.

    Where the second derivative of ``j`` is constant, blocks of points are products with one matrix
    (:class:`~pint_fem.misfits.quadratic.QuadraticFunctional`); otherwise forms that are compiled once are assembled for
    each point.
    """

    width, uses_observations = 1, False

    def __init__(self, form: ufl.Form):
        if not isinstance(form, ufl.Form) or form.arguments():
            raise InputError(
                f"{type(self).__name__}: give a functional such as inner(u - d, u - d)*dx, without test functions"
            )
        self.form = form

    def given(self) -> dict:
        """The signature of the functional."""
        return {"the functional": self.form.signature()[:16]}

    @abstractmethod
    def weights(self) -> np.ndarray:
        """Weight ``w_n`` of each local point, ``(k + 1,)``."""

    def bind(self, evolution: Evolution, spacetime: SpaceTime, slab: Slab) -> None:
        """Differentiate the functional and assemble what does not depend on the state.

        Raises
        ------
        InputError
            If the functional does not contain the evolution's ``u``, or contains a control.
        """
        super().bind(evolution, spacetime, slab)
        form, t = evolution.functional(self.form, type(self).__name__)
        form = with_fixed_degrees(form)
        u, self._t, self._data = evolution.u, t, set(data_of(form))
        coefficients = extract_coefficients(form)
        if u not in coefficients:
            raise InputError(f"{type(self).__name__}: the functional does not contain the evolution's state u")
        if {*evolution.controls, *map(evolution.copies.variable, evolution.posed.sought)} & set(coefficients):
            raise InputError(f"{type(self).__name__}: the functional contains a control; use regularisation= for it")
        self.weight = self.weights()
        self.times = evolution.time(np.arange(slab.lo, slab.hi + 1))
        self.active = self.weight != 0
        self.observed = self.active & (np.arange(slab.k + 1) > 0)  # point 0 is the left neighbour's
        self._du = Function(evolution.V)
        gradient = derivative(form, u, TestFunction(evolution.V))
        second = expand_derivatives(derivative(gradient, u, TrialFunction(evolution.V)))
        self.quadratic = second.empty() or not {u, t} & set(extract_coefficients(second))
        self.state_dependent = self.active
        if self.quadratic:
            self._functional = QuadraticFunctional(
                form, expand_derivatives(gradient), second, u, t, self.times, self.active,
                initial=get(evolution.initial),
                span=(float(evolution.time(0)), float(evolution.time(evolution.nsteps))),
                store=self.stores_data,
            )  # fmt: skip
            self.takes_batches = True
            if self._functional.Q is None:
                self.state_dependent = np.zeros_like(self.active)
        else:
            self._assemble = [get_assembler(expand_derivatives(f)) for f in (form, gradient, action(second, self._du))]

    def update_data(self, changed: set, *, own: bool) -> None:
        """Bind again if data of the functional or the initial state, which may be its reference state, have changed."""
        if changed & {*self._data, self.evolution.initial}:
            self.bind(self.evolution, self.spacetime, self.slab)

    def _assemble_at(self, order: int, points: slice, u: np.ndarray, du: np.ndarray | None = None) -> np.ndarray:
        """The functional's derivative of an order at each point with a weight."""
        out = np.zeros(len(u) if order == 0 else u.shape)
        for i, (weight, time) in enumerate(zip(self.weight[points], self.times[points], strict=True)):
            if not weight:
                continue
            put(self.evolution.u, u[i])
            if du is not None:
                put(self._du, du[i])
            if self._t is not None:
                self._t.assign(time)
            result = self._assemble[order].assemble()
            out[i] = result if order == 0 else get(result)
        return out

    def observe(self, points: slice, u: np.ndarray) -> np.ndarray:
        """The functional at each point; where it is quadratic, this space rank's part of what depends on ``u``."""
        if not self.quadratic:
            return self._assemble_at(0, points, u)[:, None]
        return self._functional.local_values(points, u)

    def observe_tangent(self, points: slice, u: np.ndarray, du: np.ndarray) -> np.ndarray:
        """This space rank's part of the weighted derivative, ``(b, 1)``."""
        return row_products(self.adjoint_source(points, u, None), du)

    def point_values(self, Y: np.ndarray) -> np.ndarray:
        """The weighted functional at each own point, ``(k,)``."""
        values = Y[1:, 0]
        if self.quadratic:
            values = self.spacetime.sum_over_space(values) + self._functional.constants(len(Y))[1:]
        return self.weight[1:] * values

    def point_derivatives(self, Y: np.ndarray | None, dY: np.ndarray) -> np.ndarray:
        """The derivative of the weighted functional at each own point, ``(k,)``."""
        return self.spacetime.sum_over_space(dY[1:, 0])

    def adjoint_source(self, points: slice, u: np.ndarray, S: np.ndarray | None) -> np.ndarray:
        """``w_n j_u(u_n, t_n)``, ``(b, n)``."""
        if self.quadratic:
            self._write(points, u, out := np.empty(u.shape), self._functional.gradient)
            return out
        out = self._assemble_at(1, points, u)
        out *= self.weight[points, None]
        return out

    def adjoint_source_tangent(self, points: slice, u: np.ndarray, du: np.ndarray, dS: np.ndarray | None) -> np.ndarray:
        """``w_n j_uu(u_n, t_n) du_n``, ``(b, n)``; of a batch ``(b, members, n)`` where it is quadratic."""
        if self.quadratic:
            self._write(points, du, out := np.empty(du.shape), self._functional.product)
            return out
        out = self._assemble_at(2, points, u, du)
        out *= self.weight[points, None]
        return out

    def write_source(self, points: slice, u: np.ndarray, S: np.ndarray | None, out: np.ndarray) -> None:
        """Write :meth:`adjoint_source` to ``out``."""
        if not self.quadratic or type(self).adjoint_source is not _FormMisfit.adjoint_source:
            return super().write_source(points, u, S, out)
        return self._write(points, u, out, self._functional.gradient)

    def write_source_tangent(
        self, points: slice, u: np.ndarray, du: np.ndarray, dS: np.ndarray | None, out: np.ndarray
    ) -> None:
        """Write :meth:`adjoint_source_tangent` to ``out``."""
        if not self.quadratic or type(self).adjoint_source_tangent is not _FormMisfit.adjoint_source_tangent:
            return super().write_source_tangent(points, u, du, dS, out)
        return self._write(points, du, out, self._functional.product)

    def _write(self, points: slice, u: np.ndarray, out: np.ndarray, derivative: Callable) -> None:
        """Write the weighted derivative of a quadratic functional at states or in directions to ``out``."""
        derivative(points, u, out)
        out *= self.weight[points].reshape(-1, *[1] * (u.ndim - 1))

    def second_derivative(self) -> tuple[PETSc.Mat, np.ndarray] | None:
        """The second derivative of a quadratic functional and the weights of the local points."""
        if not self.quadratic or self._functional.Q is None:
            return None
        return self._functional.Q.matrix, self.weight

    def nbytes(self) -> int:
        """Bytes of the vectors of a quadratic functional that are stored for the points."""
        return self._functional.nbytes if self.quadratic else 0

    def operator_nbytes(self) -> dict[str, int]:
        """Bytes of the matrix of a quadratic functional."""
        return self._functional.operator_nbytes if self.quadratic else {}


class RunningMisfit(_FormMisfit):
    r""":math:`\sum_{n=1}^{N} \Delta t\, j(u_n, t_n)`, for ``j`` a UFL functional of the evolution's ``u`` and ``t``.

    Parameters
    ----------
    form
        The functional ``j``, such as ``0.5*inner(u - d, u - d)*dx``.

    Raises
    ------
    InputError
        If the form is no functional; when a reduced functional is made of it, if ``u`` is not in it or a control is.
    """

    def weights(self) -> np.ndarray:
        """``dt`` at the points ``1..N``."""
        weight = np.full(self.slab.k + 1, self.evolution.dt)
        if self.slab.is_first:
            weight[0] = 0
        return weight


class TerminalMisfit(_FormMisfit):
    """``j(u_N)``, for ``j`` a UFL functional such as ``0.5*inner(u - d, u - d)*dx`` of the evolution's ``u``.

    An ``InputError`` is raised unless it is a functional, and by the reduced functional unless it contains ``u`` and no
    control.
    """

    def weights(self) -> np.ndarray:
        """1 at the last point."""
        weight = np.zeros(self.slab.k + 1)
        if self.slab.is_last:
            weight[-1] = 1
        return weight

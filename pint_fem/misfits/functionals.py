"""Misfits: what of the trajectory is compared with data. ``J = sum of misfits + regularisation``.

What a misfit has to offer is in :mod:`~pint_fem.misfits.base`. Data are copied when a functional is made; later
changes of their values are seen after its ``update_data()`` only.
"""

from __future__ import annotations

from abc import abstractmethod

import numpy as np
import ufl
from firedrake import Function, TestFunction, TrialFunction, action, derivative
from firedrake.assemble import get_assembler
from ufl.algorithms import expand_derivatives, extract_coefficients

from pint_fem.errors import InputError
from pint_fem.evolution.private_copies import data_of
from pint_fem.evolution.quadrature import with_fixed_degrees
from pint_fem.kernels.arrays import get, put
from pint_fem.misfits.base import BlockMisfit, Misfit
from pint_fem.misfits.point_sensors import PointSensors
from pint_fem.misfits.quadratic import QuadraticPoints

__all__ = ["Misfit", "PointSensors", "RunningMisfit", "TerminalMisfit"]


class _FormMisfit(BlockMisfit):
    r"""A UFL functional ``j(u, t)`` at some points with weights.

    Where its second derivative is constant, slabs are products with one matrix (:mod:`~pint_fem.misfits.quadratic`);
    otherwise forms compiled once are assembled for each point.
    """

    width, looks_back = 1, False

    def __init__(self, form: ufl.Form):
        if not isinstance(form, ufl.Form) or form.arguments():
            raise InputError(
                f"{type(self).__name__}: give a functional such as inner(u - d, u - d)*dx, without test functions"
            )
        self.form = form

    def given(self):
        """See :class:`~pint_fem.misfits.base.Misfit`."""
        return {"the functional": self.form.signature()[:16]}

    @abstractmethod
    def weights(self) -> np.ndarray:
        """Weight of each local point, ``(k + 1,)``."""

    def bind(self, evolution, spacetime, slab):
        """See :class:`Misfit`."""
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
        self._du = Function(evolution.V)
        gradient = derivative(form, u, TestFunction(evolution.V))
        second = expand_derivatives(derivative(gradient, u, TrialFunction(evolution.V)))
        moving = {u, t}
        self.quadratic = second.empty() or not moving & set(extract_coefficients(second))
        if self.quadratic:
            self._parts = QuadraticPoints(
                form, expand_derivatives(gradient), second, u, t, self.times, self.weight != 0,
                initial=get(evolution.initial), span=(evolution.time(0), evolution.time(evolution.nsteps)),
                keep=self.keeps_data,
            )  # fmt: skip
        else:
            self._assemble = [get_assembler(expand_derivatives(f)) for f in (form, gradient, action(second, self._du))]
        self.acts = self.weight != 0
        self.forces = self.acts if not self.quadratic or self._parts.Q is not None else np.zeros_like(self.acts)
        self.observes = self.acts & (np.arange(slab.k + 1) > 0)  # row 0 is the left neighbour's

    def update_data(self, changed, *, own):
        """See :class:`~pint_fem.misfits.base.Misfit`."""
        if changed & {*self._data, self.evolution.initial}:  # the initial state may be the reference
            self.bind(self.evolution, self.spacetime, self.slab)

    def _each(self, which: int, rows, u: np.ndarray, du: np.ndarray | None = None) -> np.ndarray:
        """Assemble form ``which`` at each point with a weight."""
        out = np.zeros(len(u) if which == 0 else u.shape)
        for i, (weight, time) in enumerate(zip(self.weight[rows], self.times[rows], strict=True)):
            if not weight:
                continue
            put(self.evolution.u, u[i])
            if du is not None:
                put(self._du, du[i])
            if self._t is not None:
                self._t.assign(time)
            result = self._assemble[which].assemble()
            out[i] = result if which == 0 else get(result)
        return out

    def observe(self, rows, u):
        """The functional, or its part with ``u`` on this rank in space."""
        if not self.quadratic:
            return self._each(0, rows, u)[:, None]
        return self._parts.local_values(rows, u)

    def observe_tangent(self, rows, u, du):
        """See :class:`~pint_fem.misfits.base.BlockMisfit`."""
        return _dots(self.force(rows, u, None), du)

    def point_values(self, Y):
        """See :class:`~pint_fem.misfits.base.BlockMisfit`."""
        values = Y[1:, 0]
        if self.quadratic:
            values = self.spacetime.sum_over_space(values) + self._parts.constants(len(Y))[1:]
        return self.weight[1:] * values

    def point_derivatives(self, Y, dY):
        """See :class:`~pint_fem.misfits.base.BlockMisfit`."""
        return self.spacetime.sum_over_space(dY[1:, 0])

    def force(self, rows, u, S):
        """See :class:`~pint_fem.misfits.base.BlockMisfit`."""
        out = self._parts.gradient(rows, u) if self.quadratic else self._each(1, rows, u)
        out *= self.weight[rows, None]
        return out

    def force_tangent(self, rows, u, du, dS):
        """See :class:`~pint_fem.misfits.base.BlockMisfit`."""
        out = self._parts.product(rows, du) if self.quadratic else self._each(2, rows, u, du)
        out *= self.weight[rows, None]
        return out

    def nbytes(self):
        """See :class:`~pint_fem.misfits.base.Misfit`."""
        return self._parts.nbytes if self.quadratic else 0

    def petsc_bytes(self):
        """See :class:`~pint_fem.misfits.base.Misfit`."""
        return self._parts.petsc_bytes if self.quadratic else {}


def _dots(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Dot product of each row on this rank, ``(b, 1)``."""
    return np.array([x @ y for x, y in zip(a, b, strict=True)]).reshape(-1, 1)


class RunningMisfit(_FormMisfit):
    r""":math:`\sum_{n=1}^{N} \Delta t\, j(u_n, t_n)`, for ``j`` a UFL functional of the evolution's ``u`` and ``t``.

    Raises
    ------
    InputError
        If the form is no functional, or has no ``u``, or contains the control.
    """

    def weights(self):
        """``dt`` at the points ``1..N``."""
        weight = np.full(self.slab.k + 1, self.evolution.dt)
        if self.slab.is_first:
            weight[0] = 0
        return weight


class TerminalMisfit(_FormMisfit):
    """``j(u_N)``, for ``j`` a UFL functional of the evolution's ``u``; errors as for :class:`RunningMisfit`."""

    def weights(self):
        """1 at the last point."""
        weight = np.zeros(self.slab.k + 1)
        if self.slab.is_last:
            weight[-1] = 1
        return weight

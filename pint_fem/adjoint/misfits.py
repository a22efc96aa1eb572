"""Misfits: what of the trajectory is compared with data. ``J = sum of misfits + regularisation``.

What a misfit has to offer is in :mod:`~pint_fem.adjoint.misfit`. Data in a functional are read when it is bound; later
changes of their values are not seen.
"""

from __future__ import annotations

from abc import abstractmethod
from functools import partial

import numpy as np
import ufl
from firedrake import Function, TestFunction, TrialFunction, action, assemble, derivative
from firedrake.assemble import get_assembler
from ufl.algorithms import expand_derivatives, extract_coefficients

from pint_fem.adjoint.misfit import BlockMisfit, Misfit
from pint_fem.adjoint.sensors import PointSensors
from pint_fem.errors import InputError
from pint_fem.propagators.arrays import get, put
from pint_fem.propagators.blocks import BlockOperator
from pint_fem.propagators.quadrature import with_fixed_degrees
from pint_fem.propagators.rows import MOST, RowSpace, sample_times

__all__ = ["Misfit", "PointSensors", "RunningMisfit", "TerminalMisfit"]


class _PointForm:
    """A form without ``u``, assembled at points: the rows are kept, or kept in a small space if they are in one, else
    computed again when asked for.

    Parameters
    ----------
    form
        A functional or a 1-form.
    t, times
        The evolution's time function (or ``None``) and the points' times; ``t`` does not matter where the form does not
        contain it: one row is all there is.
    wanted
        Points whose rows are not zero, ``(k + 1,)``.
    size
        Length of a row, ``None`` for a functional.
    span
        First and last time of all ranks.
    keep
        Whether rows are kept.
    """

    def __init__(self, form, t, times: np.ndarray, wanted: np.ndarray, size: int | None, *, span, keep: bool):
        form = expand_derivatives(form)
        self._shape = () if size is None else (size,)
        self._t, self._times, self._wanted = t, times, wanted
        self._place = np.cumsum(wanted) - 1  # among the kept rows
        self._moves = not form.empty() and t in extract_coefficients(form)
        self._rows = np.zeros((1, *self._shape)) if form.empty() else None
        self._space = None
        if self._moves and not keep:
            self._space = RowSpace(form.ufl_domain().comm, [partial(self._row, time) for time in sample_times(*span)])
        if self._rows is None:
            self._assembler = get_assembler(form)
            if keep or not self._moves:
                self._rows = self._assemble(times[wanted] if self._moves else times[:1])

    def _assemble(self, times) -> np.ndarray:
        rows = np.empty((len(times), *self._shape))
        for row, time in enumerate(times):
            make = partial(self._row, time)
            rows[row] = make() if self._space is None else self._space.get(float(time), make)
        return rows

    def _row(self, time) -> np.ndarray | float:
        if self._moves:
            self._t.assign(time)
        result = self._assembler.assemble()
        return get(result) if self._shape else result

    def __getitem__(self, where) -> np.ndarray:
        """Rows of some points, zero where they are not wanted; one row where all are the same."""
        if not self._moves:
            return self._rows
        wanted = self._wanted[where]
        out = np.zeros((len(wanted), *self._shape))
        kept = self._rows is not None
        out[wanted] = self._rows[self._place[where][wanted]] if kept else self._assemble(self._times[where][wanted])
        return out

    @property
    def nbytes(self) -> int:
        """Of what is kept, at most."""
        return 8 * self._shape[0] * MOST if self._rows is None else self._rows.nbytes


class _FormMisfit(BlockMisfit):
    r"""A UFL functional ``j(u, t)`` at some points with weights.

    Where its second derivative is constant it is :math:`\tfrac12 u^T Q u + g^T u + c`, and slabs are products with
    one matrix; ``g`` and ``c`` are assembled for each point once (once in all if ``j`` does not depend on time).
    Otherwise forms compiled once are assembled for each point.
    """

    width, looks_back = 1, False

    def __init__(self, form: ufl.Form):
        if not isinstance(form, ufl.Form) or form.arguments():
            raise InputError(
                f"{type(self).__name__}: give a functional such as inner(u - d, u - d)*dx, without test functions"
            )
        self.form = with_fixed_degrees(form)

    @abstractmethod
    def weights(self) -> np.ndarray:
        """Weight of each local point, ``(k + 1,)``."""

    def bind(self, evolution, spacetime, slab):
        """See :class:`Misfit`."""
        super().bind(evolution, spacetime, slab)
        u, t = evolution.u, evolution.t
        coefficients = extract_coefficients(self.form)
        if u not in coefficients:
            raise InputError(f"{type(self).__name__}: the functional does not contain the evolution's state u")
        if set(evolution.controls) & set(coefficients):
            raise InputError(f"{type(self).__name__}: the functional contains a control; use regularisation= for it")
        self.weight = self.weights()
        self.times = evolution.time(np.arange(slab.lo, slab.hi + 1))
        self._du = Function(evolution.V)
        gradient = derivative(self.form, u, TestFunction(evolution.V))
        second = expand_derivatives(derivative(gradient, u, TrialFunction(evolution.V)))
        moving = {u, t}
        self.quadratic = second.empty() or not moving & set(extract_coefficients(second))
        if self.quadratic:
            self._Q = None if second.empty() else BlockOperator(assemble(second, mat_type="aij").petscmat)
            data = {c: c.copy(deepcopy=True) for c in coefficients if c not in moving}
            at_zero = {u: Function(evolution.V), **data}
            span = evolution.time(0), evolution.time(evolution.nsteps)
            place = (t, self.times, self.weight != 0)
            gradient, value = ufl.replace(expand_derivatives(gradient), at_zero), ufl.replace(self.form, at_zero)
            self._g = _PointForm(gradient, *place, evolution.state_size, span=span, keep=self.keeps_data)
            self._c = _PointForm(value, *place, None, span=span, keep=True)
        else:
            self._assemble = [
                get_assembler(expand_derivatives(f)) for f in (self.form, gradient, action(second, self._du))
            ]
        self.acts = self.weight != 0
        self.forces = self.acts if not self.quadratic or self._Q is not None else np.zeros_like(self.acts)
        self.observes = self.acts & (np.arange(slab.k + 1) > 0)  # row 0 is the left neighbour's

    def _each(self, which: int, rows, u: np.ndarray, du: np.ndarray | None = None) -> np.ndarray:
        """Assemble form ``which`` at each point with a weight."""
        out = np.zeros(len(u) if which == 0 else u.shape)
        for i, (weight, time) in enumerate(zip(self.weight[rows], self.times[rows], strict=True)):
            if not weight:
                continue
            put(self.evolution.u, u[i])
            if du is not None:
                put(self._du, du[i])
            if self.evolution.t is not None:
                self.evolution.t.assign(time)
            result = self._assemble[which].assemble()
            out[i] = result if which == 0 else get(result)
        return out

    def _Qu(self, rows, u: np.ndarray) -> np.ndarray:
        """``Q u`` at the points that have a weight."""
        some = np.flatnonzero(self.weight[rows])
        if self._Q is not None and len(some) == len(u):
            return self._Q(u)
        out = np.zeros(u.shape)
        if self._Q is not None and len(some):
            out[some] = self._Q(u[some])
        return out

    def observe(self, rows, u):
        """The functional, or its part with ``u`` on this rank in space."""
        if not self.quadratic:
            return self._each(0, rows, u)[:, None]
        Qu = self._Qu(rows, u)
        Qu *= 0.5
        Qu += self._g[rows]
        return _dots(Qu, u)

    def observe_tangent(self, rows, u, du):
        """See :class:`~pint_fem.adjoint.misfit.BlockMisfit`."""
        return _dots(self.force(rows, u, None), du)

    def point_values(self, Y):
        """See :class:`~pint_fem.adjoint.misfit.BlockMisfit`."""
        values = Y[1:, 0]
        if self.quadratic:
            values = self.spacetime.sum_over_space(values) + np.broadcast_to(self._c[:], len(Y))[1:]
        return self.weight[1:] * values

    def point_derivatives(self, Y, dY):
        """See :class:`~pint_fem.adjoint.misfit.BlockMisfit`."""
        return self.spacetime.sum_over_space(dY[1:, 0])

    def force(self, rows, u, S):
        """See :class:`~pint_fem.adjoint.misfit.BlockMisfit`."""
        if self.quadratic:
            out = self._Qu(rows, u)
            out += self._g[rows]
        else:
            out = self._each(1, rows, u)
        out *= self.weight[rows, None]
        return out

    def force_tangent(self, rows, u, du, dS):
        """See :class:`~pint_fem.adjoint.misfit.BlockMisfit`."""
        out = self._Qu(rows, du) if self.quadratic else self._each(2, rows, u, du)
        out *= self.weight[rows, None]
        return out

    def nbytes(self):
        """See :class:`~pint_fem.adjoint.misfit.Misfit`."""
        return self._g.nbytes if self.quadratic else 0

    def petsc_bytes(self):
        """See :class:`~pint_fem.adjoint.misfit.Misfit`."""
        return self._Q.nbytes if self.quadratic and self._Q is not None else {}


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

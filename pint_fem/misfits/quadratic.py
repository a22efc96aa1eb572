r"""A functional of the state that is quadratic in it, at the points of a slab.

.. math::  j(u, t) = j(\bar u, t) + g(t)^T (u - \bar u) + \tfrac12 (u - \bar u)^T Q\, (u - \bar u), \qquad
           g(t) = j_u(\bar u, t),

about a reference state :math:`\bar u(t)` (:mod:`~pint_fem.misfits.reference`): values and derivatives on blocks of
states are products with one matrix, and ``j`` and ``g`` at the reference state are assembled once for each point, or
once in all where they do not depend on time. The reference state is what the functional compares ``u`` with; where
that is nothing in particular, the initial state if it suits the functional as well as zero does, and else zero. Where
nothing depends on time, a minimum takes its place if it is much better.

A derivative at the reference state that is round-off of its terms is zero: data that are in the space are its minimum.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial

import numpy as np
import ufl
from firedrake import Function, assemble
from firedrake.assemble import get_assembler
from firedrake.petsc import PETSc
from ufl.algorithms import extract_coefficients

from pint_fem.evolution.control_operators import absolute
from pint_fem.kernels.arrays import get, own_size, put
from pint_fem.kernels.blocks import BlockOperator
from pint_fem.misfits.point_rows import PointRows
from pint_fem.misfits.reference import Reference

__all__ = ["NOISE", "QuadraticPoints"]

NOISE = 16 * np.finfo(float).eps / 2
"""Round-off of an assembled entry relative to the sum of its terms' magnitudes."""
_AS_GOOD = 1.01
"""The initial state is the reference state where the functional is at most this times its value at zero."""
_MUCH_SMALLER, _ITERATIONS = 0.01, 200
"""How much smaller the functional has to be at the reference state that conjugate gradients find; their iterations."""


class QuadraticPoints:
    """See the module.

    Parameters
    ----------
    form, gradient, second
        The functional, its first derivative and its second, which depends neither on ``u`` nor on time.
    u, t
        The state's function and the time function in them (``None``: there is none).
    times, wanted
        Of the local points, and at which of them the functional is evaluated.
    initial
        Initial state ``(n,)``.
    span
        First and last time of all ranks.
    keep
        Whether rows that depend on time are kept for each point.
    """

    def __init__(
        self,
        form: ufl.Form,
        gradient: ufl.Form,
        second: ufl.Form,
        u: Function,
        t: Function | None,
        times: np.ndarray,
        wanted: np.ndarray,
        *,
        initial: np.ndarray,
        span: tuple[float, float],
        keep: bool,
    ):
        V = u.function_space()
        self._u, self._t, self._wanted = Function(V), t, wanted
        self.Q = None if second.empty() else BlockOperator(assemble(second, mat_type="aij").petscmat)
        at = {u: self._u}
        self._value_form = get_assembler(ufl.replace(form, at))
        self._gradient_form = None if gradient.empty() else get_assembler(ufl.replace(gradient, at))
        self._moves = {name: t in extract_coefficients(f) for name, f in (("value", form), ("gradient", gradient))}
        self._data = Reference(form, [u])
        self._reference: PointRows | None = None
        self._terms = None if self.Q is None else absolute(self.Q.matrix)
        if self.Q is None:
            make, moves = None, False
        else:
            make, moves = self._choice(initial, span)
        this = weakref.proxy(self)  # rows that are computed when asked for: no cycle that keeps matrices alive
        row = partial(PointRows, times=times, wanted=wanted, size=own_size(V), span=span, comm=V.mesh().comm)
        if make is not None:
            self._reference = row(partial(make, this), moves=moves, keep=keep)
        floor = 0.0 if make is None or keep else 0.25 * float(np.linalg.norm(self._noise(self._state(span[0]))))
        of = {name: moves or moved for name, moved in self._moves.items()}
        self._g = row(partial(type(self)._gradient, this), moves=of["gradient"], keep=keep, floor=floor)
        self._c = row(partial(type(self)._value, this), moves=of["value"], keep=True, size=None)
        if make is None or keep or not self._g.moves:
            self._terms = None

    # -- the reference state -------------------------------------------------------------------------------------------
    def _choice(self, initial: np.ndarray, span: tuple[float, float]) -> tuple[Callable | None, bool]:
        """What makes the reference state of a time, called with this object and the time, and whether it depends on
        time; ``None``: it is zero.
        """
        moving, found, zero = any(self._moves.values()), self._data.found, np.zeros_like(initial)
        make, factor = (type(self)._data_row, 1.0) if found else ((lambda this, time: initial), _AS_GOOD)
        total, row = np.zeros(2), zero
        for time in np.linspace(*span, 3) if moving else span[:1]:
            row = make(self, float(time))
            if row is None:  # data that cannot be interpolated
                break
            total += [abs(self._value_at(x, time)) for x in (row, zero)]
        suits = row is not None and bool(total[0] <= factor * total[1])
        if moving:
            return (make, found and self._t in self._data.coefficients) if suits else (None, False)
        row = self._minimum(row if suits else zero, span[0])
        size = self._u.function_space().mesh().comm.allreduce(float(np.abs(row).max(initial=0.0)))
        return ((lambda this, time: row) if size > 0 else None), False

    def _minimum(self, row: np.ndarray, time: float) -> np.ndarray:
        """A state where the derivative vanishes, by conjugate gradients from a given one, if the functional is much
        smaller there: where data are not the same everywhere that ``u`` is compared with data.
        """
        if self._gradient_form is None:
            return row
        before = abs(self._value_at(row, time))
        g = get(self._gradient_form.assemble())
        ksp = PETSc.KSP().create(self.Q.matrix.comm)
        ksp.setOperators(self.Q.matrix)
        ksp.setType(PETSc.KSP.Type.CG)
        ksp.getPC().setType(PETSc.PC.Type.JACOBI)
        ksp.setTolerances(rtol=1e-12, max_it=_ITERATIONS)
        ksp.setErrorIfNotConverged(False)
        x, b = self.Q.matrix.createVecs()
        b.array[:] = g
        ksp.solve(b, x)
        better = row - x.array_r
        ksp.destroy()
        finite = np.isfinite(x.norm())
        return better if finite and abs(self._value_at(better, time)) < _MUCH_SMALLER * before else row

    def _data_row(self, time: float) -> np.ndarray | None:
        if self._t is not None:
            self._t.assign(time)
        return self._data.row()

    def _state(self, time: float) -> np.ndarray:
        """The reference state of a time."""
        return np.zeros(own_size(self._u.function_space())) if self._reference is None else self._reference.at(time)

    def _set(self, state: np.ndarray, time: float) -> None:
        put(self._u, state)
        if self._t is not None:
            self._t.assign(time)

    # -- at the reference state ----------------------------------------------------------------------------------------
    def _value_at(self, state: np.ndarray, time: float) -> float:
        self._set(state, time)
        return float(self._value_form.assemble())

    def _value(self, time: float) -> float:
        return self._value_at(self._state(time), time)

    def _gradient(self, time: float) -> np.ndarray:
        state = self._state(time)
        if self._gradient_form is None:
            return np.zeros_like(state)
        self._set(state, time)
        row = get(self._gradient_form.assemble())
        if self._reference is not None:
            row[np.abs(row) <= self._noise(state)] = 0.0
        return row

    def _noise(self, state: np.ndarray) -> np.ndarray:
        """Round-off of the derivative at a state."""
        x, y = self._terms.createVecs()
        x.array[:] = np.abs(state)
        self._terms.mult(x, y)
        return NOISE * y.array_r

    # -- on blocks -----------------------------------------------------------------------------------------------------
    def _from_reference(self, rows, u: np.ndarray) -> np.ndarray:
        return u if self._reference is None else u - self._reference[rows]

    def product(self, rows, du: np.ndarray) -> np.ndarray:
        """``Q du`` at the points that are wanted."""
        some = np.flatnonzero(self._wanted[rows])
        if self.Q is not None and len(some) == len(du):
            return self.Q(du)
        out = np.zeros(du.shape)
        if self.Q is not None and len(some):
            out[some] = self.Q(du[some])
        return out

    def local_values(self, rows, u: np.ndarray) -> np.ndarray:
        """What depends on the state of ``j``, this rank's part of it, ``(b, 1)``; see :meth:`constants`."""
        w = self._from_reference(rows, u)
        out = self.product(rows, w)
        out *= 0.5
        if not self._g.is_zero:
            out += self._g[rows]
        return np.array([x @ y for x, y in zip(out, w, strict=True)]).reshape(-1, 1)

    def constants(self, count: int) -> np.ndarray:
        """The rest of ``j`` at all local points, ``(count,)``, the same on all ranks in space."""
        return np.broadcast_to(self._c[:], count)

    def gradient(self, rows, u: np.ndarray) -> np.ndarray:
        """``j_u`` of states, ``(b, n)``."""
        out = self.product(rows, self._from_reference(rows, u))
        if not self._g.is_zero:
            out += self._g[rows]
        return out

    @property
    def nbytes(self) -> int:
        """Bytes of what is kept for the points."""
        return self._g.nbytes + (0 if self._reference is None else self._reference.nbytes)

    @property
    def petsc_bytes(self) -> dict[str, int]:
        """Bytes of the matrix and its blocks, and of the terms' magnitudes where derivatives are computed again."""
        return {} if self.Q is None else self.Q.nbytes

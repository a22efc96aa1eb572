r"""Functionals that are quadratic in the state, evaluated at the time points of a rank by products with one matrix.

.. math::  j(u, t) = j(\bar u, t) + g(t)^T (u - \bar u) + \tfrac12 (u - \bar u)^T Q\, (u - \bar u), \qquad
           g(t) = j_u(\bar u, t),

with a reference state :math:`\bar u(t)` close to the data (:mod:`~pint_fem.misfits.reference`), as the expansion about
zero loses the digits in which large states and data agree. ``j`` and ``g`` at the reference state are assembled once
for each point, or once in all where they do not depend on time.

The reference state is the data in the functional; where there are none, the initial state if ``j`` is about as small
there as at zero; and otherwise zero. Where nothing depends on time, an approximate minimum of ``j`` takes its place if
``j`` is much smaller there. Entries of ``g`` that are round-off of the terms they are sums of are set to zero, so that
data in the space of the state are an exact minimum.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import ufl
from firedrake import Function, assemble
from firedrake.assemble import get_assembler
from firedrake.petsc import PETSc
from ufl.algorithms import extract_coefficients

from pint_fem.evolution.control_operators import absolute
from pint_fem.kernels.arrays import as_rows, get, own_size, put
from pint_fem.kernels.block_operator import BlockOperator
from pint_fem.misfits.point_vectors import PointVectors
from pint_fem.misfits.reference import ReferenceValues

__all__ = ["NOISE", "QuadraticFunctional", "row_products"]

NOISE = 16 * np.finfo(float).eps / 2
"""Round-off of an assembled entry relative to the sum of its terms' magnitudes."""
_ABOUT_AS_SMALL = 1.01
"""The initial state is the reference state where the functional is at most this times its value at zero."""
_MUCH_SMALLER, _ITERATIONS = 0.01, 200
"""Ratio of values for which a minimum by conjugate gradients is the reference state; most iterations."""


def row_products(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Dot product of each row of ``a`` and ``b`` on this rank, ``(rows, 1)``, independent of the other rows."""
    return np.array([x @ y for x, y in zip(a, b, strict=True)]).reshape(-1, 1)


class _Assembler:
    """A functional and its gradient at any state ``(n,)`` and time."""

    def __init__(self, form: ufl.Form, gradient: ufl.Form, u: Function, t: Function | None):
        self._u, self._t = Function(u.function_space()), t
        self._form = get_assembler(ufl.replace(form, {u: self._u}))
        self._gradient = None if gradient.empty() else get_assembler(ufl.replace(gradient, {u: self._u}))

    def _assign(self, state: np.ndarray, time: float) -> None:
        put(self._u, state)
        if self._t is not None:
            self._t.assign(time)

    def value(self, state: np.ndarray, time: float) -> float:
        """The functional (collective over space)."""
        self._assign(state, time)
        return float(self._form.assemble())

    def gradient(self, state: np.ndarray, time: float) -> np.ndarray:
        """Its derivative, ``(n,)``."""
        if self._gradient is None:
            return np.zeros_like(state)
        self._assign(state, time)
        return get(self._gradient.assemble())


class QuadraticFunctional:
    """A functional ``j(u, t)`` that is quadratic in the state, at the local points of a rank.

    Parameters
    ----------
    form, gradient, second
        The functional, its first derivative and its second, which depends neither on ``u`` nor on time.
    u, t
        The state's function and the time function in them (``None``: there is none).
    times, active
        Times of the local points, and at which of them the functional is evaluated, ``(k + 1,)``.
    initial, span
        Initial state ``(n,)``; first and last time of all ranks.
    store
        Whether vectors that depend on time are stored for each point.

    Attributes
    ----------
    Q : BlockOperator or None
        The second derivative; ``None`` where it vanishes.
    """

    def __init__(
        self, form: ufl.Form, gradient: ufl.Form, second: ufl.Form, u: Function, t: Function | None,
        times: np.ndarray, active: np.ndarray, *, initial: np.ndarray, span: tuple[float, float], store: bool,
    ):  # fmt: skip
        V = u.function_space()
        self._active = active
        self.Q = None if second.empty() else BlockOperator(assemble(second, mat_type="aij").petscmat)
        self._assembler = assembler = _Assembler(form, gradient, u, t)
        value_moves, gradient_moves = (t in extract_coefficients(f) for f in (form, gradient))
        make, moves = None, False
        if self.Q is not None:
            make, moves = self._choose_reference(form, u, t, initial, span, moving=value_moves or gradient_moves)
        vectors = partial(PointVectors, times=times, active=active, size=own_size(V), span=span, comm=V.mesh().comm)
        self._reference = None if make is None else vectors(make, moves=moves, store=store)
        # the vectors below are computed from these objects and not from this one: a cycle would keep matrices alive
        state: Callable[[float], np.ndarray] = lambda time: np.zeros(own_size(V))
        magnitudes, floor = None, 0.0
        if make is not None:
            state = self._reference.at  # type: ignore[assignment]
            magnitudes = absolute(self.Q.matrix)
            floor = 0.0 if store else 0.25 * float(np.linalg.norm(_noise(magnitudes, state(span[0]))))
        rounded = partial(_rounded_gradient, assembler, state, magnitudes)
        self._g = vectors(rounded, moves=moves or gradient_moves, store=store, floor=floor)
        value = lambda time: assembler.value(state(time), time)
        self._constant = vectors(value, moves=moves or value_moves, store=True, size=None)

    # -- the reference state -------------------------------------------------------------------------------------------
    def _choose_reference(
        self,
        form: ufl.Form,
        u: Function,
        t: Function | None,
        initial: np.ndarray,
        span: tuple[float, float],
        *,
        moving: bool,
    ) -> tuple[Callable[[float], np.ndarray] | None, bool]:
        """The reference state as a function of time (``None``: it is zero), and whether it depends on time."""
        data = ReferenceValues(form, [u])
        make, factor = lambda time: initial, _ABOUT_AS_SMALL
        if data.found:
            make, factor = partial(_data_at, data, t), 1.0
        zero, totals = np.zeros_like(initial), np.zeros(2)
        for time in np.linspace(*span, 3) if moving else span[:1]:
            state = make(float(time))
            if state is None:  # data that cannot be interpolated
                break
            totals += [abs(self._assembler.value(x, time)) for x in (state, zero)]
        suits = state is not None and bool(totals[0] <= factor * totals[1])
        if moving:
            return (make, data.found and t in data.coefficients) if suits else (None, False)
        state = self._approximate_minimum(state if suits else zero, span[0])
        size = u.function_space().mesh().comm.allreduce(float(np.abs(state).max(initial=0.0)))
        return ((lambda time: state) if size > 0 else None), False

    def _approximate_minimum(self, state: np.ndarray, time: float) -> np.ndarray:
        """A zero of the derivative by conjugate gradients if the functional is much smaller there, else ``state``: for
        functionals that compare ``u`` with different data in different places.
        """
        before = abs(self._assembler.value(state, time))
        ksp = PETSc.KSP().create(self.Q.matrix.comm)
        ksp.setOperators(self.Q.matrix)
        ksp.setType(PETSc.KSP.Type.CG)
        ksp.getPC().setType(PETSc.PC.Type.JACOBI)
        ksp.setTolerances(rtol=1e-12, max_it=_ITERATIONS)
        ksp.setErrorIfNotConverged(False)
        x, b = self.Q.matrix.createVecs()
        b.array[:] = self._assembler.gradient(state, time)
        ksp.solve(b, x)
        better = state - x.array_r
        ksp.destroy()
        finite = np.isfinite(x.norm())
        return better if finite and abs(self._assembler.value(better, time)) < _MUCH_SMALLER * before else state

    # -- blocks of points ----------------------------------------------------------------------------------------------
    def _difference(self, points: slice, u: np.ndarray) -> np.ndarray:
        return u if self._reference is None else u - self._reference[points]

    def product(self, points: slice, du: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """``Q du`` at the active points, zero at the others, for ``(b, n)`` or a batch ``(b, members, n)``; in ``out``
        where it is given.
        """
        some = np.flatnonzero(self._active[points])
        out = np.empty(du.shape) if out is None else out
        if self.Q is not None and len(some) == len(du) and out.flags.c_contiguous:
            self.Q(as_rows(du), as_rows(out))
            return out
        out[...] = 0.0
        if self.Q is not None and len(some):
            out[some] = self.Q(as_rows(du[some])).reshape(len(some), *du.shape[1:])
        return out

    def local_values(self, points: slice, u: np.ndarray) -> np.ndarray:
        """``j`` of states without its constant term, ``(b, 1)``: this rank's part of the sum over space."""
        w = self._difference(points, u)
        out = self.product(points, w)
        out *= 0.5
        if not self._g.is_zero:
            out += self._g[points]
        return row_products(out, w)

    def constants(self, count: int) -> np.ndarray:
        """The constant term of ``j`` at all local points, ``(count,)``, the same on all ranks in space."""
        return np.broadcast_to(self._constant[:], count)

    def gradient(self, points: slice, u: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """``j_u`` of states, ``(b, n)``; in ``out`` where it is given."""
        out = self.product(points, self._difference(points, u), out)
        if not self._g.is_zero:
            out += self._g[points]
        return out

    @property
    def nbytes(self) -> int:
        """Bytes of the vectors that are stored for the points."""
        return self._g.nbytes + (0 if self._reference is None else self._reference.nbytes)

    @property
    def operator_nbytes(self) -> dict[str, int]:
        """Bytes of the matrix and its copy for the kernels on this rank, by part."""
        return {} if self.Q is None else self.Q.nbytes


def _data_at(data: ReferenceValues, t: Function | None, time: float) -> np.ndarray | None:
    """The data of a functional at a time; ``None`` where they cannot be interpolated."""
    if t is not None:
        t.assign(time)
    return data.vector()


def _rounded_gradient(
    assembler: _Assembler, state: Callable[[float], np.ndarray], magnitudes: PETSc.Mat | None, time: float
) -> np.ndarray:
    """The derivative at the reference state of a time, with entries that are round-off set to zero."""
    row = assembler.gradient(state(time), time)
    if magnitudes is not None:
        row[np.abs(row) <= _noise(magnitudes, state(time))] = 0.0
    return row


def _noise(magnitudes: PETSc.Mat, state: np.ndarray) -> np.ndarray:
    """Round-off of the derivative at a state, from the magnitudes of the second derivative's entries."""
    x, y = magnitudes.createVecs()
    x.array[:] = np.abs(state)
    magnitudes.mult(x, y)
    return NOISE * y.array_r

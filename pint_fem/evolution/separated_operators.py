r"""Control operators that depend on time by scalar factors, :math:`O(t) = \sum_k c_k(t)\, O_k`.

A current :math:`J(x)\, s(t)` with unknown ``J`` has one term. The terms are found by sampling: :math:`O(t) x` for a
fixed random ``x`` at some times, and those of them that others are no combinations of give the :math:`O_k = O(t_k)`.
Coefficients at another time solve a least-squares problem for :math:`O(t) x`, whose residual tells whether the operator
is of this form there. All depends on the evolution only, not on which steps a rank has.
"""

from __future__ import annotations

import numpy as np
import ufl
from firedrake import Cofunction, Function, derivative
from firedrake.assemble import get_assembler
from mpi4py import MPI
from ufl.algorithms import expand_derivatives, extract_coefficients

from pint_fem.errors import InputError
from pint_fem.evolution.control_operators import control_operator
from pint_fem.kernels.arrays import get, is_real, own_size, put

__all__ = ["MOST", "SeparatedOperator", "separated_operator"]

MOST = 8
"""Terms that an operator may have."""
SAMPLES = 48
_TOLERANCE = 1e-12


class SeparatedOperator:
    """The terms of a control's operator.

    Parameters
    ----------
    form
        Residual, with the sign of a load.
    control
        Affine in it.
    zero_rows
        Own rows that the operator leaves out.
    t
        Time function, or ``None``.
    interval
        ``(t0, t1)`` to take samples from.

    Attributes
    ----------
    terms : list of ControlOperator
    constant : bool
        Whether it does not depend on time: one term with the coefficient 1.
    separable : bool
        Whether ``MOST`` terms are enough.
    """

    def __init__(self, form, control: Function, zero_rows: np.ndarray, t: Function | None, interval):
        if t is not None:  # samples are taken at times of its own
            moving, t = t, Function(t.function_space(), name="t")
            form = ufl.replace(form, {moving: t})
        self._make = lambda: control_operator(form, control, zero_rows)
        self._t, self._zero_rows, self.name = t, zero_rows, control.name()
        space = control.function_space()
        x = Function(space)
        action = expand_derivatives(derivative(form, control, x))
        self.constant = t is None or t not in extract_coefficients(action)
        self.separable, self.terms = True, []
        if self.constant:
            self.terms.append(self._make())
            return
        self._comm = space.mesh().comm
        rng = np.random.default_rng(self._comm.rank)
        put(x, np.ones(own_size(space)) if is_real(space) else rng.standard_normal(own_size(space)))
        V = form.arguments()[0].function_space()
        self._assembler, self._vector = get_assembler(action), Cofunction(V.dual())
        self._known: dict[float, np.ndarray] = {}
        self._find(np.linspace(*interval, SAMPLES))

    def _sample(self, time: float) -> np.ndarray:
        """``O(t) x``."""
        self._t.assign(time)
        values = get(self._assembler.assemble(tensor=self._vector))
        values[self._zero_rows] = 0
        return values

    def _dot(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return self._comm.allreduce(a @ b, op=MPI.SUM)

    def _find(self, times: np.ndarray) -> None:
        """Choose the terms."""
        samples = np.array([self._sample(time) for time in times])
        norms = np.sqrt(self._comm.allreduce((samples**2).sum(axis=1), op=MPI.SUM))
        self._scale, left, chosen = norms.max(), samples.copy(), []
        while True:
            norms = np.sqrt(self._comm.allreduce((left**2).sum(axis=1), op=MPI.SUM))
            worst = int(np.argmax(norms))
            if norms[worst] <= _TOLERANCE * self._scale:
                break
            if len(chosen) == MOST:
                self.separable = False
                return
            chosen.append(worst)
            q = left[worst] / norms[worst]
            for _ in range(2):
                left -= np.outer(self._dot(left, q), q)
        self._basis = samples[chosen]
        self._gram = self._dot(self._basis, self._basis.T)
        for index in chosen:
            self._t.assign(times[index])
            self.terms.append(self._make())

    def coefficients(self, times: np.ndarray) -> np.ndarray:
        """:math:`c_k(t)`, ``(times, terms)`` (collective over space).

        Raises
        ------
        InputError
            If the operator is no combination of the terms at a time.
        """
        if self.constant:
            return np.ones((len(times), 1))
        return np.array([self._at(float(time)) for time in times]).reshape(len(times), len(self.terms))

    def _at(self, time: float) -> np.ndarray:
        if time not in self._known:
            values = self._sample(time)
            c = np.linalg.solve(self._gram, self._dot(self._basis, values)) if self.terms else np.zeros(0)
            rest = values - c @ self._basis
            if self._dot(rest, rest) ** 0.5 > 1e3 * _TOLERANCE * max(self._scale, self._dot(values, values) ** 0.5):
                raise InputError(
                    f"the residual's dependence on time beside the control {self.name!r} is not a sum of "
                    f"{len(self.terms)} terms at t = {time:g}: give propagator=FormPropagator"
                )
            self._known[time] = c
        return self._known[time]


def separated_operator(form, control: Function, zero_rows: np.ndarray, t, interval) -> SeparatedOperator | None:
    """The terms; ``None`` where the form does not depend on the control."""
    if expand_derivatives(derivative(form, control, Function(control.function_space()))).empty():
        return None
    return SeparatedOperator(form, control, zero_rows, t, interval)

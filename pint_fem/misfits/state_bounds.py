r"""Bounds on the state as a penalty: the Moreau-Yosida regularisation of the constraint at all steps.

For a scalar quantity :math:`y = B u + b` that is affine in the state, at points :math:`p` with weights :math:`m_p`,

.. math::
    J_\gamma = \frac{\gamma}{2} \sum_{n=1}^{N} \Delta t \sum_p m_p \left(\max(0, y_{np} - \overline y_{np})^2 +
    \max(0, \underline y_{np} - y_{np})^2\right)

is added to the functional. Its derivative is continuous, and the matrix :math:`\gamma \Delta t B^T D B`, with
:math:`D = m_p` where a bound is violated and 0 elsewhere, is a generalised second derivative (a Newton derivative), for
which Newton's method is that of primal-dual active sets [1]. As :math:`\gamma \to \infty` minimisers converge to
those with :math:`\underline y \le y \le \overline y` at the points, and :math:`\gamma m_p \max(0, y - \overline y)` to
the multipliers [1, 2]; where these are bounded, violations fall as :math:`1/\gamma`
(:func:`~pint_fem.adjoint.minimisation.penalty_path.follow_penalty`).

The points are the nodes of a space in which y is interpolated, and :math:`m_p = \int \varphi_p` the integrals of its
basis functions. As y is affine, B is assembled once; values, gradients and products are those of arrays for blocks of
steps.

References
----------
[1] K. Ito, K. Kunisch, Semi-smooth Newton methods for state-constrained optimal control problems, Systems Control
    Lett. 50 (2003) 221-228.
[2] M. Hintermüller, K. Kunisch, Path-following methods for a class of constrained minimization problems in function
    space, SIAM J. Optim. 17 (2006) 159-187.
"""

from __future__ import annotations

import math
from numbers import Real

import numpy as np
import ufl
from firedrake import Function, FunctionSpace, TestFunction, TrialFunction, assemble, dx
from firedrake import interpolate as interpolate_
from firedrake.functionspaceimpl import WithGeometry
from firedrake.petsc import PETSc
from mpi4py import MPI
from pyadjoint.tape import stop_annotating
from ufl.algorithms import expand_derivatives, extract_coefficients
from ufl.domain import extract_unique_domain

from pint_fem.errors import InputError
from pint_fem.evolution.evolution import Evolution
from pint_fem.evolution.private_copies import data_of
from pint_fem.kernels.arrays import as_rows, get, own_size
from pint_fem.kernels.block_operator import BlockOperator
from pint_fem.kernels.direct import added
from pint_fem.misfits.base import BlockMisfit
from pint_fem.misfits.point_vectors import PointVectors
from pint_fem.misfits.quadratic import row_products
from pint_fem.spacetime import Slab, SpaceTime

__all__ = ["StateBounds"]

Bound = float | ufl.core.expr.Expr | None

_POSITIVE = 1e-12
"""Least weight of a node relative to the largest for which it is a point of the state's own space."""


class StateBounds(BlockMisfit):
    r"""Bounds :math:`\underline y \le y(u_n) \le \overline y` on the state at the steps ``1..N``, as a penalty:
    :math:`\frac{\gamma}{2} \sum_n \Delta t \int \max(0, y - \overline y)^2 + \max(0, \underline y - y)^2`.

    Give it to a functional beside its misfits. Functions and constants in the expressions are data: they are copied
    when a functional is made, and read again by its ``update_data()``, and so is the attribute ``gamma``.

    Parameters
    ----------
    expression : ufl.core.expr.Expr
        The scalar y, affine in the evolution's ``u``: ``u``, ``u[0]``, ``split(u)[1] - 2*u0``.
    lower, upper : float, ufl.core.expr.Expr or None
        Bounds: numbers, or UFL expressions of data and the evolution's ``t``; ``None`` or an infinite number for none.
    gamma : float
        The factor :math:`\gamma > 0`.
    measure : ufl.Measure, optional
        Where the bounds hold: ``dx`` by default, ``dx(1)``, ``ds(2)``.
    space : FunctionSpace, optional
        A space of scalar functions whose nodes are the points at which the bounds hold, without negative weights. By
        default the space of y where this is ``u`` itself and its nodes have positive weights, as for piecewise linear
        functions, and otherwise that of continuous piecewise linear functions.

    Raises
    ------
    InputError
        If there is no bound, `gamma` is no finite positive number, or the expression is not scalar; when a functional
        is made, on every rank, if the expression does not contain ``u``, is not affine in it or contains a control, a
        bound contains ``u`` or a control or is not a number, or a lower bound exceeds the upper one.
    """

    width, uses_observations, takes_batches, piecewise = 2, False, True, True

    def __init__(
        self, expression: ufl.core.expr.Expr, *, lower: Bound = None, upper: Bound = None, gamma: float = 1e3,
        measure: ufl.Measure | None = None, space: WithGeometry | None = None,
    ):  # fmt: skip
        if not isinstance(expression, ufl.core.expr.Expr) or expression.ufl_shape or expression.ufl_free_indices:
            raise InputError("StateBounds: give a scalar expression of the state, such as u, u[0] or split(u)[1]")
        if lower is None and upper is None:
            raise InputError("StateBounds: give lower= or upper=, or both")
        for name, bound in (("lower", lower), ("upper", upper)):
            expr = isinstance(bound, ufl.core.expr.Expr)
            if isinstance(bound, bool) or not (bound is None or isinstance(bound, Real) or expr):
                raise InputError(f"StateBounds: {name} = {bound!r}: give a number, a UFL expression or None")
            if (expr and bound.ufl_shape) or (not expr and bound is not None and math.isnan(bound)):
                raise InputError(f"StateBounds: {name} = {bound!r}: give a number or a scalar expression")
        if measure is not None and not isinstance(measure, ufl.Measure):
            raise InputError(f"StateBounds: measure = {measure!r}: give a measure, such as dx or ds(1)")
        self.expression, self.lower, self.upper = expression, lower, upper
        self.gamma, self.measure, self.space = gamma, measure, space
        self._users = self  # the object that the user has, also of a copy for a second functional
        self._read_gamma()

    def _read_gamma(self) -> None:
        gamma = self._users.gamma
        if isinstance(gamma, bool) or not isinstance(gamma, Real) or not 0 < gamma < math.inf:
            raise InputError(f"StateBounds: gamma = {gamma!r}: give a finite number > 0")
        self._gamma = float(gamma)

    def given(self) -> dict:
        """The factor and the expressions, for comparison between ranks."""
        mesh = extract_unique_domain(self.expression)
        found: dict[str, object] = {"gamma": self._users.gamma}
        for name, e in (("y", self.expression), ("lower", self.lower), ("upper", self.upper)):
            found[name] = e
            if isinstance(e, ufl.core.expr.Expr):
                found[name] = None if mesh is None else (e * dx(domain=mesh)).signature()[:16]
        return found

    def has_changed(self) -> bool:
        """Whether ``gamma`` is another number than the one that was read."""
        return self._users.gamma != self._gamma

    def update_data(self, changed: set, *, own: bool) -> None:
        """Read ``gamma`` again, and functions in the expressions where they have changed."""
        if own:
            self._read_gamma()
        if changed & self._data:
            self.bind(self.evolution, self.spacetime, self.slab)
        elif own:
            self._set_weights()

    # -- preparation ---------------------------------------------------------------------------------------------------
    def bind(self, evolution: Evolution, spacetime: SpaceTime, slab: Slab) -> None:
        """Assemble the operator and the weights of the points, and interpolate the bounds; errors are those of the
        class.
        """
        super().bind(evolution, spacetime, slab)
        self._data: set = set()
        self.times = evolution.time(np.arange(slab.lo, slab.hi + 1))
        self.active = np.arange(slab.lo, slab.hi + 1) > 0
        self.observed = self.active & (np.arange(slab.k + 1) > 0)  # point 0 is the left neighbour's
        self.state_dependent = self.active
        y, t = self._private(self.expression, "the expression")
        if evolution.u not in extract_coefficients(y):
            raise InputError("StateBounds: the expression does not contain the evolution's state u")
        with stop_annotating():
            space = self._space_of_points(y)
            self._masses = get(assemble(TestFunction(space) * (self.measure or dx(domain=space.mesh()))))
            least = self._over_space(self._masses.min(initial=0.0), MPI.MIN)
            if least < -_POSITIVE * self._over_space(np.abs(self._masses).max(initial=0.0), MPI.MAX):
                raise InputError(
                    f"StateBounds: a node of {space.ufl_element()} has a negative weight: give a space with positive "
                    "ones, such as FunctionSpace(mesh, 'CG', 1)"
                )
            self._masses = np.maximum(self._masses, 0.0)
            self._operators(y, t, space)
            self._bounds = {name: self._bound(name, space) for name in ("lower", "upper")}
        self._require_order()
        self._set_weights()

    def _private(self, expression: ufl.core.expr.Expr, what: str) -> tuple[ufl.core.expr.Expr, Function | None]:
        """An expression in private copies, and the time function in it; refused with a control in it."""
        ev = self.evolution
        form, t = ev.functional(expression * dx(domain=ev.V.mesh().unique()), f"StateBounds: {what}")
        if form.empty():
            return ufl.as_ufl(0.0), None
        private = sum((i.integrand() for i in form.integrals()[1:]), start=form.integrals()[0].integrand())
        self._data |= set(data_of(private)) - {ev.u, t}
        if {*ev.controls, *map(ev.copies.variable, ev.posed.sought)} & set(extract_coefficients(private)):
            raise InputError(f"StateBounds: {what} contains a control; give bounds= of the minimiser for it")
        return private, t

    def _space_of_points(self, y: ufl.core.expr.Expr) -> WithGeometry:
        """The space whose nodes are the points."""
        ev = self.evolution
        if self.space is not None:
            if self.space.value_shape:
                raise InputError("StateBounds: space= has functions with several components: give one of scalars")
            return self.space
        if y == ev.u:
            masses = get(assemble(TestFunction(ev.V) * dx))
            least = self._over_space(masses.min(initial=np.inf), MPI.MIN)
            if least > _POSITIVE * self._over_space(masses.max(initial=0.0), MPI.MAX):
                return ev.V
        return FunctionSpace(ev.V.mesh().unique(), "CG", 1)

    def _operators(self, y: ufl.core.expr.Expr, t: Function | None, space: WithGeometry) -> None:
        """B and its transpose, None for the identity, and b at the points of time."""
        ev, zero = self.evolution, Function(self.evolution.V)
        trial = TrialFunction(ev.V)
        slope = expand_derivatives(ufl.derivative(y * dx, ev.u, trial))
        if {ev.u, t} & set(extract_coefficients(slope)):
            raise InputError("StateBounds: the expression is not affine in the state u with constant coefficients")
        self._B: BlockOperator | None = None
        if not (y == ev.u and space == ev.V):
            linear = sum((i.integrand() for i in slope.integrals()[1:]), start=slope.integrals()[0].integrand())
            B: PETSc.Mat = assemble(interpolate_(linear, space)).petscmat
            self._B, self._B_T = BlockOperator(B), BlockOperator(B.transpose(type(B)()))
        at_zero = ufl.replace(y, {ev.u: zero})
        self._offset = self._vectors(at_zero, t, space)

    def _vectors(self, expression: ufl.core.expr.Expr, t: Function | None, space: WithGeometry) -> PointVectors:
        """An expression without the state, interpolated at the points of time."""
        made, ev = Function(space), self.evolution
        span = (float(ev.time(0)), float(ev.time(ev.nsteps)))

        def make(time: float) -> np.ndarray:
            if t is not None:
                t.assign(time)
            with stop_annotating():
                return get(made.interpolate(expression))

        return PointVectors(
            make, times=self.times, active=self.active, size=own_size(space), moves=t is not None, span=span,
            store=self.stores_data, comm=self.spacetime.space_comm,
        )  # fmt: skip

    def _bound(self, name: str, space: WithGeometry) -> PointVectors | None:
        """The values of a bound; None where there is none."""
        given = getattr(self, name)
        none = -math.inf if name == "lower" else math.inf
        if given is None or (isinstance(given, Real) and float(given) == none):
            return None
        if isinstance(given, Real):
            size = own_size(space)
            return PointVectors(
                lambda _: np.full(size, float(given)), times=self.times, active=self.active, size=size, moves=False,
                span=(0.0, 1.0), store=True, comm=self.spacetime.space_comm,
            )  # fmt: skip
        expression, t = self._private(given, name)
        if self.evolution.u in extract_coefficients(expression):
            raise InputError(f"StateBounds: {name} contains the state u: write it into the expression")
        return self._vectors(expression, t, space)

    def _require_order(self) -> None:
        """Refuse bounds between which there is no number."""
        low, high = self._bounds["lower"], self._bounds["upper"]
        for first in range(len(self.times)):
            point = slice(first, first + 1)
            if not self.active[first]:
                continue
            lower = -np.inf if low is None else low[point]
            upper = np.inf if high is None else high[point]
            if not np.all((lower <= upper) & (lower < np.inf) & (upper > -np.inf)):
                raise InputError(
                    f"StateBounds: no number is between the bounds at t = {self.times[first]:.9g}: give lower <= upper"
                )
            if not any(bound is not None and bound.moves for bound in (low, high)):
                return

    def _set_weights(self) -> None:
        self._weight = np.where(self.active, self._gamma * self.evolution.dt, 0.0)

    def _over_space(self, number: float, op: MPI.Op) -> float:
        return self.spacetime.space_comm.allreduce(float(number), op=op)

    # -- blocks of points ----------------------------------------------------------------------------------------------
    def _excess(self, points: slice, u: np.ndarray) -> np.ndarray:
        """How far y is above the upper bound (positive) or below the lower one (negative), ``(b, points)``."""
        y = u if self._B is None else self._B(as_rows(u))
        if not self._offset.is_zero:
            y = y + self._offset[points]
        out = np.zeros_like(y)
        low, high = self._bounds["lower"], self._bounds["upper"]
        if high is not None:
            np.maximum(y - high[points], 0.0, out=out)
        if low is not None:
            out += np.minimum(y - low[points], 0.0)
        out[~self.active[points]] = 0.0
        return out

    def observe(self, points: slice, u: np.ndarray) -> np.ndarray:
        """This space rank's part of the sum over the points, without gamma, and the largest violation, ``(b, 2)``."""
        excess = self._excess(points, u)
        largest = np.abs(np.where(self._masses > 0, excess, 0.0)).max(axis=1, initial=0.0)
        return np.column_stack([0.5 * row_products(excess * self._masses, excess)[:, 0], largest])

    def observe_tangent(self, points: slice, u: np.ndarray, du: np.ndarray) -> np.ndarray:
        """This space rank's part of the weighted derivative, ``(b, 2)`` with zeros in the second column."""
        source = self.adjoint_source(points, u, None)
        if du.ndim == 3:
            source = np.broadcast_to(source[:, None], du.shape)
        out = np.zeros((*du.shape[:-1], 2))
        out[..., 0] = row_products(as_rows(source), as_rows(du)).reshape(du.shape[:-1])
        return out

    def point_values(self, Y: np.ndarray) -> np.ndarray:
        """The weighted penalty at each own point, ``(k,)``."""
        return self._weight[1:] * self.spacetime.sum_over_space(np.ascontiguousarray(Y[1:, 0]))

    def point_derivatives(self, Y: np.ndarray | None, dY: np.ndarray) -> np.ndarray:
        """The derivative of the weighted penalty at each own point, ``(k,)``."""
        return self.spacetime.sum_over_space(np.ascontiguousarray(dY[1:, ..., 0]))

    def adjoint_source(self, points: slice, u: np.ndarray, S: np.ndarray | None) -> np.ndarray:
        """The weighted derivative by the state at each point, ``(b, n)``."""
        return self._pulled_back(self._excess(points, u) * self._masses * self._weight[points, None])

    def adjoint_source_tangent(self, points: slice, u: np.ndarray, du: np.ndarray, dS: np.ndarray | None) -> np.ndarray:
        """The product of the weighted generalised second derivative with directions, shaped as these are."""
        factors = np.where(self._excess(points, u) != 0, self._masses, 0.0) * self._weight[points, None]
        dy = du if self._B is None else self._B(as_rows(du)).reshape(*du.shape[:-1], self._B.rows)
        return self._pulled_back(dy * (factors[:, None] if du.ndim == 3 else factors))

    def _pulled_back(self, values: np.ndarray) -> np.ndarray:
        """B^T of values at the points, ``(..., n)``."""
        if self._B is None:
            return values
        return self._B_T(as_rows(values)).reshape(*values.shape[:-1], self._B_T.rows)

    def nbytes(self) -> int:
        """Bytes of weights and bounds that are stored for the points."""
        vectors = [bound for bound in self._bounds.values() if bound is not None]
        return self._masses.nbytes + self._offset.nbytes + sum(bound.nbytes for bound in vectors)

    def operator_nbytes(self) -> dict[str, int]:
        """Bytes of the operator and its transpose on this rank, by part."""
        return {} if self._B is None else added(self._B.nbytes, self._B_T.nbytes)

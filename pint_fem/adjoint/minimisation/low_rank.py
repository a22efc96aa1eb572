r"""A preconditioner of conjugate gradients from a low-rank approximation of the misfit's Hessian.

With the misfit's Gauss-Newton form :math:`A` at an iterate and the second derivative :math:`R` of the regularisation,

.. math:: P = (\hat A + R)^{-1}, \qquad \hat A \approx A,

by :mod:`pint_fem.optimize.low_rank`: a random direction costs one action of :math:`A`, and the actions of a block of
directions are one tangent and one adjoint sweep. Conjugate gradients then take a few steps for any weight of the
regularisation; the number of directions is about that of eigenvalues of :math:`A x = \lambda R x` above the tolerance.

**When it is computed.** At the first iterate of a run, and at an iterate where conjugate gradients took more than
``refresh_after`` steps at the one before. It then begins with the eigenvectors that it has, which change little, so
that only the last block is random. For another weight of the regularisation (which is found by comparing the operators)
and of the misfit, whose weight is the inverse variance of the noise (:meth:`LowRankPreconditioner.rescaled`), the same
eigenpairs hold; more are computed only where what was left out is too large for the new weights.

**Singular regularisation.** Where :math:`R` is singular (gradients alone) or a control has none, :math:`R + \varepsilon
M` is used in its place in :math:`P`, with the mass matrix :math:`M` and :math:`\varepsilon` a small part of the
quotient :math:`(v, R v) / (v, M v)` of white noise, or where there is no :math:`R`, of :math:`A`. The preconditioner
reports it. The minimiser is that of the functional in any case.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from functools import partial
from numbers import Real
from typing import TYPE_CHECKING, Any

import numpy as np
from firedrake import TestFunction, TrialFunction, dx, inner

from pint_fem.adjoint.regularisation_in_time.inner_product import InnerInTime
from pint_fem.adjoint.riesz import ControlInner
from pint_fem.capacity import most_items
from pint_fem.collective import all_ranks, on_first_rank
from pint_fem.errors import InputError, InputTypeError
from pint_fem.evolution.control_layout import ControlLayout
from pint_fem.optimize.low_rank import LowRankHessian, Pencil, probe

if TYPE_CHECKING:
    from pint_fem.adjoint.functional import ControlFunctional
    from pint_fem.adjoint.minimisation.objective import Objective

__all__ = ["LowRankPreconditioner"]

_SHIFT, _SHIFT_OF_MISFIT = 1e-5, 1e-8
"""Parts of the quotients of the regularisation and of the misfit that are taken for a shift."""
_SOLVED = 1e-6
"""Relative residual of a solve above which an operator is singular."""
_SAME = 1e-8
"""Relative difference up to which an operator is a multiple of another one."""
_MOST = 512
"""Largest number of directions by default."""


class LowRankPreconditioner:
    """The inverse of the sum of the regularisation's Hessian and a low-rank approximation of the misfit's.

    ``J.minimize_trust_region(preconditioner="low-rank")`` makes one for the run. One that is given as
    ``preconditioner=P`` keeps its eigenpairs, and is used again for other weights of the regularisation, noise levels
    and data, also of another functional of the same controls.

    Parameters
    ----------
    tolerance : float
        Eigenvalues of the misfit's Hessian relative to the regularisation's that are left out: conjugate gradients see
        eigenvalues from one to one and about this number.
    block : int
        Least number of directions whose actions are computed by one tangent and one adjoint sweep.
    most : int, optional
        Largest number of directions; default: 512, or as many as fit the memory. Where more are above the tolerance,
        those of the largest eigenvalues are used, and the preconditioner reports it.
    refresh_after : int
        It is computed again at an iterate if conjugate gradients took more steps than this at the one before.
    seed : int
        Of the random directions, which do not depend on the number of ranks in time.

    Attributes
    ----------
    hessian : LowRankHessian or None
        Eigenpairs, remainder and weights; ``None`` before the first run.
    directions, computed : int
        Number of directions whose actions were computed, and how often the approximation was, since it was made.
    shift : float
        Factor of the mass matrix where the regularisation is singular, the largest one of all controls; else 0.

    Raises
    ------
    InputError
        If a number is out of range; InputTypeError where it is none.
    """

    def __init__(
        self,
        *,
        tolerance: float = 0.3,
        block: int = 16,
        most: int | None = None,
        refresh_after: int = 3,
        seed: int = 0,
    ):
        counts = {"block": block, "most": most, "refresh_after": refresh_after}
        if isinstance(tolerance, bool) or not isinstance(tolerance, Real):
            raise InputTypeError(f"LowRankPreconditioner: tolerance = {tolerance!r} is refused: give a positive number")
        if not 0 < tolerance < np.inf:
            raise InputError(f"LowRankPreconditioner: tolerance = {tolerance} is refused: give a positive number")
        for name, count in counts.items():
            if count is not None and (isinstance(count, bool) or not isinstance(count, (int, np.integer))):
                raise InputTypeError(f"LowRankPreconditioner: {name} = {count!r} is refused: give a positive integer")
            if count is not None and count < 1:
                raise InputError(f"LowRankPreconditioner: {name} = {count} is refused: give a positive integer")
        self.tolerance, self.block, self.most = float(tolerance), block, most
        self.refresh_after, self.seed = refresh_after, seed
        self.hessian: LowRankHessian | None = None
        self.directions = self.computed = 0
        self.shift = 0.0
        self._start: np.ndarray | None = None
        self._operator: _RegularisationOperator | None = None
        self._objective: Objective | None = None
        self._inner: ControlInner | None = None
        self._iterate: np.ndarray | None = None
        self._steps = 0

    def __str__(self) -> str:
        """One line: rank, directions, what is left out."""
        H = self.hessian
        if H is None:
            return "low-rank preconditioner, not computed yet"
        line = (
            f"low-rank preconditioner of rank {H.rank} by {self.directions} directions, computed {self.computed} "
            f"time{'s' if self.computed != 1 else ''}; largest relative eigenvalue left out {H.ratio * H.remainder:.1e}"
        )
        if not H.complete:
            line += f", above {self.tolerance:g}: {H.products} directions are the most that are allowed"
        if self.shift:
            line += f"; singular regularisation, shifted by {self.shift:.1e} times the mass matrix"
        return line

    def rescaled(self, *, misfit: float = 1.0, regularisation: float = 1.0) -> LowRankPreconditioner:
        """Return a preconditioner with the same eigenpairs for a multiple of the misfit, whose weight is the inverse
        variance of the noise; a weight of the regularisation is found in a run without it.

        Raises
        ------
        InputError
            If a factor is not positive.
        """
        if not (0 < misfit < np.inf and 0 < regularisation < np.inf):
            raise InputError(f"rescaled: factors {misfit} and {regularisation} are refused: give positive numbers")
        made = copy(self)
        made._objective = made._iterate = None
        if self.hessian is not None:
            made.hessian = self.hessian.rescaled(misfit=misfit, regularisation=regularisation)
        return made

    # -- a run ---------------------------------------------------------------------------------------------------------
    def begin(self, functional: ControlFunctional, objective: Objective, inner_product: ControlInner) -> None:
        """Let the preconditioner be that of a run (collective).

        Raises
        ------
        InputError
            On every rank, if the functional has a total variation or another regularisation that is not quadratic, or
            other controls than the eigenpairs are for.
        """
        layout = functional.layout
        operator = _RegularisationOperator(functional, self.seed)
        known = self._operator
        if known is not None and not all_ranks(
            layout.spacetime.comm, operator.size == known.size and layout.size == known.layout.size
        ):
            raise InputError(
                "preconditioner: the LowRankPreconditioner is for other controls: make one for these with "
                "preconditioner='low-rank'"
            )
        self._objective, self._inner, self._iterate, self._steps = objective, inner_product, None, 0
        if self.hessian is not None:
            factor = None if self._operator is None else operator.multiple_of(self._operator)
            H = self.hessian
            if factor is None:
                self._start, self.hessian = H.vectors, None
            else:
                self.hessian = H.rescaled(regularisation=factor / H.regularisation)
                if H.complete and self.hessian.ratio * self.hessian.remainder > self.tolerance:
                    self._start, self.hessian = H.vectors, None
        if self.hessian is None:
            self._operator = operator
        self._next, self._layout = operator, layout

    def __call__(self, r: np.ndarray) -> np.ndarray:
        """Return ``P r`` (collective)."""
        if self._iterate is None or self._objective.iterate is not self._iterate:
            steps, self._steps, self._iterate = self._steps, 0, self._objective.iterate
            if self.hessian is None or steps > self.refresh_after:
                self._compute()
        self._steps += 1
        dual = self._inner.dual(r)
        values = _pairing(self._layout, dual[None], self.hessian.vectors)[0]
        return self.hessian.apply(self._operator.inverse(dual[None])[0], values)

    def _compute(self) -> None:
        """Compute the approximation at the present iterate (collective)."""
        problem, layout = self._objective.problem, self._layout
        operator = self._operator = self._next
        if self.hessian is not None:
            self._start = self.hessian.vectors[self.hessian.ratio * self.hessian.eigenvalues > self.tolerance]

        def actions(X: np.ndarray) -> np.ndarray:
            found = problem.hessian_actions(self._iterate, list(X), gauss_newton=True)
            return np.array(found)

        operator.make_definite(lambda X: actions(X) - operator.plain(X))
        self.shift = operator.shift
        most = self.most
        if most is None:
            fitting = most_items(problem.spacetime.comm, problem.memory().peak(), 5 * 8 * layout.size)
            most = min(_MOST, fitting)
        pencil = Pencil(
            lambda X: actions(X) - operator.plain(X), operator.metric, operator.inverse, partial(_pairing, layout),
            operator.noise, operator.size, partial(on_first_rank, problem.spacetime.comm, "low-rank preconditioner"),
        )  # fmt: skip
        self.hessian = probe(pencil, tolerance=self.tolerance, block=self.block, most=most, start=self._start)
        self.directions, self.computed = self.directions + self.hessian.products, self.computed + 1
        self._start = None
        problem.spacetime.log(str(self))


class _RegularisationOperator:
    """The second derivative of the regularisation by each control, made definite where it is singular.

    Parameters
    ----------
    functional
        The functional.
    seed
        Of the random vectors.

    Raises
    ------
    InputError
        On every rank, if the regularisation is not quadratic.
    """

    def __init__(self, functional: ControlFunctional, seed: int):
        problem = functional.problem
        self.layout, self._seed = functional.layout, seed
        controls = self.layout.evolution.controls
        if not all(regularisation.quadratic for _, regularisation in problem.regularisations()):
            raise InputError(
                "preconditioner 'low-rank': the regularisation is not quadratic: with a total variation give "
                "'regularisation', which is made for it, otherwise 'limited-memory'"
            )
        self.size = int(self.layout.spacetime.from_group(0, _count(self.layout), (1,))[0])
        self._forms = {control: problem.regularisation_hessian(control) for control in controls}
        self._rates = {c: form for c in controls if (form := problem.rate_hessian(c)) is not None}
        self._mass = ControlInner(self.layout, "L2")
        self._shifts = dict.fromkeys(controls, 0.0)
        self._product: ControlInner | None = None
        if all(form is not None for form in self._forms.values()):
            self._product = InnerInTime(self.layout, list(self._forms.values()), self._rates)
            if not self._is_definite(self._product):
                self._product = None

    @property
    def shift(self) -> float:
        """The largest factor of a mass matrix."""
        return max(self._shifts.values())

    def _is_definite(self, product: ControlInner) -> bool:
        """Whether solves are accurate (collective)."""
        dual = self.noise(0, 1)[0]
        x, y = product.primal(dual), self._mass.primal(dual)
        residual = self._mass.primal(product.dual(x) - dual)
        value, square = self.layout.pairing(dual, x), self._mass.inner(residual, residual)
        return bool(0 < value < np.inf and square <= _SOLVED**2 * self._mass.inner(y, y))

    def make_definite(self, misfit: Callable[[np.ndarray], np.ndarray]) -> None:
        """Shift a singular operator, given the products of the misfit's Hessian with vectors ``(k, n)``
        (collective).
        """
        if self._product is not None:
            return
        v = self._mass.primal(self.noise(0, 1)[0])
        forms = []
        quotient_of_misfit = self._mass_quotient(misfit(v[None])[0], v)
        for control, form in self._forms.items():
            space = control.function_space()
            mass = inner(TrialFunction(space), TestFunction(space)) * dx
            shift = _SHIFT_OF_MISFIT * quotient_of_misfit
            if form is not None:
                one = np.zeros_like(v)
                self.layout.part(one, control)[...] = self.layout.part(v, control)
                product = ControlInner(self.layout, [form if c is control else "L2" for c in self._forms])
                shift = max(_SHIFT * self._mass_quotient(product.dual(one), one), 1e-3 * shift)
            self._shifts[control] = shift or 1.0
            forms.append(self._shifts[control] * mass if form is None else form + self._shifts[control] * mass)
        self._product = InnerInTime(self.layout, forms, self._rates)

    def _mass_quotient(self, dual: np.ndarray, v: np.ndarray) -> float:
        """The value of a dual vector at a vector over its square (collective)."""
        return abs(self.layout.pairing(dual, v)) / self._mass.inner(v, v)

    def metric(self, X: np.ndarray) -> np.ndarray:
        """Products with vectors ``(k, n)``, shifts included (collective)."""
        return np.array([self._product.dual(x) for x in X]).reshape(X.shape)

    def inverse(self, duals: np.ndarray) -> np.ndarray:
        """Solutions for dual vectors ``(k, n)``, shifts included (collective)."""
        return np.array([self._product.primal(y) for y in duals]).reshape(duals.shape)

    def plain(self, X: np.ndarray) -> np.ndarray:
        """Products with the regularisation's own second derivatives (collective)."""
        out = np.empty_like(X)
        for x, y in zip(X, out, strict=True):
            y[:] = 0.0 if self._product is None else self._product.dual(x)
            if self._product is None or self.shift:
                mass = self._mass.dual(x)
                for control, shift in self._shifts.items():
                    self.layout.part(y, control)[...] -= shift * self.layout.part(mass, control)
        return out

    def noise(self, first: int, count: int) -> np.ndarray:
        """Random dual vectors ``(count, n)``, the same for any number of ranks in time."""
        layout = self.layout
        out, rank = np.empty((count, layout.size)), layout.spacetime.space_comm.rank
        for i, control in enumerate(layout.evolution.controls):
            part = layout.part(out, control)
            stepwise = control in layout.evolution.stepwise
            for number in range(count):
                rows = part[number] if stepwise else part[number][None]
                for step, row in enumerate(rows, start=layout.slab.lo if stepwise else -1):
                    key = (self._seed, i, step + 1, rank, first + number)
                    row[:] = np.random.default_rng(key).standard_normal(len(row))
        return out

    def multiple_of(self, other: _RegularisationOperator) -> float | None:
        """Return the factor if this operator is a positive multiple of another one, else ``None`` (collective)."""
        if self._product is None or other._product is None or self.shift or other.shift:
            return None
        dual = self.noise(0, 1)[0]
        x, y = self._product.primal(dual), other._product.primal(dual)
        square = self._mass.inner(x, x)
        factor = self._mass.inner(x, y) / square
        rest = factor * x - y
        return factor if factor > 0 and self._mass.inner(rest, rest) <= _SAME**2 * factor**2 * square else None


def _count(layout: ControlLayout) -> np.ndarray:
    """Number of unknowns of all ranks, ``(1,)`` (collective)."""
    split = layout.static_size
    static, moving = (layout.spacetime.sum_over_space(np.array([float(n)])) for n in (split, layout.size - split))
    return static + layout.spacetime.sum_over_time(moving)


def _pairing(layout: ControlLayout, duals: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    """Values ``(a, b)`` of dual vectors ``(a, n)`` at vectors ``(b, n)``, identical on all ranks (collective)."""
    split, spacetime = layout.static_size, layout.spacetime
    parts = np.array([duals[:, s] @ vectors[:, s].T for s in (slice(split), slice(split, None))])
    parts = spacetime.sum_over_space(parts) if parts.size else parts
    total = parts[0] + (spacetime.sum_over_time(parts[1]) if layout.evolution.per_step else 0.0)
    return spacetime.from_group(0, total, total.shape)


def made_for(given: Any) -> LowRankPreconditioner | None:
    """The preconditioner that an argument of a minimiser stands for; ``None`` where it is another one."""
    if isinstance(given, str) and given == "low-rank":
        return LowRankPreconditioner()
    return given if isinstance(given, LowRankPreconditioner) else None

r"""Derivatives of a step: linearity, Taylor remainders of the tangent, dot products of the adjoint."""

from __future__ import annotations

import math

import numpy as np

from pint_fem.mgrit.checks.calls import LevelCalls
from pint_fem.mgrit.checks.report import Found, Runner, ratio

__all__ = ["check_adjoint", "check_tangent"]

TAYLOR_ORDER = 1.8
"""Least order of Taylor remainders: 2 but for what is left of higher terms."""
TAYLOR_STEPS = 0.1 * 4.0 ** -np.arange(7)


def _linear(level: LevelCalls, method: str, d: np.ndarray) -> Found:
    """``2 d_0 - 3 d_1`` through a derivative, against its parts."""
    worst = 0.0
    for steps in _ends(level):
        k, u = len(steps), level.u[: len(steps)]
        a, b = d[:k], d[::-1][:k]
        A, B, both = (level.apply(method, steps, u, x) for x in (a, b, 2 * a - 3 * b))
        gap = level.space.norms(both - (2 * A - 3 * B)).max()
        size = 2 * level.space.norms(A).max() + 3 * level.space.norms(B).max()
        worst = max(worst, ratio(gap, size))
    return Found(worst)


def _ends(level: LevelCalls) -> list[range]:
    """Steps at which derivatives are taken: two at the beginning and the last."""
    return [range(min(2, level.nsteps)), range(level.nsteps - 1, level.nsteps)]


def check_tangent(run: Runner, level: LevelCalls, *, after: bool) -> bool:
    """Linearity and Taylor test; whether it is the derivative."""
    ok = run(
        level.where,
        "tangent is linear in du",
        lambda: _linear(level, "tangent", level.directions),
        at_most=level.rtol,
        after=after,
    )
    return run(level.where, "tangent, Taylor remainder: order", lambda: _taylor(level), at_least=TAYLOR_ORDER, after=ok)


def _taylor(level: LevelCalls) -> Found:
    """Order at the smallest ``h`` whose remainder is above round-off, the least of some steps; infinite if affine."""
    least, note = math.inf, "affine: no remainder"
    for steps in _ends(level):
        k, norms = len(steps), level.space.norms
        u, d = level.u[:k], level.directions[:k]
        base, slope = level.phi(steps, u), level.apply("tangent", steps, u, d)
        R = np.array([norms(level.phi(steps, u + h * d) - base - h * slope) for h in TAYLOR_STEPS])
        # far enough above round-off that the next remainder, of order 2, is above it as well
        floor = 100 * level.rtol * np.array([norms(base) + h * norms(slope) for h in TAYLOR_STEPS])
        for r, f in zip(R.T, floor.T, strict=True):
            pairs = int(np.argmin(np.append(r[:-1] > f[:-1], False)))
            if not pairs:
                continue
            with np.errstate(divide="ignore"):
                orders = np.log(r[:pairs] / r[1 : pairs + 1]) / math.log(4)
            if orders[-1] < least:
                least = float(orders[-1])
                note = f"orders {' '.join(f'{o:.2f}' for o in orders)}, first remainder {r[0]:.1e}"
    return Found(least, note)


def check_adjoint(run: Runner, level: LevelCalls, *, tangent: bool, after: bool) -> bool:
    """Linearity and dot-product test, against the tangent where that is right, else against differences of steps."""
    ok = run(
        level.where,
        "adjoint is linear in lam",
        lambda: _linear(level, "adjoint", level.adjoints),
        at_most=level.rtol,
        after=after,
    )
    name, limit = ("tangent", level.rtol) if tangent else ("differences of steps", math.sqrt(level.rtol))
    return run(
        level.where, f"adjoint against {name}", lambda: _dot_product(level, tangent=tangent), at_most=limit, after=ok
    )


def _dot_product(level: LevelCalls, *, tangent: bool) -> Found:
    """``<T d, lam> - <d, A lam>`` over the norms."""
    worst, space = 0.0, level.space
    for steps in _ends(level):
        k = len(steps)
        u, d, lam = level.u[:k], level.directions[:k], level.adjoints[:k]
        if tangent:
            Td = level.apply("tangent", steps, u, d)
        else:  # of order 4: exact for affine steps
            h = 0.1 * level.rtol**0.2
            at = lambda x, steps=steps, u=u, d=d, h=h: level.phi(steps, u + x * h * d)
            Td = (8 * (at(1) - at(-1)) - (at(2) - at(-2))) / (12 * h)
        Al = level.apply("adjoint", steps, u, lam)
        gap = np.abs(space.dots(Td, lam) - space.dots(d, Al))
        size = space.norms(Td) * space.norms(lam) + space.norms(d) * space.norms(Al)
        worst = max(worst, *map(ratio, gap, size))
    return Found(worst)

"""Iterations of :mod:`tests.benchmarks.optimal_control`: those for one KKT system, beside conjugate gradients."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from pint_fem.adjoint.minimisation.kkt.preconditioner import KKTPreconditioner
from pint_fem.all_at_once.stopping import DivergedError
from tests.benchmarks.optimal_control_problems import problem

__all__ = ["CELLS", "STEPS", "WEIGHTS", "Counted", "Setting", "counted", "iterations", "markdown", "settings"]

WEIGHTS = (1.0, 1e-1, 1e-2, 1e-4, 1e-6, 1e-8)
STEPS, CELLS = (64, 256, 1024), (8, 16, 32)
KINDS = {
    "heat": (("BackwardEuler", 1), ("BackwardEuler", 2), ("SDIRK2", 1), ("SDIRK2", 2)),
    "wave": (("ImplicitMidpoint", 1), ("ImplicitMidpoint", 2)),
    "cavity": (("ImplicitMidpoint", 1),),
}
"""Integrators and degrees of the elements of each problem."""
TARGETS = {"heat": 14, "wave": 35, "cavity": 35}
GTOL, MOST = 1e-8, 3000


class Setting(NamedTuple):
    """A problem without its weight.

    Attributes
    ----------
    name, integrator : str
    degree, cells, steps : int
    """

    name: str
    integrator: str
    degree: int
    cells: int
    steps: int


class Counted(NamedTuple):
    """Iterations for one weight.

    Attributes
    ----------
    ends : int
        Of GMRES for the ends of time in the first KKT system, to a relative residual of 1e-8.
    systems, total : int
        Number of KKT systems until the gradient is 1e-8 of the first one, and iterations for them.
    replaced : int or None
        Steps of conjugate gradients with the regularisation as preconditioner, where GMRES did not converge.
    plain : int or None
        Steps of conjugate gradients without a preconditioner; ``None`` where they would have taken too long.
    gradient : float
        Norm of the gradient in the end, relative to the first one.
    how : str
        How the frequencies' systems are solved.
    """

    ends: int
    systems: int
    total: int
    replaced: int | None
    plain: int | None
    gradient: float
    how: str

    def __str__(self) -> str:
        first = f"{self.ends}" if self.replaced is None else f"{self.replaced}*"
        if self.systems > 1:
            first += f" ({self.total} in {self.systems})"
        return f"{first} / {_plain(self.plain)}"


def _plain(steps: int | None) -> str:
    return "-" if steps is None else f">{MOST:,}" if steps > MOST else f"{steps:,}"


def settings(
    names: Sequence[str] = tuple(KINDS), cells: Sequence[int] = CELLS, steps: Sequence[int] = STEPS,
    integrators: Sequence[str] = (), degrees: Sequence[int] = (),
) -> Iterator[Setting]:  # fmt: skip
    """Settings of the table, all of them or those with given values."""
    for name in names:
        for integrator, degree in KINDS[name]:
            if integrator in (integrators or [integrator]) and degree in (degrees or [degree]):
                yield from (Setting(name, integrator, degree, m, N) for m in cells for N in steps)


def iterations(setting: Setting, weight: float, *, seconds: float = 30.0) -> Counted:
    """Count the iterations of one problem.

    Parameters
    ----------
    setting, weight
        The problem.
    seconds
        Most time for conjugate gradients without a preconditioner; 0 for none of them.
    """
    J = problem(weight=weight, **setting._asdict()).rf
    zero = np.zeros(J.layout.size)
    J.problem.value(zero)
    first = J.problem.derivative(zero)
    kkt = KKTPreconditioner(J)
    c, replaced, systems = -np.ascontiguousarray(J.layout.steps(first)), None, kkt.kkt
    try:
        solution = systems.solve(c=c)
        found, ends = J.layout.from_steps(solution.z), solution.iterations
    except DivergedError as error:
        kkt.handed_over, ends = str(error), systems.max_it
        result = _newton(J, kkt)
        found, replaced = result.x, _cg_steps(result)
    gradient, solves, total = _gradient(J, found) / _norm(J, first), systems.solves, systems.iterations
    if gradient > GTOL and replaced is None:
        found = _newton(J, kkt).x
        gradient = _gradient(J, found) / _norm(J, first)
        solves, total = systems.solves - 1, systems.iterations - ends
    kkt.release()
    return Counted(ends, solves, total, replaced, _conjugate_gradients(J, seconds), gradient, kkt.how)


def _newton(J, preconditioner: KKTPreconditioner):
    zero = J.function(np.zeros(J.layout.size))
    return J.minimize_trust_region(
        zero, preconditioner=preconditioner, gtol_rel=GTOL, cg_rtol=0.1 * GTOL, cg_max_it=MOST
    )


def _gradient(J, z: np.ndarray) -> float:
    J.problem.value(z)
    return _norm(J, J.problem.derivative(z))


def _norm(J, derivative: np.ndarray) -> float:
    g = J.inner.primal(derivative)
    return math.sqrt(J.inner.inner(g, g))


def _cg_steps(result) -> int:
    return sum(record.cg_iterations for record in result.history)


def _conjugate_gradients(J, seconds: float) -> int | None:
    """Steps without a preconditioner; one more than :data:`MOST` where these do not suffice."""
    if not seconds:
        return None
    zero = np.zeros(J.layout.size)
    direction = J.problem.derivative(zero)
    J.problem.hessian_action(zero, direction)
    start = time.perf_counter()
    J.problem.hessian_action(zero, direction)
    limit = min(MOST, int(seconds / (time.perf_counter() - start)))
    start = J.function(zero)
    result = J.minimize_trust_region(start, gtol_rel=GTOL, cg_rtol=0.5 * GTOL, cg_max_it=max(limit, 1), max_it=2)
    steps = _cg_steps(result)
    if steps <= limit:
        return steps
    return MOST + 1 if limit == MOST else None


def counted(
    setting: Setting, weights: Sequence[float], *, seconds: float, say: Callable[[str], object]
) -> list[Counted]:
    """The iterations for some weights, from the largest: where conjugate gradients take too long, so they do for all
    that follow.
    """
    out: list[Counted] = []
    for weight in weights:
        out.append(iterations(setting, weight, seconds=seconds))
        if out[-1].plain is None:
            seconds = 0.0
        say(f"{setting}, weight {weight:g}: {out[-1]}, gradient {out[-1].gradient:.0e}, {out[-1].how}")
    return out


def markdown(found: dict[Setting, list[Counted]], weights: Sequence[float]) -> str:
    """The table, with the largest number of iterations of each problem below."""
    head = ["problem", "integrator", "elements", "mesh", "steps", *(f"{weight:g}" for weight in weights)]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for s, row in found.items():
        elements = "N1curl x DG0" if s.name == "cavity" else f"P{s.degree}"
        cells = (s.name, s.integrator, elements, f"{s.cells} x {s.cells}", f"{s.steps:,}", *map(str, row))
        lines.append(f"| {' | '.join(cells)} |")
    for name in dict.fromkeys(s.name for s in found):
        rows = [c for s, row in found.items() if s.name == name for c in row]
        solved, handed = [c for c in rows if c.replaced is None], [c.replaced for c in rows if c.replaced is not None]
        text = f"{name}:"
        if solved:
            text += f" at most {max(c.ends for c in solved)} iterations for one KKT system (wanted: {TARGETS[name]})"
            text += f", at most {max(c.total for c in solved)} to a gradient of 1e-8"
        if handed:
            text += f"; handed over in {len(handed)} of {len(rows)} cases, with at most {max(handed)} steps*"
        lines += ["", f"{text}; gradients at most {max(c.gradient for c in rows):.0e} of the first."]
    return "\n".join(lines)

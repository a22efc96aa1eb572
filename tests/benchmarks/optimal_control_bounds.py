"""Bounds on the controls of :mod:`tests.benchmarks.optimal_control`: active-set steps, and conjugate gradients in them.

The number of steps is compared with that of the sequential primal-dual active-set method with dense algebra, on the
small problem of its tests; conjugate gradients with three preconditioners on a larger one.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
from firedrake import COMM_SELF

import pint_fem as pf
from tests.benchmarks.optimal_control_problems import problem
from tests.benchmarks.rows import Row, row
from tests.test_active_set import textbook
from tests.test_active_set_control import Dense, control_of_heat

__all__ = ["WEIGHTS", "bound_rows"]

WEIGHTS = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
DENSE_CELLS, DENSE_STEPS, DENSE_GTOL = 4, 16, 1e-8
GTOL, MOST_CG = 1e-6, 1000
BOUND, DENSE_BOUND = 0.5, 0.2
"""The bounds hold a control to this share of the greatest value that it has without them, on the larger mesh and in
dense algebra.
"""
PRECONDITIONERS = (None, "limited-memory")


def bound_rows(size, say: Callable[[str], object], weights=WEIGHTS) -> list[Row]:
    """Conjugate gradients without KKT systems over those with them; active-set steps are in the notes.

    Parameters
    ----------
    size
        ``(cells, steps)`` of the larger problem.
    say
        Prints a line on the progress.
    weights
        Of the control.
    """
    out = []
    for weight in weights:
        say(f"bounds, weight {weight:g}: {dense_steps(weight)}")
        out += _larger(*size, weight, say)
    return out


def dense_steps(weight: float, share: float = DENSE_BOUND) -> str:
    """Active-set steps of the method with KKT systems and of dense algebra, both with the same factor c of the
    multipliers in the first sets, which does not matter later; then the steps with the default factor.
    """
    dense = Dense(DENSE_CELLS, DENSE_STEPS, weight)
    bound = share * np.abs(np.linalg.solve(dense.H, dense.b)).max()
    zero, upper = 0 * dense.b, np.full(len(dense.b), bound)
    pose = lambda: control_of_heat(pf.SpaceTime("1x1", comm=COMM_SELF), n=DENSE_CELLS, steps=DENSE_STEPS, alpha=weight)
    options = {"bounds": (-bound, bound), "gtol_rel": DENSE_GTOL, "max_it": 100}
    results = [pose().minimize("kkt", prox_step=c, **options) for c in (1.0, None)]
    counts = [f"{result.iterations}{_globalised(result)}" for result in results]
    text = f"{counts[0]} active-set steps, by default {counts[1]}"
    try:
        x, systems = textbook(dense.H, dense.b, dense.w, -upper, upper, zero, zero, 1.0)
    except AssertionError:
        return f"{text}; dense primal-dual active sets cycle"
    apart = np.abs(results[0].x - x).max() / bound
    return f"{text}; dense primal-dual active sets: {systems}, minimisers differ by {apart:.0e}"


def _globalised(result) -> str:
    """How many steps were in a trust region, and whether the run has converged."""
    count = sum(record.globalised for record in result.history)
    text = f", {count} of them in a trust region" if count else ""
    return text if result.converged else f"{text} ({result.reason.value})"


def _larger(cells: int, steps: int, weight: float, say: Callable[[str], object]) -> list[Row]:
    """Steps and times on a larger mesh."""
    pose = lambda: problem("heat", cells=cells, degree=1, weight=weight, steps=steps, integrator="BackwardEuler").rf
    free = pose().minimize("kkt", gtol_rel=GTOL).x
    bound = BOUND * np.abs(free).max()
    options = {"bounds": (-bound, bound), "gtol_rel": GTOL}
    runs: dict[str, Callable] = {"KKT": lambda J: J.minimize("kkt", **options)}
    for preconditioner in PRECONDITIONERS:
        runs[preconditioner or "none"] = lambda J, p=preconditioner: J.minimize_active_set(
            preconditioner=p, cg_max_it=MOST_CG, **options
        )
    found = {}
    for name, run in runs.items():
        J = pose()
        start = time.perf_counter()
        result = run(J)
        found[name] = time.perf_counter() - start, result
        cg = sum(record.cg_iterations for record in result.history)
        say(f"  {name}: {result.iterations} active-set steps{_globalised(result)}, {cg} CG steps")
    ours, kkt = found.pop("KKT")
    out = []
    for name, (theirs, result) in found.items():
        counts = [sum(record.cg_iterations for record in r.history) for r in (kkt, result)]
        last = kkt.history[-1]
        note = f"CG steps {counts[0]} / {counts[1]}, active-set steps {kkt.iterations} / {result.iterations}, "
        note += f"{(last.at_lower + last.at_upper) / len(kkt.x):.0%} of the values at bounds, "
        note += f"J differs by {abs(kkt.value - result.value) / abs(kkt.value):.0e}"
        text = f"bounds, {cells} x {cells}, {steps} steps, weight {weight:g}: active sets, CG with {name} / KKT"
        out.append(row("q", text, ours, theirs, steps, None, False, note + _globalised(result)))
    return out

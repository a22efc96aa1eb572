"""MGRIT on Maxwell's equations from lossless to eddy currents: observed convergence beside theory's bound.

    python -m tests.benchmarks.maxwell_table [--small]

A cavity in vacuum with uniform conductivity, one unit of time, SDIRK2 on all levels, V-cycles with FCF-relaxation. The
solution is zero and the start random, so that iterates are errors; their norm is the energy's at the C-points. Two
levels: the bound of ``mgrit_estimate``. More: that of the V-cycle, over the same pairs of damping and frequency
(:mod:`tests.benchmarks.v_cycle`).
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from firedrake import COMM_SELF, Function, UnitSquareMesh, assemble
from rich.console import Console
from rich.table import Table

import pint_fem as pf
from pint_fem.evolution.tableaux import DIRK
from pint_fem.kernels.block_operator import BlockOperator
from pint_fem.sweeps.sweeps import Sweeps
from pint_fem.theory.block_modes import damped_wave
from pint_fem.theory.estimates import mgrit_estimate
from pint_fem.theory.spectrum import spectrum
from pint_fem.theory.stability import runge_kutta_matrix
from problems.maxwell import B, Medium, Region, Walls, perfect_conductor, residual, state_space
from tests.benchmarks.v_cycle import v_cycle_norm

__all__ = ["Case", "cases", "measure"]

SIGMAS = (0.0, 1.0, 10.0, 40.0, 100.0, 400.0, 2000.0)
STEPS = (64, 256, 1024)
CELLS = 4


@dataclass(frozen=True)
class Case:
    """A row.

    Attributes
    ----------
    sigma, steps, m, levels
        What is solved.
    observed : float
        Largest factor of a cycle.
    bound : float
        Theory's.
    warned : bool
        Whether a pair of levels has a verdict that warns.
    """

    sigma: float
    steps: int
    m: int
    levels: int
    observed: float
    bound: float
    warned: bool

    @property
    def holds(self) -> bool:
        """Observed is under the bound, and a case that does not contract has been warned of."""
        return self.observed <= self.bound * (1 + 1e-8) and (self.warned or self.observed < 1)


def evolution(sigma: float, steps: int) -> pf.Evolution:
    """The cavity."""
    mesh = UnitSquareMesh(CELLS, CELLS, comm=COMM_SELF)
    V, walls = state_space(mesh), Walls()
    u = Function(V)
    form = residual(u, Medium(mesh, (Region("all", sigma=sigma),)))
    return pf.Evolution(
        form, u, tableau=pf.SDIRK2(), dt=1 / steps, nsteps=steps, bcs=perfect_conductor(V, walls), eliminate=B
    )


def measure(ev: pf.Evolution, sigma: float, m: int, levels: int, *, cycles: int = 6, seed: int = 0) -> Case:
    """One row."""
    options = {"levels": levels, "coarsening": m, "relax": "FCF", "start": "guess"}
    verdicts, N = mgrit_estimate(ev, options), ev.nsteps
    sweeps = Sweeps(ev, pf.SpaceTime("1x1", comm=COMM_SELF), options=options)
    energy = BlockOperator(assemble(ev.linear_operators()[0], bcs=ev.bcs, mat_type="aij").petscmat)
    e = np.random.default_rng(seed).standard_normal((N + 1, ev.state_size))
    e[:, sweeps.propagators[0].bc_rows] = 0
    e[0] = 0
    norm = lambda: np.sqrt(np.vdot(e[::m], energy(e[::m])))
    sizes, U = [norm()], np.zeros_like(e)
    for _ in range(min(cycles, N // m // 2)):
        sweeps.tangent(None, U, None, e, cold=False, cycles=1)
        sizes.append(norm())
        if sizes[-1] < 1e-10 * sizes[0]:
            break
    observed = max(b / a for a, b in pairwise(sizes))
    bound = verdicts[0].factor if levels == 2 else _v_cycle(ev, m, levels)
    return Case(sigma, N, m, levels, observed, bound, not all(v.converges for v in verdicts))


def _v_cycle(ev: pf.Evolution, m: int, levels: int) -> float:
    """Bound of the V-cycle over the evolution's spectrum."""
    found, dirk = spectrum(ev), DIRK(ev.tableau)
    if found.kind == "wave":
        w = np.geomspace(1e-2 * found.high, found.high, 24) * ev.dt
        s = np.zeros_like(w)
    else:
        s, w = found.pairs(ev.dt, per_decade=8)
        s, w = s[w > 1e-3 * w.max()], w[w > 1e-3 * w.max()]
    pairs = damped_wave(s, w)
    propagators = [runge_kutta_matrix(dirk.A, dirk.b, -(m**level) * pairs) for level in range(levels)]
    parts = np.array_split(np.arange(len(s)), max(1, ev.nsteps * m ** (levels - 2) * len(s) // 1_000_000))
    return max(
        v_cycle_norm([p[part] for p in propagators], [m] * (levels - 1), ev.nsteps).max() for part in parts if len(part)
    )


def cases(sigmas=SIGMAS, steps=STEPS, coarsening=(2, 4, 8), levels=(2, 3, 4)):
    """All rows that have at least four steps on the coarsest level."""
    for sigma in sigmas:
        for N in steps:
            ev = evolution(sigma, N)
            for m in coarsening:
                for count in levels:
                    if N // m ** (count - 1) >= 4:
                        yield measure(ev, sigma, m, count)


def main():
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="a few rows")
    small = parser.parse_args().small
    given = dict(sigmas=(0.0, 40.0, 2000.0), steps=(64,), levels=(2, 3)) if small else {}
    table = Table(title="MGRIT on Maxwell: largest factor of a cycle / bound (w: the verdict warns)")
    for name in ("sigma", "N", "m", "levels", "observed", "bound", "", "holds"):
        table.add_column(name, justify="right")
    broken = 0
    for case in cases(**given):
        numbers = f"{case.sigma:g}", str(case.steps), str(case.m), str(case.levels)
        table.add_row(
            *numbers,
            f"{case.observed:.3g}",
            f"{case.bound:.3g}",
            "w" if case.warned else "",
            "yes" if case.holds else "NO",
        )
        broken += not case.holds
    Console(width=100).print(table)
    print("all under their bounds, all that do not contract warned of" if not broken else f"{broken} rows do not hold")
    raise SystemExit(bool(broken))


if __name__ == "__main__":
    main()

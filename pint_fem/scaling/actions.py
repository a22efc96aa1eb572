"""Actions that are timed for a calibration: kernels, the work around sweeps, whole solves, and the parts of ParaDiag.

Kernels are timed through the solver's own levels, as relaxation calls them: several steps in some intervals of a slab,
one group of intervals after another, with the right-hand side added.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import cycle
from typing import Any

import numpy as np
import scipy.fft
from firedrake.petsc import PETSc
from mpi4py import MPI

from pint_fem.adjoint.reduced_functional import TimeParallelReducedFunctional
from pint_fem.kernels.factor import Factor
from pint_fem.kernels.lanes.structures import WIDTHS
from pint_fem.paradiag.circulant import shifts
from pint_fem.paradiag.distribution import TimeTransposes
from pint_fem.paradiag.lane_kernels import groups
from pint_fem.paradiag.options import ParaDiagOptions
from pint_fem.paradiag.stage_shifts import shifted_factors
from pint_fem.paradiag.transforms import time_transform
from pint_fem.scaling.paradiag import FEW
from pint_fem.spacetime import SpaceTime
from pint_fem.sweeps.frequencies.systems import frequency_systems

__all__ = [
    "PARADIAG", "SMALL", "Action", "extra_actions", "factor_entries", "kernel_actions", "paradiag_actions",
    "solve_actions", "solver_in_space", "solver_parameters",
]  # fmt: skip

PARADIAG = {"time_solver": "paradiag", "alpha": 1e-4}
"""Options of ParaDiag for the measurement of its parts."""
SIZES = WIDTHS[np.dtype(np.float64)]
STRIDE = 8
SMALL = 128
"""Steps of the solves that kernels and overhead are timed with."""
MANY, FEW_FACTORS = 64, 24
"""Frequencies that ParaDiag's solves are timed with, several at once and one after the other."""

Action = tuple[Callable[[], object], float]
"""An action that is timed, and the number by which its seconds are divided."""


def solver_parameters(options: Mapping, **more: Any) -> dict:
    """The model's options as ``solver_parameters`` of a reduced functional; ``more`` are options of the solver, too."""
    options = {**options, **more}
    kind = options.pop("time_solver", "mgrit")
    return {"time_solver": kind, "paradiag" if kind == "paradiag" else "mgrit": options}


def _lanes_action(level, U: np.ndarray, G: np.ndarray, size: int) -> Action:
    """Successive steps in ``size`` intervals by ``level.advance``, each time on other rows of the slab."""
    span, steps = STRIDE * size, STRIDE - 1
    groups = cycle(range(0, len(G), span))

    def run():
        rows = slice(first := next(groups), first + span)
        inside = lambda a: a.reshape(size, STRIDE, -1)
        results = inside(U[rows.start + 1 : rows.stop + 1])[:, :steps]
        level.advance(0, STRIDE, U[rows][::STRIDE], results, inside(G[rows])[:, :steps])

    return run, steps


def _sweep_action(level, U: np.ndarray, G: np.ndarray) -> Action:
    """Steps of one state by ``level.sweep_steps``, each time on other rows of the slab."""
    steps = min(len(G), STRIDE * STRIDE)
    parts = cycle(range(0, len(G), steps))

    def run():
        rows = slice(first := next(parts), first + steps)
        level.sweep_steps(range(steps), U[rows.start : rows.stop + 1], G[rows])

    return run, steps


def kernel_actions(rf: TimeParallelReducedFunctional, sizes: Sequence[int] = SIZES) -> dict[tuple, Action]:
    """Kernels of the sweeps of a linear evolution's reduced functional, by kind, level and number of states per call;
    one level stands for all those with states of the same size.
    """
    sweeps, out, size = rf.problem.sweeps, {}, None
    rng, rows = np.random.default_rng(0), STRIDE * max(sizes)
    levels = zip(sweeps.solvers.tangent.levels, sweeps.solvers.adjoint.levels, sweeps.propagators, strict=True)
    for ahead, back, propagator in levels:
        if propagator.evolution.state_size == size:
            break
        size, index = propagator.evolution.state_size, ahead.index
        for kind, level in (("step", ahead), ("adjoint", back)):
            U, G = rng.standard_normal((rows + 1, size)), rng.standard_normal((rows, size))
            made = lambda n, *given: _sweep_action(*given) if n == 1 else _lanes_action(*given, n)
            out |= {(kind, index, n): made(n, level, U, G) for n in sizes}
    return out


def factor_entries(factor: Factor) -> float:
    """Entries of a factor on this rank below and on its diagonal, about where PETSc has it; 0 where there is none."""
    if factor.triangular is not None:
        return float(factor.triangular.left.entries)
    return factor.nbytes.get("factors", 0) / (12.0 if factor.symmetric else 24.0)


def solver_in_space(factor: Factor) -> tuple[str, dict[str, float]]:
    """The kind of a stage's solver on several space ranks, of :data:`pint_fem.scaling.space.SOLVERS`, after a solve,
    and its sizes: ``"iterations"``, ``"levels"`` of multigrid, ``"interface"`` unknowns of a parallel direct solver
    (collective over space).

    A factor that solves by other means than PETSc's describes itself by an attribute ``in_space`` of this form.
    """
    described = getattr(factor, "in_space", None)
    if described is not None:
        kind, sizes = described
        return kind, dict(sizes)
    if factor.triangular is not None:
        return "replicated", {}
    pc = factor.ksp.getPC()
    if pc.getType() == "redundant":
        return "replicated", {}
    if factor.ksp.getType() == "preonly":
        return "substructuring", {"interface": float(_coupled_unknowns(factor.matrix))}
    sizes = {"iterations": float(max(factor.ksp.getIterationNumber(), 1))}
    if pc.getType() in ("mg", "gamg", "ml", "hypre"):
        levels = {"levels": float(pc.getMGLevels())} if pc.getType() in ("mg", "gamg") else {}
        return "multigrid", sizes | levels
    return "subdomains", sizes


def _coupled_unknowns(matrix: PETSc.Mat) -> int:
    """Unknowns that are coupled to one of a rank before theirs, on all ranks: an interface (collective)."""
    first, last = matrix.getOwnershipRange()
    ptr, columns, _ = matrix.getValuesCSR()
    rows = np.repeat(np.arange(last - first), np.diff(ptr))
    return int(matrix.comm.tompi4py().allreduce(len(np.unique(rows[columns < first]))))


def extra_actions(rf: TimeParallelReducedFunctional) -> dict[str, Action]:
    """Work around the sweeps; ``"all steps"`` is for the cost of summing adjoints."""
    problem, sweeps = rf.problem, rf.problem.sweeps
    k, z = sweeps.slab.k, rf.array([c.control for c in rf.controls])
    U = np.random.default_rng(1).standard_normal((k + 1, sweeps.evolution.state_size))
    steps, fine, misfits = problem.layout.steps(z), sweeps.propagators[0], problem.misfits
    transpose = lambda count: lambda: fine.control_adjoint(sweeps.data(steps, U), U[1 : count + 1])
    out = {
        "misfit value": (lambda: [m.values(U) for m in misfits], k),
        "misfit gradient": (lambda: sum(m.gradient(U) for m in misfits), k),
        "forcing": (lambda: fine.forcing(sweeps.data(steps)), 1),
        "control gradient": (transpose(1), 1),
        "all steps": (transpose(k), 1),
        "optimiser": (lambda: rf.inner.primal(rf.inner.dual(z)), 1),
    }
    if problem.regularisation is not None:
        out["regularisation"] = (lambda: problem.regularisation.gradient(z), 1)
    slab = np.random.default_rng(1).standard_normal((64, sweeps.evolution.state_size))
    out["norm"] = (lambda: rf.spacetime.point_norms(slab), 64)
    return out


def solve_actions(
    rf: TimeParallelReducedFunctional, controls: np.ndarray, gradient: np.ndarray, **accuracy: float
) -> dict[str, Action]:
    """Cold state and adjoint sweeps of a functional for given controls and derivative of the misfit, to a given
    accuracy.
    """
    problem, sweeps = rf.problem, rf.problem.sweeps
    z = problem.layout.steps(controls)

    def state():
        problem.U[:] = sweeps.initial
        sweeps.state(z, problem.U, cold=True, **accuracy)

    def adjoint():
        problem.L[:] = 0
        sweeps.adjoint(z, problem.U, gradient, problem.L, cold=True, **accuracy)

    return {"state": (state, 1), "adjoint": (adjoint, 1)}


def paradiag_actions(pose: Callable, nsteps: int, small: int) -> tuple[dict[str, Action], dict[str, float]]:
    """Parts of ParaDiag on one process, and sizes, by the names in ``paradiag`` of
    :class:`~pint_fem.scaling.costs.Calibration`; ``pose`` and ``nsteps`` are those of a
    :class:`~pint_fem.scaling.calibrate.Case`, and frequencies are solved for ``small`` steps.
    """
    rf = pose(SpaceTime("1x1", comm=MPI.COMM_SELF), small, solver_parameters(PARADIAG))
    size, mu, rng = rf.evolution.state_size, shifts(small, PARADIAG["alpha"]), np.random.default_rng(2)
    systems = frequency_systems(rf.problem.sweeps.propagators[0], ParaDiagOptions(), {})
    # so many factors that they are read from memory, as in a solve
    some = range(min(MANY if systems.has_lanes else FEW_FACTORS, len(mu)))
    rows = rng.standard_normal((len(some), size)) + 1j * rng.standard_normal((len(some), size))
    solves = {"solve": systems.solve, "solve transposed": systems.solve_transposed}
    y = np.array([shifted_factors(systems.A, systems.b, complex(m))[1][0] for m in mu])
    transform = None
    if systems.has_lanes:
        transform, single = time_transform(nsteps, "d"), rows.astype(np.complex64)
        once = lambda rows, **given: (lambda: systems.solve_all(some, mu, rows, **given), len(some))
        actions = {"solve": once(rows), "solve transposed": once(rows, transposed=True), "single solve": once(single)}
        # factors in single precision, as those of solves to a tolerance are
        own, kernels = next(groups(some, "f"))
        actions["factor"] = (lambda: systems.systems[0].factor_lanes(kernels, y[list(own)]), len(own))
    else:
        once = lambda solve: lambda: [solve(k, complex(mu[k]), rows[k]) for k in some]
        actions = {name: (once(solve), len(some)) for name, solve in solves.items()}
        actions["factor"] = (lambda: systems.systems[0].factor(y[1]), 1)
    actions["single solve" if systems.has_lanes else "solve"][0]()
    nbytes = systems.bytes / systems.kept
    # of all unknowns of a rank at once, in memory, or of few, in the caches
    most, scale = max(min(size, 2**23 // nsteps), FEW + 1), np.ones(nsteps)
    for name, count in (("few ", FEW), ("", most)):
        columns = rng.standard_normal((nsteps, count))
        if transform is None:
            spectrum = scipy.fft.rfft(columns, axis=0)
            actions[f"{name}fft"] = (lambda columns=columns: scipy.fft.rfft(columns, axis=0), count)
            actions[f"{name}ifft"] = (lambda spectrum=spectrum: scipy.fft.irfft(spectrum, nsteps, axis=0), count)
        else:
            spectrum = np.empty((nsteps // 2 + 1, count), transform.complex)
            forward = partial(transform.forward, columns, spectrum, scale)
            forward()
            backward = partial(transform.backward, spectrum, columns.copy(), scale)
            actions[f"{name}fft"], actions[f"{name}ifft"] = (forward, count), (backward, count)
    maps = TimeTransposes(MPI.COMM_SELF, [0, small], len(mu), size)
    slab = rng.standard_normal((small, size))
    actions["pack"] = (lambda: maps.collect(maps.spread(slab, maps.rows), maps.rows), 4 * slab.nbytes)
    return actions, {"factor bytes": nbytes, "fft steps": nsteps, "fft columns": most}

"""``--grid``: a process grid as given, by the calibrations of this project, or by steps that are measured here."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from mpi4py import MPI

__all__ = ["GRID_HELP", "fastest_split", "measured_grid", "planned_grid"]

MOST_STEPS = 100_000
"""The model counts messages of each step: predictions beyond take longer than they save."""
MEASURED = Path(__file__).resolve().parents[1] / "tests" / "benchmarks" / "scaling" / "calibrations"
"""Calibrations of the project's problems beside the one that comes with the package."""
GRID_HELP = "auto: the fastest by steps that are measured in a few seconds; default:"


def measured_grid(
    grid: str | None, pose: Callable, *, solver: dict[str, Any], experiments: int = 1, by_map: bool = False
) -> tuple[str | None, str | None]:
    """The given grid; for ``auto`` that of the least predicted time of the functional and its gradient, by steps that
    are measured on the ranks of this run (collective).

    Parameters
    ----------
    grid
        Of the command line; ``None`` where it is not given.
    pose
        ``pose(spacetime)`` poses one experiment, see :func:`pint_fem.choose_grid`.
    solver
        ``solver_parameters`` of the sweeps.
    experiments
        Number of experiments.
    by_map
        Whether the inversion is by the map from controls to readings, whose sensors are divided among the ranks in time
        as experiments are among groups of ranks.

    Returns
    -------
    str or None, str or None
        The grid, and a line about the choice.
    """
    if grid != "auto":
        return grid, None
    from pint_fem.scaling.grid_choice import choose_grid

    if by_map:
        found = choose_grid(pose, experiments=MPI.COMM_WORLD.size, solver_parameters={"time_solver": "serial"})
        space, time, groups = found.shape
        chosen = f"{space}x{time * groups}"
        return chosen, f"grid auto: {chosen}, as the map divides its sensors among ranks in time; {found.why}"
    found = choose_grid(pose, experiments=experiments, solver_parameters=solver)
    return found.grid, found.why


def planned_grid(
    grid: str | None, problem: str, *, solver: dict[str, Any], steps: int, calibrated: bool
) -> tuple[str | None, str | None]:
    """The given grid; where none is given the fastest split of all ranks if there is a calibration of the problem.

    Parameters
    ----------
    grid, steps
        Of the command line.
    problem
        Name of the calibration.
    solver
        ``solver_parameters`` of the sweeps: ``time_solver`` and MGRIT's options with ``rtol``.
    calibrated
        Whether the mesh and the elements are those that were calibrated.

    Returns
    -------
    str or None, str or None
        The grid, and a line about it.
    """
    comm = MPI.COMM_WORLD
    if grid is not None or comm.size == 1 or not calibrated or not comm.size <= steps <= MOST_STEPS:
        return grid, None
    from pint_fem.sweeps.selection import mgrit_options  # on all ranks: it starts PETSc

    time_solver, given, found = solver["time_solver"], mgrit_options(solver["mgrit"]), None
    if comm.rank == 0:
        try:
            from pint_fem.scaling.costs import bundled
        except ImportError:  # no greenlet
            pass
        else:
            options = {"serial": {"levels": 1}, "paradiag": {"time_solver": "paradiag", "alpha": 1e-4}}
            calibration = problem if problem in bundled() else MEASURED / f"{problem}.json"
            if problem in bundled() or calibration.is_file():
                split = fastest_split(calibration, comm.size, options.get(time_solver, given), steps, given.rtol)
                found = "x".join(map(str, split))
    found = comm.bcast(found, root=0)
    if found is None:
        return None, None
    return found, f"grid: {found}, predicted to be the fastest (calibration {problem})"


def fastest_split(calibration, ranks: int, options: Any, steps: int, rtol: float) -> tuple[int, int]:
    """The fastest split of all ranks in space and time for given options of MGRIT or ParaDiag, by a gradient from cold
    in as many cycles as were counted for ``rtol``, or four; all ranks in time where there is no prediction.
    """
    from pint_fem.mgrit import MGRITOptions
    from pint_fem.scaling.costs import load
    from pint_fem.scaling.planner import cycles_of, predict, space_ranks

    try:
        c = load(calibration)
        cycles = None if isinstance(options, MGRITOptions) else cycles_of(c, options, rtol)
        splits = [(space, ranks // space) for space in space_ranks(c, ranks) if ranks // space <= steps]
        return min((predict(c, options, grid, cycles or (4, 4), nsteps=steps).seconds, grid) for grid in splits)[1]
    except ValueError:  # no such calibration, options that the solver itself refuses, too many ranks
        return 1, ranks

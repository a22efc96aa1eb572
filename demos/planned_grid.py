"""``--grid auto``: the process grid that the performance model predicts to be the fastest."""

from pathlib import Path

from mpi4py import MPI

MOST_STEPS = 100_000
"""The model counts messages of each step: predictions beyond take longer than they save."""
MEASURED = Path(__file__).resolve().parents[1] / "tests" / "benchmarks" / "scaling" / "calibrations"
"""Calibrations of the project's problems beside the one that comes with the package."""


def planned_grid(grid, problem, *, solver, steps, calibrated):
    """The given grid; for ``auto`` the fastest split of all ranks where there is a calibration of the problem.

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
    str, str or None
        The grid, and a line about it.
    """
    comm = MPI.COMM_WORLD
    if grid != "auto" or comm.size == 1 or not calibrated or not comm.size <= steps <= MOST_STEPS:
        return grid, None
    from pint_fem.sweeps.selection import mgrit_options  # on all ranks: it starts PETSc

    time_solver, given, found = solver["time_solver"], mgrit_options(solver["mgrit"]), grid
    if comm.rank == 0:
        try:
            from pint_fem.scaling.costs import bundled
            from pint_fem.scaling.planner import auto_grid
        except ImportError:  # no greenlet
            pass
        else:
            options = {"serial": {"levels": 1}, "paradiag": {"time_solver": "paradiag", "alpha": 1e-4}}
            calibration = problem if problem in bundled() else MEASURED / f"{problem}.json"
            if problem in bundled() or calibration.is_file():
                split = auto_grid(calibration, comm.size, options.get(time_solver, given), steps, given.rtol)
                found = "x".join(map(str, split))
    found = comm.bcast(found, root=0)
    if found == grid:
        return grid, None
    return found, f"grid auto: {found}, predicted to be the fastest (calibration {problem})"

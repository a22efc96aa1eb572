"""``--grid auto``: the process grid that the performance model predicts to be the fastest."""

from mpi4py import MPI


def planned_grid(grid, problem, *, time_solver, steps, rtol, known):
    """The grid asked for; for ``auto`` the fastest split of all ranks where there is a calibration of the problem.

    Parameters
    ----------
    grid, time_solver, steps, rtol
        Of the command line.
    problem
        Name of the calibration.
    known
        Whether the mesh and the elements are those that were calibrated.

    Returns
    -------
    str, str or None
        The grid, and a line about it.
    """
    comm = MPI.COMM_WORLD
    if grid != "auto" or comm.size == 1 or not known or steps < comm.size:
        return grid, None
    from pint_fem.adjoint.time_solver import mgrit_options  # on all ranks: it starts PETSc

    given, found = mgrit_options(None), grid
    if comm.rank == 0:
        try:
            from pint_fem.scaling.costs import bundled
            from pint_fem.scaling.planner import auto_grid
        except ImportError:  # no greenlet
            pass
        else:
            options = {"serial": {"levels": 1}, "paradiag": {"time_solver": "paradiag", "alpha": 1e-4}}
            if problem in bundled():
                found = "x".join(
                    map(str, auto_grid(problem, comm.size, options.get(time_solver, given), steps, rtol))
                )
    found = comm.bcast(found, root=0)
    if found == grid:
        return grid, None
    return found, f"grid auto: {found}, predicted to be the fastest (calibration {problem})"

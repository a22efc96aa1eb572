"""Cycles of solves, counted in real runs: they depend on the problem and the options, not on machine or time ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from mpi4py import MPI

from pint_fem.errors import SolverFailure
from pint_fem.spacetime import SpaceTime

__all__ = ["count_cycles", "solver_parameters"]

PARADIAG_STEPS = 512
"""Most steps for ParaDiag's iterations, whose number does not depend on the steps."""


def solver_parameters(options: Mapping, **more) -> dict:
    """The model's options as ``solver_parameters`` of a reduced functional; ``more`` are options of the solver, too."""
    options = {**options, **more}
    kind = options.pop("time_solver", "mgrit")
    return {"time_solver": kind, "paradiag" if kind == "paradiag" else "mgrit": options}


def count_cycles(pose: Callable, steps: int, menu: Sequence[Mapping], tolerances: Sequence[float]) -> list[dict]:
    """Count the cycles of cold state and adjoint solves in real runs on this process.

    Each configuration is solved once, to the smallest tolerance; its residuals determine the cycles for the others.
    Configurations that do not converge are left out.

    Parameters
    ----------
    pose
        ``(spacetime, steps, solver_parameters)`` to the reduced functional.
    steps
        Time steps; at most :data:`PARADIAG_STEPS` are used for ParaDiag.
    menu
        Options of MGRIT and ParaDiag, as the model's.
    tolerances
        Relative tolerances.

    Returns
    -------
    list of dict
        ``cycles`` of :class:`~pint_fem.scaling.costs.Calibration`.
    """
    out = []
    for options in menu:
        count = min(steps, PARADIAG_STEPS) if "time_solver" in options else steps
        rf = pose(SpaceTime("1x1", comm=MPI.COMM_SELF), count, solver_parameters(options, rtol=min(tolerances)))
        problem = rf.problem
        problem.invalidate()
        try:
            problem.derivative(rf.array([c.control for c in rf.controls]) + 1.0)
        except SolverFailure:
            continue
        evaluation = problem.evaluations[0]
        for rtol in tolerances:
            met = lambda result, rtol=rtol: next(i for i, r in enumerate(result.residuals) if r <= rtol * result.scale)
            entry = {"state": met(evaluation.state), "adjoint": met(evaluation.adjoint)}
            out.append({"options": dict(options), "rtol": rtol, **entry})
    return out

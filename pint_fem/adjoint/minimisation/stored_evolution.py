"""The part of a checkpoint that belongs to one evolution: the trajectories of its last controls, and checks of them."""

from __future__ import annotations

import math
from typing import Any

import h5py
import numpy as np
from firedrake.functionspaceimpl import WithGeometry

from pint_fem.adjoint.evaluation import Evaluation
from pint_fem.adjoint.minimisation.fingerprint import evolution_numbers
from pint_fem.adjoint.problem import ReducedProblem
from pint_fem.all_at_once.stopping import SolveResult
from pint_fem.array_file import Piece, Place, read_part
from pint_fem.errors import InputError, SolverFailure
from pint_fem.evolution.control_layout import ControlLayout
from pint_fem.kernels.arrays import own_size
from pint_fem.spacetime import SpaceTime
from pint_fem.sweeps.steps import error_at_f_points

__all__ = ["ControlVectors", "StoredEvolution"]

_SAME = 1e-7  # of values of one trajectory, as nonlinear stages are computed again to Newton's tolerance
_ROUND_OFF = 1e-13  # of the larger part
_NORM_RATIO = 10.0  # of residuals of one trajectory in the norms over C-points and over all points
_OTHER_NORM_RATIO = 1e3  # the same where the recorded norm is not that of coefficients


def place_of(spacetime: SpaceTime, space: WithGeometry, rows: tuple[slice, int] | None) -> Place:
    """The place of functions of a space in the file, one per row of ``rows``, own rows and their total number."""
    first, _ = space.dof_dset.layout_vec.getOwnershipRange()
    own, size = slice(first, first + own_size(space)), space.dof_dset.layout_vec.getSize()
    column = (spacetime.space_comm.rank, spacetime.space_size)
    return Place((size,), (own,), column) if rows is None else Place((rows[1], size), (rows[0], own), column)


class ControlVectors:
    """Vectors of controls in the file, by control.

    Parameters
    ----------
    layout
        The controls.
    """

    def __init__(self, layout: ControlLayout):
        self.layout, slab, controls = layout, layout.slab, layout.evolution
        rows = (slice(slab.lo, slab.hi), controls.nsteps)
        self.places = [
            place_of(layout.spacetime, c.function_space(), rows if c in controls.stepwise else None)
            for c in controls.controls
        ]

    def pieces(self, name: str, vector: np.ndarray) -> list[Piece]:
        """The pieces of a vector; the first rank in time of the first group of experiments writes those of static
        controls, and this group those of the others.
        """
        spacetime = self.layout.spacetime
        leads = spacetime.experiments_comm.rank == 0
        first = leads and spacetime.time_comm.rank == 0
        return [
            Piece(f"{name}/{i}", place, part if first or (leads and part.ndim == 2) else None)
            for i, (part, place) in enumerate(zip(self.layout.parts(vector), self.places, strict=True))
        ]

    def read(self, file: h5py.File, name: str) -> np.ndarray:
        """This rank's part of a vector of the file."""
        return self.layout.join([read_part(file, f"{name}/{i}", place) for i, place in enumerate(self.places)])


class StoredEvolution:
    """The trajectories of one evolution in the file.

    Parameters
    ----------
    problem
        That of the evolution.
    name
        The name of its group in the file.
    """

    def __init__(self, problem: ReducedProblem, name: str):
        self.problem, self.name = problem, name
        self._controls = ControlVectors(problem.layout)
        self._states = place_of(problem.spacetime, problem.evolution.V, problem.sweeps.stored)

    def numbers(self) -> dict:
        """The numbers of the evolution that have to be the same in a run that continues (collective over space)."""
        ev = self.problem.evolution
        given = {"states": list(self._states.shape), "dt": ev.dt, "t0": ev.t0}
        return given | evolution_numbers(self.problem.sweeps.evolution, self.problem.spacetime.space_comm)

    def reassess(self) -> None:
        """Compute the values of all evaluations anew: a gradient may have solved for the state once more."""
        for evaluation in self.problem.evaluations:
            if evaluation.state is not None:
                self.problem.reassess(evaluation)

    def described(self) -> list[dict]:
        """The results of the evaluations' solves, for JSON."""
        return [_described(evaluation) for evaluation in self.problem.evaluations]

    # -- writing and reading -------------------------------------------------------------------------------------------
    def pieces(self) -> list[Piece]:
        """The pieces of all evaluations: the controls and the trajectories."""
        (rows, columns), out = self._states.where, []
        skip = 0 if self.problem.sweeps.slab.is_first else 1  # row 0 is the left neighbour's last
        own = self._states._replace(where=(slice(rows.start + skip, rows.stop), columns))
        for i, evaluation in enumerate(self.problem.evaluations):
            name = f"{self.name}/{i}"
            out += [] if evaluation.z is None else self._controls.pieces(f"{name}/z", evaluation.z)
            out += [Piece(f"{name}/U", own, evaluation.U[skip:]), Piece(f"{name}/L", own, evaluation.L[skip:])]
        return out

    def restore(self, file: h5py.File, described: list[dict]) -> None:
        """Read the trajectories into the evaluations of the problem."""
        for i, (evaluation, given) in enumerate(zip(self.problem.evaluations, described, strict=False)):
            evaluation.move_to(self._controls.read(file, f"{self.name}/{i}/z") if given["solved"] else None)
            evaluation.U[:], evaluation.L[:] = (
                read_part(file, f"{self.name}/{i}/{part}", self._states) for part in ("U", "L")
            )
            evaluation.cold = given["cold"]
            evaluation.rtol = {kind: np.inf if rtol is None else rtol for kind, rtol in given["rtol"].items()}
            evaluation.state, evaluation.adjoint = (_result(given[kind]) for kind in ("state", "adjoint"))

    # -- checks --------------------------------------------------------------------------------------------------------
    def check_trajectories(self, file: str) -> None:
        """Check that the states solve this run's steps to the residual that they had: otherwise the evolution is
        another (collective over the evolution's grid).
        """
        sweeps = self.problem.sweeps
        usual = sweeps.options.time_norm == 2 and sweeps.solvers.norm == "l2" and not sweeps.solvers.accelerated
        for evaluation in self.problem.evaluations:
            result = evaluation.state
            if evaluation.z is None or result is None or (result.reason == "its" and not result.residuals):
                continue
            residual, size = self.problem.state_residual(evaluation)
            had = result.residuals[-1] if result.residuals else 0.0
            limit = max((_NORM_RATIO if usual else _OTHER_NORM_RATIO) * had, _SAME * size)
            limit = max(limit, _NORM_RATIO * error_at_f_points(sweeps.options, sweeps.propagators[0]) * size)
            if not residual <= limit:
                raise InputError(
                    f"{file} is of another evolution: the state in it has a residual of {residual:.3e} "
                    f"in this run's steps, at most {limit:.3e} was expected; give another file or remove it"
                )

    def check_values(self, file: str, described: list[dict]) -> None:
        """Check that misfit and regularisation of the trajectories have their old values: otherwise the problem is
        another (collective over the evolution's grid).
        """
        other = []
        for evaluation, given in zip(self.problem.evaluations, described, strict=False):
            stored = given.get("parts") or {}  # another version may not have them
            finite = {name: value for name, value in stored.items() if math.isfinite(value)}
            if not finite:
                continue
            try:
                now = self.problem.reassess(evaluation)
            except SolverFailure as error:
                other.append(str(error))
                break
            small = _ROUND_OFF * max(map(abs, finite.values()))
            for name, value in finite.items():
                if not abs(now[name] - value) <= max(_SAME * abs(value), small):
                    other.append(f"{name}: the file has {value}, this run {now[name]}")
        if other:
            raise InputError(
                f"{file} is of another evolution, misfit, data or regularisation: {'; '.join(other)}; "
                "give another file or remove it"
            )


def _described(evaluation: Evaluation) -> dict[str, Any]:
    """The results of an evaluation's solves, for JSON."""

    def result(r: SolveResult | None) -> list | None:
        if r is None:
            return None
        residual = r.residuals[-1] if r.residuals else None
        return [r.converged, r.reason, residual, r.cycles, None if np.isnan(r.scale) else r.scale]

    results = {"state": result(evaluation.state), "adjoint": result(evaluation.adjoint)}
    rtol = {kind: float(value) if np.isfinite(value) else None for kind, value in evaluation.rtol.items()}
    return {
        "solved": evaluation.z is not None,
        "cold": evaluation.cold,
        "rtol": rtol,
        "parts": evaluation.parts,
        **results,
    }


def _result(given: list | None) -> SolveResult | None:
    """The result of a solve from its numbers in the file."""
    if given is None:
        return None
    converged, reason, residual, cycles, scale = given
    residuals = [] if residual is None else [residual]
    return SolveResult(converged, reason, residuals, cycles, np.nan if scale is None else scale)

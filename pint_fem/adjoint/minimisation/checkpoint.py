"""Checkpoints of minimisations: one HDF5 file, written by all ranks, replaced as a whole.

Each rank writes its own part; nothing is gathered. The file contains the state of the minimiser, its vectors by
control, and the trajectories from which the next solves start, so that an interrupted run continues on any number of
time ranks and the same number of space ranks: with bitwise identical results for a quadratic ``J`` on as many time
ranks as before, otherwise to round-off and the solvers' tolerance. Sums over time have other round-off on another
number of ranks. Where the evolution is nonlinear, the stage values from which Newton's method starts and the factors of
earlier linearisations are not stored, as they are several times as large as the trajectory. It is written under another
name, forced to disk and then renamed: whenever the process is killed or the disk is full, the last complete file is
there. Each row of each array has a checksum (:mod:`~pint_fem.array_file`), and one run at a
time writes a file.

A run continues from a file only with the evolution, method, inner product, bounds and constraints that it was written
with (:mod:`~pint_fem.adjoint.minimisation.fingerprint`), and with misfits and a regularisation whose values on the
trajectories in it are those that were written. The state in it has to solve the steps of this run, to the residual that
it had, which is evaluated anew in one pass over the steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import h5py
import numpy as np
from firedrake.functionspaceimpl import WithGeometry

from pint_fem import files
from pint_fem.adjoint.evaluation import Evaluation
from pint_fem.adjoint.minimisation.fingerprint import (
    bound_numbers,
    constraint_numbers,
    control_label,
    evolution_numbers,
    inner_number,
)
from pint_fem.adjoint.minimisation.objective import Objective
from pint_fem.adjoint.problem import ReducedProblem
from pint_fem.all_at_once.stopping import SolveResult
from pint_fem.array_file import Piece, Place, read_head, read_part, write_file
from pint_fem.collective import collectively, on_first_rank
from pint_fem.digests import differences
from pint_fem.errors import InputError, SolverFailure
from pint_fem.kernels.arrays import own_size
from pint_fem.logs import logger
from pint_fem.optimize.constraints import AffineConstraints
from pint_fem.sweeps.steps import error_at_f_points

__all__ = ["HDF5Checkpoint", "open_checkpoint"]

_VERSION = 2  # 1: the head an attribute, no checksums, only the sizes of the evolution
_SAME = 1e-7  # of values of one trajectory, as nonlinear stages are computed again to Newton's tolerance
_ROUND_OFF = 1e-13  # of the larger part
_NORM_RATIO = 10.0  # of residuals of one trajectory in the norms over C-points and over all points
_OTHER_NORM_RATIO = 1e3  # the same where the recorded norm is not that of coefficients


@contextmanager
def open_checkpoint(
    given: object,
    objective: Objective,
    if_save_fails: str,
    *,
    method: str,
    sides: Mapping[str, np.ndarray | float] | None = None,
    constrained: AffineConstraints | None = None,
    constraints: Sequence | None = None,
) -> Iterator[object]:
    """A checkpoint in a file of that name, locked for this run; any other checkpoint as it is (collective).

    Parameters
    ----------
    given : str, pathlib.Path, Checkpoint or None
        The file or the checkpoint.
    objective : Objective
        The objective.
    if_save_fails : {"stop", "continue"}
        As for :class:`HDF5Checkpoint`.
    method, sides, constrained, constraints
        The method, its bounds by name, the objective under constraints and these: a run continues only with the same.

    Raises
    ------
    InputError
        On every rank, if the functional is not that of one evolution, or the file cannot be written.
    """
    if not isinstance(given, (str, Path)):
        yield given
        return
    if not isinstance(objective.problem, ReducedProblem):
        raise InputError(
            "checkpoint: a file keeps the run of one evolution's functional: leave it out for a sum, a multiple and "
            "where the initial condition is an expression of controls"
        )
    layout, run = objective.problem.layout, {"method": method, "bounds": None, "constraints": None}
    if sides is not None:
        run["bounds"] = {name: bound_numbers(layout, side) for name, side in sides.items()}
    if constraints:
        run["constraints"] = constraint_numbers(layout, constrained, [float(value) for _, value in constraints])
    file = HDF5Checkpoint(given, objective, run, if_save_fails=if_save_fails)
    file.reserve()
    try:
        yield file
    finally:
        file.release()


class HDF5Checkpoint:
    """A :class:`pint_fem.optimize.Checkpoint` in an HDF5 file.

    Parameters
    ----------
    path : str or pathlib.Path
        The file; its folder has to exist.
    objective : Objective
        The objective, whose controls, trajectories and error estimates are stored.
    run : dict, optional
        The method, bounds and constraints, for JSON, which have to be the same in a run that continues.
    if_save_fails : {"stop", "continue"}
        Where the file cannot be written, as on a full disk, ``"stop"`` raises, and ``"continue"`` prints a line and
        leaves the last complete file.

    Raises
    ------
    InputError
        On every rank: no such folder, or the name is that of a folder, a symbolic link, a FIFO or a device; in
        ``load``, a file that cannot be read, is damaged or of another problem or run; in ``save``, a file that cannot
        be written (the last one is left as it is).
    """

    def __init__(
        self,
        path: str | Path,
        objective: Objective,
        run: dict | None = None,
        *,
        if_save_fails: str = "stop",
    ):
        if if_save_fails not in ("stop", "continue"):
            raise InputError(f"if_save_fails = {if_save_fails!r}: give 'stop' or 'continue'")
        self.path, self.objective, self._problem = Path(path), objective, objective.problem
        self._continues = if_save_fails == "continue"
        self._layout, self._spacetime = self._problem.layout, self._problem.spacetime
        self._comm = self._spacetime.comm
        self._lock: files.FileLock | None = None
        on_first_rank(self._comm, "", self._check_path)
        slab, ev = self._layout.slab, self._problem.evolution
        rows = (slice(slab.lo, slab.hi), ev.nsteps)
        self._controls = [self._place(c.function_space(), rows if c in ev.stepwise else None) for c in ev.controls]
        self._states = self._place(ev.V, self._problem.sweeps.stored)
        self._fingerprint = self._describe() | (run or {})

    def _place(self, space: WithGeometry, rows: tuple[slice, int] | None) -> Place:
        """The place of functions of a space in the file, one per row of ``rows``, own rows and their total number."""
        first, _ = space.dof_dset.layout_vec.getOwnershipRange()
        own, size = slice(first, first + own_size(space)), space.dof_dset.layout_vec.getSize()
        column = (self._spacetime.space_comm.rank, self._spacetime.space_size)
        return Place((size,), (own,), column) if rows is None else Place((rows[1], size), (rows[0], own), column)

    def _check_path(self) -> bool:
        """Whether the file exists."""
        if not self.path.parent.is_dir():
            raise InputError(f"checkpoint {self.path}: there is no such folder {self.path.parent}")
        return files.require_regular(self.path, "checkpoint")

    def _describe(self) -> dict:
        """The numbers of the problem that have to be the same in a run that continues."""
        ev = self._problem.evolution
        placed = zip(ev.controls, self._controls, strict=True)
        return {
            "space ranks": self._spacetime.space_size,
            "controls": [control_label(c.name(), place.shape) for c, place in placed],
            "states": list(self._states.shape),
            "dt": ev.dt,
            "t0": ev.t0,
            "inner product": inner_number(self._layout, self.objective),
            **evolution_numbers(self._problem.sweeps.evolution, self._spacetime.space_comm),
        }

    # -- one run at a time ---------------------------------------------------------------------------------------------
    def reserve(self) -> None:
        """Lock the file, and check that it can be written, before a run (collective).

        Raises
        ------
        InputError
            On every rank, if another run has locked it, or the folder cannot be written to.
        """
        self._lock = self._lock or files.FileLock(self.path, "checkpoint")
        on_first_rank(self._comm, "", self._lock.acquire)

    def release(self) -> None:
        """Unlock the file."""
        if self._lock is not None:
            self._lock.release()

    # -- writing -------------------------------------------------------------------------------------------------------
    def save(self, scalars: dict, vectors: dict[str, np.ndarray]) -> None:
        """Write a state; the last file is replaced when this one is complete and on disk."""
        for evaluation in self._problem.evaluations:
            if evaluation.state is not None:
                self._problem.reassess(evaluation)  # a gradient may have solved for the state once more
        try:
            self._save(scalars, vectors)
        except InputError as error:
            if not self._continues:
                raise
            if self._comm.rank == 0:
                logger.warning("%s; the run continues, and the last complete file remains", error)

    def _save(self, scalars: dict, vectors: dict[str, np.ndarray]) -> None:
        """Write a new file beside the last one, and replace that."""
        self.reserve()
        pieces = [piece for name, vector in vectors.items() for piece in self._vector(f"vectors/{name}", vector)]
        for i, evaluation in enumerate(self._problem.evaluations):
            pieces += self._evaluation_pieces(f"points/{i}", evaluation)
        head = {
            "version": _VERSION,
            "problem": self._fingerprint,
            "scalars": scalars,
            "vectors": list(vectors),
            "objective": getattr(self.objective, "state", dict)(),
            "points": [_described(evaluation) for evaluation in self._problem.evaluations],
        }
        write_file(self._comm, self.path, "checkpoint", head, pieces)

    def _vector(self, name: str, vector: np.ndarray) -> list[Piece]:
        """The pieces of a vector by control; the first rank in time writes those of static controls."""
        first = self._spacetime.time_comm.rank == 0
        return [
            Piece(f"{name}/{i}", place, part if part.ndim == 2 or first else None)
            for i, (part, place) in enumerate(zip(self._layout.parts(vector), self._controls, strict=True))
        ]

    def _evaluation_pieces(self, name: str, evaluation: Evaluation) -> list[Piece]:
        """The pieces of an evaluation: the controls and the trajectories."""
        rows, columns = self._states.where
        skip = 0 if self._layout.slab.is_first else 1  # row 0 is the left neighbour's last
        own = self._states._replace(where=(slice(rows.start + skip, rows.stop), columns))
        controls = [] if evaluation.z is None else self._vector(f"{name}/z", evaluation.z)
        return [*controls, Piece(f"{name}/U", own, evaluation.U[skip:]), Piece(f"{name}/L", own, evaluation.L[skip:])]

    # -- reading -------------------------------------------------------------------------------------------------------
    def load(self) -> tuple[dict, dict[str, np.ndarray]] | None:
        """The last state, ``None`` if there is no file; the problem's trajectories and error estimates are set."""
        if not on_first_rank(self._comm, "", self._check_path):
            return None
        head = collectively(self._comm, "", self._reading, lambda file: self._refuse_others(read_head(file)))
        try:
            vectors = collectively(self._comm, "", self._reading, lambda file: self._restore(file, head))
            self._check_trajectories()
            self._check_values(head["points"])
        except Exception:
            self._problem.invalidate()  # nothing of a file that is refused is a first guess
            raise
        if hasattr(self.objective, "restore"):
            self.objective.restore(head["objective"])
        return head["scalars"], vectors

    def _reading(self, work: Callable):
        """The result of ``work(file)`` on this rank, without communication; a damaged file is refused."""
        advice = "give another file, or remove it to start anew"
        with files.refuse_unreadable(f"checkpoint {self.path}", advice), h5py.File(self.path, locking=False) as file:
            return work(file)

    def _check_trajectories(self) -> None:
        """Check that the states solve this run's steps to the residual that they had: otherwise the evolution is
        another.
        """
        sweeps = self._problem.sweeps
        usual = sweeps.options.time_norm == 2 and sweeps.solvers.norm == "l2" and not sweeps.solvers.accelerated
        for evaluation in self._problem.evaluations:
            result = evaluation.state
            if evaluation.z is None or result is None or (result.reason == "its" and not result.residuals):
                continue
            residual, size = self._problem.state_residual(evaluation)
            had = result.residuals[-1] if result.residuals else 0.0
            limit = max((_NORM_RATIO if usual else _OTHER_NORM_RATIO) * had, _SAME * size)
            limit = max(limit, _NORM_RATIO * error_at_f_points(sweeps.options, sweeps.propagators[0]) * size)
            if not residual <= limit:
                raise InputError(
                    f"checkpoint {self.path} is of another evolution: the state in it has a residual of {residual:.3e} "
                    f"in this run's steps, at most {limit:.3e} was expected; give another file or remove it"
                )

    def _check_values(self, described: list[dict]) -> None:
        """Check that misfit and regularisation of the trajectories have their old values: otherwise the problem is
        another.
        """
        other = []
        for evaluation, given in zip(self._problem.evaluations, described, strict=False):
            stored = given.get("parts") or {}  # another version may not have them
            finite = {name: value for name, value in stored.items() if math.isfinite(value)}
            if not finite:
                continue
            try:
                now = self._problem.reassess(evaluation)
            except SolverFailure as error:
                other.append(str(error))
                break
            small = _ROUND_OFF * max(map(abs, finite.values()))
            for name, value in finite.items():
                if not abs(now[name] - value) <= max(_SAME * abs(value), small):
                    other.append(f"{name}: the file has {value}, this run {now[name]}")
        if other:
            raise InputError(
                f"checkpoint {self.path} is of another evolution, misfit, data or regularisation: {'; '.join(other)}; "
                "give another file or remove it"
            )

    def _refuse_others(self, head: dict) -> dict:
        """The head; refused where this run cannot continue from the file."""
        stored = head["problem"]
        own = self._fingerprint if "version" in head else {k: v for k, v in self._fingerprint.items() if k in stored}
        other = differences(stored, own)
        if other:
            raise InputError(
                f"checkpoint {self.path} is of another problem or run: {other}; give another file or remove it"
            )
        stored, own = head["objective"], getattr(self.objective, "state", dict)()
        if bool(stored) != bool(own):
            has = "with" if stored else "without"
            raise InputError(
                f"checkpoint {self.path} holds a run {has} inexact=: continue it likewise, or give another file"
            )
        if set(stored) != set(own):
            raise InputError(
                f"checkpoint {self.path} is of another version: it has {sorted(stored)}, not {sorted(own)}; "
                "give another file or remove it"
            )
        return head

    def _get_vector(self, file, name: str) -> np.ndarray:
        """This rank's part of a vector of the file."""
        return self._layout.join([read_part(file, f"{name}/{i}", place) for i, place in enumerate(self._controls)])

    def _restore(self, file, head: dict) -> dict[str, np.ndarray]:
        """The vectors of the minimiser; the trajectories are read into the evaluations of the problem."""
        for i, (evaluation, given) in enumerate(zip(self._problem.evaluations, head["points"], strict=False)):
            z = self._get_vector(file, f"points/{i}/z") if given["solved"] else None
            evaluation.move_to(z)
            evaluation.U[:], evaluation.L[:] = (
                read_part(file, f"points/{i}/{name}", self._states) for name in ("U", "L")
            )
            evaluation.cold = given["cold"]
            evaluation.rtol = {kind: np.inf if rtol is None else rtol for kind, rtol in given["rtol"].items()}
            evaluation.state, evaluation.adjoint = (_result(given[kind]) for kind in ("state", "adjoint"))
        return {name: self._get_vector(file, f"vectors/{name}") for name in head["vectors"]}


def _described(evaluation: Evaluation) -> dict:
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

"""Checkpoints of optimisations: one HDF5 file, written by all ranks, replaced as a whole.

Each rank writes its own part; nothing is gathered. The file holds the optimiser's state, its vectors by control, and
the trajectories that the next solves start from, so that a run that was killed goes on, on any number of time ranks
and the same number of space ranks: with the same bits for a quadratic ``J`` on as many time ranks as before, and to
round-off and the solvers' tolerance else. Sums over time have other round-off on another number of ranks. Where the
evolution is nonlinear, the stage values that Newton starts from and the factors of earlier linearisations that it uses
are not kept, as they are several times the trajectory. It is written under another name, forced to disk and then
renamed: whenever the process is killed or the disk is full, the last complete file is there. Each row of each array has
a checksum (:mod:`~pint_fem.adjoint.minimisation.checkpoint_file`), and one run at a time writes a file.

A file goes on only with the evolution, method, inner product, bounds and constraints that it was written with
(:mod:`~pint_fem.adjoint.minimisation.fingerprint`), and with misfits and a regularisation whose values on the trajectories in it
are those that were written. The state in it has to solve the steps of this run, to the residual that it had: that is
evaluated anew, in one pass over the steps.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import h5py
import numpy as np

from pint_fem import files
from pint_fem.adjoint.evaluation import Point
from pint_fem.adjoint.minimisation.checkpoint_file import Piece, Place, create_file, read_head, read_part, write_parts
from pint_fem.adjoint.minimisation.fingerprint import control_label, differences, evolution_numbers, inner_number
from pint_fem.adjoint.minimisation.objective import Objective
from pint_fem.all_at_once.stopping import SolveResult
from pint_fem.collective import collectively, on_first_rank
from pint_fem.errors import InputError, SolverFailure
from pint_fem.kernels.arrays import own_size

__all__ = ["HDF5Checkpoint"]

_VERSION = 2  # 1: the head an attribute, no checksums, nothing of the evolution but its sizes
_SAME = 1e-7  # of values of one trajectory: stages of a nonlinear step are computed again, to Newton's tolerance
_NOTHING = 1e-13  # round-off of the larger part
_ABOVE = 10.0  # residuals of one trajectory in the norms over C-points and over all points
_ABOVE_IN_OTHER_NORMS = 1e3  # the same where the recorded norm is not that of coefficients


class HDF5Checkpoint:
    """What :class:`pint_fem.optimize.Checkpoint` asks for.

    Parameters
    ----------
    path
        The file; its folder has to exist.
    objective
        What is minimised: its controls, trajectories and error estimates are kept.
    run
        What else has to be the same in a run that goes on, for JSON: method, bounds, constraints.
    if_save_fails
        What a save does that fails, as on a full disk: ``"stop"`` raises, ``"continue"`` prints a line and leaves the
        last complete file.
    printer
        For that line.

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
        printer: Callable[[str], object] = print,
    ):
        if if_save_fails not in ("stop", "continue"):
            raise InputError(f"if_save_fails = {if_save_fails!r}: give 'stop' or 'continue'")
        self.path, self.objective, self._problem = Path(path), objective, objective.problem
        self._continues, self._printer = if_save_fails == "continue", printer
        self._layout, self._spacetime = self._problem.layout, self._problem.spacetime
        self._comm = self._spacetime.comm
        self._lock: files.FileLock | None = None
        on_first_rank(self._comm, "", self._check_path)
        slab, ev = self._layout.slab, self._problem.evolution
        rows = (slice(slab.lo, slab.hi), ev.nsteps)
        self._controls = [self._place(c.function_space(), rows if c in ev.stepwise else None) for c in ev.controls]
        self._states = self._place(ev.V, self._problem.sweeps.stored)
        self._fingerprint = self._describe() | (run or {})

    def _place(self, space, rows: tuple[slice, int] | None) -> Place:
        first, _ = space.dof_dset.layout_vec.getOwnershipRange()
        own, size = slice(first, first + own_size(space)), space.dof_dset.layout_vec.getSize()
        column = (self._spacetime.space_comm.rank, self._spacetime.space_size)
        return Place((size,), (own,), column) if rows is None else Place((rows[1], size), (rows[0], own), column)

    def _check_path(self) -> bool:
        """Whether the file is there."""
        if not self.path.parent.is_dir():
            raise InputError(f"checkpoint {self.path}: there is no such folder {self.path.parent}")
        return files.require_regular(self.path, "checkpoint")

    def _describe(self) -> dict:
        """What has to be the same in a run that goes on."""
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
        """Take the right to write the file, and find out whether it can be written, before a run (collective).

        Raises
        ------
        InputError
            On every rank, if another run has it, or the folder cannot be written to.
        """
        self._lock = self._lock or files.FileLock(self.path, "checkpoint")
        on_first_rank(self._comm, "", self._lock.acquire)

    def release(self) -> None:
        """Let other runs write the file."""
        if self._lock is not None:
            self._lock.release()

    # -- writing -------------------------------------------------------------------------------------------------------
    def save(self, scalars: dict, vectors: dict[str, np.ndarray]) -> None:
        """Write a state; the file of the last one is replaced when this one is complete and on disk."""
        for point in self._problem.points:
            if point.state is not None:
                self._problem.reassess(point)  # a gradient may have solved for the state once more
        try:
            self._save(scalars, vectors)
        except InputError as error:
            if not self._continues:
                raise
            if self._comm.rank == 0:
                self._printer(f"warning: {error}; the run goes on, and the last complete file stays")

    def _save(self, scalars: dict, vectors: dict[str, np.ndarray]) -> None:
        self.reserve()
        new = self.path.with_name(self.path.name + ".new")
        pieces = [piece for name, vector in vectors.items() for piece in self._vector(f"vectors/{name}", vector)]
        pieces += [piece for i, point in enumerate(self._problem.points) for piece in self._point(f"points/{i}", point)]
        head = {
            "version": _VERSION,
            "problem": self._fingerprint,
            "scalars": scalars,
            "vectors": list(vectors),
            "objective": getattr(self.objective, "memory", dict)(),
            "points": [_described(point) for point in self._problem.points],
        }
        try:
            offsets = on_first_rank(self._comm, "", self._guarded, create_file, new, head, pieces)
            collectively(self._comm, "", self._guarded, write_parts, new, offsets, pieces)
            on_first_rank(self._comm, "", self._guarded, files.replace, new, self.path)
        except InputError:  # on all ranks: none of them is about to open it any more
            if self._comm.rank == 0:
                with suppress(OSError):
                    os.unlink(new)  # on a full disk it would be in the way
            raise

    def _guarded(self, work: Callable, *args):
        """``work(*args)``; where the file cannot be written the message names it."""
        errors = (OSError, RuntimeError)  # HDF5 raises either
        with files.as_input_error(f"checkpoint {self.path} cannot be written", errors=errors):
            return work(*args)

    def _vector(self, name: str, vector: np.ndarray) -> list[Piece]:
        """The controls of a vector, static ones by the first rank in time."""
        first = self._spacetime.time_comm.rank == 0
        return [
            Piece(f"{name}/{i}", place, part if part.ndim == 2 or first else None)
            for i, (part, place) in enumerate(zip(self._layout.parts(vector), self._controls, strict=True))
        ]

    def _point(self, name: str, point: Point) -> list[Piece]:
        """A control and its trajectories."""
        rows, columns = self._states.where
        skip = 0 if self._layout.slab.is_first else 1  # row 0 is the left neighbour's last
        own = self._states._replace(where=(slice(rows.start + skip, rows.stop), columns))
        controls = [] if point.z is None else self._vector(f"{name}/z", point.z)
        return [*controls, Piece(f"{name}/U", own, point.U[skip:]), Piece(f"{name}/L", own, point.L[skip:])]

    # -- reading -------------------------------------------------------------------------------------------------------
    def load(self) -> tuple[dict, dict[str, np.ndarray]] | None:
        """The last state, ``None`` if there is no file; the problem's trajectories and estimates are set."""
        if not on_first_rank(self._comm, "", self._check_path):
            return None
        head = collectively(self._comm, "", self._reading, lambda file: self._refuse_others(read_head(file)))
        try:
            vectors = collectively(self._comm, "", self._reading, lambda file: self._restore(file, head))
            self._check_trajectories()
            self._check_values(head["points"])
        except Exception:
            self._problem.forget()  # nothing of a file that is refused is a first guess
            raise
        if hasattr(self.objective, "recall"):
            self.objective.recall(head["objective"])
        return head["scalars"], vectors

    def _reading(self, work: Callable):
        """``work(file)`` on this rank, without communication; what is damaged is refused."""
        advice = "give another file, or remove it to start anew"
        with files.refuse_unreadable(f"checkpoint {self.path}", advice), h5py.File(self.path, locking=False) as file:
            return work(file)

    def _check_trajectories(self) -> None:
        """States solve this run's steps, to the residual that they had, unless the evolution is another one."""
        sweeps = self._problem.sweeps
        usual = sweeps.options.time_norm == 2 and sweeps.norm == "l2" and not sweeps.accelerated
        for point in self._problem.points:
            result = point.state
            if point.z is None or result is None or (result.reason == "its" and not result.residuals):
                continue
            residual, size = self._problem.state_residual(point)
            had = result.residuals[-1] if result.residuals else 0.0
            limit = max((_ABOVE if usual else _ABOVE_IN_OTHER_NORMS) * had, _SAME * size)
            if not residual <= limit:
                raise InputError(
                    f"checkpoint {self.path} is of another evolution: the state in it has a residual of {residual:.3e} "
                    f"in this run's steps, at most {limit:.3e} was expected; give another file or remove it"
                )

    def _check_values(self, described: list[dict]) -> None:
        """Misfit and regularisation of the trajectories are what they were, unless the problem is another one."""
        other = []
        for point, given in zip(self._problem.points, described, strict=False):
            kept = given.get("parts") or {}  # another version may not have them
            finite = {name: value for name, value in kept.items() if math.isfinite(value)}
            if not finite:
                continue
            try:
                now = self._problem.reassess(point)
            except SolverFailure as error:
                other.append(str(error))
                break
            small = _NOTHING * max(map(abs, finite.values()))
            for name, value in finite.items():
                if not abs(now[name] - value) <= max(_SAME * abs(value), small):
                    other.append(f"{name}: the file has {value}, this run {now[name]}")
        if other:
            raise InputError(
                f"checkpoint {self.path} is of another evolution, misfit, data or regularisation: {'; '.join(other)}; "
                "give another file or remove it"
            )

    def _refuse_others(self, head: dict) -> dict:
        """The head, unless this run cannot go on from the file."""
        kept = head["problem"]
        own = self._fingerprint if "version" in head else {k: v for k, v in self._fingerprint.items() if k in kept}
        other = differences(kept, own)
        if other:
            raise InputError(
                f"checkpoint {self.path} is of another problem or run: {other}; give another file or remove it"
            )
        kept, own = head["objective"], getattr(self.objective, "memory", dict)()
        if bool(kept) != bool(own):
            has = "with" if kept else "without"
            raise InputError(
                f"checkpoint {self.path} holds a run {has} inexact=: continue it likewise, or give another file"
            )
        if set(kept) != set(own):
            raise InputError(
                f"checkpoint {self.path} is of another version: it has {sorted(kept)}, not {sorted(own)}; "
                "give another file or remove it"
            )
        return head

    def _get_vector(self, file, name: str) -> np.ndarray:
        return self._layout.join([read_part(file, f"{name}/{i}", place) for i, place in enumerate(self._controls)])

    def _restore(self, file, head: dict) -> dict[str, np.ndarray]:
        """Vectors; trajectories go where they belong."""
        for i, (point, given) in enumerate(zip(self._problem.points, head["points"], strict=False)):
            z = self._get_vector(file, f"points/{i}/z") if given["solved"] else None
            point.move_to(z)
            point.U[:], point.L[:] = (read_part(file, f"points/{i}/{name}", self._states) for name in ("U", "L"))
            point.cold = given["cold"]
            point.rtol = {kind: np.inf if rtol is None else rtol for kind, rtol in given["rtol"].items()}
            point.state, point.adjoint = (_result(given[kind]) for kind in ("state", "adjoint"))
        return {name: self._get_vector(file, f"vectors/{name}") for name in head["vectors"]}


def _described(point: Point) -> dict:
    """What is known of a point's solves, for JSON."""

    def result(r: SolveResult | None) -> list | None:
        if r is None:
            return None
        residual = r.residuals[-1] if r.residuals else None
        return [r.converged, r.reason, residual, r.cycles, None if np.isnan(r.scale) else r.scale]

    results = {"state": result(point.state), "adjoint": result(point.adjoint)}
    rtol = {kind: float(value) if np.isfinite(value) else None for kind, value in point.rtol.items()}
    return {"solved": point.z is not None, "cold": point.cold, "rtol": rtol, "parts": point.parts, **results}


def _result(given: list | None) -> SolveResult | None:
    if given is None:
        return None
    converged, reason, residual, cycles, scale = given
    residuals = [] if residual is None else [residual]
    return SolveResult(converged, reason, residuals, cycles, np.nan if scale is None else scale)

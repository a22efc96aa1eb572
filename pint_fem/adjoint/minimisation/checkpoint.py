"""Checkpoints of minimisations: one HDF5 file, written by all ranks, replaced as a whole.

Each rank writes its own part; nothing is gathered. The file contains the state of the minimiser, its vectors by
control, and the trajectories of each evolution from which the next solves start, so that an interrupted run continues
on any number of time ranks and of groups of experiments, and the same number of space ranks: with bitwise identical
results for a quadratic ``J`` on the grid as before, otherwise to round-off and the solvers' tolerance. Sums over time
and over experiments have other round-off on another number of ranks. Where the evolution is nonlinear, the stage values
from which Newton's method starts and the factors of earlier linearisations are not stored, as they are several times as
large as the trajectory. It is written under another name, forced to disk and then renamed: whenever the process is
killed or the disk is full, the last complete file is there. Each row of each array has a checksum
(:mod:`~pint_fem.array_file`), and one run at a time writes a file.

A run continues from a file only with the evolution, method, inner product, bounds and constraints that it was written
with (:mod:`~pint_fem.adjoint.minimisation.fingerprint`), and with misfits and a regularisation whose values on the
trajectories in it are those that were written. The state in it has to solve the steps of this run, to the residual that
it had, which is evaluated anew in one pass over the steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from pint_fem import files
from pint_fem.adjoint.interface import ControlProblem, regularisation_value
from pint_fem.adjoint.minimisation.fingerprint import (
    bound_numbers,
    constraint_numbers,
    control_label,
    inner_number,
    probe,
)
from pint_fem.adjoint.minimisation.objective import Objective
from pint_fem.adjoint.minimisation.stored_evolution import ControlVectors, StoredEvolution
from pint_fem.adjoint.problem import ReducedProblem
from pint_fem.array_file import Piece, Place, read_head, write_file
from pint_fem.collective import collectively, on_first_rank
from pint_fem.digests import differences
from pint_fem.errors import InputError
from pint_fem.logs import logger
from pint_fem.optimize.constraints import AffineConstraints

__all__ = ["HDF5Checkpoint", "open_checkpoint"]

_VERSION = 2  # 1: the head an attribute, no checksums, only the sizes of the evolution


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
        On every rank, if the file cannot be written.
    """
    if not isinstance(given, (str, Path)):
        yield given
        return
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
        self._spacetime, self._controls = self._problem.spacetime, ControlVectors(self._problem.layout)
        self._comm = self._spacetime.comm
        self._lock: files.FileLock | None = None
        on_first_rank(self._comm, "", self._check_path)
        self._single = isinstance(self._problem, ReducedProblem)
        self._own = _stored(self._problem)
        self._fingerprint = self._describe() | (run or {})

    def _check_path(self) -> bool:
        """Whether the file exists."""
        if not self.path.parent.is_dir():
            raise InputError(f"checkpoint {self.path}: there is no such folder {self.path.parent}")
        return files.require_regular(self.path, "checkpoint")

    def _describe(self) -> dict:
        """The numbers of the problem that have to be the same in a run that continues."""
        controls, layout = self._problem.evolution.controls, self._problem.layout
        out = {
            "space ranks": self._spacetime.space_size,
            "controls": [
                control_label(c.name(), place.shape) for c, place in zip(controls, self._controls.places, strict=True)
            ],
            "inner product": inner_number(layout, self.objective),
        }
        of_each = self._of_all(lambda stored: stored.numbers())
        if self._single:
            return out | of_each["0"]
        at = regularisation_value(self._problem, probe(layout))
        weights = [list(w) for w in self._problem.leaf_weights()]
        return out | {"experiments": of_each, "weights": weights, "regularisation at a fixed control": at}

    def _of_all(self, numbers: Callable[[StoredEvolution], Any]) -> dict[str, Any]:
        """What a function returns for each evolution, those of all groups of experiments (collective)."""
        own = collectively(self._comm, "", lambda: {name: numbers(stored) for name, stored in self._own.items()})
        groups = self._spacetime.experiments_comm.allgather(own)
        found = {name: value for group in groups for name, value in group.items()}
        return {name: found[name] for name in sorted(found, key=int)}

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
        described = self._of_all(_reassessed)
        try:
            self._save(scalars, vectors, described)
        except InputError as error:
            if not self._continues:
                raise
            if self._comm.rank == 0:
                logger.warning("%s; the run continues, and the last complete file remains", error)

    def _save(self, scalars: dict, vectors: dict[str, np.ndarray], described: dict[str, list[dict]]) -> None:
        """Write a new file beside the last one, and replace that."""
        self.reserve()
        pieces = [
            piece for name, vector in vectors.items() for piece in self._controls.pieces(f"vectors/{name}", vector)
        ]
        pieces += [piece for stored in self._own.values() for piece in stored.pieces()]
        head = {
            "version": _VERSION,
            "problem": self._fingerprint,
            "scalars": scalars,
            "vectors": list(vectors),
            "objective": getattr(self.objective, "state", dict)(),
            "points": described["0"] if self._single else described,
        }
        write_file(self._comm, self.path, "checkpoint", head, pieces + self._of_other_groups(pieces))

    def _of_other_groups(self, pieces: Sequence[Piece]) -> list[Piece]:
        """Pieces of other groups of experiments, which the first rank reserves space for (collective)."""
        own = {piece.name for piece in pieces}
        groups = self._spacetime.experiments_comm.allgather([(p.name, p.place.shape, p.place.column) for p in pieces])
        others = {name: (shape, column) for group in groups for name, shape, column in group if name not in own}
        empty = slice(0, 0)
        return [
            Piece(name, Place(shape, (empty,) * len(shape), column), None) for name, (shape, column) in others.items()
        ]

    # -- reading -------------------------------------------------------------------------------------------------------
    def load(self) -> tuple[dict, dict[str, np.ndarray]] | None:
        """The last state, ``None`` if there is no file; the problem's trajectories and error estimates are set."""
        if not on_first_rank(self._comm, "", self._check_path):
            return None
        head = collectively(self._comm, "", self._reading, lambda file: self._refuse_others(read_head(file)))
        try:
            vectors = collectively(self._comm, "", self._reading, lambda file: self._restore(file, head))
            collectively(self._comm, "", self._check, self._points(head))
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

    def _points(self, head: dict) -> dict[str, list[dict]]:
        """The descriptions of the evaluations of each evolution in the file."""
        return {"0": head["points"]} if self._single else head["points"]

    def _check(self, points: dict[str, list[dict]]) -> None:
        """Check that the trajectories are those of this run's problem (collective over the own group)."""
        for name, stored in self._own.items():
            stored.check_trajectories(f"checkpoint {self.path}")
            stored.check_values(f"checkpoint {self.path}", points[name])

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

    def _restore(self, file: h5py.File, head: dict) -> dict[str, np.ndarray]:
        """The vectors of the minimiser; the trajectories are read into the evaluations of the problem."""
        points = self._points(head)
        for name, stored in self._own.items():
            stored.restore(file, points[name])
        return {name: self._controls.read(file, f"vectors/{name}") for name in head["vectors"]}


def _stored(problem: ControlProblem) -> dict[str, StoredEvolution]:
    """The evolutions of the own group by their numbers among all, each once."""
    if isinstance(problem, ReducedProblem):
        return {"0": StoredEvolution(problem, "points")}
    found: dict[ReducedProblem, int] = {}
    for number, leaf in zip(problem.leaf_numbers(), problem.leaves, strict=True):
        found.setdefault(leaf, number)
    return {str(number): StoredEvolution(leaf, f"experiments/{number}/points") for leaf, number in found.items()}


def _reassessed(stored: StoredEvolution) -> list[dict]:
    """The results of the evaluations of an evolution, with values of their present states."""
    stored.reassess()
    return stored.described()

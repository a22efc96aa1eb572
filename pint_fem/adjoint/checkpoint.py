"""Checkpoints of optimisations: one HDF5 file, written by all ranks together, replaced as a whole.

Each rank writes its own part; nothing is gathered. The file holds the optimiser's state, its vectors by control, and
the trajectories that the next solves start from, so that a run that was killed goes on, on any number of time ranks
and the same number of space ranks: with the same bits for a quadratic ``J`` on as many time ranks as before, and to
round-off and the solvers' tolerance else. Sums over time have other round-off on another number of ranks. Where the
evolution is nonlinear, the stage values that Newton starts from and the factors of earlier linearisations that it uses
are not kept, as they are several times the trajectory. It is written under another name, forced to disk and then
renamed: whenever the process is killed, the last complete file is there.

A file goes on only with the method, inner product, bounds and constraints that it was written with
(:mod:`~pint_fem.adjoint.fingerprint`), and with misfits and a regularisation whose values on the trajectories in it
are those that were written. Coefficients of the evolution are not compared, but where only C-points are stored the
misfits see them.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import h5py
import numpy as np

from pint_fem.adjoint.fingerprint import control_label, differences, inner_number
from pint_fem.adjoint.objective import Objective
from pint_fem.adjoint.problem import Point
from pint_fem.errors import InputError
from pint_fem.mgrit import SolveResult, SolverFailure
from pint_fem.propagators.arrays import own_size

__all__ = ["HDF5Checkpoint"]

_SAME = 1e-7  # of values of one trajectory: stages of a nonlinear step are computed again, to Newton's tolerance
_NOTHING = 1e-13  # round-off of the larger part


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

    Raises
    ------
    InputError
        On every rank: no such folder; in ``load``, a file that cannot be read or is of another problem or run; in
        ``save``, a file that cannot be written (the last one is left as it is).
    """

    def __init__(self, path: str | Path, objective: Objective, run: dict | None = None):
        self.path, self.objective, self._problem = Path(path), objective, objective.problem
        self._layout, self._spacetime = self._problem.layout, self._problem.spacetime
        self._comm = self._spacetime.comm
        self._agree(None if self.path.parent.is_dir() else f"checkpoint {self.path}: there is no such folder")
        slab, ev = self._layout.slab, self._problem.evolution
        rows = (slice(slab.lo, slab.hi), ev.nsteps)
        self._controls = [self._place(c.function_space(), rows if c in ev.stepwise else None) for c in ev.controls]
        self._states = self._place(ev.V, self._problem.sweeps.stored)
        self._fingerprint = self._describe() | (run or {})

    @staticmethod
    def _place(space, rows: tuple[slice, int] | None) -> tuple[tuple[int, ...], tuple[slice, ...]]:
        """Shape of an array of all ranks and what this rank has of it."""
        first, _ = space.dof_dset.layout_vec.getOwnershipRange()
        own, size = slice(first, first + own_size(space)), space.dof_dset.layout_vec.getSize()
        return ((size,), (own,)) if rows is None else ((rows[1], size), (rows[0], own))

    def _agree(self, problem: str | None) -> None:
        """Raise on every rank what one of them has to say."""
        problem = next((p for p in self._comm.allgather(problem) if p), None)
        if problem:
            raise InputError(problem)

    def _describe(self) -> dict:
        """What has to be the same in a run that goes on."""
        ev = self._problem.evolution
        placed = zip(ev.controls, self._controls, strict=True)
        return {
            "space ranks": self._spacetime.space_size,
            "controls": [control_label(c.name(), shape) for c, (shape, _) in placed],
            "states": list(self._states[0]),
            "dt": ev.dt,
            "t0": ev.t0,
            "inner product": inner_number(self._layout, self.objective),
        }

    # -- writing -------------------------------------------------------------------------------------------------------
    def save(self, scalars: dict, vectors: dict[str, np.ndarray]) -> None:
        """Write a state; the file of the last one is replaced when this one is complete and on disk."""
        new, problem = self.path.with_name(self.path.name + ".new"), None
        for point in self._problem.points:
            if point.state is not None:
                self._problem.reassess(point)  # a gradient may have solved for the state once more
        try:
            with h5py.File(new, "w", driver="mpio", comm=self._comm) as file:
                self._write(file, scalars, vectors)
        except Exception as error:
            problem = f"checkpoint {new} cannot be written: {error}"
        self._agree(problem)
        if self._comm.rank == 0:
            try:
                _to_disk(new)
                os.replace(new, self.path)
                _to_disk(self.path.parent)
            except OSError as error:
                problem = f"checkpoint {self.path} cannot be written: {error}"
        self._agree(problem)

    def _write(self, file, scalars: dict, vectors: dict[str, np.ndarray]) -> None:
        memory = getattr(self.objective, "memory", dict)()
        points = [_described(point) for point in self._problem.points]
        head = {"problem": self._fingerprint, "scalars": scalars, "vectors": list(vectors)}
        file.attrs["head"] = np.void(json.dumps(head | {"objective": memory, "points": points}).encode())
        for name, vector in vectors.items():
            self._put_vector(file, f"vectors/{name}", vector)
        for i, point in enumerate(self._problem.points):
            if point.z is not None:
                self._put_vector(file, f"points/{i}/z", point.z)
            own = slice(0 if self._layout.slab.is_first else 1, None)  # row 0 is the left neighbour's last
            shape, (rows, columns) = self._states
            for name, slab in (("U", point.U), ("L", point.L)):
                data = file.create_dataset(f"points/{i}/{name}", shape, "f8")
                data[rows.start + own.start : rows.stop, columns] = slab[own]

    def _put_vector(self, file, name: str, vector: np.ndarray) -> None:
        """Write the controls of a vector, static ones by the first rank in time."""
        for i, (part, (shape, where)) in enumerate(zip(self._layout.parts(vector), self._controls, strict=True)):
            data = file.create_dataset(f"{name}/{i}", shape, "f8")
            if part.ndim == 2 or self._spacetime.time_comm.rank == 0:
                data[where] = part

    # -- reading -------------------------------------------------------------------------------------------------------
    def load(self) -> tuple[dict, dict[str, np.ndarray]] | None:
        """The last state, ``None`` if there is no file; the problem's trajectories and estimates are set."""
        if not self._comm.bcast(self.path.exists() if self._comm.rank == 0 else None, root=0):
            return None
        problem, found = None, None
        try:
            with h5py.File(self.path, "r") as file:
                head = json.loads(bytes(file.attrs["head"]))
                problem = self._refusal(head)
                if problem is None:
                    vectors = {name: self._get_vector(file, f"vectors/{name}") for name in head["vectors"]}
                    self._restore_points(file, head["points"])
                    found = head["scalars"], vectors
        except Exception as error:
            problem = (
                f"checkpoint {self.path} cannot be read ({type(error).__name__}: {error}); remove it to start anew"
            )
        self._agree(problem)
        self._check_values(head["points"])
        if hasattr(self.objective, "recall"):
            self.objective.recall(head["objective"])
        return found

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
            self._problem.forget()
            raise InputError(
                f"checkpoint {self.path} is of another evolution, misfit, data or regularisation: {'; '.join(other)}; "
                "give another file or remove it"
            )

    def _refusal(self, head: dict) -> str | None:
        """Why this run cannot go on from a file, if so."""
        other = differences(head["problem"], self._fingerprint)
        if other:
            return f"checkpoint {self.path} is of another problem or run: {other}; give another file or remove it"
        kept, own = head["objective"], getattr(self.objective, "memory", dict)()
        if bool(kept) != bool(own):
            has = "with" if kept else "without"
            return f"checkpoint {self.path} holds a run {has} inexact=: continue it likewise, or give another file"
        if set(kept) != set(own):
            return f"checkpoint {self.path} is of another version: it has {sorted(kept)}, not {sorted(own)}; remove it"
        return None

    def _get_vector(self, file, name: str) -> np.ndarray:
        return self._layout.join([file[f"{name}/{i}"][where] for i, (_, where) in enumerate(self._controls)])

    def _restore_points(self, file, described: list[dict]) -> None:
        for i, (point, given) in enumerate(zip(self._problem.points, described, strict=False)):
            z = self._get_vector(file, f"points/{i}/z") if given["solved"] else None
            point.move_to(z)
            point.U[:], point.L[:] = (file[f"points/{i}/{name}"][self._states[1]] for name in ("U", "L"))
            point.cold = given["cold"]
            point.rtol = {kind: np.inf if rtol is None else rtol for kind, rtol in given["rtol"].items()}
            point.state, point.adjoint = (_result(given[kind]) for kind in ("state", "adjoint"))


def _to_disk(path: Path) -> None:
    """Force a file or a folder to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


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

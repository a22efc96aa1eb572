"""Detection of changes in the user's data after a functional has read them, and reading them again."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
from mpi4py import MPI
from pyadjoint.tape import stop_annotating

from pint_fem.adjoint.consistency.problem_data import require_same_given, require_same_values
from pint_fem.adjoint.regularisation import Regularisation
from pint_fem.collective import collectively, raise_collectively
from pint_fem.errors import FAILURES, InputError
from pint_fem.misfits.base import Misfit
from pint_fem.sweeps.sweeps import Sweeps

__all__ = ["UserData"]


class UserData:
    """The user's data that a functional has read.

    Masks of data have entries for, in this order, functions and constants in forms and the initial condition, boundary
    conditions, data of misfits outside forms such as readings, and the coordinates of the mesh.

    The constructor raises ``InputError`` on every rank if data differ between ranks.

    Parameters
    ----------
    sweeps, misfits, regularisation
        The parts of the functional that contain data.

    Attributes
    ----------
    failure : BaseException or None
        The error on this rank in the last comparison.
    updates : int
        How often functions or constants have been read again with other values, the same on all ranks.
    """

    def __init__(self, sweeps: Sweeps, misfits: Sequence[Misfit], regularisation: Regularisation | None):
        self._sweeps, self._misfits, self._regularisation = sweeps, misfits, regularisation
        self._copies, self._comm = sweeps.evolution.copies, sweeps.spacetime.comm
        self._coordinates = sweeps.evolution.V.mesh().unique().coordinates
        self._places = self._coordinates.dat.data_ro.copy()
        self.failure: BaseException | None = None
        self.updates = 0
        require_same_values(sweeps.spacetime, self._copies)
        self._warned: np.ndarray | None = None  # sized at the first evaluation: later parts may add data

    def changed(self) -> np.ndarray:
        """Return the mask of data that have other values on this rank than when they were read; an error is stored as
        :attr:`failure`.
        """
        self.failure, own = None, np.ones(len(self._misfits), dtype=bool)
        try:
            own[:] = [m.has_changed() for m in self._misfits]
        except FAILURES as error:  # raised on all ranks by the check of the control
            self.failure = error
        moved = not np.array_equal(self._coordinates.dat.data_ro, self._places)
        return np.concatenate([self._copies.changed(), own, [moved]]).astype(bool)

    def _labels(self, which: np.ndarray) -> list[str]:
        names = [*self._copies.labels, *(f"what is given to {type(m).__name__}" for m in self._misfits)]
        names.append("the coordinates of the mesh")
        return [name for name, chosen in zip(names, which, strict=True) if chosen]

    def warn(self, changed: np.ndarray) -> None:
        """Warn of each change once, on the first rank of each group of experiments, given the mask of data that have
        changed on any of its ranks.

        A moved mesh is an ``InputError``: assembled operators would be those of the old mesh, and forms not.
        """
        self._refuse_moved(changed)
        before = np.zeros_like(changed) if self._warned is None else self._warned
        new, self._warned = changed & ~before, changed | before
        if new.any() and self._comm.rank == 0:
            warnings.warn(
                f"changed after the functional was made: {', '.join(self._labels(new))}. The values read then are "
                "used; update_data() of the functional reads them again",
                stacklevel=6,
            )

    @staticmethod
    def _refuse_moved(changed: np.ndarray) -> None:
        if changed[-1]:
            raise InputError("the coordinates of the mesh changed after the functional was made: make a new functional")

    def update(self) -> list[str]:
        """Read all data again, update the parts, and return the names of data with new values (collective).

        Data that differ between ranks are an ``InputError`` on every rank, before anything is read.
        """
        which = self.changed()
        raise_collectively(self._comm, self.failure, "data given anew")
        self._comm.Allreduce(MPI.IN_PLACE, which, op=MPI.LOR)
        self._refuse_moved(which)
        require_same_given(self._sweeps.spacetime, self._misfits)
        require_same_values(self._sweeps.spacetime, self._copies)
        with stop_annotating():
            changed = collectively(self._comm, "reading data again", self._read, which[:-1])
            self._sweeps.update_data(changed)
        self.updates += bool(changed)
        self._warned = None
        return self._labels(which)

    def _read(self, which: np.ndarray) -> set:
        """Update misfits and regularisation, and return the copies of functions and constants with new values."""
        misfits = which[len(which) - len(self._misfits) :]
        changed = self._copies.update(which[: len(which) - len(self._misfits)])
        for misfit, own in zip(self._misfits, misfits, strict=True):
            misfit.update_data(changed, own=bool(own))
        if self._regularisation is not None:
            self._regularisation.update_data(changed)
        return changed

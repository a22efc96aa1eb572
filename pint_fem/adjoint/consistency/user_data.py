"""A user's data as a functional has read them: what has changed since, and reading it again."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
from mpi4py import MPI
from pyadjoint.tape import stop_annotating

from pint_fem.adjoint.consistency.same_problem import require_same_given, require_same_values
from pint_fem.adjoint.regularisation import Regularisation
from pint_fem.collective import collectively, raise_collectively
from pint_fem.errors import FAILURES, InputError
from pint_fem.misfits.base import Misfit
from pint_fem.sweeps.sweeps import Sweeps

__all__ = ["Data"]


class Data:
    """The data of all parts of a functional, in this order: functions and constants in forms and the initial condition,
    boundary conditions, what misfits have beside forms, such as readings, and the coordinates of the mesh.

    Parameters
    ----------
    sweeps, misfits, regularisation
        The parts.
    """

    def __init__(self, sweeps: Sweeps, misfits: Sequence[Misfit], regularisation: Regularisation | None):
        self._sweeps, self._misfits, self._regularisation = sweeps, misfits, regularisation
        self._copies, self._comm = sweeps.evolution.copies, sweeps.spacetime.comm
        self._coordinates = sweeps.evolution.V.mesh().unique().coordinates
        self._places = self._coordinates.dat.data_ro.copy()
        #: What went wrong on this rank when data were last compared.
        self.failure: BaseException | None = None
        require_same_values(sweeps.spacetime, self._copies)
        #: Sized at the first evaluation: parts that are made after this one add data of their own.
        self._warned: np.ndarray | None = None

    def changed(self) -> np.ndarray:
        """Which data are others on this rank than those that were read; where that fails see :attr:`failure`."""
        self.failure, own = None, np.ones(len(self._misfits), dtype=bool)
        try:
            own[:] = [m.has_changed() for m in self._misfits]
        except FAILURES as error:  # raised by all ranks together, when they have heard of it
            self.failure = error
        moved = not np.array_equal(self._coordinates.dat.data_ro, self._places)
        return np.concatenate([self._copies.changed(), own, [moved]]).astype(bool)

    def _labels(self, which: np.ndarray) -> list[str]:
        names = [*self._copies.labels, *(f"what is given to {type(m).__name__}" for m in self._misfits)]
        names.append("the coordinates of the mesh")
        return [name for name, chosen in zip(names, which, strict=True) if chosen]

    def warn(self, changed: np.ndarray) -> None:
        """Warn of changes, once each, on the first rank; ``changed`` is the same on all ranks.

        Raises
        ------
        InputError
            On every rank, if the mesh has moved: forms see that, and what was assembled before does not.
        """
        self._refuse_moved(changed)
        before = np.zeros_like(changed) if self._warned is None else self._warned
        new, self._warned = changed & ~before, changed | before
        if new.any() and self._sweeps.spacetime.is_root:
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
        """Read all data again and let the parts know; what has changed (collective).

        Raises
        ------
        InputError
            On every rank, before anything is read, if ranks have other data than each other.
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
        self._warned = None
        return self._labels(which)

    def _read(self, which: np.ndarray) -> set:
        """Copies of functions and constants that have other values now; misfits and regularisation have taken them."""
        misfits = which[len(which) - len(self._misfits) :]
        changed = self._copies.update(which[: len(which) - len(self._misfits)])
        for misfit, own in zip(self._misfits, misfits, strict=True):
            misfit.update_data(changed, own=bool(own))
        if self._regularisation is not None:
            self._regularisation.update_data(changed)
        return changed

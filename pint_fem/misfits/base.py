r"""What a misfit is: a function of what it observes of each point of the trajectory.

A misfit is bound to a slab and written for blocks of points, so that no array with a state for each of them has to
exist. ``rows`` are numbers of local points: row 0 is the slab's first point, the left neighbour's last; a rank's own
points are rows ``1..k``.

* ``observe`` takes states to a few numbers a point, :math:`y_n`; ``point_values`` makes of those of all local points
  the share of each own point, summed over space, so that the sum over time is in point order;
* ``pull_back`` takes what was observed to :math:`s_n`, and ``force`` these and states to :math:`dJ/du_n`, in rows
  ``0..k-1`` (and ``k`` on the last rank), which is what the adjoint of the slab needs;
* each has its derivative in a direction.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import numpy as np

from pint_fem.collective import collectively
from pint_fem.errors import InputError
from pint_fem.evolution.evolution import Evolution
from pint_fem.kernels.blocks import WIDTH
from pint_fem.spacetime import Slab, SpaceTime

__all__ = ["BlockMisfit", "Misfit", "on_points", "on_slab"]

BLOCK = 8 * WIDTH
"""Points that are looked at together where all are stored."""


class Misfit(ABC):
    """On whole slabs: ``values`` and their derivative, ``gradient`` and its derivative."""

    #: Whether it is a quadratic function of the trajectory.
    quadratic = False
    #: Whether :meth:`bind` has been called: the misfit is a functional's.
    is_bound = False

    def bind(self, evolution: Evolution, spacetime: SpaceTime, slab: Slab) -> None:
        """Prepare for the points of a slab; called once, on every rank."""
        self.evolution, self.spacetime, self.slab, self.is_bound = evolution, spacetime, slab, True

    def given(self) -> dict:
        """What the user has given it, by name, which all ranks have to be given alike: data that are not in forms, and
        signatures of forms.
        """
        return {}

    def has_changed(self) -> bool:
        """Whether the user has changed data that are not in forms since they were read."""
        return False

    def update_data(self, changed: set, *, own: bool) -> None:
        """Take new values of data (collective).

        Parameters
        ----------
        changed
            Functions and constants of the evolution's private copies that have other values now.
        own
            Whether :meth:`has_changed` on any rank.
        """
        return  # nothing to take

    @abstractmethod
    def values(self, U: np.ndarray) -> np.ndarray:
        """Share of each own point, ``(k,)``, from states ``(k + 1, n)``."""

    @abstractmethod
    def directional(self, U: np.ndarray, dU: np.ndarray) -> np.ndarray:
        """Derivative of :meth:`values` in the direction ``dU``, ``(k,)``."""

    @abstractmethod
    def gradient(self, U: np.ndarray) -> np.ndarray:
        """``dJ/dU_n``, ``(k + 1, n)``."""

    @abstractmethod
    def hessian(self, U: np.ndarray, dU: np.ndarray) -> np.ndarray:
        """Derivative of :meth:`gradient` in the direction ``dU``, ``(k + 1, n)``."""

    def nbytes(self) -> int:
        """Bytes that it keeps for the points of the slab."""
        return 0

    def petsc_bytes(self) -> dict[str, int]:
        """Bytes in PETSc's hands, by part."""
        return {}


def on_slab(work: Callable, U: np.ndarray, *dU: np.ndarray, shape: tuple[int, ...] | None = None) -> np.ndarray:
    """What a misfit's ``work`` has for all local points, or an array of another shape."""
    out, shape = work(U, *dU), shape or U.shape
    if np.shape(out) != shape:
        got, name = "None" if out is None else f"shape {np.shape(out)}", getattr(work, "__qualname__", work)
        raise InputError(f"{name} of a misfit returned {got}: return an array of shape {shape}")
    return out


def on_points(work: Callable, U: np.ndarray, *dU: np.ndarray) -> np.ndarray:
    """What a misfit's ``work`` has for the own points."""
    return on_slab(work, U, *dU, shape=(len(U) - 1,))


class BlockMisfit(Misfit):
    """On blocks of points; see the module.

    Attributes
    ----------
    keeps_data : bool
        Whether data that depend on time are kept for each point, a state each, or computed again where they are wanted.
        Set before :meth:`bind`.
    looks_back : bool
        Whether :meth:`force` and the derivative of shares depend on what was observed.
    observes, acts, forces : ndarray of bool, shape (k + 1,)
        Points whose states :meth:`observe` (and its derivative) looks at; those where :meth:`force` may not vanish, and
        of them those whose states it looks at. The same on all ranks in space.
    """

    keeps_data = True
    looks_back = True
    observes: np.ndarray
    acts: np.ndarray
    forces: np.ndarray

    @property
    @abstractmethod
    def width(self) -> int:
        """Numbers observed of a point."""

    @abstractmethod
    def observe(self, rows: np.ndarray, u: np.ndarray) -> np.ndarray:
        """What is observed of states ``(b, n)``, ``(b, width)``."""

    @abstractmethod
    def observe_tangent(self, rows: np.ndarray, u: np.ndarray, du: np.ndarray) -> np.ndarray:
        """Its derivative in a direction."""

    @abstractmethod
    def point_values(self, Y: np.ndarray) -> np.ndarray:
        """Share of each own point, ``(k,)``, from the observations ``(k + 1, width)``."""

    @abstractmethod
    def point_derivatives(self, Y: np.ndarray, dY: np.ndarray) -> np.ndarray:
        """Its derivative."""

    def pull_back(self, Y: np.ndarray) -> np.ndarray:
        """Derivatives of the sum of shares by what was observed, ``(k + 1, width)``; collective."""
        return Y

    def pull_back_tangent(self, dY: np.ndarray) -> np.ndarray:
        """Its derivative."""
        return dY

    @abstractmethod
    def force(self, rows: np.ndarray, u: np.ndarray, S: np.ndarray | None) -> np.ndarray:
        """``dJ/du_n`` of points, ``(b, n)``; ``S`` is what :meth:`pull_back` gave for all."""

    @abstractmethod
    def force_tangent(self, rows: np.ndarray, u: np.ndarray, du: np.ndarray, dS: np.ndarray) -> np.ndarray:
        """Its derivative."""

    # -- on slabs ------------------------------------------------------------------------------------------------------
    def _check(self, *slabs: np.ndarray) -> None:
        for slab in slabs:
            if len(slab) != self.slab.k + 1:
                raise InputError(
                    f"{type(self).__name__}: {len(slab)} states, but the slab has {self.slab.k + 1} points; with mgrit "
                    "storage 'C', whose slabs are of C-points only, ask ReducedProblem.observations and .states"
                )

    def read(self, U: np.ndarray, dU: np.ndarray | None = None) -> np.ndarray:
        """Observations of all local points, or their derivative; collective, what fails on a rank fails on all.

        Raises
        ------
        InputError
            If there is not a state for each local point.
        """
        return collectively(self.spacetime.comm, f"{type(self).__name__}.observe", self._read, U, dU)

    def _read(self, U, dU) -> np.ndarray:
        self._check(U, *(() if dU is None else (dU,)))
        Y = np.zeros((len(U), self.width))
        for rows in _blocks(len(U)):
            Y[rows] = self.observe(rows, U[rows]) if dU is None else self.observe_tangent(rows, U[rows], dU[rows])
        return Y

    def values(self, U):
        """See :class:`Misfit`."""
        return self.point_values(self.read(U))

    def directional(self, U, dU):
        """See :class:`Misfit`."""
        return self.point_derivatives(self.read(U) if self.looks_back else None, self.read(U, dU))

    def gradient(self, U):
        """See :class:`Misfit`."""
        self._check(U)
        S, out = self.pull_back(self.read(U)) if self.looks_back else None, np.empty_like(U)
        for rows in _blocks(len(U)):
            out[rows] = self.force(rows, U[rows], S)
        return out

    def hessian(self, U, dU):
        """See :class:`Misfit`."""
        self._check(U, dU)
        dS, out = self.pull_back_tangent(self.read(U, dU)) if self.looks_back else None, np.empty_like(U)
        for rows in _blocks(len(U)):
            out[rows] = self.force_tangent(rows, U[rows], dU[rows], dS)
        return out


def _blocks(count: int):
    """Rows in blocks, all of the same size but the last."""
    for first in range(0, count, BLOCK):
        yield slice(first, min(first + BLOCK, count))

r"""Check that all ranks evaluate at the same control, by one small reduction per evaluation.

Each rank in time holds a copy of the static controls and takes its own steps with it. Copies that differ (a random
start, a start that only one rank reads) would give the derivative of no functional, without any error. The ranks of one
place in space compare the *sketch* :math:`(\|z\|, w^T z)`, :math:`w_i = \cos i^2`, of their copies to a relative
tolerance, not bitwise: a solver with several ranks in space may have another round-off in each group.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from mpi4py import MPI

from pint_fem.collective import any_rank, raise_collectively, require_same
from pint_fem.digests import digest
from pint_fem.errors import InputError
from pint_fem.evolution.control_layout import ControlLayout
from pint_fem.spacetime import SpaceTime

__all__ = ["ControlConsistency", "compare_copies", "norms_by_rank", "sketch", "sketch_weights"]

_RTOL = 1e-9
"""Far above the round-off of copies in a run, far below what changes ``J``."""
_HUGE = 1e300
"""Replaces numbers that are not finite."""


def sketch_weights(size: int) -> np.ndarray:
    """Return the weights :math:`w_i = \\cos i^2`, ``(size,)``."""
    return np.cos(np.arange(size, dtype=float) ** 2)


def sketch(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return :math:`(\\|z\\|, w^T z)` of a vector; finite numbers, whatever the values are."""
    with np.errstate(over="ignore", invalid="ignore"):
        found = np.array([np.linalg.norm(values), weights @ values])
    return np.where(np.isfinite(found), found, _HUGE)


def compare_copies(spacetime: SpaceTime, sketches: np.ndarray, head: Sequence[float] = ()) -> tuple:
    """Compare vectors between the ranks of one place in space, for all places in one reduction (collective).

    Parameters
    ----------
    spacetime
        Process grid.
    sketches
        Sketches of the vectors, ``(vectors, numbers)``; the first number is the norm. NaN: none on this rank.
    head
        Other numbers of this rank.

    Returns
    -------
    ndarray, ndarray of bool
        The least of the other numbers over all ranks, and which of the vectors differ by more than round-off.
    """
    numbers = np.full(
        (2, *sketches.shape, spacetime.space_size), np.inf
    )  # least of the sketches, and of their negatives
    if not np.isnan(sketches).any():
        numbers[..., spacetime.space_comm.rank] = sketches, -sketches
    least = np.concatenate([head, numbers.ravel()])
    spacetime.comm.Allreduce(MPI.IN_PLACE, least, op=MPI.MIN)
    low, opposite_high = least[len(head) :].reshape(numbers.shape)
    differ = -opposite_high - low > _RTOL * np.maximum(-opposite_high[:, :1], 1e-300)
    return least[: len(head)], differ.any(axis=(1, 2))


def norms_by_rank(comm: MPI.Comm, norm: float) -> str:
    """Return the norms of a vector on the first four ranks, for messages (collective)."""
    norms = comm.allgather(float(norm))
    return ", ".join(f"{n:.9g} on rank {rank}" for rank, n in enumerate(norms[:4]))


class ControlConsistency:
    """Comparison of controls and directions between ranks, for vectors of a given layout."""

    def __init__(self, layout: ControlLayout):
        self.layout, self._spacetime, self._comm = layout, layout.spacetime, layout.spacetime.comm
        self._weights = sketch_weights(layout.static_size)
        self._or_groups = " or groups of experiments" if self._spacetime.experiments_size > 1 else ""

    def require(
        self,
        vectors: Mapping[str, np.ndarray],
        *,
        call: Mapping | None = None,
        votes: Sequence[bool] = (),
        failure: BaseException | None = None,
    ) -> np.ndarray:
        """Require the same call on all ranks (collective).

        Parameters
        ----------
        vectors
            Controls or directions by name, in the layout's form.
        call
            Other arguments of the evaluation.
        votes
            Conditions on this rank.
        failure
            An earlier error on this rank, which all ranks raise.

        Returns
        -------
        ndarray of bool
            Which of the votes are true on all ranks.

        Raises
        ------
        InputError
            On every rank, where a vector has not the layout's size, or static controls or arguments differ.
        """
        fits = failure is None and all(np.size(z) == self.layout.size for z in vectors.values())
        if self._comm.size == 1:
            raise_collectively(self._comm, failure)
            self._refuse_sizes(vectors, fits)
            return np.array(votes, dtype=bool)
        static, sketches = slice(self.layout.static_size), np.full((len(vectors), 2), np.nan)
        if fits:
            sketches = np.array([sketch(np.ravel(z)[static], self._weights) for z in vectors.values()])
        key = float(digest(call or {}) % 2**52)
        least, differ = compare_copies(self._spacetime, sketches, [*map(float, votes), float(fits), key, -key])
        *_, all_fit, low_key, high_key = least
        if not all_fit:
            raise_collectively(self._comm, failure)
        self._refuse_sizes(vectors, bool(all_fit))
        if low_key != -high_key:
            require_same(self._comm, **(call or {}))
        self._require_same_steps(vectors)
        if differ.any():
            name = list(vectors)[int(np.argmax(differ))]
            norms = norms_by_rank(self._comm, np.linalg.norm(np.ravel(vectors[name])[static]))
            raise InputError(
                f"{name} differs between ranks in time{self._or_groups}, which each hold a copy of what is static "
                f"(norms {norms}): "
                "give all of them the same values, such as a start that one rank makes and broadcasts"
            )
        return least[: len(votes)] > 0

    def _require_same_steps(self, vectors: Mapping[str, np.ndarray]) -> None:
        """Require the same values of controls with one value per step in all groups of experiments, each of which has a
        copy of them (collective).
        """
        spacetime, first = self._spacetime, self.layout.static_size
        if spacetime.experiments_size == 1 or not self.layout.evolution.stepwise:
            return
        weights = sketch_weights(self.layout.size - first)
        own = np.array([sketch(np.ravel(z)[first:], weights) for z in vectors.values()])
        ends = np.array([own, -own])
        spacetime.experiments_comm.Allreduce(MPI.IN_PLACE, ends, op=MPI.MIN)
        differ = (-ends[1] - ends[0] > _RTOL * np.maximum(-ends[1][:, :1], 1e-300)).any(axis=1)
        differ = np.array([any_rank(self._comm, one) for one in differ])
        if differ.any():
            name = list(vectors)[int(np.argmax(differ))]
            raise InputError(
                f"{name} differs between the groups of experiments, which each hold a copy of all values: give all of "
                "them the same values"
            )

    def _refuse_sizes(self, vectors: Mapping[str, np.ndarray], fits: bool) -> None:
        if not fits:
            shapes = ", ".join(f"{name} of shape {np.shape(z)}" for name, z in vectors.items())
            raise InputError(f"{shapes}: give {self.layout.size} values on this rank, and as many as it has on each")

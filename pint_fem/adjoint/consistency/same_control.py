r"""Whether all ranks evaluate at the same control: one small reduction an evaluation.

What is static is held by every rank in time, and each takes its own steps with its own copy. Copies that differ (a
random start, a start read by one rank) would give the derivative of no functional, silently. With
:math:`w_i = \cos i^2`, the ranks of one place in space compare :math:`\|z\|` and :math:`(w, z)` of their copies to
a relative tolerance, not their bits: a solver with ranks in space may have another round-off in each group.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from mpi4py import MPI

from pint_fem.adjoint.control_layout import ControlLayout
from pint_fem.collective import raise_collectively, require_same
from pint_fem.digests import digest
from pint_fem.errors import InputError

__all__ = ["RTOL", "Copies", "sketch", "sketch_weights"]

RTOL = 1e-9
"""Far above what round-off makes of copies in a run, far below what matters to ``J``."""
_HUGE = 1e300
"""Stands for numbers that are not finite."""


def sketch_weights(size: int) -> np.ndarray:
    """The weights :math:`w_i = \\cos i^2`."""
    return np.cos(np.arange(size, dtype=float) ** 2)


def sketch(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The numbers that copies are compared by, :math:`\\|z\\|` and :math:`(w, z)`; finite, whatever the values are."""
    with np.errstate(over="ignore", invalid="ignore"):
        found = np.array([np.linalg.norm(values), weights @ values])
    return np.where(np.isfinite(found), found, _HUGE)


class Copies:
    """Compares controls and directions over the ranks.

    Parameters
    ----------
    layout
        Where the static controls are in a vector.
    """

    def __init__(self, layout: ControlLayout):
        self.layout, spacetime = layout, layout.spacetime
        self._comm, self._places = spacetime.comm, spacetime.space_size
        self._place = spacetime.space_comm.rank
        self._weights = sketch_weights(layout.static_size)

    def agree(
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
            Controls or directions by what they are, in the layout's form.
        call
            Other arguments of the evaluation.
        votes
            What the ranks decide together.
        failure
            What went wrong on this rank before, which all ranks raise.

        Returns
        -------
        ndarray of bool
            Which of the votes are true on all ranks.

        Raises
        ------
        InputError
            On every rank, where a vector has not the layout's size, or static controls or arguments differ.
        """
        fits = all(np.size(z) == self.layout.size for z in vectors.values())
        fits = fits and failure is None
        if self._comm.size == 1:
            raise_collectively(self._comm, failure)
            self._refuse_sizes(vectors, fits)
            return np.array(votes, dtype=bool)
        key = float(digest(call or {}) % 2**52)
        numbers = np.full((len(vectors), 2, self._places), np.inf)  # what other places have does not count
        opposite = numbers.copy()
        if fits:
            static = slice(self.layout.static_size)
            found = np.array([sketch(np.ravel(z)[static], self._weights) for z in vectors.values()])
            numbers[:, :, self._place], opposite[:, :, self._place] = found, -found
        head = [*map(float, votes), float(fits), key, -key]
        least = np.concatenate([head, numbers.ravel(), opposite.ravel()])
        self._comm.Allreduce(MPI.IN_PLACE, least, op=MPI.MIN)
        all_fit, low_key, high_key = least[len(votes) : len(head)]
        if not all_fit:
            raise_collectively(self._comm, failure)
        self._refuse_sizes(vectors, bool(all_fit))
        if low_key != -high_key:
            require_same(self._comm, **(call or {}))
        low, high = least[len(head) :].reshape(2, *numbers.shape) * np.array([1, -1])[:, None, None, None]
        apart = (high - low > RTOL * np.maximum(high[:, :1], 1e-300)).any(axis=(1, 2))
        if apart.any():
            name = list(vectors)[int(np.argmax(apart))]
            norm = float(np.linalg.norm(np.ravel(vectors[name])[: self.layout.static_size]))
            norms = self._comm.allgather((self._place, norm))
            shown = ", ".join(f"{n:.9g} on rank {rank}" for rank, (_, n) in enumerate(norms[:4]))
            raise InputError(
                f"{name} differs between ranks in time, which each hold a copy of what is static (norms {shown}): "
                "give all of them the same values, such as a start that one rank makes and broadcasts"
            )
        return least[: len(votes)] > 0

    def _refuse_sizes(self, vectors: Mapping[str, np.ndarray], fits: bool) -> None:
        if not fits:
            shapes = ", ".join(f"{name} of shape {np.shape(z)}" for name, z in vectors.items())
            raise InputError(f"{shapes}: give {self.layout.size} values on this rank, and as many as it has on each")

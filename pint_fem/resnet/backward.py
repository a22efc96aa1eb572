"""The backward pass of ranks that share layers or batches: what fails before the sweep on one rank fails on all."""

from __future__ import annotations

import torch

from pint_fem.collective import raise_collectively
from pint_fem.errors import FAILURES, InputError

__all__ = ["Meetings"]

_LEAST = 2  # before the classification layer's derivative and before the sweep


class Meetings:
    """Where ranks make sure, within a backward pass, that all others have come as far.

    A rank that fails before a meeting takes part in it from :meth:`backward`, with its failure. A derivative that fails
    within the sweep, or between the means over data groups, is not met.

    Parameters
    ----------
    comm
        Communicator of all ranks of the network.
    """

    def __init__(self, comm):
        self.comm = comm
        self._active, self._count, self._failed = False, 0, False

    def meet(self) -> None:
        """Go on where no rank has failed (collective); nothing in a backward pass that was not started here."""
        if not self._active:
            return
        try:
            raise_collectively(self.comm, None, "backward")
        except BaseException:
            self._failed = True
            raise
        self._count += 1

    def backward(self, total: torch.Tensor) -> None:
        """``total.backward()`` (collective).

        Raises
        ------
        InputError
            On every rank, where the loss of one does not depend on what the network gives.
        SolverFailure, Exception
            What a derivative raises: as it is on its rank, ``RuntimeError`` on the others.
        """
        failure, self._active, self._count, self._failed = None, True, 0, False
        try:
            total.backward()
        except FAILURES as error:
            failure = error
        finally:
            self._active = False
        if self._failed:  # all ranks have met the failure
            raise failure
        if failure is None and self._count < _LEAST:
            failure = InputError("the loss does not depend on what the network gives: it has no derivative")
        raise_collectively(self.comm, failure, "backward")

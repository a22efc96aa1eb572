"""What the ranks of one network check collectively: equal batches, and failures in the backward pass."""

from __future__ import annotations

from typing import Any

import torch
from mpi4py import MPI

from pint_fem.collective import raise_collectively
from pint_fem.digests import digest
from pint_fem.errors import FAILURES, InputError

__all__ = ["CollectiveBackward", "batch_digest", "comparable"]

_LEAST = 2  # checks in a backward pass: before the classification layer's derivative, and before the sweep


def comparable(values: Any) -> Any:
    """The values of a tensor, the shape of a sparse one, as :func:`pint_fem.digests.digest` takes them."""
    if not torch.is_tensor(values):
        return values
    if values.layout != torch.strided:
        return tuple(values.shape)
    return (values.float() if values.dtype == torch.bfloat16 else values).numpy(force=True)


def batch_digest(values: Any) -> int:
    """Hash number of a batch's type and values, the same in every process."""
    return digest(comparable(values))


class CollectiveBackward:
    """A backward pass in which a failure on one rank before the sweep is raised on all ranks.

    The derivatives of the network call :meth:`check` before they communicate. A rank that fails before that takes part
    in the check from :meth:`backward`, with its failure. A failure within the sweep, or between the means over data
    groups, is not covered.

    Parameters
    ----------
    comm
        Communicator of all ranks of the network.
    """

    def __init__(self, comm: MPI.Comm):
        self.comm = comm
        self._active, self._count, self._failed = False, 0, False

    def check(self) -> None:
        """Raise if another rank has failed (collective); does nothing in a pass that :meth:`backward` has not begun."""
        if not self._active:
            return
        try:
            raise_collectively(self.comm, None, "backward")
        except BaseException:
            self._failed = True
            raise
        self._count += 1

    def backward(self, total: torch.Tensor) -> None:
        """``total.backward()`` for a scalar that depends on the output of the network (collective).

        Raises
        ------
        InputError
            On every rank, where the scalar of one does not depend on the output of the network.
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
        if self._failed:  # a check has raised it on all ranks
            raise failure
        if failure is None and self._count < _LEAST:
            failure = InputError("the loss does not depend on the output of the network: it has no derivative")
        raise_collectively(self.comm, failure, "backward")

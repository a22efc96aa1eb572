"""What the ranks of one network agree upon before they communicate: the call that they are in, its batch, its failures.

Every collective part of a network begins with the same message, whatever the part: its name, the failure of this rank,
if there is one, and facts. So ranks that are in different parts, because one has skipped a batch, caught an exception
or lost its loss, learn of it and all raise, instead of waiting for each other.
"""

from __future__ import annotations

import atexit
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from mpi4py import MPI
from torch.utils._pytree import tree_flatten

from pint_fem.collective import mark_shared, raise_collectively
from pint_fem.digests import digest
from pint_fem.errors import FAILURES, InputError

__all__ = ["Agreement", "CollectiveBackward", "batch_digest", "comparable"]


def comparable(values: Any) -> Any:
    """The values of a tensor, the shape of a sparse one, as :func:`pint_fem.digests.digest` takes them."""
    if not torch.is_tensor(values):
        return values
    if values.layout != torch.strided or values.device.type == "meta":
        return tuple(values.shape)
    return (values.float() if values.dtype == torch.bfloat16 else values).numpy(force=True)


def batch_digest(values: Any) -> int:
    """Hash number of the types and values of a tensor, or of nested sequences and mappings of tensors, the same in
    every process.
    """
    if torch.is_tensor(values):
        return digest(comparable(values))
    leaves, structure = tree_flatten(values)
    return digest([str(structure), *(comparable(leaf) for leaf in leaves)])


class _Report(NamedTuple):
    """What a rank sends to the others at the beginning of a collective part."""

    part: str
    failed: bool
    same: Mapping[str, Any]
    facts: Mapping[str, Any]


_END = "end of the program"
_communicators: list[MPI.Comm] = []


def _meet_at_exit(comm: MPI.Comm) -> None:
    """Let a process that ends take part in what the other ranks of a communicator begin, until they end, too."""
    if comm.size == 1 or any(known is comm for known in _communicators):
        return
    if not _communicators:
        atexit.register(_leave)
    _communicators.append(comm)


def _leave() -> None:
    """Agree with the other ranks that the program ends; who begins another part learns of it."""
    for comm in _communicators:
        while not MPI.Is_finalized() and comm != MPI.COMM_NULL:
            if all(report.part == _END for report in comm.allgather(_Report(_END, False, {}, {}))):
                break


class Agreement:
    """The first message of each collective part of a network.

    Parameters
    ----------
    comm
        Communicator of the ranks that share the layers.
    everyone
        Communicator of the ranks of all data groups; default: ``comm``.
    """

    def __init__(self, comm: MPI.Comm, everyone: MPI.Comm | None = None):
        self.comm, self.everyone = comm, comm if everyone is None else everyone
        _meet_at_exit(comm)

    def __call__(
        self,
        part: str,
        failure: BaseException | None = None,
        *,
        same: Mapping[str, Any] | None = None,
        where: str = "",
        shares: bool = False,
        **facts: Any,
    ) -> Sequence[Mapping[str, Any]]:
        """Exchange the facts of all ranks (collective).

        Parameters
        ----------
        part
            Name of the part of the network that this rank begins.
        failure
            What was raised on this rank before, or ``None``.
        same
            Facts by name that have to be the same on all ranks.
        where
            What was being done, for the message of a failure; default: ``part``.
        shares
            Whether the data groups take part, too: what is raised in one is then raised in all.
        **facts
            Anything that can be pickled.

        Returns
        -------
        sequence of mappings
            ``facts`` of each rank.

        Raises
        ------
        InputError
            On every rank, where ranks begin different parts, or with different facts ``same``.
        Exception
            What was raised on one rank: as it is there, by the rules of :mod:`pint_fem.collective` on the others.
        """
        try:
            reports = self._exchange(part, failure, same or {}, where or part, facts)
        except FAILURES as error:
            failure = mark_shared(self.comm, error)
        if shares and self.everyone.size > self.comm.size:
            raise_collectively(self.everyone, failure, where or part)
        if failure is not None:
            raise failure
        return reports

    def _exchange(
        self, part: str, failure: BaseException | None, same: Mapping, where: str, facts: Mapping
    ) -> Sequence[Mapping[str, Any]]:
        """The facts of the ranks that share the layers, which have to be in the same part."""
        if self.comm.size == 1:
            if failure is not None:
                raise failure
            return [facts]
        reports: list[_Report] = self.comm.allgather(_Report(part, failure is not None, same, facts))
        first = reports[0]
        if any(r.failed for r in reports):
            raise_collectively(self.comm, failure, where)
        if other := next((r for r, report in enumerate(reports) if report.part != first.part), None):
            raise InputError(
                f"layer rank 0 is in the {first.part} of the network and layer rank {other} in its "
                f"{reports[other].part}: all ranks have to make the same calls in the same order; one may have skipped "
                "a batch, caught an exception, or have a loss that does not depend on the output of the network"
            )
        for rank, report in enumerate(reports):
            for name in {**first.same, **report.same}:
                if report.same.get(name) != first.same.get(name):
                    raise InputError(
                        f"{name}: {first.same.get(name)} on layer rank 0, {report.same.get(name)} on layer rank "
                        f"{rank}; give all ranks that share the layers the same"
                    )
        return [r.facts for r in reports]


class CollectiveBackward:
    """A backward pass in which a failure on one rank is raised on all ranks.

    The derivatives of the network call :meth:`check` before they communicate. A rank that fails elsewhere in the pass
    takes part in the next check of the others, with its failure. A failure within the sweep is raised on all ranks by
    the sweep itself.

    Parameters
    ----------
    agreement
        Of the network.
    """

    def __init__(self, agreement: Agreement):
        self._agree = agreement
        self._count, self._raised = 0, False

    def check(self, *, shares: bool = False, **same: Any) -> None:
        """Raise if another rank has failed or is in another part of the network (collective)."""
        try:
            self._agree("backward pass", same=same, shares=shares)
        except BaseException:
            self._raised = True
            raise
        self._count += 1

    def backward(self, total: torch.Tensor, **options: Any) -> None:
        """``total.backward(**options)`` for a scalar that depends on the output of the network (collective).

        Raises
        ------
        InputError
            On every rank, where the scalar of one does not depend on the output of the network.
        SolverFailure, Exception
            What a derivative raises: as it is on its rank, ``RuntimeError`` on the others.
        """
        failure: BaseException | None = None
        self._count, self._raised = 0, False
        try:
            total.backward(**options)
        except FAILURES as error:
            failure = error
        if self._raised:  # on all ranks, and in all data groups
            raise failure  # type: ignore[misc]
        if failure is None and not self._count:
            failure = InputError("the loss does not depend on the output of the network: it has no derivative")
        self._agree("end of the backward pass", failure, where="backward", shares=True)

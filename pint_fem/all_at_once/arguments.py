"""Checks of a solve's arguments: arrays have to fit the levels, and all ranks have to be given the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pint_fem.collective import consistent_across_ranks, raise_collectively, require_same
from pint_fem.digests import digest
from pint_fem.errors import InputError

if TYPE_CHECKING:
    from pint_fem.all_at_once.solver import AllAtOnceSolver

__all__ = ["check_arrays"]


def check_arrays(
    solver: AllAtOnceSolver,
    U: np.ndarray,
    G: np.ndarray | None,
    coarse_rhs: Sequence[np.ndarray | None] | None,
    **call: Any,
) -> None:
    """Refuse arrays that do not fit, and a solve that is not the same on all ranks (collective).

    Parameters
    ----------
    solver
        A :class:`~pint_fem.all_at_once.solver.AllAtOnceSolver`: its levels determine how many rows there are; its
        steps, bounds and options are compared.
    U, G, coarse_rhs
        Arguments of its ``solve``: the trajectory, its right-hand side and those of coarse levels.
    **call
        The other arguments of its ``solve`` by name.

    Raises
    ------
    InputError
        On every rank, naming what differs between ranks, or what does not fit on any of them.
    """
    k, problem = solver.levels[0].k, None
    given = [None] * (len(solver.levels) - 1) if coarse_rhs is None else list(coarse_rhs)
    rows = [level.k for level in solver.levels[1:]]
    if len(given) != len(rows) or any(g is not None and len(g) != n for g, n in zip(given, rows, strict=False)):
        sizes = [None if g is None else len(g) for g in given]
        problem = f"coarse_rhs of {sizes} rows for the own steps {rows} of the coarse levels"
    if (
        not U.ndim
        or len(U) != solver.local_rows
        or (G is not None and G.shape not in [(n, *U.shape[1:]) for n in solver.rhs_rows])
    ):
        what = f"{k} own steps" + ("" if solver.local_rows == k + 1 else f" with {solver.local_rows - 1} C-points")
        problem = f"U {U.shape} and G {None if G is None else G.shape} for {what}"
    elif call.get("batch") and (U.ndim < 2 or not U.shape[1]):
        problem = f"U {U.shape} for a batch: give (points, right-hand sides, *state) with at least one right-hand side"
    elif U.dtype not in (np.float64, np.float32) or (G is not None and G.dtype != U.dtype):
        problem = (
            f"U of type {U.dtype}{'' if G is None else f', G of {G.dtype}'}: give float64 or float32, the same for both"
        )
    elif not U[:1].flags.c_contiguous:
        problem = "the states in U are not contiguous: only the time axis may be strided"
    absent = tuple(x is None for x in (G, *given)) if k else None
    comm, everyone = solver.comm, solver.everyone
    key = (digest((solver.key, *call.values())) if everyone.size > 1 else 0,)
    kind = (U.dtype.num, *U.shape[1:])  # of the states that are sent
    if everyone is comm:
        same = consistent_across_ranks(comm, problem is None, key, kind, absent)
    else:  # parts of states may have other shapes there
        same = consistent_across_ranks(everyone, consistent_across_ranks(comm, problem is None, kind, absent), key)
    if same:
        return
    own = {"number of steps": solver.nsteps, "bounds": tuple(solver.levels[0].bounds), **vars(solver.options), **call}
    require_same(everyone, **own, **{"solver": solver.key})
    reports = comm.allgather((problem, U.shape[1:], str(U.dtype), absent))
    problems = [p for p, *_ in reports if p]
    if len({shape for _, shape, *_ in reports}) > 1:
        problems.append(f"states of different shapes on the ranks: {[shape for _, shape, *_ in reports]}")
    if len({dtype for *_, dtype, _ in reports}) > 1:
        problems.append(f"states of different types on the ranks: {[dtype for *_, dtype, _ in reports]}")
    if len({absent for *_, absent in reports if absent}) > 1:
        problems.append("G or coarse_rhs is None on some ranks only: give zeros there")
    raise_collectively(everyone, InputError(f"{solver.name}: {problems[0]}") if problems else None)

"""Checks of a solve's arguments: arrays have to fit the levels, and all ranks have to be given the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pint_fem.all_at_once.arrays import Array, is_contiguous, is_tensor, kind_of, no_values, torch_module, type_code
from pint_fem.collective import consistent_across_ranks, raise_collectively, require_same
from pint_fem.digests import digest
from pint_fem.errors import InputError

if TYPE_CHECKING:
    from pint_fem.all_at_once.solver import AllAtOnceSolver

__all__ = ["check_arrays"]

_STRIDED = "the states in U are not contiguous: only the time axis may be strided"
_TENSOR_TYPES = ("torch.float64", "torch.float32", "torch.bfloat16")


def check_arrays(
    solver: AllAtOnceSolver,
    U: Array,
    G: Array | None,
    coarse_rhs: Sequence[Array | None] | None,
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
        or (G is not None and tuple(G.shape) not in [(n, *U.shape[1:]) for n in solver.rhs_rows])
    ):
        what = f"{k} own steps" + ("" if solver.local_rows == k + 1 else f" with {solver.local_rows - 1} C-points")
        problem = f"U {tuple(U.shape)} and G {None if G is None else tuple(G.shape)} for {what}"
    elif call.get("batch") and (U.ndim < 2 or not U.shape[1]):
        problem = (
            f"U {tuple(U.shape)} for a batch: give (points, right-hand sides, *state) with at least one right-hand side"
        )
    elif is_tensor(U):
        problem = _problem_of_tensors(solver, U, [G, *given])
    elif U.dtype not in (np.float64, np.float32) or (G is not None and G.dtype != U.dtype):
        problem = (
            f"U of type {U.dtype}{'' if G is None else f', G of {G.dtype}'}: give float64 or float32, the same for both"
        )
    elif not U[:1].flags.c_contiguous:
        problem = _STRIDED
    absent = tuple(x is None for x in (G, *given)) if k else None
    comm, everyone = solver.comm, solver.everyone
    key = (digest((solver.key, *call.values())) if everyone.size > 1 else 0,)
    kind = (type_code(U), *U.shape[1:])  # of the states that are sent
    if everyone is comm:
        same = consistent_across_ranks(comm, problem is None, key, kind, absent)
    else:  # parts of states may have other shapes there
        same = consistent_across_ranks(everyone, consistent_across_ranks(comm, problem is None, kind, absent), key)
    if same:
        return
    own = {"number of steps": solver.nsteps, "bounds": tuple(solver.levels[0].bounds), **vars(solver.options), **call}
    require_same(everyone, **own, **{"solver": solver.key})
    reports = comm.allgather((problem, tuple(U.shape[1:]), str(U.dtype), absent))
    problems = [p for p, *_ in reports if p]
    if len({shape for _, shape, *_ in reports}) > 1:
        problems.append(f"states of different shapes on the ranks: {[shape for _, shape, *_ in reports]}")
    if len({dtype for *_, dtype, _ in reports}) > 1:
        problems.append(f"states of different types on the ranks: {[dtype for *_, dtype, _ in reports]}")
    if len({absent for *_, absent in reports if absent}) > 1:
        problems.append("G or coarse_rhs is None on some ranks only: give zeros there")
    raise_collectively(everyone, InputError(f"{solver.name}: {problems[0]}") if problems else None)


def _problem_of_tensors(solver: AllAtOnceSolver, U: Array, others: Sequence[Array | None]) -> str | None:
    """What does not fit about a tensor ``U`` and the right-hand sides beside it."""
    options, given = solver.options, [x for x in others if x is not None]
    if not solver.takes_tensors:
        return f"U is a torch tensor: {options.solver} takes numpy arrays, such as U.numpy()"
    if str(U.dtype) not in _TENSOR_TYPES:
        return f"U of type {U.dtype}: give {', '.join(_TENSOR_TYPES)}"
    if any(not is_tensor(x) or kind_of(x) != kind_of(U) for x in given):
        kinds = [f"{x.device if is_tensor(x) else 'numpy array'} {x.dtype}" for x in given]
        return f"U is a tensor on {U.device} of {U.dtype}, right-hand sides are {kinds}: give tensors of one kind"
    if U.layout is not torch_module().strided:
        return f"U is a tensor of layout {U.layout}: give a dense one"
    if U.requires_grad or any(x.requires_grad for x in given):
        return "U or a right-hand side requires a gradient, which a solve in place does not have: give U.detach()"
    if not is_contiguous(U[:1]):
        return _STRIDED
    if U.stride(0) == 0 and len(U) > 1:
        return "all rows of U are the same memory (an expanded tensor): give U.clone()"
    if no_values(U) and (options.residual != "none" or solver.comm.size > 1):
        return "U is on the meta device and has no values: give residual='none', on one rank"
    return None

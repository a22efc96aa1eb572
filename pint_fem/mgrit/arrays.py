"""The arrays of a solve: whether they fit the levels, on all ranks alike."""

from __future__ import annotations

import numpy as np

from pint_fem.mgrit.agreement import all_alike

__all__ = ["check_arrays"]


def check_arrays(solver, U: np.ndarray, G: np.ndarray | None, coarse_rhs) -> None:
    """Refuse arrays that do not fit (collective).

    Parameters
    ----------
    solver
        A :class:`~pint_fem.mgrit.solver.MGRIT`: its levels say how many rows there are.
    U, G, coarse_rhs
        As for :meth:`pint_fem.mgrit.MGRIT.solve`.

    Raises
    ------
    ValueError
        On every rank, where those of any do not fit.
    """
    k, problem = solver.levels[0].k, None
    given = [None] * (len(solver.levels) - 1) if coarse_rhs is None else list(coarse_rhs)
    rows = [level.k for level in solver.levels[1:]]
    if len(given) != len(rows) or any(g is not None and len(g) != n for g, n in zip(given, rows, strict=False)):
        sizes = [None if g is None else len(g) for g in given]
        problem = f"coarse_rhs of {sizes} rows for the own steps {rows} of the coarse levels"
    if not U.ndim or len(U) != solver.local_rows or (G is not None and G.shape not in _rhs_shapes(solver, U)):
        what = f"{k} own steps" + ("" if solver.local_rows == k + 1 else f" with {solver.local_rows - 1} C-points")
        problem = f"U {U.shape} and G {None if G is None else G.shape} for {what}"
    elif U.dtype not in (np.float64, np.float32) or (G is not None and G.dtype != U.dtype):
        problem = f"U of type {U.dtype}{'' if G is None else f', G of {G.dtype}'}: give float64 or float32, both alike"
    elif not U[:1].flags.c_contiguous:
        problem = "the states in U are not contiguous: only the time axis may be strided"
    absent = tuple(x is None for x in (G, *given)) if k else None
    if all_alike(solver.comm, problem is None, U.shape[1:], absent):
        return
    reports = solver.comm.allgather((problem, U.shape[1:], absent))
    problems = [p for p, *_ in reports if p]
    if len({shape for _, shape, _ in reports}) > 1:
        problems.append(f"states of different shapes on the ranks: {[shape for _, shape, _ in reports]}")
    if len({absent for *_, absent in reports if absent}) > 1:
        problems.append("G or coarse_rhs is None on some ranks only: give zeros there")
    if problems:
        raise ValueError(f"{solver.name}: {problems[0]}")


def _rhs_shapes(solver, U: np.ndarray) -> list[tuple[int, ...]]:
    """Shapes that a right-hand side may have."""
    fine = solver.levels[0]
    rows = [fine.k]
    if solver.options.storage == "C" and int(fine.c_points[-1]) == fine.nsteps:
        rows.append(solver.local_rows - 1)
    return [(count, *U.shape[1:]) for count in rows]

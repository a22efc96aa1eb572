"""Description of an MGRIT hierarchy in a few lines of text, and an estimate of its memory."""

from __future__ import annotations

__all__ = ["describe", "memory_estimate"]


def describe(solver, state_nbytes: int | None = None, *, kind: str = "MGRIT", tolerance: str = "") -> str:
    """Describe a :class:`~pint_fem.mgrit.solver.MGRIT`.

    Parameters
    ----------
    solver
        The solver.
    state_nbytes
        Bytes of a state on the finest level, for the memory of this rank.
    kind, tolerance
        Name of the method and stopping criterion in the text; default: those of plain MGRIT.

    Returns
    -------
    str
    """
    o = solver.options
    if not tolerance:
        tolerance = f"rtol {o.rtol:g}" + (f", atol {o.atol:g}" if o.atol else "")
        if o.is_fixed:
            tolerance = f"{o.max_it} cycles"
    first = {"auto": "", "guess": "", "skip": ", first down-cycle skipped", "nested": ", nested iteration"}[o.start]
    ranks = f"{solver.comm.size} time rank" + "s" * (solver.comm.size > 1)
    lines = [f"{kind} '{solver.name}': {solver.nsteps} steps on {ranks}, {o.cycle}-cycles{first}, {tolerance}"]
    for level in solver.levels:
        kind = {"sequential": "sequential", "gathered": "gathered on one rank"}.get(o.coarse_solver, "")
        if level.index < len(solver.levels) - 1:
            m = f"m = {level.m}" if level.m else f"{len(level.c_points)} C-points"
            weight = o.weight(level.index)
            kind = f"{m}, {o.scheme(level.index)}-relaxation" + (f", C-weight {weight:g}" if weight != 1 else "")
        elif o.coarse_solver == "relax":
            kind = f"{o.coarse_sweeps} FC-sweeps"
        elif o.coarse_solver == "paradiag":
            kind = f"{o.coarse_sweeps} alpha-circulant iteration" + "s" * (o.coarse_sweeps > 1)
        lines.append(f"  level {level.index}: {level.nsteps} steps, {kind}")
    if state_nbytes is not None:
        finest, coarse = memory_estimate(solver, state_nbytes)
        what = "all points" if o.storage == "all" else "C-points"
        lines.append(f"  memory of a rank: {what} {finest / 2**20:.3g} MB, coarse levels {coarse / 2**20:.3g} MB")
    return "\n".join(lines)


def memory_estimate(solver, state_nbytes: int) -> tuple[int, int]:
    """Bytes of this rank's arrays for the finest level (work arrays included) and for the coarse ones.

    Before the first solve as if states were the same size on all levels.
    """
    o, extra = solver.options, solver.extra_states
    sizes = [state_nbytes] + [state_nbytes if c.U is None else c.U[:1].nbytes for c in solver.levels[1:]]
    finest = solver.local_rows + extra[0] + (solver.levels[0].k if o.residual == "full" else 0)
    coarse = sum(
        (4 * level.k + 2 + more) * size
        for level, more, size in zip(solver.levels[1:], extra[1:], sizes[1:], strict=True)
    )
    if o.coarse_solver == "gathered" and solver.comm.rank == 0 and len(solver.levels) > 1:
        coarse += (2 * solver.levels[-1].nsteps + 1) * sizes[-1]
    return finest * state_nbytes, coarse

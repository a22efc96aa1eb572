r"""Checks of a user's propagators and transfers, before MGRIT runs with them (XBraid: ``braid_TestAll``).

On each level: what a method writes and what it leaves alone, whether results depend on earlier calls, on the block
or on strides, ``sweep`` against ``step``, and derivatives. With :math:`T` the tangent and :math:`A` the adjoint,

.. math::
    \|\Phi(u + h\,d) - \Phi(u) - h\,T d\| = O(h^2), \qquad \langle T d, \lambda\rangle = \langle d, A \lambda\rangle .

Then transfers, messages, and that a cycle keeps the sequential solution. A check that rests on a failed one is not
run, so the failures name causes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from mpi4py import MPI

from pint_fem.all_at_once.arrays import Array, is_tensor
from pint_fem.all_at_once.grids import Coarsening, coarse_points, is_integer
from pint_fem.all_at_once.propagator import Propagator
from pint_fem.collective import collectively
from pint_fem.errors import InputError
from pint_fem.mgrit.checks.calls import LevelCalls, TransferCalls, has_method
from pint_fem.mgrit.checks.methods import (
    MAPS,
    check_adjoint,
    check_method,
    check_sweep,
    check_tangent,
    check_transfer,
    fixed_point,
    in_turn,
)
from pint_fem.mgrit.checks.report import CheckReport, Found, Runner, Space, UserError, raise_first
from pint_fem.mgrit.checks.tensors import array_of_state, propagator_of_arrays, transfer_of_arrays
from pint_fem.mgrit.options import MGRITOptions
from pint_fem.mgrit.solver import MGRIT
from pint_fem.mgrit.transfer import Transfer

__all__ = ["CheckReport", "check"]


def check(
    propagators: Propagator | Sequence[Propagator],
    nsteps: int,
    state: Array,
    *,
    coarsening: int | Sequence = (8, 4),
    transfers: Sequence | None = None,
    comm: MPI.Comm = MPI.COMM_SELF,
    space_comm: MPI.Comm = MPI.COMM_SELF,
    seed: int = 0,
    rtol: float = 1e-12,
) -> CheckReport:
    """Check propagators and transfers (collective over ``comm`` and ``space_comm``).

    Parameters
    ----------
    propagators
        One, or one per level, finest first.
    nsteps
        Steps on the finest level.
    state
        A typical state on the finest level: its shape, and values around which steps make sense. Steps are taken from
        states that differ from it by up to a tenth of its root mean square (or 0.1, where it is zero). A CPU tensor
        (float64) for propagators of tensors.
    coarsening, transfers
        Those of :class:`~pint_fem.mgrit.solver.MGRIT`.
    comm
        Time communicator. Every rank checks all steps, and all get the same report.
    space_comm
        The ranks that share a state, each with its part.
    seed
        Seed of the states and directions.
    rtol
        Relative accuracy of the steps and their derivatives.

    Returns
    -------
    CheckReport
        What a user's method raises is a failure in it. A line has ``passed`` or ``failed`` with the number and its
        limit, ``reported`` (a number without a limit), ``not there`` (an optional method), or ``not run``.

    Raises
    ------
    InputError
        On every rank, if the arguments do not fit each other, or differ between ranks.
    """

    def make() -> _Setup:
        try:
            return _Setup(propagators, nsteps, state, coarsening, transfers, rtol, seed)
        except ValueError as error:
            raise InputError(f"check: {error}") from error

    setup = collectively(space_comm, "", collectively, comm, "", make)
    keys = {key for part in space_comm.allgather(comm.allgather(setup.key)) for key in part}
    if len(keys) > 1:
        raise InputError("check: the arguments differ: give all ranks the same steps, levels, transfers and steppers")
    run = Runner(comm, space_comm)
    space = Space(space_comm)
    levels: list[LevelCalls] = []
    here, sound = setup.state, True
    for index, propagator in enumerate(setup.propagators):
        transfer = setup.transfers[index - 1] if index else None
        if transfer is not None and here is not None:
            here, right = check_transfer(run, transfer, levels[-1], seed)
            sound &= right
        if here is None:
            run.add(f"level {index}", "step runs", "not run", "(the restriction gives no state)")
            continue
        level = LevelCalls(propagator, index, setup.nsteps[index], setup.strides[index], here, space, seed, rtol)
        sound &= _check_level(run, level)
        if index:
            fine = levels[-1]
            difference = lambda fine=fine, level=level: _coarse_step(fine, level, setup)
            run(level.where, f"coarse step against those of level {fine.index}", difference, after=sound)
        levels.append(level)
    messages = run("all", "messages: a state to the next rank and back", lambda: _round_trip(setup.state, comm))
    after = sound and messages
    keeps = lambda: _fixed_point_of_cycles(setup, levels, comm)
    run("all", "MGRIT keeps the sequential solution", keeps, at_most=rtol, after=after)
    return run.finish()


class _Setup:
    """The arguments, checked against each other."""

    def __init__(
        self, propagators: Propagator | Sequence[Propagator], nsteps: int, state: Array,
        coarsening: int | Sequence, transfers: Sequence | None, rtol: float, seed: int,
    ):  # fmt: skip
        if hasattr(propagators, "step") or not isinstance(propagators, Sequence):
            propagators = [propagators]
        self.propagators = list(propagators)
        if is_tensor(state):
            state, self.propagators = array_of_state(state), [propagator_of_arrays(p) for p in self.propagators]
            transfers = transfers and [transfer_of_arrays(t) for t in transfers]
        if not self.propagators:
            raise ValueError("no propagators: give one, or one per level")
        if not is_integer(nsteps) or nsteps < 1:
            raise ValueError(f"nsteps = {nsteps!r}: give a whole number of at least 1")
        if not isinstance(rtol, (int, float)) or not 0 < rtol < 1:
            raise ValueError(f"rtol {rtol!r}: give a number between 0 and 1, such as 1e-12")
        if not hasattr(seed, "__index__") or seed < 0:
            raise ValueError(f"seed {seed!r}: give a whole number of at least 0")
        if np.iscomplexobj(state):
            raise ValueError(f"state of type {np.asarray(state).dtype}: give {np.dtype(float)}")
        self.state = np.array(state, dtype=float)
        if not np.isfinite(self.state).all():
            raise ValueError("state has values that are not finite")
        options = MGRITOptions.make(coarsening=coarsening, levels=len(self.propagators))
        self.factors = options.factors(int(nsteps))
        self.nsteps = [len(p) - 1 for p in coarse_points(int(nsteps), self.factors)]
        self.strides = [_strides(options.coarsen(i)) for i in range(len(self.propagators))]
        transfers = [None] * len(self.factors) if transfers is None else list(transfers)
        if len(transfers) != len(self.factors):
            raise ValueError(f"{len(transfers)} transfers for {len(self.factors)} coarse levels: give one to each")
        self.transfers = [Transfer.make(t) for t in transfers]
        methods = [
            [has_method(p, name) for name in ("step", "sweep", "tangent", "adjoint")]
            + [bool(getattr(p, "uses_guess", False)), int(getattr(p, "block", 0) or 0)]
            for p in self.propagators
        ]
        maps = [t and [getattr(t, f"{name}_transposed") is not None for name in MAPS] for t in self.transfers]
        self.key = repr((self.nsteps, self.factors, methods, maps, self.state.ndim, rtol, seed))

    def short(self) -> tuple[int, list]:
        """A horizon of two steps on the coarsest level, in fine steps, and its coarsening."""
        n = min(2 if self.factors else 8, self.nsteps[-1])
        factors: list[Coarsening] = []
        for m in reversed(self.factors):
            factors.insert(0, m if isinstance(m, int) else m[: n + 1])
            n = m * n if isinstance(m, int) else m[n]
        return n, factors


def _strides(m: Coarsening) -> list[int]:
    """Lengths of the intervals between C-points, the least and the largest."""
    return [m] if isinstance(m, int) else [int(np.diff(m).min()), int(np.diff(m).max())]


# -- one level ---------------------------------------------------------------------------------------------------------
def _check_level(run: Runner, level: LevelCalls) -> bool:
    """Check a level's methods; whether those that MGRIT needs are right."""
    where, rtol = level.where, level.rtol
    if not level.has("step"):
        run.add(where, "step runs", "failed", "there is no method step(steps, u, out)")
        return False
    sound, alone = check_method(run, level, "step", ["step"])
    good = sound
    if level.uses_guess:
        name = "guess: the exact result is a fixed point"
        good &= run(where, name, lambda: fixed_point(level), at_most=rtol, after=sound)
    if level.has("sweep"):
        good &= check_sweep(run, level, after=good)
    else:
        run.add(where, "sweep", "not there", "steps are taken one by one")
    present, right = ["step"] if sound else [], {}
    for method in ("tangent", "adjoint"):
        if level.has(method):
            right[method], _ = check_method(run, level, method, [*present, method])
            present += [method] if right[method] else []
        else:
            run.add(where, method, "not there")
    independent = good
    if right:
        name, several = "step and derivatives in turn, identical", len(present) > 1
        measure = lambda: in_turn(level, present)
        independent = run(where, name, measure, at_most=0, unit="changed", after=good and several)
        good &= independent or not several
    is_derivative = "tangent" in right and check_tangent(run, level, after=right["tangent"] and independent)
    if "adjoint" in right:
        check_adjoint(run, level, tangent=is_derivative, after=right["adjoint"] and independent)
    return good and alone


# -- several levels ----------------------------------------------------------------------------------------------------
def _coarse_step(fine: LevelCalls, coarse: LevelCalls, setup: _Setup) -> Found:
    """Difference of the first coarse step from the fine ones in its place."""
    m, transfer = setup.factors[fine.index], setup.transfers[fine.index]
    U = fine.trajectory(m if isinstance(m, int) else m[1])[-1:]
    U = U if transfer is None else TransferCalls(transfer, fine.space)("restrict", U)
    return Found(fine.space.difference(coarse.phi(range(1), coarse.state[None]), U), "relative difference")


def _round_trip(state: np.ndarray, comm: MPI.Comm) -> Found:
    """Send a state to the next rank and back; it has to be bitwise identical."""
    shapes = comm.allgather(state.shape)
    if len(set(shapes)) > 1:
        raise UserError(f"states of different shapes on the ranks: {shapes}")
    right, left = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    sent = state[None] + comm.rank
    there, back = np.empty_like(sent), np.empty_like(sent)
    comm.Sendrecv(sent, right, 0, there, left, 0)
    comm.Sendrecv(there, left, 1, back, right, 1)
    if not np.array_equal(sent, back):
        raise UserError("a state came back changed")
    return Found()


def _fixed_point_of_cycles(setup: _Setup, levels: list[LevelCalls], comm: MPI.Comm) -> Found:
    """Residual of the sequential solution of a few steps, and of a cycle from it, over its norm."""
    n, factors = setup.short()
    fine, exact, error = levels[0], None, None
    try:
        exact = fine.trajectory(n)
    except UserError as failure:
        error = str(failure)
    raise_first(comm, error)  # before the solver, which needs all ranks

    def solver(**options: Any) -> MGRIT:
        options |= dict(start="guess", levels=len(levels)) | (dict(coarsening=factors) if factors else {})
        norms = lambda block: fine.space.dots(block, block)
        return MGRIT(
            setup.propagators, n, options=options, comm=comm, point_norms=norms, transfers=setup.transfers, name="check"
        )

    cycle = solver(residual="none", max_it=1)
    rows = exact[cycle.levels[0].lo : cycle.levels[0].hi + 1]
    U = rows.copy()
    cycle.solve(U)
    if not factors:
        return Found(fine.space.difference(U, rows))
    evaluation = solver(residual="full", check="cycle", rtol=1.0, max_it=1)
    results = [evaluation.solve(V) for V in (rows.copy(), U)]
    return Found(max(r.residuals[0] / r.scale if r.scale else r.residuals[0] for r in results))

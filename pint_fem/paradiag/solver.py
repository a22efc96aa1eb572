r"""ParaDiag: solve all steps of a linear evolution at once by an alpha-circulant preconditioner, distributed over time.

.. math::  u \leftarrow u + P_\alpha^{-1} (b - A u)

with :math:`A u = b` the system of all steps and :math:`P_\alpha` of :mod:`~pint_fem.paradiag.circulant`. With an
eigenvalue :math:`\lambda` of :math:`\Phi`, the first iteration leaves an error of the shape :math:`\lambda^i`, and each
further one multiplies it by :math:`\alpha \lambda^N / (1 - \alpha \lambda^N)`: at most :math:`\alpha/(1-\alpha)` where
:math:`|\lambda| \le 1`, for heat as for waves (Gander, Wu, Numer. Math. 143, 2019).

Needs numpy and mpi4py only. A scalar ODE::

    class Euler:
        def step(self, steps, u, out): out[...] = u / (1 + dt)

    def solve(k, mu, r): return r / (1 - mu / (1 + dt))

    U = np.zeros((65, 1)); U[0] = 1
    ParaDiag(Euler(), 64, solve, options=dict(alpha=1e-4)).solve(U)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from mpi4py import MPI

from pint_fem.all_at_once.grids import Bounds
from pint_fem.all_at_once.levels import build_levels
from pint_fem.all_at_once.propagator import Propagator
from pint_fem.all_at_once.solver import AllAtOnceSolver
from pint_fem.all_at_once.stopping import SolveResult
from pint_fem.all_at_once.trace import timed
from pint_fem.paradiag.circulant import AlphaCirculant, BlockSolve, FrequencySolve
from pint_fem.paradiag.guarded_solves import GuardedBlocks, GuardedSolve
from pint_fem.paradiag.options import ParaDiagOptions

__all__ = ["ParaDiag"]


class ParaDiag(AllAtOnceSolver):
    """ParaDiag-II for ``U[n+1] = Phi U[n] + G[n]``, ``n = 0..N-1``.

    Residuals are ``Phi U + G - U`` at all points, relative to the trajectory's norm. ``start="skip"`` or ``"nested"``
    begins at zero, ``"guess"`` with the given iterate (always, with :attr:`before_iteration`). Without the assumptions
    of convergence theory (a ``Phi`` that grows, frequencies solved with other operators than those of ``Phi``) it
    converges more slowly or not, which the result reports.

    Parameters
    ----------
    propagator
        The step ``Phi`` (affine in a tangent sweep of a nonlinear evolution), a
        :class:`~pint_fem.all_at_once.propagator.Propagator`.
    nsteps
        ``N``.
    solve
        ``(k, mu, r) -> v`` with ``(I - mu Phi) v = r``, complex arrays ``(n,)`` of a rank's unknowns.
    options
        :class:`~pint_fem.paradiag.options.ParaDiagOptions` or a dictionary of them.
    comm
        Time communicator; default: this process alone.
    bounds
        ``comm.size + 1`` step bounds of the ranks; default: nearly equal.
    name
        Named in monitor lines and errors.
    backwards
        ``comm`` is another communicator in reverse order (adjoint sweeps): ranks keep their frequencies.
    circulant
        Makes the preconditioner, an :class:`~pint_fem.paradiag.circulant.AlphaCirculant` or one like it.
    blocks
        Solves for several frequencies at once (:class:`~pint_fem.paradiag.circulant.BlockSolve`), which are used
        instead of ``solve`` where they are available; without them, everything is in double precision.
    **given
        ``everyone``, ``point_norms``, ``trace`` and ``is_root`` of
        :class:`~pint_fem.all_at_once.solver.AllAtOnceSolver`.

    Attributes
    ----------
    before_iteration : callable or None
        Where ``Phi`` is affine or not linear: called before each iteration with the iterate and the last contraction
        (at first ``None``), to improve the solves of the frequencies.

    Raises
    ------
    ValueError
        On bad options or bounds.
    """

    options: ParaDiagOptions

    def __init__(
        self,
        propagator: Propagator,
        nsteps: int,
        solve: FrequencySolve,
        *,
        options: ParaDiagOptions | Mapping | None = None,
        comm: MPI.Comm = MPI.COMM_SELF,
        bounds: Sequence[int] | None = None,
        name: str = "paradiag",
        backwards: bool = False,
        circulant: Callable[..., AlphaCirculant] = AlphaCirculant,
        blocks: BlockSolve | None = None,
        **given: Any,
    ):
        options, bounds = ParaDiagOptions.make(options), Bounds.of_ranks(nsteps, comm.size, bounds)
        levels = build_levels([propagator], (), bounds, comm)
        super().__init__(levels, options, comm=comm, name=name, **given)
        self._frequency_solve, self._backwards, self._make_circulant = solve, backwards, circulant
        self._guarded = GuardedSolve(solve, self._note)
        self._blocks = None if blocks is None else GuardedBlocks(blocks, self._guarded, self._note)
        self._circulant: AlphaCirculant | None = None
        self._size = 0
        self.before_iteration: Callable[[np.ndarray, float | None], None] | None = None

    def circulant(self, size: int) -> AlphaCirculant:
        """The preconditioner for states of ``size`` local unknowns."""
        if self._circulant is None or self._size != size:
            self._size = size
            self._circulant = self._make_circulant(
                self.nsteps, self.options.alpha, self._guarded, size, comm=self.comm, bounds=self.levels[0].bounds,
                blocks=self._blocks, backwards=self._backwards, trace=self.trace,
            )  # fmt: skip
        return self._circulant

    def _note(self, where: str, error: BaseException) -> None:
        self._failures.note(where, error)

    @property
    def _is_single(self) -> bool:
        """Whether the present solve is preconditioned in single precision; the same on all ranks."""
        precision = self.options.precision
        # a given number of iterations has no residual to meet, and its transpose has to be the transpose
        if precision != "auto" or self._stop.cycles is not None or self.options.is_fixed:
            return precision == "single"
        return self.options.precision_for_tolerances == "single"

    def _iterate(
        self, U: np.ndarray, start: str, coarse_rhs: Sequence[np.ndarray | None] | None, result: SolveResult
    ) -> None:
        fine, size = self.levels[0], int(np.prod(U.shape[1:], dtype=int))
        members = U.shape[1] if self._failures.batch else 1
        self._guarded.members = members
        precondition, single = self.circulant(size), self._is_single
        from_zero = start in ("skip", "nested") and self.before_iteration is None
        r = self._residual_from_zero(U) if from_zero else self._residual_at_all_points(U)
        while True:
            with timed(self.trace, "norm", 0, sweep=self.name):
                squares = [self._failures.squares(block) for block in (r, U[1:])]
                norm, scale = self._norms(squares, None)
            stops = self._decide(result, norm[None], scale)
            self._monitor(result)
            if stops:
                break
            if self.before_iteration is not None:
                previous = result.residuals[-2:-1]
                self.before_iteration(U, result.residuals[-1] / previous[0] if previous else None)
            precondition.add(r.reshape(fine.k, size), U[1:], single=single)
            self._end_iteration(result)
            r = self._residual_at_all_points(U)
        fine.exchange(U)

    def _residual_from_zero(self, U: np.ndarray) -> np.ndarray:
        """Set ``U`` to zero but for the initial value; the residual there costs one step."""
        fine, r = self.levels[0], self._residual
        if r is None or (r.shape, r.dtype) != (U[1:].shape, U.dtype):
            r = self._residual = np.empty_like(U[1:])
        r[...] = 0 if fine.G is None else fine.G
        if fine.left is None and fine.k:
            first = np.empty_like(r[:1])
            fine.phi(range(1), U[:1], first)
            r[:1] += first
        elif fine.left is not None:
            U[0] = 0
        U[1:] = 0
        return r

    def view(self, state_nbytes: int | None = None) -> str:
        """Describe the solver in a few lines, with the memory of this rank where the bytes of a state are given."""
        o, count = self.options, self.nsteps // 2 + 1
        ranks = f"{self.comm.size} time rank" + "s" * (self.comm.size > 1)
        lines = [
            f"ParaDiag '{self.name}': {self.nsteps} steps on {ranks}, alpha {o.alpha:g}, rtol {o.rtol:g}"
            + (f", atol {o.atol:g}" if o.atol else ""),
            f"  {count} frequencies, {-(-count // self.comm.size)} a rank at most; contracts by "
            f"{o.alpha / (1 - o.alpha):.3g} where no mode grows",
        ]
        if state_nbytes is not None:
            k = self.levels[0].k
            points, work = (k + 1) * state_nbytes, 4 * k * state_nbytes
            lines.append(f"  memory of a rank: all points {points / 2**20:.3g} MB, transforms {work / 2**20:.3g} MB")
        return "\n".join(lines)

    def memory_estimate(self, state_nbytes: int) -> tuple[int, int]:
        """Bytes of this rank's trajectory and residual; there are no coarse levels."""
        return (self.local_rows + self.levels[0].k) * state_nbytes, 0

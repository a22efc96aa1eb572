r"""ParaDiag: solve all steps of a linear evolution at once by an alpha-circulant preconditioner, distributed over time.

.. math::  u \leftarrow u + P_\alpha^{-1} (b - A u)

(see :mod:`~pint_fem.paradiag.circulant`). With an eigenvalue :math:`\lambda` of :math:`\Phi`, the first iteration
leaves an error of the shape :math:`\lambda^i`, and each further one multiplies it by :math:`\alpha \lambda^N / (1 -
\alpha \lambda^N)`: at most :math:`\alpha/(1-\alpha)` where :math:`|\lambda| \le 1`, for heat and waves alike.

Needs numpy, scipy and mpi4py only. A scalar ODE::

    class Euler:
        def step(self, steps, u, out): out[...] = u / (1 + dt)

    def solve(k, mu, r): return r / (1 - mu / (1 + dt))

    U = np.zeros((65, 1)); U[0] = 1
    ParaDiag(Euler(), 64, solve, options=dict(alpha=1e-4)).solve(U)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from mpi4py import MPI

from pint_fem.all_at_once.callbacks import returned_block
from pint_fem.all_at_once.levels import Propagator
from pint_fem.all_at_once.norms import PointNorms, euclidean
from pint_fem.all_at_once.stopping import SolveResult
from pint_fem.all_at_once.trace import Trace
from pint_fem.errors import FAILURES
from pint_fem.mgrit.solver import MGRIT
from pint_fem.paradiag.circulant import AlphaCirculant, FrequencySolve
from pint_fem.paradiag.options import ParaDiagOptions

__all__ = ["ParaDiag"]


class ParaDiag(MGRIT):
    """ParaDiag-II for ``U[n+1] = Phi U[n] + G[n]``, ``n = 0..N-1``, with the interface of MGRIT.

    The arrays of :meth:`solve` and what it returns are MGRIT's; residuals are ``Phi U + G - U`` at all points, and
    norms are relative to the trajectory's. ``start="skip"`` or ``"nested"`` begins at zero, ``"guess"`` with what is
    there (always, with :attr:`renew`). Without the assumptions of convergence theory (a ``Phi`` that grows, frequencies
    solved with other operators than those of ``Phi``) it converges more slowly or not, and says so as MGRIT does.

    Parameters
    ----------
    propagator
        The step ``Phi`` (affine in a tangent sweep of a nonlinear evolution), as MGRIT's.
    nsteps
        ``N``.
    solve
        ``(k, mu, r) -> v`` with ``(I - mu Phi) v = r``, complex arrays ``(n,)`` of a rank's unknowns.
    options
        :class:`~pint_fem.paradiag.options.ParaDiagOptions` or a dictionary of them.
    comm, everyone, bounds, point_norms, name, printer, speaks, trace
        As for MGRIT.
    backwards
        ``comm`` is another communicator in reverse order (adjoint sweeps): ranks keep their frequencies.
    circulant
        Makes the preconditioner.

    Raises
    ------
    ValueError
        On bad options.
    """

    def __init__(
        self,
        propagator: Propagator,
        nsteps: int,
        solve: FrequencySolve,
        *,
        options: ParaDiagOptions | Mapping | None = None,
        comm=MPI.COMM_SELF,
        everyone=None,
        bounds: Sequence[int] | None = None,
        point_norms: PointNorms = euclidean,
        name: str = "paradiag",
        printer: Callable[[str], None] = print,
        trace: Trace | None = None,
        speaks: bool | None = None,
        backwards: bool = False,
        circulant: Callable[..., AlphaCirculant] = AlphaCirculant,
    ):
        super().__init__(
            [propagator], nsteps, options=ParaDiagOptions.make(options), comm=comm, everyone=everyone, bounds=bounds,
            linear=True, point_norms=point_norms, name=name, printer=printer, trace=trace, speaks=speaks,
        )  # fmt: skip
        self._frequency_solve, self._backwards, self._make_circulant = solve, backwards, circulant
        self._circulant: AlphaCirculant | None = None
        self._iterates = True
        #: Where ``Phi`` is affine or not linear: called before each iteration with the iterate and the last
        #: contraction (at first ``None``), to improve the solves of the frequencies.
        self.renew: Callable[[np.ndarray, float | None], None] | None = None

    def circulant(self, size: int) -> AlphaCirculant:
        """The preconditioner for states of ``size`` local unknowns."""
        if self._circulant is None or self._size != size:
            self._size = size
            self._circulant = self._make_circulant(
                self.nsteps, self.options.alpha, self._guarded, size, comm=self.comm, bounds=self.levels[0].bounds,
                backwards=self._backwards, trace=self.trace,
            )  # fmt: skip
        return self._circulant

    def _guarded(self, k: int, mu: complex, r: np.ndarray) -> np.ndarray:
        """A failure becomes NaN, which transforms and the norm carry to every rank (no hang)."""
        try:
            return returned_block("solve(k, mu, r)", self._frequency_solve, r.shape, k, mu, r)
        except FAILURES as error:
            if np.isfinite(r).all() or not isinstance(error, Exception):
                self._failures.note(f"frequency {k}", error)
            return np.full_like(r, np.nan)

    def _step_through(self) -> None:
        self.levels[0].solve_sequentially(fresh=True)

    def _iterate(self, U: np.ndarray, start: str, coarse_rhs, result: SolveResult) -> None:
        fine, shape = self.levels[0], U[1:].shape
        size = int(np.prod(U.shape[1:], dtype=int))
        precondition = self.circulant(size)
        from_zero = start in ("skip", "nested") and self.renew is None
        r = self._first_residual(U) if from_zero else self._residuals.at_all_points(U)
        while True:
            with self._residuals.timed():
                squares = [self._residuals.squares(block) for block in (r, U[1:])]
                norm, result.scale = self._residuals.norms(squares, None)
            result.residuals.append(norm)
            self._monitor(result)
            if self._stop(result):
                break
            if self.renew is not None:
                before = result.residuals[-2:-1]
                self.renew(U, norm / before[0] if before else None)
            U[1:] += precondition(r.reshape(fine.k, size)).reshape(shape)
            result.cycles += 1
            if self.trace:
                self.trace.mark("cycle", sweep=self.name, number=result.cycles)
            r = self._residuals.at_all_points(U)
        fine.exchange(U)

    def raise_failures(self) -> None:
        """Raise on every rank if a step has failed on any since the last solve (collective).

        Raises
        ------
        SolverFailure
            Naming the step.
        """
        if self._circulant is not None:
            self._failures.raise_noted(np.zeros((1, self._size)))

    def _first_residual(self, U: np.ndarray) -> np.ndarray:
        """That of zero at all points but the initial one, which costs one step."""
        fine, r = self.levels[0], np.zeros_like(U[1:])
        if fine.left is None and fine.k:
            fine.phi(range(1), U[:1], r[:1])
        elif fine.left is not None:
            U[0] = 0
        U[1:] = 0
        if fine.G is not None:
            r += fine.G
        return r

    def view(self, state_nbytes: int | None = None) -> str:
        """Describe the solver in a few lines, with the memory of this rank where a state's size is known."""
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

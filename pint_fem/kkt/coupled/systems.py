r"""The KKT systems of the frequencies by sparse factorisations of the coupled system, for any linear evolution.

A frequency with the shift :math:`\mu` has the system

.. math::
   A u - \Psi z = a , \qquad A^H \lambda - Q u = b , \qquad R_k z + \Psi^T \lambda = c , \qquad A = I - \mu \Phi , \quad
   R_k = R + \frac{|1 - \mu|^2}{\Delta t^2} R_t .

It is written with the values and multipliers of the stages (:mod:`~pint_fem.kkt.coupled.matrices`), so that its matrix
is sparse. One ordering, of minimum degree on the pattern of all frequencies, serves all of them, and pivots are those
of the stages' matrices: on several frequencies at once (:mod:`~pint_fem.paradiag.lane_factors`), or by SuperLU. Where
that is not accurate, SuperLU exchanges rows; a solution that is not accurate is improved by one more solve for its
residual. Distributed matrices are factored by PETSc as their real equivalent
(:mod:`~pint_fem.paradiag.distributed_systems`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from petsc4py import PETSc
from scipy.sparse import csr_matrix

from pint_fem.errors import InputError, SolverFailure, is_numerical
from pint_fem.evolution.tableaux import DIRK
from pint_fem.kkt.coupled.matrices import (
    DistributedOperator,
    Layout,
    Operator,
    coupled_blocks,
    distributed,
    own_rows,
    stage_operators,
    stage_weights,
)
from pint_fem.paradiag.distributed_systems import PETScSystem
from pint_fem.paradiag.lane_kernels import LaneKernels, groups
from pint_fem.paradiag.sparse_system import SparseSystem

__all__ = ["CoupledSystems"]

_ACCURATE, _WRONG = 1e-13, 1e-7
"""Residuals, relative to the right-hand side, above which a solution is improved, and above which it is refused."""
_SINGULAR = 1e-13
"""A multiple of boundary values that is zero."""


class CoupledSystems:
    r"""The systems of all frequencies, with cached factors.

    Parameters
    ----------
    dirk
        Coefficients of the diagonally implicit method.
    steps
        Number of steps ``N``, which a message names.
    M, K
        Mass matrix and operator of :math:`M \dot u + K u`, ``(n, n)``, of scipy or assembled PETSc matrices, which may
        be distributed over ranks in space. Rows and columns of conditions may have any values.
    F
        Loads of a control that is constant in the step, ``(n, nz)``: the load of stage ``i`` is ``a_ii dt F z``.
    Q, R
        Second derivatives of the misfit and of the regularisation of one step, ``(n, n)`` and ``(nz, nz)``.
    dt
        Step size.
    R_time
        Second derivative of a regularisation of differences of the controls of neighbouring steps, ``(nz, nz)``.
    free
        Own unknowns without a Dirichlet condition, boolean ``(n,)``; default: all.
    memory
        Bytes of factors that this rank may cache; those beyond are made again at each solve.

    Attributes
    ----------
    factorisations : int
        Number of factorisations so far.
    bytes : int
        Size of the cached factors.

    Raises
    ------
    InputError
        If matrices have other shapes than these.
    """

    takes_controls, single = True, False

    def __init__(
        self,
        dirk: DIRK,
        steps: int,
        M: csr_matrix | PETSc.Mat,
        K: csr_matrix | PETSc.Mat,
        F: csr_matrix | PETSc.Mat,
        Q: csr_matrix | PETSc.Mat,
        R: csr_matrix | PETSc.Mat,
        *,
        dt: float,
        R_time: csr_matrix | PETSc.Mat | None = None,
        free: np.ndarray | None = None,
        memory: float = np.inf,
    ):
        given = {"M": M, "K": K, "F": F, "Q": Q, "R": R} | ({} if R_time is None else {"R_time": R_time})
        n, nz = _shape(F)
        for name, X in given.items():
            wanted = {"F": (n, nz), "R": (nz, nz), "R_time": (nz, nz)}.get(name, (n, n))
            if _shape(X) != wanted:
                raise InputError(f"{name} of shape {_shape(X)}: give a matrix {wanted} for {n} unknowns, {nz} controls")
        alone = not isinstance(M, PETSc.Mat) or M.comm.size == 1
        M, K, F, Q, R, *rest = (_local(X) for X in given.values()) if alone else given.values()
        own = n if alone else M.getLocalSize()[0]
        free = np.ones(own, bool) if free is None else np.asarray(free)
        if free.shape != (own,) or free.dtype != bool:
            raise InputError(f"free of shape {free.shape} and type {free.dtype}: give booleans ({own},)")
        operator = Operator if alone else DistributedOperator
        self._weights, self._steps, self._memory = stage_weights(dirk), steps, memory
        S, self._M, self._F = stage_operators(M, K, F, free, self._weights.diagonal * dt)
        self._S, self._Q, self._R = S[self._weights.diagonal[-1] * dt], operator(Q), operator(R)
        self._has_conditions = bool(self._M.comm.allreduce(int((~free).sum())))
        self._scale(dt)
        blocks = coupled_blocks(
            self._weights, S, self._M, self._F, self._Q, self._R, dt=dt, tau=self._tau, sigma=self._sigma
        )
        s, self._time_weight = self._weights.stages, 1 / dt**2
        if rest:
            blocks.append({(s, s): self._sigma**2 / self._tau * operator(rest[0]).ways[0]})
        states = [self._M.column_starts] * s
        self._layout = Layout([*states, self._F.column_starts, *states], self._M.comm.rank)
        parts = [self._layout.matrix(part) for part in blocks]
        self._system: SparseSystem | PETScSystem
        if alone:
            self._parts = [Operator(part) for part in parts]
            self._system = SparseSystem(parts, self._part_weights)
        else:
            matrices = [distributed(part, self._layout.size, M.comm) for part in parts]
            self._parts = [DistributedOperator(matrix) for matrix in matrices]
            self._system = PETScSystem(matrices, self._part_weights, {}, "kkt_coupled_")
        self._factors: dict[tuple, Any] = {}
        self._largest: dict[int, int] = {}
        self.factorisations = self.bytes = 0

    def _scale(self, dt: float) -> None:
        """Set the scales of multipliers and controls, powers of two: ``Q`` has the size of ``F R^-1 F^T``."""
        Q, R, F, M = (np.float64(x.largest) for x in (self._Q, self._R, self._F, self._M))
        power = lambda x: 2.0 ** np.round(np.log2(x)) if 0 < x < np.inf else 1.0
        with np.errstate(divide="ignore", invalid="ignore"):
            self._tau = power(np.sqrt(Q * R) / (F * dt))
            self._sigma = power(np.sqrt(self._tau * M / R))

    def _part_weights(self, mu: complex) -> list[complex]:
        """The weights of the parts for a shift."""
        every = [1.0, mu, np.conj(mu), abs(1 - mu) ** 2 * self._time_weight]
        return every[: len(self._parts)]

    @property
    def on_lanes(self) -> bool:
        """Whether several frequencies are solved at once."""
        return self._system.has_lanes

    # -- solves --------------------------------------------------------------------------------------------------------
    def solve_all(
        self, frequencies: range, mu: np.ndarray, a: np.ndarray, b: np.ndarray, c: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        r"""Solve for some frequencies (collective over space).

        Parameters
        ----------
        frequencies
            Their numbers ``k``.
        mu
            The shifts of all frequencies.
        a, b, c
            Right-hand sides of the state, of the adjoint, complex ``(frequencies, n)``, and of the control,
            ``(frequencies, nz)``; ``None`` for zero.

        Returns
        -------
        tuple of ndarray
            :math:`u`, :math:`z` and :math:`\lambda`, complex, shaped like ``a``, ``c`` and ``b``. Those of a frequency
            do not depend on the other frequencies: on one rank in space they are bitwise identical.

        Raises
        ------
        SolverFailure
            If a system is singular to working precision; the message names the frequency.
        """
        shifts = np.array([complex(mu[k]) for k in frequencies])
        self._require_boundary_values(frequencies, shifts)
        (s, _, g, _, e, e0), own = self._weights, self._layout.own
        state, control, adjoint = own[s - 1], own[s], own[-1]
        r = np.zeros((len(shifts), self._layout.size), complex)
        r[:, state], r[:, adjoint] = self._S(a) / e[-1], b / self._tau
        if c is not None:
            r[:, control] = self._sigma / self._tau * c
        x = self._solve_accurately(frequencies, shifts, r)
        u, z = x[:, state].copy(), self._sigma * x[:, control]
        P = [self._tau * x[:, part] for part in own[s + 1 :]]
        if e0:
            return u, z, self._S(P[-1], transposed=True) / e[-1]
        # the last row of the adjoint, which has no cancellation
        lam = self._M(sum(g[i] * Pi for i, Pi in enumerate(P)), transposed=True)
        lam *= shifts.conj()[:, None]
        return u, z, lam + self._Q(u) + b

    def _require_boundary_values(self, frequencies: range, shifts: np.ndarray) -> None:
        """Require that boundary values are determined: a step multiplies them by ``e_0``."""
        singular = np.abs(1 - shifts * self._weights.e0) < _SINGULAR
        if self._has_conditions and singular.any():
            k = frequencies[int(np.argmax(singular))]
            raise SolverFailure(
                f"frequency {k} of {self._steps} steps: the coupled system is singular, as the method multiplies "
                f"boundary values by {self._weights.e0:g} in a step; give an even number of steps or a stiffly "
                "accurate method"
            )

    def _solve_accurately(self, frequencies: range, shifts: np.ndarray, r: np.ndarray) -> np.ndarray:
        """Solve, and once more for the residuals of solutions that are not accurate."""
        weights = np.array([self._part_weights(mu) for mu in shifts]).reshape(len(shifts), len(self._parts)).T
        size = self._norms(r)

        def residual(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            rest = r.copy()
            for w, part in zip(weights, self._parts, strict=True):
                rest -= w[:, None] * part(x)
            return rest, self._norms(rest)

        with np.errstate(invalid="ignore", over="ignore"):
            x = self._solve(frequencies, shifts, r)
            rest, error = residual(x)
            poor = ~(error <= _ACCURATE * size)
            if poor.any():
                x[poor] += self._solve(frequencies, shifts, rest)[poor]
                rest, error = residual(x)
            wrong = ~(error <= _WRONG * size) & np.isfinite(size)
        if wrong.any():
            i = int(np.argmax(wrong))
            raise self._singular(frequencies[i], f"a solution has the residual {error[i] / size[i]:.1e}")
        return x

    def _norms(self, r: np.ndarray) -> np.ndarray:
        """Norms of complex vectors ``(f, size)`` of all ranks in space (collective)."""
        own = np.sum(np.abs(r) ** 2, axis=1)
        return np.sqrt(own if self._M.comm.size == 1 else self._M.comm.allreduce(own))

    def _singular(self, k: int, why: str) -> SolverFailure:
        return SolverFailure(
            f"frequency {k} of {self._steps} steps: the coupled system of state, control and adjoint is singular to "
            f"working precision ({why}): give a regularisation that is positive definite on all controls"
        )

    def _solve(self, frequencies: range, shifts: np.ndarray, r: np.ndarray) -> np.ndarray:
        """Solutions for right-hand sides ``(f, size)``, as the factors give them."""
        if not self._system.has_lanes:
            return np.array([self._solve_one(k, mu, x) for k, mu, x in zip(frequencies, shifts, r, strict=True)])
        out, begin = np.empty_like(r), 0
        for group, kernels in groups(frequencies, "d"):
            part = slice(begin, begin + len(group))
            begin += len(group)
            own = shifts[part]
            factor = self._factor_of_lanes(kernels, group, own)
            lanes = kernels.to_lanes(r[part, None])
            lanes = self._system.solve_lanes(kernels, factor, factor.y, lanes, transposed=False)
            kernels.from_lanes(lanes, out[part, None])
        return out

    def _solve_one(self, k: int, mu: complex, r: np.ndarray) -> np.ndarray:
        """Solve for one frequency; a factor beyond the memory limit is released afterwards."""
        factor = self._cached((k,), 1, lambda: self._named(k, self._system.factor, mu))
        try:
            return self._named(k, partial(self._system.solve, factor, mu, r, transposed=False))
        finally:
            if (k,) not in self._factors:
                self._system.release(factor)

    def _factor_of_lanes(self, kernels: LaneKernels, group: range, shifts: np.ndarray) -> Any:
        """The factor of a group of frequencies; where it fails, the failure names the frequency."""
        try:
            return self._cached((group[0], len(group)), len(group), lambda: self._system.factor_lanes(kernels, shifts))
        except RuntimeError:
            for k, mu in zip(group, shifts, strict=True):
                self._named(k, self._system.factor, mu)
            raise

    def _named(self, k: int, work: Callable, *args: Any) -> Any:
        """The result of some work for a frequency, which a numerical failure names."""
        try:
            return work(*args)
        except Exception as error:
            if is_numerical(error):
                raise self._singular(k, str(error)) from error
            raise

    def _cached(self, key: tuple, count: int, make: Callable[[], tuple[Any, int]]) -> Any:
        """The cached factor of ``key``, or a new one of ``count`` frequencies, which is cached where it has room."""
        factor = self._factors.get(key)
        if factor is None:
            factor, size = make()
            self.factorisations += count
            self._largest[count] = largest = max(self._largest.get(count, 0), size)
            if self.bytes + largest <= self._memory:
                self._factors[key] = factor
                self.bytes += size
        return factor

    def release(self) -> None:
        """Release all factors (collective over space)."""
        for key, factor in self._factors.items():
            if len(key) == 1:  # those on lanes are numpy's
                self._system.release(factor)
        self._factors.clear()
        self.bytes = 0


def _shape(X: csr_matrix | PETSc.Mat) -> tuple[int, int]:
    return tuple(X.getSize()) if isinstance(X, PETSc.Mat) else tuple(X.shape)


def _local(X: csr_matrix | PETSc.Mat) -> csr_matrix:
    """A matrix on one rank as scipy's."""
    return own_rows(X) if isinstance(X, PETSc.Mat) else csr_matrix(X)

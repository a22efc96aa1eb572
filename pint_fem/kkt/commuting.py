r"""The KKT systems of all frequencies by shifted solves, where misfit and control are functions of one pencil.

For right-hand sides :math:`a, b` of the equations of state and adjoint

.. math::
   A_k u + \Psi R_k^{-1} \Psi^T \lambda = a , \qquad A_k^H \lambda - Q u = b , \qquad A_k = I - \mu_k \Phi ,

the partial fractions of :mod:`~pint_fem.kkt.partial_fractions` give

.. math::
   \begin{pmatrix} u \\ \lambda' \end{pmatrix} = (T_\infty + M_0^{-1} K_0 T_1) \begin{pmatrix} a \\ M_0^{-1} b
   \end{pmatrix} +
   \sum_j p_j\, (K_0 - y_j M_0)^{-1} q_j^T \begin{pmatrix} M_0 a \\ b \end{pmatrix} , \qquad \lambda = M_0 \lambda' .

The loads :math:`F R^{-1} c` of the controls' right-hand sides are inputs of the sum, too, and the multipliers' sum
:math:`w = \sum_i h_i \Lambda_i` over the stages is a result: :math:`z = R^{-1} (c - F^T w)` has one difference of
nearly equal numbers for a small weight of the control. By :math:`\Psi^T \lambda` there would be two, as
:math:`\lambda` itself is one.

W frequencies are solved at once on lanes (:mod:`pint_fem.paradiag.lane_kernels`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from firedrake.petsc import PETSc

from pint_fem.errors import SolverFailure
from pint_fem.kkt.partial_fractions import PartialFractions
from pint_fem.paradiag.distributed_systems import Product, distributed_system
from pint_fem.paradiag.lane_kernels import LaneKernels, groups

__all__ = ["CommutingSystems"]

_NEGLIGIBLE = 1e-9
"""Relative size of the value at infinity that would take solves with the mass matrix, but is round-off."""


class CommutingSystems:
    """The systems of the frequencies of all ranks, factored when first used.

    Parameters
    ----------
    fractions
        The partial fractions of all frequencies.
    K, M
        The matrices :math:`K_0`, with unit rows and columns of the unknowns with a condition, and :math:`M_0`, with
        zero ones; assembled, of this rank's space communicator.
    fields
        Places of each field's unknowns in a state of this rank: index arrays or slices of the same length.
    free
        Unknowns of a field without a condition, boolean ``(n_0,)``.
    parameters, prefix
        PETSc options of the shifted systems, and the prefix of those in PETSc's database.
    memory
        Bytes of factors that are kept.
    single
        Whether systems are solved in single precision where they are on lanes.

    Attributes
    ----------
    factorisations, bytes : int
        Number of factorisations so far, each frequency and pole counting as one; bytes of the cached factors.
    """

    takes_controls = False

    def __init__(
        self, fractions: PartialFractions, K: PETSc.Mat, M: PETSc.Mat, *, fields: list, free: np.ndarray,
        parameters: Mapping, prefix: str, memory: float = 4e9, single: bool = False,
    ):  # fmt: skip
        self._fractions, self._fields, self._free = fractions, fields, np.asarray(free, bool)
        self._system = distributed_system((K, M), parameters, prefix=prefix)
        self._memory, self.single, self._K = memory, single, None
        if fractions.linear.any():
            self._K = Product(K)
        self._cached: dict[tuple, Any] = {}
        self.factorisations = self.bytes = 0
        p = len(fields)
        at_infinity = fractions.constant[:, :p, p:]
        if at_infinity.size and np.abs(at_infinity).max() > _NEGLIGIBLE * np.abs(fractions.constant).max():
            raise SolverFailure("the state of a KKT system does not vanish at infinity for a right-hand side b")

    @property
    def poles(self) -> int:
        """Number of solves per frequency."""
        return self._fractions.poles.shape[1]

    @property
    def on_lanes(self) -> bool:
        """Whether several frequencies are solved at once."""
        return self._system.has_lanes

    def solve_all(
        self, frequencies: range, mu: np.ndarray, a: np.ndarray, b: np.ndarray, c: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
        """Solve the systems of some frequencies (collective over space).

        Parameters
        ----------
        frequencies, mu
            Their numbers; the eigenvalues of the shift of all frequencies.
        a, b
            Right-hand sides, complex ``(frequencies, n)``; entries of unknowns with a condition are not used.
        c
            Loads :math:`F R^{-1} c` of the controls' right-hand sides, which are eliminated before.

        Returns
        -------
        u, w, lam : ndarray of complex, shape (frequencies, n), the same or None, and the first again
            Zero for unknowns with a condition. Where there are loads, :math:`z = R^{-1} (c - F^T w)`.
        """
        u, lam = np.zeros(a.shape, a.dtype), np.zeros(a.shape, a.dtype)
        w = None if c is None else np.zeros(a.shape, a.dtype)
        given = [a, b] if c is None else [a, b, c]
        results = [u, lam] if w is None else [u, lam, w]
        if not self.on_lanes:
            for i, k in enumerate(frequencies):
                for out, values in zip(results, self._solve_one(k, *(x[i] for x in given)), strict=False):
                    out[i] = values
            return u, w, lam
        begin = 0
        for own, kernels in groups(frequencies, self._kind):
            part = slice(begin, begin + len(own))
            lanes = [kernels.to_lanes(self._of_fields(x[part])) for x in given]
            rows = [np.zeros((len(own), *lanes[0].shape[:2]), kernels.complex) for _ in results]
            for result, out in zip(self.solve_lanes(own, kernels, *lanes), rows, strict=True):
                kernels.from_lanes(result, out)
            for out, values in zip(results, rows, strict=True):
                for f, where in enumerate(self._fields):
                    out[part, where] = values[:, f]
            begin += len(own)
        return u, w, lam

    @property
    def _kind(self) -> str:
        return "f" if self.single else "d"

    def _of_fields(self, rows: np.ndarray) -> np.ndarray:
        """The free unknowns of the fields of states ``(f, n)``: ``(f, fields, n_0)``."""
        return np.stack([rows[:, where] for where in self._fields], axis=1) * self._free

    def solve_lanes(
        self, own: range, kernels: LaneKernels, a: np.ndarray, b: np.ndarray, c: np.ndarray | None = None
    ) -> tuple[np.ndarray, ...]:
        """Solve for the fields ``(fields, n_0, 2, W)`` of the right-hand sides on lanes, which have no entries of
        unknowns with a condition; solutions likewise.
        """
        of, p, W = self._fractions, len(self._fields), kernels.width
        index = np.array([*own, *[own[-1]] * (W - len(own))])
        Ma = self._system.mass_lanes(kernels, a, transposed=False)
        loads = [] if c is None else [*c]
        sources, solutions, one = [*Ma, *b, *loads], [], a.shape[1]
        for j in range(self.poles):
            y, right = of.poles[index, j], kernels.empty(1, one)
            kernels.combine(of.inputs[index, j, : len(sources)].T, sources, right[0])
            factor = self._factor_lanes(own, j, kernels, y[: len(own)])
            solutions.append(self._system.solve_lanes(kernels, factor, y, right, transposed=False)[0])
        u, multiplier, lam, w = (kernels.empty(p, one) for _ in range(4))
        Ka = [] if self._K is None else [*self._K.on_lanes(kernels, a, transposed=False)]
        constant, outputs = of.constant[index], of.outputs[index]

        def combine(factors: list[np.ndarray], arrays: list[np.ndarray], out: np.ndarray) -> None:
            kernels.combine(np.concatenate(factors, axis=1).T, arrays, out)

        for f in range(p):
            combine([constant[:, f, :p], outputs[..., f]], [*a, *solutions], u[f])
            combine([outputs[..., p + f]], solutions, multiplier[f])
            if c is not None:
                combine([constant[:, 2 * p + f, :p], outputs[..., 2 * p + f]], [*a, *solutions], w[f])
        Ml, units = self._system.mass_lanes(kernels, multiplier, transposed=False), np.ones((W, 1))
        for f in range(p):
            factors = [units, constant[:, p + f, : len(sources)], of.linear[index, p + f, : len(Ka)]]
            combine(factors, [Ml[f], *sources, *Ka], lam[f])
        return (u, lam) if c is None else (u, lam, w)

    def _factor_lanes(self, own: range, j: int, kernels: LaneKernels, y: np.ndarray) -> Any:
        key = own[0], j, kernels.dtype.char, len(own)
        return self._from_cache(key, len(own), lambda: self._system.factor_lanes(kernels, y))

    def _from_cache(self, key: tuple, count: int, make: Any) -> Any:
        factor = self._cached.get(key)
        if factor is None:
            factor, size = make()
            self.factorisations += count
            if self.bytes + size <= self._memory:
                self._cached[key] = factor
                self.bytes += size
        return factor

    def _solve_one(
        self, k: int, a: np.ndarray, b: np.ndarray, c: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Solve for one frequency, complex ``(n,)`` (collective over space)."""
        of, p, system = self._fractions, len(self._fields), self._system
        c = np.zeros_like(b) if c is None else c
        a_f, b_f, c_f = ([np.where(self._free, x[where], 0) for where in self._fields] for x in (a, b, c))
        Ma = [system.mass(np.ascontiguousarray(x, complex), transposed=False) for x in a_f]
        u = [of.constant[k, f, :p] @ np.array(a_f) for f in range(p)]
        multiplier, w = ([np.zeros(len(self._free), complex) for _ in range(p)] for _ in range(2))
        for j in range(self.poles):
            y, q, out = complex(of.poles[k, j]), of.inputs[k, j], of.outputs[k, j]
            right = sum(q[f] * Ma[f] + q[p + f] * b_f[f] + q[2 * p + f] * c_f[f] for f in range(p))
            factor = self._from_cache((k, j), 1, lambda y=y: system.factor(y))
            try:
                x = system.solve(factor, y, right, transposed=False)
            finally:
                if (k, j) not in self._cached:
                    system.release(factor)
            for f in range(p):
                u[f] = u[f] + out[f] * x
                multiplier[f] += out[p + f] * x
                w[f] += out[2 * p + f] * x
        states = np.zeros(a.shape, complex), np.zeros(a.shape, complex), np.zeros(a.shape, complex)
        for f, where in enumerate(self._fields):
            lam = system.mass(multiplier[f], transposed=False)
            lam += of.constant[k, p + f, :p] @ np.array(Ma) + of.constant[k, p + f, p : 2 * p] @ np.array(b_f)
            if self._K is not None:
                lam += of.linear[k, p + f, :p] @ np.array([self._K(x, transposed=False) for x in a_f])
            lam += of.constant[k, p + f, 2 * p :] @ np.array(c_f)
            w[f] += of.constant[k, 2 * p + f, :p] @ np.array(a_f)
            states[0][where], states[1][where], states[2][where] = u[f], lam, w[f]
        return states

    def release(self) -> None:
        """Free all factors (collective over space)."""
        for key, factor in self._cached.items():
            if len(key) == 2:
                self._system.release(factor)
        self._cached.clear()
        self.bytes = 0

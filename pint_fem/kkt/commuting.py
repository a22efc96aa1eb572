r"""The KKT systems of all frequencies by shifted solves, where misfit and control are functions of one pencil.

For right-hand sides :math:`a, b` of the equations of state and adjoint

.. math::
   A_k u + \Psi R_k^{-1} \Psi^T \lambda = a , \qquad A_k^H \lambda - Q u = b , \qquad A_k = I - \mu_k \Phi ,

the partial fractions of :mod:`~pint_fem.kkt.partial_fractions` give

.. math::
   \begin{pmatrix} u \\ \lambda' \end{pmatrix} = (T_\infty + M_0^{-1} K_0 T_1) \begin{pmatrix} a \\ M_0^{-1} b
   \end{pmatrix} +
   \sum_j p_j\, (K_0 - y_j M_0)^{-1} q_j^T \begin{pmatrix} M_0 a \\ b \end{pmatrix} , \qquad \lambda = M_0 \lambda' .

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
        self, frequencies: range, mu: np.ndarray, a: np.ndarray, b: np.ndarray, c: None = None
    ) -> tuple[np.ndarray, None, np.ndarray]:
        """Solve the systems of some frequencies (collective over space).

        Parameters
        ----------
        frequencies, mu
            Their numbers; the eigenvalues of the shift of all frequencies.
        a, b
            Right-hand sides, complex ``(frequencies, n)``; entries of unknowns with a condition are not used.
        c
            Controls are eliminated before.

        Returns
        -------
        u, z, lam : ndarray of complex, shape (frequencies, n), None, and the first again
            Zero for unknowns with a condition.
        """
        u, lam = np.zeros(a.shape, a.dtype), np.zeros(a.shape, a.dtype)
        if not self.on_lanes:
            for i, k in enumerate(frequencies):
                u[i], lam[i] = self._solve_one(k, a[i], b[i])
            return u, None, lam
        begin = 0
        for own, kernels in groups(frequencies, self._kind):
            part = slice(begin, begin + len(own))
            lanes = [kernels.to_lanes(self._of_fields(x[part])) for x in (a, b)]
            rows = [np.zeros((len(own), *lanes[0].shape[:2]), kernels.complex) for _ in range(2)]
            for result, out in zip(self.solve_lanes(own, kernels, *lanes), rows, strict=True):
                kernels.from_lanes(result, out)
            for out, values in zip((u, lam), rows, strict=True):
                for f, where in enumerate(self._fields):
                    out[part, where] = values[:, f]
            begin += len(own)
        return u, None, lam

    @property
    def _kind(self) -> str:
        return "f" if self.single else "d"

    def groups(self, frequencies: range) -> Any:
        """Groups of frequencies with their kernels, for :meth:`solve_lanes`."""
        return groups(frequencies, self._kind)

    def _of_fields(self, rows: np.ndarray) -> np.ndarray:
        """The free unknowns of the fields of states ``(f, n)``: ``(f, fields, n_0)``."""
        return np.stack([rows[:, where] for where in self._fields], axis=1) * self._free

    def solve_lanes(
        self, own: range, kernels: LaneKernels, a: np.ndarray, b: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Solve for the fields ``(fields, n_0, 2, W)`` of the right-hand sides on lanes, which have no entries of
        unknowns with a condition; solutions likewise.
        """
        of, p, W = self._fractions, len(self._fields), kernels.width
        index = np.array([*own, *[own[-1]] * (W - len(own))])
        Ma = self._system.mass_lanes(kernels, a, transposed=False)
        u, multiplier = (kernels.empty(*a.shape[:2]) for _ in range(2))
        u[...], multiplier[...] = 0, 0
        one = a.shape[1]
        for j in range(self.poles):
            inputs, outputs, y = of.inputs[index, j], of.outputs[index, j], of.poles[index, j]
            right = kernels.empty(1, one)
            right[...] = 0
            for f in range(p):
                _add(kernels, inputs[:, f], Ma[f], right[0])
                _add(kernels, inputs[:, p + f], b[f], right[0])
            factor = self._factor_lanes(own, j, kernels, y[: len(own)])
            x = self._system.solve_lanes(kernels, factor, y, right, transposed=False)
            for f in range(p):
                _add(kernels, outputs[:, f], x[0], u[f])
                _add(kernels, outputs[:, p + f], x[0], multiplier[f])
        lam = self._system.mass_lanes(kernels, multiplier, transposed=False)
        for f in range(p):
            for g in range(p):
                _add(kernels, of.constant[index, f, g], a[g], u[f])
                _add(kernels, of.constant[index, p + f, g], Ma[g], lam[f])
                _add(kernels, of.constant[index, p + f, p + g], b[g], lam[f])
        if self._K is not None:
            Ka = self._K.on_lanes(kernels, a, transposed=False)
            for f in range(p):
                for g in range(p):
                    _add(kernels, of.linear[index, p + f, g], Ka[g], lam[f])
        return u, lam

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

    def _solve_one(self, k: int, a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Solve for one frequency, complex ``(n,)`` (collective over space)."""
        of, p, system = self._fractions, len(self._fields), self._system
        a_f, b_f = ([np.where(self._free, x[where], 0) for where in self._fields] for x in (a, b))
        Ma = [system.mass(np.ascontiguousarray(x, complex), transposed=False) for x in a_f]
        u = [of.constant[k, f, :p] @ np.array(a_f) for f in range(p)]
        multiplier = [np.zeros(len(self._free), complex) for _ in range(p)]
        for j in range(self.poles):
            y, q, out = complex(of.poles[k, j]), of.inputs[k, j], of.outputs[k, j]
            right = sum(q[f] * Ma[f] + q[p + f] * b_f[f] for f in range(p))
            factor = self._from_cache((k, j), 1, lambda y=y: system.factor(y))
            try:
                x = system.solve(factor, y, right, transposed=False)
            finally:
                if (k, j) not in self._cached:
                    system.release(factor)
            for f in range(p):
                u[f] = u[f] + out[f] * x
                multiplier[f] += out[p + f] * x
        states = np.zeros(a.shape, complex), np.zeros(a.shape, complex)
        for f, where in enumerate(self._fields):
            lam = system.mass(multiplier[f], transposed=False)
            lam += of.constant[k, p + f, :p] @ np.array(Ma) + of.constant[k, p + f, p:] @ np.array(b_f)
            if self._K is not None:
                lam += of.linear[k, p + f, :p] @ np.array([self._K(x, transposed=False) for x in a_f])
            states[0][where], states[1][where] = u[f], lam
        return states

    def release(self) -> None:
        """Free all factors (collective over space)."""
        for key, factor in self._cached.items():
            if len(key) == 2:
                self._system.release(factor)
        self._cached.clear()
        self.bytes = 0


def _add(kernels: LaneKernels, factors: np.ndarray, x: np.ndarray, y: np.ndarray) -> None:
    """``y += factors x`` of lanes ``(n, 2, W)``, where the factors are not zero."""
    if np.abs(factors).max() > 0:
        kernels.add_multiple(factors, x, y)

r"""The solves of the frequencies for a finite element step: cached sparse factors, one per frequency and stage.

:math:`(I - \mu \Phi)^{-1}` is a product of :math:`(S_j - y_j M)^{-1} S_j` (:mod:`~pint_fem.paradiag.stage_shifts`) with
the linear propagator's ``S`` and ``M``: ``S`` has unit rows and columns for boundary values and ``M`` zero
rows, so that boundary values are right, too. (With *different* diagonal entries the factors do not commute where
boundary values of a state reach its neighbours; one more iteration corrects that.) A factor is applied as
:math:`I + y_j (S_j - y_j M)^{-1} M`. State, tangent and, transposed, adjoint use the same factors. Factors beyond the
memory limit are made again at each solve.

Where a system has kernels for several frequencies at once, all frequencies of a rank are solved in groups, on *lanes*
(:mod:`~pint_fem.paradiag.lane_kernels`), in single precision where the right-hand sides are.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike

from pint_fem.paradiag.lane_kernels import LaneKernels, groups
from pint_fem.paradiag.stage_shifts import shifted_factors

__all__ = ["FrequencyBlocks", "ProjectedSystem", "ShiftedSteps", "ShiftedSystem", "WrappedSystem"]


class ShiftedSystem(ABC):
    """The matrices ``S - y M`` for many complex ``y``."""

    @abstractmethod
    def factor(self, y: complex) -> tuple[Any, int]:
        """Something that :meth:`solve` takes, and its size in bytes."""

    @abstractmethod
    def solve(self, factor: Any, y: complex, r: np.ndarray, *, transposed: bool) -> np.ndarray:
        """Solve for a complex vector with the matrix of ``y`` or its (not conjugate) transpose."""

    @abstractmethod
    def mass(self, r: np.ndarray, *, transposed: bool) -> np.ndarray:
        """``M r`` or ``M^T r``."""

    def release(self, factor: Any) -> None:
        """Free the memory of a factor that is not cached, where that has to be done explicitly."""
        return None

    @property
    def has_lanes(self) -> bool:
        """Whether the methods for several frequencies at once can be called."""
        return False

    def factor_lanes(self, kernels: LaneKernels, y: np.ndarray) -> tuple[Any, int]:
        """Factors for at most W shifts ``y``, and their size in bytes."""
        raise NotImplementedError

    def solve_lanes(
        self, kernels: LaneKernels, factor: Any, y: np.ndarray, r: np.ndarray, *, transposed: bool
    ) -> np.ndarray:
        """Solve for lanes ``(batch, n, 2, W)`` with the matrices of W shifts or their transposes."""
        raise NotImplementedError

    def mass_lanes(self, kernels: LaneKernels, r: np.ndarray, *, transposed: bool) -> np.ndarray:
        """``M r`` or ``M^T r`` of lanes ``(batch, n, 2, W)``."""
        raise NotImplementedError

    def step_lanes(self, kernels: LaneKernels, factor: Any, y: np.ndarray, r: np.ndarray, *, transposed: bool) -> None:
        """Add ``y (S - y M)^-1 M r`` to lanes, or ``y M^T (S - y M)^-T r``, in place."""
        if transposed:
            z = self.mass_lanes(kernels, self.solve_lanes(kernels, factor, y, r, transposed=True), transposed=True)
        else:
            z = self.solve_lanes(kernels, factor, y, self.mass_lanes(kernels, r, transposed=False), transposed=False)
        kernels.add_multiple(y, z, r)


class ShiftedSteps:
    r""":math:`(I - \mu \Phi)^{-1}` and its transpose.

    Parameters
    ----------
    A, b
        Coefficients of the diagonally implicit method, ``(s, s)`` and ``(s,)``.
    systems
        One for each different diagonal entry of ``A``.
    memory
        Bytes of factors that this rank may cache.

    Attributes
    ----------
    systems : list of ShiftedSystem
        One per stage.
    bytes, kept : int
        Size and number of the cached factors.
    factorisations : int
        Number of factorisations so far, each frequency, stage and precision counting as one.
    """

    def __init__(self, A: ArrayLike, b: ArrayLike, systems: Mapping[float, ShiftedSystem], memory: float):
        self.A, self.b = np.asarray(A, dtype=float), np.asarray(b, dtype=float)
        self.systems = [systems[a] for a in np.diag(self.A)]
        self._memory, self._factors, self._shifts = memory, {}, {}
        self.bytes = self.kept = self.factorisations = 0
        self._largest: dict[tuple, int] = {}

    def solve(self, k: int, mu: complex, r: np.ndarray) -> np.ndarray:
        """Solve ``(I - mu_k Phi) v = r`` for frequency ``k``, complex arrays ``(n,)``."""
        scale, shifts = self._at(k, mu)
        for j, (system, y) in enumerate(zip(self.systems, shifts, strict=True)):
            r = r + y * self._solve(k, j, y, system.mass(r, transposed=False), transposed=False)
        return scale * r

    def solve_transposed(self, k: int, mu: complex, r: np.ndarray) -> np.ndarray:
        """Solve ``(I - mu_k Phi^T) v = r`` for frequency ``k``, complex arrays ``(n,)``."""
        scale, shifts = self._at(k, mu)
        for j, (system, y) in reversed(list(enumerate(zip(self.systems, shifts, strict=True)))):
            r = r + y * system.mass(self._solve(k, j, y, r, transposed=True), transposed=True)
        return scale * r

    def _solve(self, k: int, j: int, y: complex, r: np.ndarray, *, transposed: bool) -> np.ndarray:
        """Solve with a system's matrix; a factor beyond the memory limit is released afterwards."""
        system, factor = self.systems[j], self._factor(k, j, y)
        try:
            return system.solve(factor, y, r, transposed=transposed)
        finally:
            if (k, j) not in self._factors:
                system.release(factor)

    def release(self) -> None:
        """Release all factors (collective over space), for example when the operators change."""
        for (_, j, *lanes), factor in self._factors.items():
            if not lanes:  # those on lanes are numpy's
                self.systems[j].release(factor)
        self._factors.clear()
        self.bytes = self.kept = 0

    def _at(self, k: int, mu: complex) -> tuple[complex, Sequence[complex]]:
        if k not in self._shifts:
            self._shifts[k] = mu, *shifted_factors(self.A, self.b, mu)
        return self._shifts[k][1:]

    def _factor(self, k: int, j: int, y: complex):
        return self._cached((k, j), 1, lambda: self.systems[j].factor(y))

    def _cached(self, key: tuple, count: int, make: Callable[[], tuple[Any, int]]) -> Any:
        """The cached factor of ``key``, or a new one of ``count`` frequencies, which is cached where it has room."""
        factor = self._factors.get(key)
        if factor is None:
            factor, size = make()
            self.factorisations += count
            self._largest[key[2:]] = largest = max(self._largest.get(key[2:], 0), size)
            if self.bytes + largest <= self._memory:
                self._factors[key] = factor
                self.bytes, self.kept = self.bytes + size, self.kept + count
        return factor

    # -- several frequencies at once -----------------------------------------------------------------------------------
    @property
    def has_lanes(self) -> bool:
        """Whether :meth:`solve_all` can be called."""
        return all(system.has_lanes for system in self.systems)

    def solve_all(
        self,
        frequencies: range,
        mu: np.ndarray,
        rows: np.ndarray,
        *,
        transposed: bool = False,
        out: np.ndarray | None = None,
    ) -> np.ndarray:
        """Solve ``(I - mu_k Phi) v = r``, or with ``Phi^T``, for some frequencies.

        Parameters
        ----------
        frequencies
            Their numbers ``k``.
        mu
            The numbers ``mu_k`` of all frequencies.
        rows
            Right-hand sides, complex ``(frequencies, n)`` or ``(frequencies, batch, n)``, with which each factor is
            read once for a batch. Factors are in single precision for right-hand sides of type ``complex64``.
        transposed
            Whether it is ``Phi^T``.
        out
            Where the solutions are written to, shaped and typed like ``rows``; default: a new array.

        Returns
        -------
        ndarray
            The solutions, shaped and typed like ``rows``. Those of a frequency are bitwise identical whatever the other
            frequencies.

        Raises
        ------
        RuntimeError
            If a matrix is singular.
        """
        out = np.empty(rows.shape, rows.dtype) if out is None else out
        given, results = (x if x.ndim == 3 else x[:, None] for x in (rows, out))
        begin, memory = 0, None
        for own, kernels in groups(frequencies, "f" if rows.dtype == np.complex64 else "d"):
            count, part = len(own), slice(begin, begin + len(own))
            padded = [*range(count), *[count - 1] * (kernels.width - count)]
            scales, shifts = (
                np.array(v)[padded] for v in zip(*(self._at(k, complex(mu[k])) for k in own), strict=True)
            )
            if memory is None or memory.shape[-1] != kernels.width:
                memory = kernels.empty(*given.shape[1:])
            lanes = self._solve_lanes(
                kernels, own, shifts, kernels.to_lanes(given[part], memory), transposed=transposed
            )
            kernels.multiply(scales, lanes)
            kernels.from_lanes(lanes, results[part])
            begin += count
        return out

    def _solve_lanes(
        self, kernels: LaneKernels, own: range, shifts: np.ndarray, r: np.ndarray, *, transposed: bool
    ) -> np.ndarray:
        """The product of the stages' solves, on lanes; ``r`` is overwritten."""
        stages = list(enumerate(zip(self.systems, shifts.T, strict=True)))
        for j, (system, y) in reversed(stages) if transposed else stages:
            key = own[0], j, kernels.dtype.char, len(own)
            factor = self._cached(key, len(own), lambda s=system, y=y: s.factor_lanes(kernels, y[: len(own)]))
            system.step_lanes(kernels, factor, y, r, transposed=transposed)
        return r


class FrequencyBlocks:
    """Solves for several frequencies at once, a :class:`~pint_fem.paradiag.circulant.BlockSolve`.

    Parameters
    ----------
    systems
        :class:`ShiftedSteps`, or an object with the same ``has_lanes`` and ``solve_all``.
    transposed
        Whether it is ``Phi^T`` that is solved with.
    """

    def __init__(self, systems: Any, *, transposed: bool):
        self._systems, self._transposed = systems, transposed

    @property
    def available(self) -> bool:
        """Whether the systems have kernels for several frequencies."""
        return self._systems.has_lanes

    def __call__(self, frequencies: range, mu: np.ndarray, rows: np.ndarray, out: np.ndarray) -> None:
        """Write the solutions for the right-hand sides of some frequencies to ``out``."""
        self._systems.solve_all(frequencies, mu, rows, transposed=self._transposed, out=out)


class WrappedSystem(ShiftedSystem):
    """A system solved by means of another one, whose factors are used.

    Parameters
    ----------
    inner
        The other system.
    """

    def __init__(self, inner: ShiftedSystem):
        self._inner = inner

    def factor(self, y: complex) -> tuple[Any, int]:
        """A factor of the other system and its size in bytes."""
        return self._inner.factor(y)

    def release(self, factor: Any) -> None:
        """Free the memory of a factor."""
        self._inner.release(factor)

    @property
    def has_lanes(self) -> bool:
        """Whether the other system can be solved for several frequencies at once."""
        return self._inner.has_lanes

    def factor_lanes(self, kernels: LaneKernels, y: np.ndarray) -> tuple[Any, int]:
        """Factors of the other system for at most W shifts, and their size in bytes."""
        return self._inner.factor_lanes(kernels, y)


class Projection(Protocol):
    """Removal of a nullspace, as by :class:`pint_fem.kernels.nullspace.Nullspace`."""

    def project_solution(self, values: np.ndarray, *, transposed: bool = False) -> np.ndarray:
        """Remove from values, in place, their part in the nullspace of the matrix, or of its transpose."""

    def project_source(self, values: np.ndarray, *, transposed: bool = False) -> np.ndarray:
        """Remove from values, in place, their part in the nullspace of the transpose, or of the matrix."""


class ProjectedSystem(WrappedSystem):
    """A system made regular by pins (:mod:`pint_fem.kernels.nullspace`), its solutions without their nullspace part.

    Parameters
    ----------
    system
        The system of the pinned ``S`` and of ``M``, whose nullspaces contain those of ``S``.
    nullspace
        The nullspace to be removed.
    """

    def __init__(self, system: ShiftedSystem, nullspace: Projection):
        super().__init__(system)
        self._nullspace = nullspace

    def solve(self, factor: Any, y: complex, r: np.ndarray, *, transposed: bool) -> np.ndarray:
        """Solve for a complex vector, with source and solution projected."""
        r = self._nullspace.project_source(np.array(r), transposed=transposed)
        out = self._inner.solve(factor, y, r, transposed=transposed)
        return self._nullspace.project_solution(out, transposed=transposed)

    def mass(self, r: np.ndarray, *, transposed: bool) -> np.ndarray:
        """``M r`` or ``M^T r``."""
        return self._inner.mass(r, transposed=transposed)

    def solve_lanes(
        self, kernels: LaneKernels, factor: Any, y: np.ndarray, r: np.ndarray, *, transposed: bool
    ) -> np.ndarray:
        """Solve for lanes ``(batch, n, 2, W)``, with source and solution projected."""
        r = self._projected(self._nullspace.project_source, kernels, r, transposed=transposed)
        out = self._inner.solve_lanes(kernels, factor, y, r, transposed=transposed)
        return self._projected(self._nullspace.project_solution, kernels, out, transposed=transposed)

    @staticmethod
    def _projected(project: Callable, kernels: LaneKernels, r: np.ndarray, *, transposed: bool) -> np.ndarray:
        """A projection of the frequencies, one after the other."""
        rows = np.empty((kernels.width, len(r), r.shape[1]), kernels.complex)
        kernels.from_lanes(r, rows)
        for row in rows.reshape(-1, r.shape[1]):
            row[...] = project(row.astype(complex), transposed=transposed)
        return kernels.to_lanes(rows)

    def mass_lanes(self, kernels: LaneKernels, r: np.ndarray, *, transposed: bool) -> np.ndarray:
        """``M r`` or ``M^T r`` of lanes ``(batch, n, 2, W)``."""
        return self._inner.mass_lanes(kernels, r, transposed=transposed)

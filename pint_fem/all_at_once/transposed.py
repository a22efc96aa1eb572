r"""Adjoint sweeps by a fixed number of transposed iterations, which make an inexact Hessian symmetric.

``K`` iterations from zero are a linear map :math:`M_K \approx A^{-1}` of right-hand sides. A Hessian action with
:math:`M_K` for the tangent and :math:`M_K^T` for the adjoint,

.. math:: H_K = B^T M_K^T\, C\, M_K B + R'' ,

is symmetric however few iterations there are: conjugate gradients on it are those of one operator, positive definite
where ``C`` is semidefinite and ``R''`` definite. (``B`` is the derivative of the steps by the control, ``C`` that of
the misfits, and of the steps where they are not affine.) With tolerances instead of a number of iterations the products
are not even those of one linear operator.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np

from pint_fem.all_at_once.arrays import Array, kind_of
from pint_fem.all_at_once.solver import AllAtOnceSolver

__all__ = ["TransposedSweep"]


class TransposedSweep(ABC):
    """A solver for :math:`M_K^T` and its arrays.

    Parameters
    ----------
    solver
        Whose iterations from zero are the transposes of those of the tangent sweep.
    rows
        States that the sweep stores on the finest level.

    Attributes
    ----------
    solver : AllAtOnceSolver
    rows : int
    start : str
        First guess with which sweeps of the tangent model begin at zero.
    """

    start: str

    def __init__(self, solver: AllAtOnceSolver, rows: int):
        self.solver, self.rows = solver, rows
        self._rows: Array | None = None

    def _zeros(self, shape: tuple[int, ...], like: Array | None = None) -> Array:
        """The sweep's array ``(rows, *shape)``, set to zero: of float64, or of the kind of ``like``."""
        kind = kind_of(np.empty(0) if like is None else like)
        if self._rows is None or self._rows.shape[1:] != shape or kind_of(self._rows) != kind:
            self._rows = kind.empty(self.rows, *shape)
        self._rows[...] = 0
        return self._rows

    def release(self) -> None:
        """Free the sweep's array where it is that of a batch."""
        if self._rows is not None and self._rows.ndim > 2:
            self._rows = None

    @abstractmethod
    def arrays(self, gradient: Array) -> tuple[Array, Array]:
        """The arguments of a solve: unknowns, which are zero, and the right-hand side of the own steps (collective).

        Parameters
        ----------
        gradient
            Misfit gradients of the own points, ``(k + 1, n)``, or of a batch ``(k + 1, members, n)``. The last row
            counts on the last rank; elsewhere the sweep may overwrite it.
        """

    @property
    @abstractmethod
    def adjoints(self) -> Array:
        """Adjoints of the own points, ``(k + 1, n)``, after :meth:`collect`."""

    def collect(self) -> Array:
        """The adjoints after a solve, ``(k + 1, n)`` (collective).

        Raises
        ------
        SolverFailure
            On every rank, if a step that the solve does not include failed.
        """
        return self.adjoints

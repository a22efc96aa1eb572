"""Butcher tableaux of diagonally implicit Runge-Kutta methods, and their coefficients for steps by stage values."""

from __future__ import annotations

import numpy as np
from irksome import BackwardEuler, GaussLegendre
from irksome.tableaux.ButcherTableaux import ButcherTableau

from pint_fem.errors import InputError

__all__ = ["DIRK", "SDIRK2", "BackwardEuler", "ImplicitMidpoint", "Repeated", "named_tableau", "tableau_name"]


class SDIRK2(ButcherTableau):
    """The stiffly accurate, L-stable SDIRK method of order 2, ``gamma = 1 - 1/sqrt 2`` (Alexander, SINUM 14, 1977)."""

    def __init__(self) -> None:
        g = 1 - 1 / np.sqrt(2)
        super().__init__(np.array([[g, 0], [1 - g, g]]), np.array([1 - g, g]), None, np.array([g, 1.0]), 2, None, None)

    def __str__(self) -> str:
        return "SDIRK2()"


class Repeated(ButcherTableau):
    """Several equal steps of a method as the stages of one step.

    A coarse level of MGRIT with two steps for each of its intervals approximates the fine steps about four times as
    well for a method of order two, and costs little where the coarse level is small.

    Parameters
    ----------
    tableau
        The method.
    count
        Number of steps.
    """

    def __init__(self, tableau: ButcherTableau, count: int):
        self._of = tableau, count
        A, b, c = (np.asarray(x, dtype=float) for x in (tableau.A, tableau.b, tableau.c))
        before = np.tril(np.ones((count, count)), -1)
        A = (np.kron(np.eye(count), A) + np.kron(before, np.outer(np.ones(len(b)), b))) / count
        times = np.concatenate([(step + c) / count for step in range(count)])
        super().__init__(A, np.tile(b, count) / count, None, times, tableau.order, None, None)

    def __str__(self) -> str:
        return f"{self._of[1]} steps of {self._of[0]}"


def ImplicitMidpoint() -> ButcherTableau:
    """The tableau of the implicit midpoint rule: one Gauss-Legendre stage."""
    return GaussLegendre(1)


_NAMES = {"BackwardEuler": BackwardEuler, "ImplicitMidpoint": ImplicitMidpoint, "SDIRK2": SDIRK2}


def named_tableau(name: str) -> ButcherTableau:
    """The tableau ``BackwardEuler``, ``ImplicitMidpoint`` or ``SDIRK2`` by its name.

    Raises
    ------
    InputError
        On an unknown name.
    """
    if name not in _NAMES:
        raise InputError(f"unknown integrator {name!r}: give one of {', '.join(_NAMES)}")
    return _NAMES[name]()


def tableau_name(tableau: ButcherTableau) -> str:
    """The name by which a user has given a tableau, else that of its class."""
    if isinstance(tableau, GaussLegendre) and tableau.num_stages == 1:
        return "ImplicitMidpoint"
    return type(tableau).__name__


class DIRK:
    r"""Coefficients of a diagonally implicit Runge-Kutta method for steps by stage values.

    With :math:`d_i = U_i - W_i = \Delta t\, a_{ii} k_i` the stages and the step are

    .. math::
        W_i = u_0 + \sum_{j<i} \alpha_{ij} d_j, \quad \alpha_{ij} = a_{ij}/a_{jj}, \qquad
        F\big((U_i - W_i)/(a_{ii}\Delta t),\, U_i,\, t + c_i \Delta t\big) = 0, \qquad
        u_1 = u_0 + \sum_i \beta_i d_i, \quad \beta_i = b_i/a_{ii},

    and ``u_1 = U_s`` for a stiffly accurate method. Boundary values are those of the stage's time.

    Parameters
    ----------
    tableau
        An Irksome tableau: lower triangular with a nonzero diagonal.

    Attributes
    ----------
    restarts : list of int
        Stages that begin at the one before them and depend on no earlier one otherwise, with 0 and the number of stages
        at the ends: the method is a sequence of those between them.

    Raises
    ------
    InputError
        If it is explicit or fully implicit.
    """

    def __init__(self, tableau: ButcherTableau):
        A = np.asarray(getattr(tableau, "A", np.nan), dtype=float)
        if A.ndim != 2 or not tableau.is_diagonally_implicit or (np.diag(A) == 0).any():
            raise InputError(
                f"tableau {tableau}: stages must be diagonally implicit with nonzero diagonal; "
                "give BackwardEuler(), ImplicitMidpoint(), SDIRK2() or another such Irksome tableau"
            )
        self.name = str(tableau)
        self.diagonal = np.diag(A).copy()
        self.stages = len(self.diagonal)
        self.c = np.asarray(tableau.c, dtype=float)
        self.alpha = np.tril(A, -1) / self.diagonal
        self.beta = np.asarray(tableau.b, dtype=float) / self.diagonal
        self.stiffly_accurate = bool(tableau.is_stiffly_accurate)
        self.A, self.b = A, np.asarray(tableau.b, dtype=float)
        same = [i for i in range(1, self.stages) if np.allclose(A[i:, :i], A[i - 1, :i], rtol=1e-14, atol=0)]
        self.restarts = [0, *same, self.stages]

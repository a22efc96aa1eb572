r"""A preconditioner of conjugate gradients from the Hessian products of the last Newton iterations.

Conjugate gradients at one iterate produce directions :math:`d_j` and products :math:`H d_j`. At the next iterate, where
the Hessian is similar, they make an approximation of its inverse at no further product [1]: the operator of
:mod:`pint_fem.optimize.lbfgs` with :math:`s_i = d_i,\ y_i = H d_i`. Directions of one run are conjugate, so it maps
:math:`y_i` to :math:`s_i` for all of them: were the Hessian the same, operator times Hessian would be the identity on
their span. Applying it takes :math:`2m + 1` inner products and no PDE.

The stored directions of a run are spread uniformly over it [1], as the late ones belong to the small eigenvalues.
A run of fewer iterations than the largest number of pairs, as preconditioning makes it, leaves the latest older pairs
in place, so that a good preconditioner does not replace itself by a worse one.

References
----------
[1] J. L. Morales, J. Nocedal, Automatic preconditioning by limited memory quasi-Newton updating, SIAM J. Optim. 10
    (2000) 1079-1096.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from pint_fem.optimize.lbfgs import InverseLBFGS

__all__ = ["LimitedMemoryPreconditioner", "make_preconditioner", "merged_pairs"]

Pair = tuple[np.ndarray, np.ndarray]


class LimitedMemoryPreconditioner:
    """The L-BFGS inverse Hessian from pairs (d, H d); the identity before there are any.

    Parameters
    ----------
    inner : callable
        The problem's inner product.
    """

    def __init__(self, inner: Callable[[np.ndarray, np.ndarray], float]):
        self._operator = InverseLBFGS(inner, memory=None)

    def update(self, pairs: list[Pair]) -> None:
        """Use these pairs instead of the last ones, the latest last, except those without clearly positive curvature.

        The arrays are stored without a copy.
        """
        self._operator.restore([], 1.0)
        for direction, product in pairs:
            self._operator.update(direction, product, copy=False)

    def __call__(self, r: np.ndarray) -> np.ndarray:
        """P r by the two-loop recursion."""
        return self._operator.apply(r)


def make_preconditioner(preconditioner: Callable | str | None, inner: Callable) -> tuple[Callable | None, bool]:
    """The preconditioner, made where it is given by its name, and whether it is updated by pairs."""
    if preconditioner == "limited-memory":
        preconditioner = LimitedMemoryPreconditioner(inner)
    return preconditioner, callable(getattr(preconditioner, "update", None))


def merged_pairs(old: list[Pair], new: list[Pair], memory: int) -> list[Pair]:
    """At most `memory` pairs: a uniform sample of the new ones, after as many of the latest old ones as fit."""
    if len(new) > memory:
        new = [new[i] for i in np.linspace(0, len(new) - 1, memory).round().astype(int)] if memory > 1 else new[-1:]
    rest = memory - len(new)
    return (old[-rest:] if rest else []) + new

"""Inner products of the control and their Riesz maps, on arrays."""

from __future__ import annotations

import numpy as np
import ufl
from firedrake import FunctionSpace, TestFunction, TrialFunction, assemble, dx, grad, inner

from pint_fem.errors import InputError
from pint_fem.propagators.blocks import Factor, is_symmetric
from pint_fem.spacetime import SpaceTime

__all__ = ["RieszMap"]


class RieszMap:
    r""":math:`(a, b)` and the map from dual vectors to their representatives.

    ``"L2"``: :math:`\int a b`; ``"H1"``: :math:`\int a b + \nabla a \cdot \nabla b`; ``"l2"``: coefficients. For one
    control a step the product is :math:`\sum_n \Delta t\,(a_n, b_n)`.

    Parameters
    ----------
    space
        The control's space.
    kind
        ``"L2"``, ``"H1"``, ``"l2"`` or a symmetric positive definite bilinear form on the space (a prior's, say).
    spacetime
        Process grid.
    step_weight
        ``dt`` for one control a step, ``None`` for a static one.

    Raises
    ------
    InputError
        On anything else.
    """

    def __init__(self, space: FunctionSpace, kind, spacetime: SpaceTime, *, step_weight: float | None = None):
        a, b = TrialFunction(space), TestFunction(space)
        forms = {"L2": inner(a, b) * dx, "H1": (inner(a, b) + inner(grad(a), grad(b))) * dx, "l2": None}
        given = isinstance(kind, ufl.Form)
        if given and [arg.function_space() for arg in kind.arguments()] != [space, space]:
            raise InputError("riesz map: the form is not bilinear on the control's space")
        if not given and kind not in forms:
            raise InputError(
                f"riesz map {kind!r}: give one of {', '.join(forms)}, or a bilinear form on the control's space"
            )
        self.spacetime, self.step_weight = spacetime, step_weight
        self._factor = None
        form = kind if given else forms[kind]
        if form is not None:
            self._matrix = assemble(form, mat_type="aij").petscmat
            if not is_symmetric(self._matrix):
                raise InputError("riesz map: the bilinear form is not symmetric")
            self._factor = Factor(self._matrix, {}, symmetric=True, prefix="pint_riesz_")
            self._x, self._y = self._matrix.createVecs()

    def _rows(self, operation, array: np.ndarray) -> np.ndarray:
        if self._factor is None:
            return array.copy()
        out = np.empty_like(array)
        for row, target in zip(np.atleast_2d(array), out.reshape(-1, array.shape[-1]), strict=True):
            self._x.array[:] = row
            operation(self._x, self._y)
            target[:] = self._y.array_r
        return out

    def primal(self, dual: np.ndarray) -> np.ndarray:
        """Representative of a dual vector."""
        out = self._rows(lambda x, y: self._factor.solve(x, y), dual)
        return out if self.step_weight is None else out / self.step_weight

    def dual(self, primal: np.ndarray) -> np.ndarray:
        """The dual vector ``(primal, .)``."""
        out = self._rows(lambda x, y: self._matrix.mult(x, y), primal)
        return out if self.step_weight is None else self.step_weight * out

    def inner(self, a: np.ndarray, b: np.ndarray) -> float:
        """``(a, b)``; the same bits on every rank."""
        local = self.spacetime.sum_over_space(np.array([np.vdot(self.dual(a), b)]))
        return float((local if self.step_weight is None else self.spacetime.sum_over_time(local))[0])

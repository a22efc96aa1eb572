r"""Inner products of controls and their Riesz maps, on arrays.

The Riesz map of an inner product :math:`(a, b) = a^T M b` takes a dual vector :math:`g` to its representative
:math:`M^{-1} g`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import firedrake
import numpy as np
import ufl
from firedrake import Cofunction, Function, TestFunction, TrialFunction, assemble, dx, grad, inner
from firedrake.functionspaceimpl import WithGeometry

from pint_fem.errors import InputError
from pint_fem.evolution.control_layout import ControlLayout
from pint_fem.kernels.arrays import get, is_real, own_size, put
from pint_fem.kernels.factor import Factor, is_symmetric
from pint_fem.kernels.multigrid import Geometry

__all__ = ["ControlInner", "RieszMap"]

_KINDS = ("L2", "H1", "l2", "lumped")

RieszKind = str | ufl.Form | firedrake.RieszMap


class RieszMap:
    r"""The map between a space and its dual for an inner product :math:`(a, b)`.

    ``"L2"``: :math:`\int a b`; ``"H1"``: :math:`\int a b + \nabla a \cdot \nabla b`; ``"l2"``: coefficients;
    ``"lumped"``: ``L2`` with a diagonal matrix, the mass matrix's diagonal scaled to the domain's measure (Hinton, Rock
    and Zienkiewicz, Earthquake Eng. Struct. Dyn. 4, 1976), which is positive for every element.

    Parameters
    ----------
    space
        The control's space.
    kind
        One of the above, a symmetric positive definite bilinear form on the space (such as that of a prior), or a
        ``firedrake.RieszMap``.
    reproducible
        Whether results on several ranks in space are the same bits in each run.

    Attributes
    ----------
    diagonal : ndarray, shape (n,), or None
        The diagonal of the product's matrix where it is diagonal.
    form : ufl.Form or None
        The bilinear form of the product where that is what it is computed by.

    Raises
    ------
    InputError
        If the kind is none of these, or the form does not fit.
    """

    def __init__(self, space: WithGeometry, kind: RieszKind, *, reproducible: bool = False):
        a, b = TrialFunction(space), TestFunction(space)
        given = isinstance(kind, ufl.Form)
        if given and [arg.function_space() for arg in kind.arguments()] != [space, space]:
            raise InputError("riesz map: the form is not bilinear on the control's space")
        if isinstance(kind, firedrake.RieszMap):
            if kind._function_space != space:
                raise InputError("riesz map: the firedrake.RieszMap is not on the control's space")
        elif not given and kind not in _KINDS:
            raise InputError(
                f"riesz map {kind!r}: give one of {', '.join(_KINDS)}, a bilinear form on the control's space or a "
                "firedrake.RieszMap on it"
            )
        self.space = space
        self.diagonal: np.ndarray | None = None
        self.form: ufl.Form | None = None
        self._given: firedrake.RieszMap | None = None
        mass, stiffness = inner(a, b) * dx, inner(grad(a), grad(b)) * dx
        if isinstance(kind, firedrake.RieszMap):
            self._given, self._f, self._c = kind, Function(space), Cofunction(space.dual())
        elif kind == "l2":
            self.diagonal = np.ones(own_size(space))
        elif is_real(space):
            one = Function(space).assign(1.0)
            square = assemble((kind if given else {"H1": mass + stiffness}.get(kind, mass))(one, one))
            self.diagonal = np.full(own_size(space), square)
        elif kind == "lumped":
            self.diagonal = _lumped(space, mass)
        else:
            self.form = kind if given else {"L2": mass, "H1": mass + stiffness}[kind]
            self._matrix = assemble(self.form, mat_type="aij").petscmat
            if not is_symmetric(self._matrix):
                raise InputError("riesz map: the bilinear form is not symmetric")
            given = dict(geometry=Geometry(space), reproducible=reproducible, few=True)
            self._factor = Factor(self._matrix, {}, symmetric=True, prefix="pint_riesz_", **given)
            self._x, self._y = self._matrix.createVecs()

    def primal(self, dual: np.ndarray) -> np.ndarray:
        """Return the representative of a dual vector ``(n,)``."""
        if self.diagonal is not None:
            return dual / self.diagonal
        if self._given is not None:
            put(self._c, dual)
            return get(self._given(self._c))
        self._x.array[:] = dual
        self._factor.solve(self._x, self._y)
        return self._y.array_r.copy()

    def dual(self, primal: np.ndarray) -> np.ndarray:
        """Return the dual vector ``(primal, .)`` of a vector ``(n,)``."""
        if self.diagonal is not None:
            return primal * self.diagonal
        if self._given is not None:
            put(self._f, primal)
            return get(self._given(self._f))
        self._x.array[:] = primal
        self._matrix.mult(self._x, self._y)
        return self._y.array_r.copy()


def _lumped(space: WithGeometry, mass: ufl.Form) -> np.ndarray:
    """Diagonal of the mass matrix, scaled to the sum of the matrix's entries over each component."""
    matrix = assemble(mass, mat_type="aij").petscmat
    diagonal = matrix.getDiagonal()
    one, product = matrix.createVecs()
    ones = Function(space).interpolate(ufl.as_tensor(np.ones(space.value_shape)) if space.value_shape else 1.0)
    one.array[:] = get(ones)
    matrix.mult(one, product)
    return diagonal.array_r * (one.dot(product) / diagonal.sum())


class ControlInner:
    """The inner product of all controls of a problem and its Riesz map, on flat vectors.

    For a control with one value per step it is :math:`\\sum_n \\Delta t (a_n, b_n)`.

    Parameters
    ----------
    layout
        The controls.
    kinds
        A kind of :class:`RieszMap` for all of them, or a list with a kind or a map for each; ``InputError`` is raised
        if one does not fit.
    """

    def __init__(self, layout: ControlLayout, kinds: RieszKind | Sequence[RieszKind]):
        self.layout, self._dt = layout, layout.evolution.dt
        controls = layout.evolution.controls
        kinds = list(kinds) if isinstance(kinds, (list, tuple)) else [kinds] * len(controls)
        if len(kinds) != len(controls):
            raise InputError(f"riesz_map: {len(kinds)} kinds for {len(controls)} controls; give one, or one for each")
        same = layout.evolution.reproducible
        made = lambda c, kind: RieszMap(c.function_space(), kind, reproducible=same)
        make = lambda c, kind: kind if isinstance(kind, RieszMap) else made(c, kind)
        self.maps = {c: make(c, kind) for c, kind in zip(controls, kinds, strict=True)}

    def _apply(self, name: str, z: np.ndarray, weight: float) -> np.ndarray:
        """Apply a method of each control's map, times a weight where the control has one value per step."""
        out, part = np.empty_like(z), self.layout.part
        for control, riesz in self.maps.items():
            source, target, method = part(z, control), part(out, control), getattr(riesz, name)
            if source.ndim == 1:
                target[:] = method(source)
            else:
                for row, result in zip(source, target, strict=True):
                    result[:] = weight * method(row)
        return out

    def primal(self, dual: np.ndarray) -> np.ndarray:
        """Return the representative of a dual vector; its static part is identical on all ranks in time, and all of it
        in all groups of experiments.
        """
        out, spacetime = self._apply("primal", dual, 1 / self._dt), self.layout.spacetime
        # solvers with ranks in space may differ by round-off between groups of ranks, and groups on other machines
        if spacetime.space_size > 1 or spacetime.experiments_size > 1:
            self.layout.share(out)
        return out

    def dual(self, primal: np.ndarray) -> np.ndarray:
        """Return the dual vector ``(primal, .)``."""
        return self._apply("dual", primal, self._dt)

    def inner(self, a: np.ndarray, b: np.ndarray) -> float:
        """Return ``(a, b)``, the identical number on every rank (collective)."""
        return self.layout.pairing(self.dual(a), b)

    @cached_property
    def weights(self) -> np.ndarray | None:
        """The diagonal of the product's matrix where it is diagonal, else ``None``."""
        if any(riesz.diagonal is None for riesz in self.maps.values()):
            return None
        return self._apply("dual", np.ones(self.layout.size), self._dt)

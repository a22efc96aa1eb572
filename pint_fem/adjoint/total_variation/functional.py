r"""The total variation of a control, smoothed, as a user writes it among the functionals of a regularisation.

.. math::
    \mathrm{TV}(q) = \alpha \int_\Omega |\nabla q|_\varepsilon \, dx, \qquad
    |a|_\varepsilon = \sqrt{|a|^2 + \varepsilon},

and for a control that is constant in each cell :math:`\alpha \int_{\mathcal F} |[\![q]\!]|_\varepsilon\, ds` over the
interior facets. Of a vector, and of several fields, :math:`|\nabla q|` is the root of the sum of squares of all
components (vectorial total variation [3]), so that jumps of all of them at one place are cheaper than at several.

Sharp edges cost no more than gradual ones of the same height [1]. Small :math:`\varepsilon` makes the gradient of the
functional nearly discontinuous, and Newton's method then converges from a very small neighbourhood only: see
:mod:`~pint_fem.adjoint.total_variation.primal_dual` [2].

References
----------
[1] L. I. Rudin, S. Osher, E. Fatemi, Nonlinear total variation based noise removal algorithms, Physica D 60 (1992)
    259-268.
[2] T. F. Chan, G. H. Golub, P. Mulet, A nonlinear primal-dual method for total variation-based image restoration, SIAM
    J. Sci. Comput. 20 (1999) 1964-1977.
[3] X. Bresson, T. F. Chan, Fast dual minimization of the vectorial total variation norm, Inverse Probl. Imaging 2
    (2008) 455-484.
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real

import numpy as np
import ufl
from firedrake import H1, Function, dS, dx, grad, inner, jump, sqrt
from firedrake.functionspaceimpl import WithGeometry
from ufl.algorithms.estimate_degrees import estimate_total_polynomial_degree

from pint_fem.errors import InputError, InputTypeError
from pint_fem.kernels.arrays import is_real

__all__ = ["MODELS", "TotalVariation", "is_on_facets"]

MODELS = ("primal-dual", "lagged-diffusivity", "newton")
"""Operators that stand for the second derivative in the model of a trust region."""


class TotalVariation(ufl.Form):
    r"""The smoothed total variation ``weight * int sqrt(|grad q|^2 + smoothing) dx`` of a control.

    It is a UFL functional, so that ``assemble`` returns its value, and is given to a functional of controls by itself
    or in a list, ``regularisation=[pf.TotalVariation(q, weight=1e-3, smoothing=1e-4), 1e-6 * q**2 * dx]``. Value,
    gradient and Hessian actions are those of this functional.
    :meth:`~pint_fem.adjoint.minimisation.minimisable.Minimisable.minimize_trust_region` uses another operator in the
    place of its second derivative where ``model`` says so. Of a control with one value per step it is summed over the
    steps with weight ``dt``, as all functionals are.

    Of a coefficient that is the exponential of the control, the variation of the control is that of the logarithm, in
    which a jump by a factor costs the same at any size.

    Parameters
    ----------
    control : Function or list of Function
        The control, or several whose variation is taken in common. Its space is one of continuous functions, or of
        functions that are constant in each cell, whose variation is the integral over the interior facets of the jump's
        magnitude, ``sqrt(jump**2 + smoothing)``.
    weight : float
        The factor, positive. The variation of a field with one inclusion is the jump times the inclusion's perimeter.
    smoothing : float
        Positive, a square of a gradient (of a jump for controls constant in each cell): gradients well below
        ``sqrt(smoothing)`` are penalised by their squares. A jump ``j`` that is resolved by cells of size ``h`` has the
        gradient ``j / h``.
    model : {"primal-dual", "lagged-diffusivity", "newton"}
        What the trust region uses in the place of the second derivative: the primal-dual form, which converges in few
        iterations for any smoothing; the same with a dual of zero, ``int grad p . grad v / |grad q|_eps``, which is
        positive and robust but converges linearly; or the second derivative itself.

    Attributes
    ----------
    fields : tuple of Function
        The controls.
    weight, smoothing : float
        As given.
    model : str
        As given.
    degree : int
        Degree of the quadrature rule, at whose points the dual has its values; 0 where gradients are constant in each
        cell.

    Raises
    ------
    InputError
        If the weight or the smoothing is not positive, the model is none of these, or a control is a real number or in
        a space of other discontinuous functions; InputTypeError where an argument is of another type.
    """

    def __init__(
        self,
        control: Function | Sequence[Function],
        *,
        weight: float,
        smoothing: float,
        model: str = "primal-dual",
    ):
        fields = tuple(control) if isinstance(control, (list, tuple)) else (control,)
        _require_fields(fields)
        for name, number in (("weight", weight), ("smoothing", smoothing)):
            if isinstance(number, bool) or not isinstance(number, Real):
                raise InputTypeError(f"TotalVariation: {name} = {number!r} is refused: give a positive number")
            if not 0 < number < np.inf:
                raise InputError(f"TotalVariation: {name} = {number} is refused: give a positive number")
        if model not in MODELS:
            raise InputError(
                f"TotalVariation: model = {model!r} is refused: give one of {', '.join(map(repr, MODELS))}"
            )
        self.fields, self.weight, self.smoothing, self.model = fields, float(weight), float(smoothing), model
        mesh = fields[0].function_space().mesh()
        facets = is_on_facets(fields[0].function_space())
        squares = [inner(d, d) for d in ((jump if facets else grad)(f) for f in fields)]
        size = sqrt(sum(squares[1:], start=squares[0]) + self.smoothing)
        self.degree = 0 if all(map(_is_constant_in_cells, fields)) else _degree(size)
        measure = (dS if facets else dx)(domain=mesh, degree=self.degree)
        super().__init__((self.weight * size * measure).integrals())

    def __rmul__(self, factor: object) -> ufl.Form:
        """A multiple, which is a total variation where the factor is a positive number."""
        if isinstance(factor, Real) and 0 < factor < np.inf:
            weight = float(factor) * self.weight
            return TotalVariation(self.fields, weight=weight, smoothing=self.smoothing, model=self.model)
        return super().__rmul__(factor)

    __mul__ = __rmul__

    def __add__(self, other: object) -> ufl.Form:
        """Refused, as the sum would not be known to be one: functionals are given in a list.

        Raises
        ------
        InputTypeError
            Unless the other summand is zero.
        """
        if isinstance(other, Real) and other == 0:
            return self
        raise InputTypeError(
            "TotalVariation: a sum with another functional is refused: give a list, "
            "regularisation=[TotalVariation(...), ...]"
        )

    __radd__ = __add__


def is_on_facets(space: WithGeometry) -> bool:
    """Whether the variation of functions of a space is an integral of jumps over facets."""
    return space.ufl_element() not in H1


def _require_fields(fields: Sequence) -> None:
    """Refuse what has no total variation, and fields that have none in common."""
    if not fields:
        raise InputError(
            "TotalVariation: the list of controls is empty: give a control, such as TotalVariation(q, ...)"
        )
    for f in fields:
        if not isinstance(f, Function):
            raise InputTypeError(
                f"TotalVariation: a {type(f).__name__} is refused: give the control itself, a Function, or a list of "
                "controls; of a coefficient exp(q) the variation is that of q"
            )
        space = f.function_space()
        if is_real(space):
            raise InputError(
                f"TotalVariation: control {f.name()!r} is a real number, which has no variation: leave it out"
            )
        element = space.ufl_element()
        if len(space) > 1 or (is_on_facets(space) and not (_lowest(element.degree()) == 0 and not _conforms(element))):
            raise InputError(
                f"TotalVariation: control {f.name()!r} is in {element}: give one in a space of continuous functions, "
                "such as 'CG' 1, or of functions that are constant in each cell, 'DG' 0"
            )
    spaces = [f.function_space() for f in fields]
    if len({(space.mesh(), is_on_facets(space)) for space in spaces}) > 1:
        raise InputError(
            "TotalVariation: several controls on different meshes, or continuous ones beside others constant in each "
            "cell, have no variation in common: give a TotalVariation of each"
        )


def _conforms(element: object) -> bool:
    """Whether functions of an element have continuous tangential or normal components."""
    return element in ufl.HCurl or element in ufl.HDiv


def _lowest(degree: int | tuple[int, ...]) -> int:
    """The degree of an element, the largest of those on tensor-product cells."""
    return max(degree) if isinstance(degree, tuple) else degree


def _is_constant_in_cells(f: Function) -> bool:
    """Whether gradients (or jumps, on a facet) are constant."""
    space = f.function_space()
    mesh = space.mesh()
    affine = mesh.ufl_cell().cellname in ("interval", "triangle", "tetrahedron")
    affine = affine and mesh.coordinates.function_space().ufl_element().degree() == 1
    return affine and _lowest(space.ufl_element().degree()) <= 1


def _degree(integrand: ufl.core.expr.Expr) -> int:
    """Degree of the rule for an integrand, as UFL estimates it."""
    return _lowest(estimate_total_polynomial_degree(ufl.algorithms.apply_derivatives.apply_derivatives(integrand)))

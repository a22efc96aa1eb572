r"""Gaussian laws of one field by two solves, and by Firedrake's covariance operators.

* :class:`BilaplacianPrior` has the precision :math:`A M^{-1} A` with :math:`A = \gamma K + \delta M + \beta
  M_\partial` of the stiffness, mass and boundary mass matrix (U. Villa, N. Petra, O. Ghattas, hIPPYlib, ACM Trans.
  Math. Softw. 47, 2021);
* :class:`OperatorField` has the inverse of one of Firedrake's covariance operators, which is used as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np
import ufl
from firedrake import (
    PCG64,
    Cofunction,
    Function,
    RandomGenerator,
    TestFunction,
    TrialFunction,
    ds,
    dx,
    grad,
    inner,
)
from firedrake.adjoint.covariance_operator import CovarianceOperatorBase
from firedrake.functionspaceimpl import WithGeometry
from pyadjoint.tape import stop_annotating

from pint_fem.errors import InputError
from pint_fem.inverse.laws.gaussian_fields import (
    EXACT,
    DiagonalField,
    FormField,
    GaussianField,
    Key,
    at_one,
    form_field,
)
from pint_fem.kernels.arrays import get, is_real, own_size, put

__all__ = ["BilaplacianField", "BilaplacianPrior", "OperatorField", "gaussian_field"]


@dataclass(frozen=True)
class BilaplacianPrior:
    r"""A prior with the precision :math:`A M^{-1} A`, ``M`` the mass matrix, for any control.

    With ``gamma`` and ``delta`` the form of ``A`` is
    :math:`\int \gamma \nabla a \cdot \nabla b + \delta a b + \int_{\partial\Omega} \beta a b`. In two dimensions,
    far from the boundary, the variance is :math:`1 / (4 \pi \gamma \delta)` and the correlation length
    :math:`\sqrt{8 \gamma / \delta}` (F. Lindgren, H. Rue, J. Lindstroem, J. R. Stat. Soc. B 73, 2011).

    Parameters
    ----------
    gamma, delta
        Coefficients, positive numbers or UFL expressions.
    robin
        Coefficient :math:`\beta` on the boundary, by which the variance there is nearer to that inside; ``True`` for
        :math:`\sqrt{\gamma \delta} / 1.42` (Y. Daon, G. Stadler, Inverse Probl. Imaging 12, 2018).
    form
        In place of these, the bilinear form of ``A``: symmetric, positive definite, on the control's space.

    Raises
    ------
    InputError
        If coefficients are missing, not positive, or given beside a form.
    """

    gamma: Any = None
    delta: Any = None
    robin: Any = None
    form: ufl.Form | None = None

    def __post_init__(self) -> None:
        given = {name: getattr(self, name) for name in ("gamma", "delta", "robin")}
        if self.form is not None:
            if not isinstance(self.form, ufl.Form) or any(value is not None for value in given.values()):
                raise InputError("BilaplacianPrior: give gamma and delta, or a bilinear form=, not both")
            return
        for name, value in given.items():
            if name == "robin" and (value is None or value is True or value is False):
                continue
            if isinstance(value, bool) or not isinstance(value, (Real, ufl.core.expr.Expr)):
                raise InputError(f"BilaplacianPrior: {name} = {value!r}: give a positive number or a UFL expression")
            if isinstance(value, Real) and not 0 < value < np.inf:
                raise InputError(f"BilaplacianPrior: {name} = {value!r}: give a positive number")

    def on(self, space: WithGeometry, name: str) -> GaussianField:
        """Return the law of a field in a space (collective over space).

        Raises
        ------
        InputError
            On every rank, if the space's functions have no gradient (DG, RT, N1curl) and no form is given, or the form
            does not fit.
        """
        if self.form is not None:
            return bilaplacian_field(space, checked_form(space, self.form, name), name)
        a, b = TrialFunction(space), TestFunction(space)
        form = self.delta * inner(a, b) * dx
        if not is_real(space):
            if space.ufl_element() not in ufl.H1:
                raise InputError(
                    f"BilaplacianPrior of {name!r}: functions in {space.ufl_element()} have no gradient in L2: give "
                    "form=, such as curl(a)*curl(b)*dx + a*b*dx"
                )
            form += self.gamma * inner(grad(a), grad(b)) * dx
            if self.robin not in (None, False):
                beta = ufl.sqrt(self.gamma * self.delta) / 1.42 if self.robin is True else self.robin
                form += beta * inner(a, b) * ds
        return bilaplacian_field(space, form, name)


def checked_form(space: WithGeometry, form: ufl.Form, name: str) -> ufl.Form:
    """Return a form that is bilinear on a space; others are an ``InputError``."""
    spaces = [argument.function_space() for argument in form.arguments()]
    if spaces != [space, space]:
        raise InputError(
            f"prior of {name!r}: the form has {len(spaces)} arguments or is on another space, as one that "
            "couples several controls is: give a bilinear form on the control's own function space"
        )
    return form


def gaussian_field(space: WithGeometry, given: Any, name: str) -> GaussianField:
    """Return the law of one field (collective over space).

    Parameters
    ----------
    space
        The field's space.
    given
        A symmetric positive definite bilinear form, the precision; a :class:`BilaplacianPrior`; one of Firedrake's
        covariance operators; or a law on this space, returned as it is.
    name
        Name of the field, for messages.

    Raises
    ------
    InputError
        On every rank, if it is none of these, or does not fit.
    """
    if isinstance(given, GaussianField):
        if given.space != space:
            raise InputError(f"prior of {name!r}: the law is on another function space than the control")
        return given
    if isinstance(given, BilaplacianPrior):
        return given.on(space, name)
    if isinstance(given, CovarianceOperatorBase):
        return OperatorField(space, given, name)
    if isinstance(given, ufl.Form):
        return form_field(space, checked_form(space, given, name), name)
    raise InputError(
        f"prior of {name!r}: {given!r}: give a bilinear form, a BilaplacianPrior or one of Firedrake's covariance "
        "operators"
    )


class BilaplacianField(GaussianField):
    r"""The law whose precision is :math:`A M^{-1} A`, with the mass matrix ``M``: covariances are two solves, and
    samples are :math:`A^{-1} M x` with :math:`x \sim N(0, M^{-1})`.

    Parameters
    ----------
    space
        The field's space, not one of real numbers.
    form
        The bilinear form of ``A``, symmetric and positive definite.
    name
        Name of the field, for messages.

    Raises
    ------
    InputError
        As for :class:`FormField`.
    """

    def __init__(self, space: WithGeometry, form: ufl.Form, name: str):
        super().__init__(space)
        self._A = FormField(space, form, name)
        self._M = FormField(space, inner(TrialFunction(space), TestFunction(space)) * dx, name)
        if self._A.log_det_precision is not None and self._M.log_det_precision is not None:
            self.log_det_precision = 2 * self._A.log_det_precision - self._M.log_det_precision

    def covariance(self, rows: np.ndarray) -> np.ndarray:
        """Return ``A^{-1} M A^{-1}`` times dual vectors ``(k, n)``."""
        return self._A.covariance(self._M.precision(self._A.covariance(rows)))

    def precision(self, rows: np.ndarray) -> np.ndarray:
        """Return ``A M^{-1} A`` times primal vectors ``(k, n)``."""
        return self._A.precision(self._M.covariance(self._A.precision(rows)))

    def samples(self, keys: Sequence[Key], count: int) -> np.ndarray:
        """Return samples by a sample of the mass matrix's inverse, a product and a solve."""
        x = self._M.samples(keys, count)
        return self._A.covariance(self._M.precision(x.reshape(-1, self.size))).reshape(x.shape)


def bilaplacian_field(space: WithGeometry, form: ufl.Form, name: str) -> GaussianField:
    """Return the law whose precision is ``A M^{-1} A`` with the bilinear form of ``A``, of a field or of a real number
    (collective over space); errors as for :class:`BilaplacianField` and :class:`DiagonalField`.
    """
    if not is_real(space):
        return BilaplacianField(space, form, name)
    a, m = (at_one(space, f) for f in (form, inner(TrialFunction(space), TestFunction(space)) * dx))
    return DiagonalField(space, np.full(own_size(space), a * a / m), name)


class OperatorField(GaussianField):
    """The law of one of Firedrake's covariance operators, applied to one vector after another.

    Parameters
    ----------
    space
        The field's space.
    operator
        The covariance, such as ``AutoregressiveCovariance(V, L=0.2)``. Its samples get noise seeded by this package,
        not the operator's own.
    name
        Name of the field, for messages.

    Raises
    ------
    InputError
        On every rank, if the operator is on another space.
    """

    largest_exact = EXACT // 10  # a solve of Firedrake's takes some ten times as long

    def __init__(self, space: WithGeometry, operator: CovarianceOperatorBase, name: str):
        super().__init__(space)
        if operator.function_space() != space:
            raise InputError(
                f"prior of {name!r}: the covariance operator is on {operator.function_space()}: give one on the "
                "control's own function space"
            )
        self.operator = operator

    @stop_annotating()
    def covariance(self, rows: np.ndarray) -> np.ndarray:
        """Return the operator's action on dual vectors ``(k, n)``."""
        return self._apply(self.operator.apply_action, Cofunction(self.space.dual()), Function(self.space), rows)

    @stop_annotating()
    def precision(self, rows: np.ndarray) -> np.ndarray:
        """Return the operator's inverse action on primal vectors ``(k, n)``."""
        return self._apply(self.operator.apply_inverse, Function(self.space), Cofunction(self.space.dual()), rows)

    @staticmethod
    def _apply(action, x, y, rows: np.ndarray) -> np.ndarray:
        out = np.empty(rows.shape)
        for row, result in zip(rows, out, strict=True):
            put(x, row)
            action(x, tensor=y)
            result[:] = get(y)
        return out

    @stop_annotating()
    def samples(self, keys: Sequence[Key], count: int) -> np.ndarray:
        """Return the operator's samples, with noise of each rank in space by a stream of its own."""
        out, f = np.empty((count, len(keys), self.size)), Function(self.space)
        for i, key in enumerate(keys):
            # Firedrake takes one whole number, from which it derives those of the ranks
            seed = int.from_bytes(np.random.SeedSequence(key).generate_state(4).tobytes(), "little")
            noise = _SeededNoise(self.operator.rng(), RandomGenerator(PCG64(seed=seed, comm=self.space.mesh().comm)))
            for row in out[:, i]:
                self.operator.sample(rng=noise, tensor=f)
                row[:] = get(f)
        return out


class _SeededNoise:
    """An operator's white noise with another generator of random numbers; all else is the operator's own."""

    def __init__(self, noise, generator):
        self._noise, self._generator = noise, generator

    def sample(self, **options):
        """White noise, with the options of ``WhiteNoiseGenerator.sample``."""
        return self._noise.sample(**{**options, "rng": self._generator})

    def __getattr__(self, name: str):
        return getattr(self._noise, name)

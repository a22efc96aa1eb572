r"""Gaussian laws of one field with mean zero: covariance, precision, samples and pointwise variances.

A field has the coefficients :math:`q \sim N(0, Q^{-1})`. Its precision ``Q`` maps coefficients to dual vectors, and is
one of

* the matrix of a symmetric positive definite bilinear form (:class:`FormField`), factored once;
* diagonal (:class:`DiagonalField`), as for a real number;
* a Riesz map (:class:`MapField`).

Further ones are in :mod:`pint_fem.inverse.laws.covariance_fields`.

Samples are :math:`S w` with white noise ``w`` and any ``S`` with :math:`S S^T = Q^{-1}`. Where a matrix has triangular
factors for the kernels on lanes, :math:`Q = P^T L D L^T P`, ``S`` is the half solve :math:`P^T L^{-T} D^{-1/2}`. All
ranks in space then draw the same noise of all unknowns, and apply the factor that they have copies of. Elsewhere
:math:`S = D^{-1/2} (D^{-1/2} Q D^{-1/2})^{-1/2}` with the diagonal ``D`` of ``Q``, by the Lanczos iteration of Chow and
Saad (:func:`pint_fem.kernels.lanczos.inverse_root`), for which each rank draws the noise of its own unknowns. No field
is gathered in either way.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import ufl
from firedrake import Function, assemble
from firedrake.functionspaceimpl import WithGeometry
from firedrake.petsc import PETSc
from mpi4py import MPI
from pyadjoint.tape import stop_annotating

from pint_fem.collective import all_ranks
from pint_fem.errors import InputError, is_numerical
from pint_fem.kernels.arrays import is_real, own_size
from pint_fem.kernels.block_operator import BlockOperator, ManySolves
from pint_fem.kernels.direct import is_finite
from pint_fem.kernels.factor import Factor, is_symmetric
from pint_fem.kernels.lanczos import inverse_root
from pint_fem.kernels.replication import Replication

__all__ = ["DiagonalField", "FormField", "GaussianField", "Key", "MapField", "at_one", "form_field"]

EXACT = 20_000
"""Unknowns up to which variances are computed by solves for all columns of the identity."""
SAMPLES = 2000
"""Samples of which larger variances are estimates."""
_SINGULAR = 1e-14
"""Smallest eigenvalue of a regular matrix, scaled to a diagonal of ones."""
_BLOCK = 5e5  # numbers in the columns of the identity at a time

_REMEDY = (
    "add a multiple of the mass, such as 1e-2*inner(a, b)*dx in a bilinear form or 0.5e-2*inner(q, q)*dx in the "
    "regularisation"
)
_NOT_DEFINITE = f"prior of {{name!r}}: the bilinear form is not positive definite, or singular to round-off: {_REMEDY}"

Key = tuple[int, ...]
"""Numbers, not negative, that seed the noise of a sample."""


class GaussianField(ABC):
    """A Gaussian law with mean zero of the own coefficients ``(n,)`` of a field. All methods are collective over space.

    Parameters
    ----------
    space
        The field's space.

    Attributes
    ----------
    size, total : int
        Numbers of own and of all coefficients.
    log_det_precision : float or None
        Logarithm of the determinant of the precision; ``None`` where it is not cheap.
    """

    log_det_precision: float | None = None
    largest_exact = EXACT

    def __init__(self, space: WithGeometry):
        self.space, self.size = space, own_size(space)
        self._variance: np.ndarray | None = None
        self._replication = Replication(self.size, space.mesh().comm)
        self.total = self._replication.total

    @abstractmethod
    def covariance(self, rows: np.ndarray) -> np.ndarray:
        """Return the products of the covariance with dual vectors ``(k, n)``, primal vectors ``(k, n)``."""

    @abstractmethod
    def precision(self, rows: np.ndarray) -> np.ndarray:
        """Return the products of the precision with primal vectors ``(k, n)``, dual vectors ``(k, n)``."""

    @abstractmethod
    def samples(self, keys: Sequence[Key], count: int) -> np.ndarray:
        """Return ``count`` samples with the noise of each of some keys, ``(count, len(keys), n)``; the first ones do
        not depend on ``count``.
        """

    def variance(self, samples: int | None = None, among: MPI.Comm = MPI.COMM_SELF) -> np.ndarray:
        r"""Return the variance of each coefficient, ``(n,)``.

        Parameters
        ----------
        samples
            Number ``N`` of samples of which it is an estimate, with the standard error :math:`\sqrt{2/N}` relative to
            each variance. Default: the diagonal of the covariance itself, by a solve for each coefficient, where there
            are at most ``largest_exact`` of them, else 2000 samples (standard error 3.2 %).
        among
            Ranks that have this law with the same coefficients, all of which call this method: the solves are divided
            among them.
        """
        if samples is None and self.total <= self.largest_exact:
            if self._variance is None:
                self._variance = self._exact_variance(among)
            return self._variance.copy()
        count = SAMPLES if samples is None else samples
        total, each = np.zeros(self.size), max(1, int(_BLOCK / max(1, self.total)))
        for number, first in enumerate(range(0, count, each)):
            drawn = self.samples([(0, number)], min(each, count - first))[:, 0]
            total += np.einsum("ij,ij->j", drawn, drawn)
        return total / count

    def _exact_variance(self, among: MPI.Comm) -> np.ndarray:
        out, own = np.zeros(self.size), self._replication.own
        start, stop = (self.total * rank // among.size for rank in (among.rank, among.rank + 1))
        each = max(1, int(_BLOCK / max(1, self.total)))
        for first in range(start, stop, each):
            columns = range(first, min(first + each, stop))
            mine = np.arange(max(own.start, columns.start), min(own.stop, columns.stop))
            rows = np.zeros((len(columns), self.size))
            rows[mine - first, mine - own.start] = 1.0
            out[mine - own.start] = self.covariance(rows)[mine - first, mine - own.start]
        return out if among.size == 1 else among.allreduce(out)


class FormField(GaussianField):
    """The law whose precision is the matrix of a bilinear form.

    Parameters
    ----------
    space
        The field's space.
    form
        A symmetric positive definite bilinear form on it.
    name
        Name of the field, for messages.

    Attributes
    ----------
    product, solves : BlockOperator, ManySolves
        Products with the matrix and its inverse.

    Raises
    ------
    InputError
        On every rank, if the form's matrix is not finite, not symmetric, not positive definite, or singular.
    """

    def __init__(self, space: WithGeometry, form: ufl.Form, name: str):
        super().__init__(space)
        with stop_annotating():
            matrix = assemble(form, mat_type="aij").petscmat
        if not is_finite(matrix):
            raise InputError(f"prior of {name!r}: the form has infinite or NaN entries: check its coefficients")
        if not is_symmetric(matrix):
            raise InputError(f"prior of {name!r}: the bilinear form is not symmetric: give a symmetric one")
        self._comm = matrix.comm.tompi4py()
        diagonal = matrix.getDiagonal()
        if not diagonal.min()[1] > 0:
            raise InputError(_NOT_DEFINITE.format(name=name))
        self._scale = 1 / np.sqrt(diagonal.array_r)
        self.product = BlockOperator(matrix)
        try:
            self.solves = ManySolves(Factor(matrix, {}, symmetric=True, prefix="pint_prior_"))
            definite = self._is_definite()
        except (ArithmeticError, PETSc.Error) as error:
            if not is_numerical(error):
                raise
            raise InputError(_NOT_DEFINITE.format(name=name)) from error
        if not definite:
            raise InputError(_NOT_DEFINITE.format(name=name))
        if self.solves.has_root:
            self.log_det_precision = self.solves.log_det

    def _is_definite(self) -> bool:
        """Whether the matrix is positive definite and not singular to round-off: by the signs of the pivots, or by the
        Lanczos iteration; by inverse iteration for the smallest eigenvalue of the matrix scaled to a unit diagonal.
        """
        triangular = self.solves.factor.triangular
        if triangular is not None and not triangular.is_positive:
            return False
        start = np.cos(1.0 + np.arange(self._replication.own.start, self._replication.own.stop) ** 2)[None]
        if not self.solves.has_root:
            self._scaled_root(start)
        for _ in range(3):
            x = self._scaled(self.solves, start, 1 / self._scale)
            norm = np.sqrt(self._dot(x, x))
            if not np.isfinite(norm).all():
                return False
            quotient, start = self._dot(x, start) / norm**2, x / norm[:, None]
        return bool(quotient[0] > _SINGULAR)

    @staticmethod
    def _scaled(apply, rows: np.ndarray, scale: np.ndarray) -> np.ndarray:
        return scale * apply(scale * rows)

    def _dot(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return space_dots(self._comm, a, b)

    def covariance(self, rows: np.ndarray) -> np.ndarray:
        """Return the solutions for dual vectors ``(k, n)``."""
        return self.solves(rows)

    def precision(self, rows: np.ndarray) -> np.ndarray:
        """Return the products with primal vectors ``(k, n)``."""
        return self.product(rows)

    def _scaled_root(self, rows: np.ndarray) -> np.ndarray:
        """Products of ``D^{-1/2} (D^{-1/2} Q D^{-1/2})^{-1/2}`` with vectors ``(k, n)``."""
        return self._scale * inverse_root(lambda v: self._scaled(self.product, v, self._scale), rows, self._dot)

    def samples(self, keys: Sequence[Key], count: int) -> np.ndarray:
        """Return samples by a half solve, or by the Lanczos iteration."""
        if self.solves.has_root:
            noise = white_noise(keys, count, self.total)
            return self.solves.root(noise.reshape(-1, self.total)).reshape(count, len(keys), self.size)
        noise = white_noise([(*key, self._comm.rank) for key in keys], count, self.size)
        return self._scaled_root(noise.reshape(-1, self.size)).reshape(noise.shape)


def space_dots(comm: MPI.Comm, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Dot products ``(k,)`` of the rows of two arrays, summed over the ranks of a communicator (collective)."""
    return comm.allreduce(np.einsum("ij,ij->i", a, b), op=MPI.SUM)


def white_noise(keys: Sequence[Key], count: int, size: int) -> np.ndarray:
    """Independent standard normal numbers ``(count, len(keys), size)``, those of each key seeded by it alone."""
    out = np.empty((count, len(keys), size))
    for i, key in enumerate(keys):
        out[:, i] = np.random.default_rng(key).standard_normal((count, size))
    return out


class DiagonalField(GaussianField):
    """The law of independent coefficients; one real number, which the first rank in space owns, is such a field.

    Parameters
    ----------
    space
        The field's space.
    diagonal
        The precision of each own coefficient, ``(n,)``.
    name
        Name of the field, for messages.

    Raises
    ------
    InputError
        On every rank in space, if a precision is not positive and finite.
    """

    def __init__(self, space: WithGeometry, diagonal: np.ndarray, name: str):
        super().__init__(space)
        comm = space.mesh().comm
        if not all_ranks(comm, ((diagonal > 0) & (diagonal < np.inf)).all()):
            raise InputError(f"prior of {name!r}: a precision of a coefficient is not positive: {_REMEDY}")
        self._diagonal, self._rank = np.array(diagonal), comm.rank
        self.log_det_precision = float(comm.allreduce(np.log(diagonal).sum()))

    def covariance(self, rows: np.ndarray) -> np.ndarray:
        """Return dual vectors ``(k, n)`` divided by the precisions."""
        return rows / self._diagonal

    def precision(self, rows: np.ndarray) -> np.ndarray:
        """Return primal vectors ``(k, n)`` times the precisions."""
        return rows * self._diagonal

    def samples(self, keys: Sequence[Key], count: int) -> np.ndarray:
        """Return scaled white noise."""
        return white_noise([(*key, self._rank) for key in keys], count, self.size) / np.sqrt(self._diagonal)

    def _exact_variance(self, among: MPI.Comm) -> np.ndarray:
        return 1 / self._diagonal


class MapField(GaussianField):
    """The law whose precision is a Riesz map, applied to one vector after another.

    Parameters
    ----------
    space
        The field's space.
    riesz
        An object with ``primal(dual)`` and ``dual(primal)``, inverse to each other, on own values ``(n,)``.
    """

    largest_exact = EXACT // 10

    def __init__(self, space: WithGeometry, riesz: Any):
        super().__init__(space)
        self._riesz, self._comm = riesz, space.mesh().comm

    def covariance(self, rows: np.ndarray) -> np.ndarray:
        """Return the representatives of dual vectors ``(k, n)``."""
        return np.array([self._riesz.primal(row) for row in rows]).reshape(rows.shape)

    def precision(self, rows: np.ndarray) -> np.ndarray:
        """Return the dual vectors of primal vectors ``(k, n)``."""
        return np.array([self._riesz.dual(row) for row in rows]).reshape(rows.shape)

    def samples(self, keys: Sequence[Key], count: int) -> np.ndarray:
        """Return samples by the Lanczos iteration."""
        noise = white_noise([(*key, self._comm.rank) for key in keys], count, self.size)
        rows = noise.reshape(-1, self.size)
        return inverse_root(self.precision, rows, lambda a, b: space_dots(self._comm, a, b)).reshape(noise.shape)


def form_field(space: WithGeometry, form: ufl.Form, name: str) -> GaussianField:
    """Return the law whose precision is a bilinear form, of a field or of a real number (collective over space); errors
    as for :class:`FormField` and :class:`DiagonalField`.
    """
    if is_real(space):
        return DiagonalField(space, np.full(own_size(space), at_one(space, form)), name)
    return FormField(space, form, name)


def at_one(space: WithGeometry, form: ufl.Form) -> float:
    """The value of a bilinear form on real numbers at one."""
    with stop_annotating():
        one = Function(space).assign(1.0)
        return float(assemble(form(one, one)))

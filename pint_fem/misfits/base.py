r"""The interface of misfits: functionals :math:`\sum_n j_n` of the trajectory, with values and derivatives in blocks.

A misfit is bound to the time points of a rank. Local point 0 is the last point of the left neighbour (on the first
rank the initial state) and points ``1..k`` are the rank's own, so states are arrays ``(k + 1, n)``. A
:class:`BlockMisfit` is evaluated in three stages, so that no array with a state for each point has to exist:

* :meth:`~BlockMisfit.observe` maps states to a few numbers per point, the observations :math:`y_n`;
* :meth:`~BlockMisfit.point_values` maps the observations of all local points to the contribution :math:`j_n` of each
  own point, and :meth:`~BlockMisfit.pull_back` to the derivatives :math:`s_n = \partial J / \partial y_n`;
* :meth:`~BlockMisfit.adjoint_source` maps these and the states to :math:`\partial J / \partial u_n`, the right-hand
  side of the adjoint equation.

Each of them has a derivative in a direction. Contributions are summed over space for each point, so that the sum over
time is taken in the order of the points.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator

import numpy as np
from firedrake.petsc import PETSc

from pint_fem.collective import collectively
from pint_fem.errors import InputError
from pint_fem.evolution.evolution import Evolution
from pint_fem.spacetime import Slab, SpaceTime

__all__ = ["BLOCK", "BlockMisfit", "Misfit", "checked_slab", "checked_values", "hessian_products"]

BLOCK = 64
"""Points of a block where the states at all points are stored."""


class Misfit(ABC):
    """A functional of the trajectory, evaluated on states at all local points."""

    #: Whether it is a quadratic function of the trajectory.
    quadratic = False
    #: Whether it consists of quadratic functions of the trajectory with continuous first derivatives between them.
    piecewise = False
    #: Whether :meth:`hessian` also takes a batch of directions, ``(k + 1, members, n)``, and returns as many products.
    takes_batches = False
    #: Whether :meth:`bind` has been called, that is, whether the misfit belongs to a reduced functional.
    is_bound = False

    def bind(self, evolution: Evolution, spacetime: SpaceTime, slab: Slab) -> None:
        """Prepare for the local points of a rank; called once, on every rank."""
        self.evolution, self.spacetime, self.slab, self.is_bound = evolution, spacetime, slab, True

    def given(self) -> dict:
        """The user's input by name, compared between ranks: arrays, numbers and signatures of forms."""
        return {}

    def has_changed(self) -> bool:
        """Whether the user has changed input other than functions in forms since it was read."""
        return False

    def update_data(self, changed: set, *, own: bool) -> None:
        """Read new values of data (collective).

        Parameters
        ----------
        changed
            Functions and constants of the evolution's private copies that have new values.
        own
            Whether :meth:`has_changed` is true on any rank.
        """
        return  # a misfit without data has nothing to update

    @abstractmethod
    def values(self, U: np.ndarray) -> np.ndarray:
        """Contribution of each own point, ``(k,)``, from states ``(k + 1, n)``."""

    @abstractmethod
    def directional(self, U: np.ndarray, dU: np.ndarray) -> np.ndarray:
        """Derivative of :meth:`values` in the direction ``dU``, ``(k,)``."""

    @abstractmethod
    def gradient(self, U: np.ndarray) -> np.ndarray:
        """``dJ/dU_n``, ``(k + 1, n)``, in rows ``0..k-1`` and on the last rank ``k``; the other row is not used."""

    @abstractmethod
    def hessian(self, U: np.ndarray, dU: np.ndarray) -> np.ndarray:
        """Derivative of :meth:`gradient` in the direction ``dU``, ``(k + 1, n)``."""

    def second_derivative(self) -> tuple[PETSc.Mat, np.ndarray] | None:
        """The matrix ``Q`` and the weights ``w_n`` of the local points, ``(k + 1,)``, where the second derivative at
        each point is ``w_n Q`` for any state and no points are coupled; ``None`` where it is not known to be of this
        form.
        """
        return None

    def nbytes(self) -> int:
        """Bytes of the numpy arrays that are stored for the local points."""
        return 0

    def operator_nbytes(self) -> dict[str, int]:
        """Bytes of matrices on this rank by part, as :meth:`FEPropagator.operator_nbytes` names them."""
        return {}


def hessian_products(misfit: Misfit, U: np.ndarray, dU: np.ndarray) -> np.ndarray:
    """The result of :meth:`Misfit.hessian` for a direction ``(k + 1, n)`` or a batch ``(k + 1, members, n)``."""
    if dU.ndim == 2 or misfit.takes_batches:
        return checked_slab(misfit.hessian, U, dU, shape=dU.shape)
    products = np.empty_like(dU)
    for member in range(dU.shape[1]):
        products[:, member] = checked_slab(misfit.hessian, U, np.ascontiguousarray(dU[:, member]))
    return products


def checked_slab(method: Callable, U: np.ndarray, *dU: np.ndarray, shape: tuple[int, ...] | None = None) -> np.ndarray:
    """The result of :meth:`Misfit.gradient` or :meth:`Misfit.hessian` for states (and a direction) ``(k + 1, n)``; an
    ``InputError`` unless it has the given shape, by default that of ``U``.
    """
    out, shape = method(U, *dU), shape or U.shape
    if np.shape(out) != shape:
        got, name = "None" if out is None else f"shape {np.shape(out)}", getattr(method, "__qualname__", method)
        raise InputError(f"{name} of a misfit returned {got}: return an array of shape {shape}")
    return out


def checked_values(method: Callable, U: np.ndarray, *dU: np.ndarray) -> np.ndarray:
    """The result of :meth:`Misfit.values` or :meth:`Misfit.directional`; an ``InputError`` unless it is ``(k,)``."""
    return checked_slab(method, U, *dU, shape=(len(U) - 1,))


class BlockMisfit(Misfit):
    """A misfit that is evaluated on blocks of points, through observations of a few numbers per point.

    In all methods ``points`` is a slice of local points, ``u`` and ``du`` are states and directions at these,
    ``(b, n)``, and ``Y``, ``dY``, ``S`` and ``dS`` are arrays ``(k + 1, width)`` of all local points. Where
    ``takes_batches`` is true, ``du`` may also be ``(b, members, n)``, then ``dY`` and ``dS`` are ``(k + 1, members,
    width)``.

    Attributes
    ----------
    stores_data : bool
        Whether data that depend on time are stored for each point, as one state per point, or computed again when they
        are used. Set before :meth:`bind`.
    uses_observations : bool
        Whether :meth:`adjoint_source` and :meth:`point_derivatives` depend on the observations.
    observed, active, state_dependent : ndarray of bool, shape (k + 1,)
        Points whose states :meth:`observe` and its derivative use; points where :meth:`adjoint_source` may be nonzero;
        and those of the latter whose states it uses. The same on all ranks in space.
    """

    stores_data = True
    uses_observations = True
    observed: np.ndarray
    active: np.ndarray
    state_dependent: np.ndarray

    @property
    @abstractmethod
    def width(self) -> int:
        """Number of observations per point on this rank."""

    @abstractmethod
    def observe(self, points: slice, u: np.ndarray) -> np.ndarray:
        """Observations of states, ``(b, width)``."""

    @abstractmethod
    def observe_tangent(self, points: slice, u: np.ndarray, du: np.ndarray) -> np.ndarray:
        """Derivative of :meth:`observe` at ``u`` in the direction ``du``, ``(b, width)``."""

    @abstractmethod
    def point_values(self, Y: np.ndarray) -> np.ndarray:
        """Contribution of each own point, ``(k,)``, from the observations ``Y``."""

    @abstractmethod
    def point_derivatives(self, Y: np.ndarray | None, dY: np.ndarray) -> np.ndarray:
        """Derivative of :meth:`point_values` at ``Y`` in the direction ``dY``, ``(k,)``."""

    def pull_back(self, Y: np.ndarray) -> np.ndarray:
        """Derivatives of the functional by the observations, ``(k + 1, width)`` (collective)."""
        return Y

    def pull_back_tangent(self, dY: np.ndarray) -> np.ndarray:
        """Derivative of :meth:`pull_back` in the direction ``dY``, ``(k + 1, width)`` (collective)."""
        return dY

    @abstractmethod
    def adjoint_source(self, points: slice, u: np.ndarray, S: np.ndarray | None) -> np.ndarray:
        """``dJ/du_n`` at the points, ``(b, n)``; ``S`` is the result of :meth:`pull_back`, if observations are used."""

    @abstractmethod
    def adjoint_source_tangent(self, points: slice, u: np.ndarray, du: np.ndarray, dS: np.ndarray | None) -> np.ndarray:
        """Derivative of :meth:`adjoint_source` in the direction ``du``, ``(b, n)``, where ``S`` changes by ``dS``."""

    def write_source(self, points: slice, u: np.ndarray, S: np.ndarray | None, out: np.ndarray) -> None:
        """Write :meth:`adjoint_source` to ``out``."""
        out[...] = self.adjoint_source(points, u, S)

    def write_source_tangent(
        self, points: slice, u: np.ndarray, du: np.ndarray, dS: np.ndarray | None, out: np.ndarray
    ) -> None:
        """Write :meth:`adjoint_source_tangent` to ``out``."""
        out[...] = self.adjoint_source_tangent(points, u, du, dS)

    # -- states at all local points ------------------------------------------------------------------------------------
    def _require_all_points(self, *slabs: np.ndarray) -> None:
        for slab in slabs:
            if len(slab) != self.slab.k + 1:
                raise InputError(
                    f"{type(self).__name__}: {len(slab)} states, but the slab has {self.slab.k + 1} points; with mgrit "
                    "storage 'C', whose slabs are of C-points only, use ReducedProblem.observations and .states"
                )

    def read(self, U: np.ndarray, dU: np.ndarray | None = None) -> np.ndarray:
        """Observations of all local points, ``(k + 1, width)``, or their derivative in the direction ``dU``
        (collective); an ``InputError`` on all ranks where ``U`` has not one state per local point.
        """
        return collectively(self.spacetime.comm, f"{type(self).__name__}.observe", self._read, U, dU)

    def _read(self, U: np.ndarray, dU: np.ndarray | None) -> np.ndarray:
        self._require_all_points(U, *(() if dU is None else (dU,)))
        Y = np.zeros((*(U if dU is None else dU).shape[:-1], self.width))
        for points in _blocks(*Y.shape[:-1]):
            u = U[points]
            Y[points] = self.observe(points, u) if dU is None else self.observe_tangent(points, u, dU[points])
        return Y

    def values(self, U: np.ndarray) -> np.ndarray:
        """Contribution of each own point, ``(k,)``, from states ``(k + 1, n)``."""
        return self.point_values(self.read(U))

    def directional(self, U: np.ndarray, dU: np.ndarray) -> np.ndarray:
        """Derivative of :meth:`values` in the direction ``dU``, ``(k,)``."""
        return self.point_derivatives(self.read(U) if self.uses_observations else None, self.read(U, dU))

    def gradient(self, U: np.ndarray) -> np.ndarray:
        """``dJ/dU_n``, ``(k + 1, n)``."""
        self._require_all_points(U)
        S, out = self.pull_back(self.read(U)) if self.uses_observations else None, np.empty_like(U)
        for points in _blocks(len(U)):
            self.write_source(points, U[points], S, out[points])
        return out

    def hessian(self, U: np.ndarray, dU: np.ndarray) -> np.ndarray:
        """Derivative of :meth:`gradient` in the direction ``dU``, shaped as this is."""
        self._require_all_points(U, dU)
        dS = self.pull_back_tangent(self.read(U, dU)) if self.uses_observations else None
        out = np.empty_like(dU)
        for points in _blocks(*dU.shape[:-1]):
            self.write_source_tangent(points, U[points], dU[points], dS, out[points])
        return out


def _blocks(count: int, members: int = 1) -> Iterator[slice]:
    """Slices of points with ``BLOCK`` states in all members of a batch, the last one of the rest."""
    size = max(BLOCK // members, 1)
    for first in range(0, count, size):
        yield slice(first, min(first + size, count))

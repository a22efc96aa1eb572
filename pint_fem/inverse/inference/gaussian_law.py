"""What every Gaussian law of the controls has: its mean and deviations as functions, products with its covariance."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import numpy as np
from firedrake import Cofunction

from pint_fem.collective import collectively
from pint_fem.errors import InputError
from pint_fem.kernels.arrays import get

if TYPE_CHECKING:
    from pint_fem.inverse.map import ParameterToObservable

__all__ = ["GaussianLaw"]


class GaussianLaw(ABC):
    """A Gaussian law of the controls of a map.

    Attributes
    ----------
    F : ParameterToObservable
    x : ndarray, shape (layout.size,)
        The mean as a flat vector.
    """

    F: ParameterToObservable
    x: np.ndarray

    @abstractmethod
    def variance(self) -> np.ndarray:
        """The variance of each entry of the controls, ``(layout.size,)`` (collective)."""

    @abstractmethod
    def sample(self, count: int, seed: int = 0) -> np.ndarray:
        """Samples of the controls, ``(count, layout.size)`` (collective); the same for the same seed."""

    @abstractmethod
    def _covariance(self, g: np.ndarray) -> np.ndarray:
        """The covariance applied to dual vectors ``(k, layout.size)`` (collective)."""

    # -- as functions --------------------------------------------------------------------------------------------------
    def _functions(self, x: np.ndarray) -> Any:
        if self.F.functions is None:
            raise InputError("the map was made without functions: use the flat vectors x, variance() and sample()")
        return self.F.functions.function(x)

    @property
    def mean(self) -> Any:
        """The mean, which is the maximum a posteriori: a function, or a list with one for each control."""
        return self._functions(self.x)

    def standard_deviation(self) -> Any:
        """The standard deviation of each coefficient of the controls, as :attr:`mean` (collective)."""
        return self._functions(np.sqrt(self.variance()))

    def samples(self, count: int, seed: int = 0) -> list:
        """Samples of the controls, each as :attr:`mean` (collective); the same for the same seed."""
        return [self._functions(x) for x in self.sample(count, seed)]

    @property
    def predicted(self) -> np.ndarray:
        """The readings at the mean, ``(m,)`` (collective)."""
        return self.F.predict(self.x)

    def covariance(self, g: Any) -> Any:
        """The covariance applied to derivatives with respect to the controls (collective).

        Parameters
        ----------
        g
            A cofunction, or a list with one for each control; or dual vectors, ``(layout.size,)`` or ``(k,
            layout.size)``.

        Returns
        -------
        object
            Functions in the place of cofunctions, as :attr:`mean`; of vectors an array of the same shape.

        Raises
        ------
        InputError
            On every rank, if what is given does not fit the controls.
        """
        layout = self.F.layout
        if isinstance(g, np.ndarray):
            fits = collectively(layout.spacetime.comm, "", _rows, g, layout.size)
            return self._covariance(fits).reshape(g.shape)
        rows = collectively(layout.spacetime.comm, "", self._dual, g)
        return self._functions(self._covariance(rows[None])[0])

    def _dual(self, given: Any) -> np.ndarray:
        """The flat vector of cofunctions."""
        each = list(given) if isinstance(given, (list, tuple)) else [given]
        controls = self.F.layout.evolution.controls
        if len(each) != len(controls):
            raise InputError(f"{len(each)} cofunctions are given for {len(controls)} controls: give one for each")
        values = []
        for one, control in zip(each, controls, strict=True):
            space = control.function_space().dual()
            if control in self.F.layout.evolution.stepwise:
                if not hasattr(one, "subfunctions") or isinstance(one, Cofunction):
                    raise InputError(
                        f"the control {control.name()!r} has one value per step: give an EnsembleCofunction"
                    )
                values.append(np.array([get(part) for part in one.subfunctions]))
            elif not isinstance(one, Cofunction) or one.function_space() != space:
                raise InputError(
                    f"given is a {type(one).__name__}, a derivative by {control.name()!r} is a cofunction in {space}: "
                    "give assemble(derivative(form, control)), or flat vectors"
                )
            else:
                values.append(get(one))
        return self.F.layout.join(values)


def _rows(g: np.ndarray, size: int) -> np.ndarray:
    """Vectors of a size as rows of an array."""
    if g.ndim not in (1, 2) or g.shape[-1] != size:
        raise InputError(f"vectors of shape {g.shape}: give ({size},) or (k, {size})")
    return np.atleast_2d(g)

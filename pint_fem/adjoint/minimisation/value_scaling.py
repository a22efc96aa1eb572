"""The factor by which a functional is multiplied where pyadjoint's ``minimize`` passes it to scipy.

``minimize(J, scale=s)`` sets ``J.scale = s`` and evaluates ``J`` through arrays; values and derivatives then have to be
``s`` times those of ``J``, and ``maximize`` relies on that with ``s = -1``. scipy's tolerances are absolute, so where
``J`` or its gradient is small at the start they get the factor of :mod:`pint_fem.optimize.scipy_methods.run` as well,
unless a ``scale`` is given. A user's own evaluations, ``J(z)``, have no factor, and derivatives have that of the last
evaluation: pyadjoint's controls, which turn arrays into functions, mark those that come from a minimiser.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from firedrake import EnsembleFunction, Function
from pyadjoint import Control

from pint_fem.optimize.scipy_methods.run import unit_factor

__all__ = ["ScaledControl", "ValueScaling"]

_MARK = "_pint_fem_from_a_minimiser"


class ValueScaling:
    """The factor of a functional's values and derivatives.

    Attributes
    ----------
    factor : float
        The factor of the last evaluation.
    scale : float
        pyadjoint's factor.
    """

    def __init__(self) -> None:
        self.factor, self._scale, self._unit = 1.0, 1.0, 1.0
        self._is_first = False

    @property
    def scale(self) -> float:
        """pyadjoint's factor; setting it begins an optimisation."""
        return self._scale

    @scale.setter
    def scale(self, scale: float) -> None:
        """Set the factor; the next evaluation from an array is the first of a minimisation."""
        self._scale, self._unit, self._is_first = float(scale), 1.0, abs(scale) == 1

    def evaluated(self, from_minimiser: bool, value: float, norm: Callable[[], float]) -> float:
        """The value times its factor, 1 for the user's own evaluations; ``norm()`` is the norm of the gradient."""
        if from_minimiser and self._is_first:
            self._is_first, self._unit = False, unit_factor(value, norm())
        self.factor = self._scale * self._unit if from_minimiser else 1.0
        return self.factor * value

    @staticmethod
    def from_array(values: Sequence) -> bool:
        """Whether values were made from the array of a minimiser."""
        return any(getattr(value, _MARK, False) for value in values)


class ScaledControl(Control):
    """A control that marks the functions made from the array of a minimiser until they become its value.

    Parameters
    ----------
    value : Function or EnsembleFunction
        pyadjoint's value of the control.
    unit : ValueScaling
        The factor of the functional, which is 1 after an update of the control.
    """

    def __init__(self, value: Function | EnsembleFunction, unit: ValueScaling):
        super().__init__(value)
        self._unit = unit

    def assign_numpy(self, dst: object, src: np.ndarray, offset: int) -> tuple[object, int]:
        """Values from an array, as pyadjoint's control takes them, and the next offset; the function is marked."""
        dst, offset = super().assign_numpy(dst, src, offset)
        setattr(dst, _MARK, True)
        return dst, offset

    def update(self, value: object) -> None:
        """Set the value of the control, as pyadjoint does, and remove its mark."""
        if hasattr(value, _MARK):
            delattr(value, _MARK)
        self._unit.factor = 1.0
        super().update(value)

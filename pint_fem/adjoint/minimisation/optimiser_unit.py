"""The unit in which pyadjoint's ``minimize`` hands a functional to scipy.

``minimize(J, scale=s)`` sets ``J.scale = s`` and evaluates ``J`` through arrays; values and derivatives are then to be
``s`` times those of ``J``, and ``maximize`` relies on that with ``s = -1``. scipy's tolerances are absolute, so where
``J`` or its gradient is small at the start they get the factor of :mod:`pint_fem.optimize.scipy_methods.run` as well, unless a
``scale`` is given. Evaluations of the user's, ``J(z)``, have no factor, and derivatives have that of the last
evaluation: pyadjoint's controls, which turn arrays into functions, mark those that come from an optimiser.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pyadjoint import Control

from pint_fem.optimize.scipy_methods.run import unit_factor

__all__ = ["OptimiserControl", "OptimiserUnit"]

_MARK = "_pint_fem_from_an_optimiser"


class OptimiserUnit:
    """The factor of a functional's values and derivatives.

    Attributes
    ----------
    factor : float
        Of the last evaluation.
    scale : float
        pyadjoint's.
    """

    def __init__(self):
        self.factor, self._scale, self._unit = 1.0, 1.0, 1.0
        self._begins = False

    @property
    def scale(self) -> float:
        """pyadjoint's factor; setting it begins an optimisation."""
        return self._scale

    @scale.setter
    def scale(self, scale: float) -> None:
        self._scale, self._unit, self._begins = float(scale), 1.0, abs(scale) == 1

    def evaluated(self, from_optimiser: bool, value: float, norm: Callable[[], float]) -> float:
        """The value in the unit of who asks for it; ``norm`` is that of the gradient."""
        if from_optimiser and self._begins:
            self._begins, self._unit = False, unit_factor(value, norm())
        self.factor = self._scale * self._unit if from_optimiser else 1.0
        return self.factor * value

    @staticmethod
    def is_asked(values: Sequence) -> bool:
        """Whether values come from an optimiser's array."""
        return any(getattr(value, _MARK, False) for value in values)


class OptimiserControl(Control):
    """A control that marks the functions it makes of an optimiser's array until they become its value.

    Parameters
    ----------
    value
        pyadjoint's value of the control.
    unit
        Of the functional: what is evaluated next is in the user's unit.
    """

    def __init__(self, value, unit: OptimiserUnit):
        super().__init__(value)
        self._unit = unit

    def assign_numpy(self, dst, src, offset):
        """See pyadjoint."""
        dst, offset = super().assign_numpy(dst, src, offset)
        setattr(dst, _MARK, True)
        return dst, offset

    def update(self, value):
        """See pyadjoint."""
        if hasattr(value, _MARK):
            delattr(value, _MARK)
        self._unit.factor = 1.0
        super().update(value)

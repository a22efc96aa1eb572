r"""A quadratic functional of a control's rate of change, as a user writes it among the functionals of a regularisation.

For controls :math:`z_1, \dots, z_N` with one value per step and a quadratic functional :math:`R` it is

.. math::  S(z) = \sum_{n=1}^{N-1} \Delta t\, R\Big(\frac{z_{n+1} - z_n}{\Delta t}\Big),

which with :math:`R(q) = \frac{\gamma}{2} \int q^2 dx` converges to the square of a seminorm of :math:`H^1` in time,
:math:`\frac{\gamma}{2} \int_0^T \|\partial_t q\|^2 dt`. With the matrix :math:`D`, :math:`(D z)_n = (z_{n+1} - z_n) /
\Delta t`, gradient and second derivative are :math:`\Delta t\, D^T R'(D z)` and :math:`\Delta t\, D^T R'' D`. Made
periodic in time the latter is diagonal in the frequencies: it is :math:`\Delta t\, |1 - \mu|^2 / \Delta t^2\, R''` for
a shift that multiplies by :math:`\mu`.
"""

from __future__ import annotations

from numbers import Real

import ufl

from pint_fem.errors import InputError, InputTypeError

__all__ = ["RateOfChange"]


class RateOfChange(ufl.Form):
    r"""A quadratic functional :math:`R` of the rates of change :math:`(z_{n+1} - z_n) / \Delta t` of controls with one
    value per step, summed over the steps with weight :math:`\Delta t`.

    It is given to a functional of controls by itself or in a list with others,
    ``regularisation=[alpha/2 * q**2 * dx, pf.RateOfChange(gamma/2 * q**2 * dx)]``. The control's name in the form
    stands for its rate of change, so that ``R`` may have data, too: ``(q - r)**2 * dx`` compares the rate with ``r``.
    Constant controls have the value ``R(0)`` per step: beside it a functional of the controls themselves is needed
    where the misfit does not determine a constant in time.

    As a form it is ``R`` itself: ``assemble`` returns ``R`` at the present value of the control.

    Parameters
    ----------
    functional : ufl.Form
        ``R``, without arguments, a quadratic functional of one or several controls with one value per step.

    Raises
    ------
    InputError
        If the form has arguments, is empty or is itself of this kind; InputTypeError where it is no form. Static
        controls, a functional that is not quadratic, the state and the time are refused where the functional of the
        controls is made.
    """

    def __init__(self, functional: ufl.Form):
        if not isinstance(functional, ufl.Form):
            raise InputTypeError(
                f"RateOfChange: a {type(functional).__name__} is refused: give a functional of the control, such as "
                "RateOfChange(gamma/2 * inner(q, q) * dx)"
            )
        if isinstance(functional, RateOfChange):
            raise InputError("RateOfChange of a RateOfChange is refused: give the functional of the first rate alone")
        if functional.empty() or functional.arguments():
            raise InputError(
                "RateOfChange: a form that is empty or has test or trial functions is refused: give a functional of "
                "the control, such as RateOfChange(gamma/2 * inner(q, q) * dx)"
            )
        super().__init__(functional.integrals())

    @property
    def functional(self) -> ufl.Form:
        """The functional ``R`` as a plain form."""
        return ufl.Form(self.integrals())

    def __rmul__(self, factor: object) -> ufl.Form:
        """A multiple by a number, which is a functional of the rates again."""
        made = super().__rmul__(factor)
        return RateOfChange(made) if isinstance(factor, Real) else made

    __mul__ = __rmul__

    def __neg__(self) -> ufl.Form:
        """The negative functional."""
        return -1.0 * self

    def __add__(self, other: object) -> ufl.Form:
        """A sum with another functional of rates.

        Raises
        ------
        InputTypeError
            Where the other summand is a functional of the controls themselves.
        """
        if isinstance(other, Real) and other == 0:
            return self
        if isinstance(other, RateOfChange):
            return RateOfChange(self.functional + other.functional)
        raise InputTypeError(
            "RateOfChange: a sum with a functional of the controls themselves is refused: give a list, "
            "regularisation=[..., RateOfChange(...)]"
        )

    __radd__ = __add__

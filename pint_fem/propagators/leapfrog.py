r"""Leapfrog steps, explicit in the coupling of two fields, for waves with steps that the CFL condition allows.

For the two parts of :mod:`~pint_fem.propagators.elimination`, from :math:`t` to :math:`t + \Delta t` with ``h`` half of
it, :math:`X = M_b^{-1} D`, and the load at the midpoint,

.. math::
    b_{1/2} &= b_0 - h X a_0 + M_b^{-1} h f_b , \\
    (M_a + h K_a)\, \bar a &= M_a a_0 - h\, G\, b_{1/2} + h f_a , \qquad a_1 = 2 \bar a - a_0 , \\
    b_1 &= b_{1/2} - h X a_1 + M_b^{-1} h f_b .

Two such half steps of ``b`` make the whole steps of the classical staggered scheme (Yee, IEEE Trans. Antennas Propag.
14, 1966), with the damping :math:`K_a` implicit. It is of second order, and stable for :math:`\Delta t\,\omega < 2`,
:math:`\omega^2` the largest eigenvalue of :math:`-G X x = \omega^2 M_a x`. Only mass matrices are solved with.
"""

from __future__ import annotations

import numpy as np
from firedrake.petsc import PETSc
from irksome.tableaux.ButcherTableaux import ButcherTableau

from pint_fem.errors import InputError
from pint_fem.evolution.affine_parts import touches_field
from pint_fem.evolution.evolution import Evolution
from pint_fem.evolution.fields import Fields
from pint_fem.evolution.tableaux import ImplicitMidpoint
from pint_fem.kernels.factor import Factor
from pint_fem.kernels.lanczos import Pencil
from pint_fem.kernels.lanes.program import STATE, StepProgram
from pint_fem.propagators.elimination import field_program
from pint_fem.propagators.linear import LinearPropagator
from pint_fem.propagators.recursion import StepPrograms, append_solve

__all__ = ["LeapfrogPropagator", "require_fields", "stable_step"]


def stable_step(evolution: Evolution) -> float:
    """Largest stable step of leapfrog, at most 1 percent too small (collective over space).

    Parameters
    ----------
    evolution
        A linear evolution with constant operators and ``eliminate``.

    Returns
    -------
    float
        The step; infinite where nothing couples the fields.

    Raises
    ------
    InputError
        If the evolution does not name a field to ``eliminate``.
    """
    return _stable_step(require_fields(evolution))


def _stable_step(fields: Fields) -> float:
    pencil = Pencil(fields.part(0.0), fields.fixed)
    highest = pencil.ends(pencil.product(fields.stiffness()))[1]
    return 2 / highest**0.5 if highest > 0 else np.inf


def require_fields(evolution: Evolution) -> Fields:
    """The blocks of the fields, which leapfrog requires."""
    parts, number = evolution.affine_parts, evolution.eliminate
    if number is not None and parts is not None and touches_field(parts, number):
        names = ", ".join(repr(control.name()) for control in parts.in_operators)
        raise InputError(
            f"leapfrog: the control {names} is in the rows or columns of field {number}, which is eliminated: "
            "eliminate another field, or give an implicit integrator and leave propagator=leapfrog out"
        )
    if evolution.fields is None:
        raise InputError(
            "leapfrog requires a linear evolution with constant operators and the number of the field to step by "
            "halves: give Evolution(..., eliminate=1)"
        )
    return evolution.fields


class LeapfrogPropagator(LinearPropagator):
    """Leapfrog steps; the evolution's tableau is not used.

    Parameters
    ----------
    evolution, stride, tableau
        As for every propagator; the tableau is ignored.

    Raises
    ------
    InputError
        If no field is named to be eliminated, or the step is too long.
    """

    def __init__(self, evolution: Evolution, *, stride: int = 1, tableau: ButcherTableau | None = None):
        super().__init__(evolution, stride=stride, tableau=ImplicitMidpoint())

    def _require_operators(self) -> None:
        """Raise where no field is named to be eliminated."""
        require_fields(self.evolution)

    def shifted_parts(self, h: float) -> tuple[PETSc.Mat, ...]:
        """Raise, as the step is not that of a Runge-Kutta method.

        Raises
        ------
        InputError
            Always.
        """
        raise InputError(
            "ParaDiag requires the steps of a diagonally implicit Runge-Kutta method, and leapfrog is none: leave "
            "propagator=leapfrog out (steps are then those of the evolution's tableau), or give time_solver 'mgrit'"
        )

    def _recursion(self) -> StepPrograms:
        """Factor the matrix of half a step, and make the programs; an ``InputError`` where the step is not stable."""
        limit = _stable_step(self.fields)
        if self.dt > limit:
            raise InputError(
                f"leapfrog with dt = {self.dt:.4g} is not stable on this mesh: give at most {limit:.4g} (more steps), "
                "or an implicit integrator"
            )
        (h,) = self.steps_of_stage
        self._factor(h, self.fields.part(h))
        return _LeapfrogPrograms(self.fields, self.factors[h], h)


class _LeapfrogPrograms(StepPrograms):
    """A leapfrog step of twice ``h`` and its transpose, with the load in the vector ``y``."""

    def __init__(self, fields: Fields, factor: Factor, h: float):
        self.fields, self.factor, self.h = fields, factor, h

    def forward(self) -> StepProgram:
        """The step; states number 0 are its load."""
        h, matrices, made = self.h, self.fields.matrices, field_program(self.fields)
        load, half = made.vector("y"), made.vector("half", ["b"])
        made.zero(load)
        made.load(load, 0)
        made.copy(half, STATE, x_part="b")
        made.multiply(half, matrices["X"], STATE, -h, add=True, x_part="a")
        made.add(half, load, x_part="b")
        made.multiply("r", matrices["M"], STATE, x_part="a")
        made.add("r", load, x_part="a")
        made.multiply("r", matrices["G"], half, -h, add=True)
        append_solve(made, "r", self.factor)
        made.copy(STATE, STATE, -1.0, part="a", x_part="a")
        made.add(STATE, "r", 2.0, part="a")
        made.copy(STATE, half, part="b")
        made.multiply(STATE, matrices["X"], STATE, -h, add=True, part="b", x_part="a")
        made.add(STATE, load, part="b", x_part="b")
        return made

    def backward(self, *, sources: bool = False) -> StepProgram:
        """The transposed step; states number 0 are the adjoint of its load. With ``sources`` states number 1 are added
        to the right-hand side of the transposed solve, and those number 2 to the product of its solution with ``M^T``.
        """
        h, matrices, made = self.h, self.fields.matrices, field_program(self.fields)
        adjoint, end = made.vector("y"), made.vector("end", ["a"])
        made.copy(end, STATE, x_part="a")
        made.multiply(end, matrices["XT"], STATE, -h, add=True, x_part="b")
        made.copy("r", end, 2.0)
        if sources:
            made.zero(adjoint)
            made.load(adjoint, 1)
            made.add("r", adjoint, x_part="a")
        append_solve(made, "r", self.factor, transposed=True)
        made.copy(adjoint, "r", part="a")
        made.copy(adjoint, STATE, part="b", x_part="b")
        made.multiply(STATE, matrices["GT"], "r", -h, add=True, part="b")
        made.add(adjoint, STATE, part="b", x_part="b")
        made.store(adjoint, 0)
        made.multiply(STATE, matrices["MT"], "r", part="a")
        made.add(STATE, end, -1.0, part="a")
        made.multiply(STATE, matrices["XT"], STATE, -h, add=True, part="a", x_part="b")
        if sources:
            made.zero(adjoint)
            made.load(adjoint, 2)
            made.add(STATE, adjoint, part="a", x_part="a")
        return made

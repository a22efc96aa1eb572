r"""Stages of a system of two coupled fields, one of which is eliminated.

With the blocks of :mod:`pint_fem.evolution.fields` and :math:`X = M_b^{-1} D`, a stage of step ``h`` is

.. math::
    (M_a + h K_a - h^2 G X)\, a = r_a - h\, G\, r_b , \qquad  b = r_b - h X a ,

for :math:`r_a = M_a W_a + b_a` and :math:`r_b = W_b + M_b^{-1} b_b` with the stage's base ``W`` and load ``b`` (the
second block row is multiplied by :math:`M_b^{-1}`, so that no solve with :math:`M_b` is left in a step). For Maxwell's
equations the matrix is that of :math:`\epsilon + h \sigma + h^2 \nabla\times \mu^{-1} \nabla\times`, symmetric and
positive definite. Transposes have :math:`X^T` in the place of ``G`` and :math:`G^T` in that of ``X``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pint_fem.evolution.fields import Fields
from pint_fem.kernels.factor import Factor
from pint_fem.kernels.lanes.program import StepProgram
from pint_fem.propagators.recursion import Recursion, append_solve

__all__ = ["EliminatedRecursion", "field_program"]


def field_program(fields: Fields) -> StepProgram:
    """A program without operations for states of two fields, the parts ``"a"`` and ``"b"``, with a vector ``r`` of the
    first.
    """
    made = StepProgram({"a": fields.a, "b": fields.b}, fields.state_size)
    made.vector("r", ["a"])
    return made


class EliminatedRecursion(Recursion):
    """The recursion over the stages of a Runge-Kutta step, each solved by elimination.

    Parameters
    ----------
    fields
        The blocks of the two fields.
    factors
        Factors of matrices of the size of ``a``, by ``a_ii dt``.
    *args
        Parameters of :class:`~pint_fem.propagators.recursion.Recursion`.
    """

    def __init__(self, fields: Fields, factors: Mapping[float, Factor], *args: Any):
        super().__init__(*args)
        self.fields, self.factors = fields, factors

    def program(self) -> StepProgram:
        """A program for states of two parts."""
        return field_program(self.fields)

    def mass(
        self, program: StepProgram, out: str, x: str, *, transposed: bool = False, keep: float | None = None
    ) -> None:
        """Append ``out = M x``, or ``out = M^T x``; the rows of ``b`` are those of the identity; ``keep``: add ``keep
        out``.
        """
        M, add = self.fields.matrices["MT" if transposed else "M"], keep is not None
        program.multiply(out, M, x, add=add, scale=keep or 0.0, part="a", x_part="a")
        if add:
            program.copy(out, out, keep, part="b", x_part="b")
            program.add(out, x, part="b", x_part="b")
        else:
            program.copy(out, x, part="b", x_part="b")

    def solve(self, program: StepProgram, y: str, h: float, *, transposed: bool = False) -> None:
        """Append the solution of a stage, or of its transpose."""
        first, second = ("XT", "GT") if transposed else ("G", "X")
        matrices = self.fields.matrices
        program.copy("r", y, x_part="a")
        program.multiply("r", matrices[first], y, -h, add=True, x_part="b")
        append_solve(program, "r", self.factors[h], transposed=transposed)
        program.copy(y, "r", part="a")
        program.multiply(y, matrices[second], "r", -h, add=True, part="b")

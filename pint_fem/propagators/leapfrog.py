r"""The leapfrog propagator: explicit in the coupling of two fields, for waves whose steps the CFL condition allows.

For the two parts of :mod:`~pint_fem.propagators.elimination`, from :math:`t` to :math:`t + \Delta t` with ``h`` half of
it, :math:`X = M_b^{-1} D`, and the load at the midpoint,

.. math::
    b_{1/2} &= b_0 - h X a_0 + M_b^{-1} h f_b , \\
    (M_a + h K_a)\, \bar a &= M_a a_0 - h\, G\, b_{1/2} + h f_a , \qquad a_1 = 2 \bar a - a_0 , \\
    b_1 &= b_{1/2} - h X a_1 + M_b^{-1} h f_b .

Two such half steps of ``b`` make the whole steps of the classical staggered scheme (Yee, IEEE Trans. Antennas Propag.
14, 1966), with the damping :math:`K_a` implicit. Of second order; stable for :math:`\Delta t\,\omega < 2`,
:math:`\omega^2` the largest eigenvalue of :math:`-G X x = \omega^2 M_a x`. Only mass matrices are solved with.
"""

from __future__ import annotations

import numpy as np

from pint_fem.errors import InputError
from pint_fem.evolution.evolution import Evolution
from pint_fem.evolution.tableaux import ImplicitMidpoint
from pint_fem.kernels.blocks import Workspace
from pint_fem.kernels.lanczos import Pencil
from pint_fem.kernels.regularity import stage_factor
from pint_fem.propagators.base import FEPropagator
from pint_fem.propagators.elimination import BlockFields, FieldBlocks, StateFields
from pint_fem.propagators.linear import LinearPropagator
from pint_fem.propagators.recursion import Recursion

__all__ = ["LeapfrogPropagator", "leapfrog", "stable_step"]


def stable_step(evolution: Evolution) -> float:
    """Largest stable step of leapfrog, rounded down by 1 percent (collective over space).

    Raises
    ------
    InputError
        If the evolution does not say which field to ``eliminate``.
    """
    fields = _fields(evolution)
    pencil = Pencil(fields.part(0.0), fields.fixed)
    highest = pencil.ends(pencil.product(fields.stiffness()))[1]
    return 2 / highest**0.5 if highest > 0 else np.inf


def _fields(evolution: Evolution):
    if evolution.fields is None:
        raise InputError(
            "leapfrog wants a linear evolution with constant operators and the number of the field to step by halves: "
            "give Evolution(..., eliminate=1)"
        )
    return evolution.fields


def leapfrog(evolution: Evolution, *, stride: int = 1, tableau=None) -> FEPropagator:
    """Leapfrog on the finest level, the evolution's or the given implicit method on the others: a ``propagator`` for
    :class:`~pint_fem.adjoint.TimeParallelReducedFunctional`.

    Raises
    ------
    InputError
        If the step of the finest level is not stable.
    """
    kind = LeapfrogPropagator if stride == 1 else LinearPropagator
    return kind(evolution, stride=stride, tableau=tableau)


class LeapfrogPropagator(LinearPropagator):
    """See the module; the evolution's tableau is not used.

    Raises
    ------
    InputError
        If no field is named to be eliminated, or the step is too long.
    """

    def __init__(self, evolution: Evolution, *, stride: int = 1, tableau=None):
        evolution = evolution.private()
        _fields(evolution)
        limit = stable_step(evolution)
        if stride * evolution.dt > limit:
            raise InputError(
                f"leapfrog with dt = {stride * evolution.dt:.4g} is not stable on this mesh: give at most {limit:.4g} "
                "(more steps), or an implicit integrator"
            )
        super().__init__(evolution, stride=stride, tableau=ImplicitMidpoint())

    def shifted_parts(self, h):
        """There is none: the step is no Runge-Kutta method's.

        Raises
        ------
        InputError
            Always.
        """
        raise InputError(
            "ParaDiag wants the steps of a diagonally implicit Runge-Kutta method, and leapfrog is none: leave "
            "propagator=leapfrog out (steps are then those of the evolution's tableau), or give time_solver 'mgrit'"
        )

    def _recursions(self, operators):
        ev, given = self.evolution, (self.dirk, self.steps_of_stage, self.factors, self.bc_rows, False)
        (h,) = self.steps_of_stage
        known = dict(symmetric=self.fields.symmetric, geometry=self.fields.geometry)
        self.factors[h] = stage_factor(ev, self.fields.part(h), self.fields.nullspace, **known)
        workspace = Workspace.zeros((ev.state_size, None), self.fields.M_b.comm)
        return (
            _LeapfrogRecursion(BlockFields(self.fields, self.factors), workspace, *given),
            _LeapfrogRecursion(StateFields(self.fields, self.factors), np.zeros(ev.state_size), *given),
        )


class _LeapfrogRecursion(Recursion):
    """A step and its transpose; see :class:`~pint_fem.propagators.elimination.EliminatedRecursion`."""

    def __init__(self, blocks: FieldBlocks, workspace: Workspace | np.ndarray, *args):
        self.blocks, self.workspace = blocks, workspace
        self.w = workspace if isinstance(workspace, np.ndarray) else workspace.array
        self._load, self._end = np.zeros_like(self.w), np.zeros_like(self.w)
        super().__init__(*args)

    @property
    def nbytes(self):
        """See the base class."""
        return super().nbytes + self._load.nbytes + self._end.nbytes

    @property
    def petsc_bytes(self):
        """Of the blocks."""
        return self.w.nbytes + self.blocks.petsc_bytes

    def forward(self, load=None):
        """See the base class."""
        (h,), multiply, end = self.steps, self.blocks.multiply, self._end
        a, b = self.blocks.fields.a, self.blocks.fields.b
        given = self._load
        given[...] = 0
        if load is not None:
            load(given, 0)
        a0 = self.w[..., a]
        half = self.w[..., b] - h * multiply("X", a0) + given[..., b]
        r = multiply("M", a0) + given[..., a]
        r -= h * multiply("G", half)
        a1 = 2 * self.blocks.solve(h, r) - a0
        end[..., a] = a1
        end[..., b] = half - h * multiply("X", a1) + given[..., b]
        return end

    def backward(self, on_stage=None):
        """See the base class."""
        (h,), multiply, end = self.steps, self.blocks.multiply, self._end
        a, b = self.blocks.fields.a, self.blocks.fields.b
        b1 = self.w[..., b]
        a1 = self.w[..., a] - h * multiply("XT", b1)
        y = self.blocks.solve(h, 2 * a1, transposed=True)
        half = b1 - h * multiply("GT", y)
        if on_stage is not None:
            self._load[..., a] = y
            self._load[..., b] = b1 + half
            on_stage(0, self._load)
        end[..., a] = multiply("MT", y) - a1
        end[..., a] -= h * multiply("XT", half)
        end[..., b] = half
        return end

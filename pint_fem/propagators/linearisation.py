"""What is remembered of each step where it is linearised: stage values, matrices, factors, stage adjoints.

A *linearisation* is a control with a trajectory. Everything that derivatives need of it is computed once for a step,
when it is first asked for; sweeps are then products and triangular solves. What a later linearisation can use remains:
factors as approximate ones (see :mod:`~pint_fem.kernels.factors`) and the remainders of first iterates, which save
iterations and change no result (:mod:`~pint_fem.propagators.newton`), and the memory of matrices. So nothing grows
from one linearisation to the next.

Remembered of a step are ``4 s`` states for ``s`` stages (the diagonals of factors among them), two adjoints with
``s + 2`` states each, a tangent with ``2 s + 1`` states and a control vector, and for each stage the Jacobian and those
of the matrices ``F_W`` and ``F_z`` that move; and factors as far as their budget goes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from firedrake.petsc import PETSc
from mpi4py import MPI

from pint_fem.kernels.factors import Solver
from pint_fem.propagators.stage import StageForms

__all__ = ["Memories", "Remainder", "StageMemory", "StepMemory"]


class Remainder(NamedTuple):
    """What the first iterate of a stage's last solve lacked (see :mod:`~pint_fem.propagators.newton`).

    Attributes
    ----------
    holds : object
        Stands for the matrix of the factor that the iterate was computed with.
    array : ndarray
        The difference.
    """

    holds: object
    array: np.ndarray


class StageMemory:
    """Of a stage.

    Attributes
    ----------
    W, U : ndarray or None
        Base and stage value.
    J, F_W, F_z, F_U
        Matrices of the linearisation; shared where constant. ``F_U`` is without conditions, where controls are in them.
    solver : Solver or None
        Of its own, of this or an earlier Jacobian.
    lender : StageMemory or None
        An earlier stage of the step with the same coefficient.
    token : object
        Stands for the linearisation.
    spent, needed : int
        Corrections by refinement in this linearisation, in all and in the last solve.
    remainder : Remainder or None
        Of the last solve that began at its base value.
    sweep, moved, rate : object, float, float or None
        The sweep of the last solve; how far root and base value have moved since one began at the base value; the
        contraction of the last increments.
    """

    def __init__(self, index: int, h: float, lender: StageMemory | None, *, constant: bool, **may: bool):
        self.index, self.h, self.lender, self.constant = index, h, lender, constant
        self.may_keep, self.may_refine = may["keep"], may["refine"]
        self.W: np.ndarray | None = None
        self.U: np.ndarray | None = None
        self.J: PETSc.Mat | None = None
        self.F_W: PETSc.Mat | None = None
        self.F_U: PETSc.Mat | None = None
        self.F_z: list[PETSc.Mat | None] | None = None
        self.solver: Solver | None = None
        self.token: object = None
        self.spent, self.needed = 0, 1
        self.remainder: Remainder | None = None
        self.sweep: object = None
        self.moved, self.rate = 0.0, None

    def linearise(self, forms: StageForms) -> None:
        """Assemble the matrices at the values that the forms hold."""
        self.token, self.spent, self.needed = object(), 0, 1
        self.J, self.F_W = forms.J.matrix(self.h, self.J), forms.F_W.matrix(self.h, self.F_W)
        before = self.F_z or [None] * len(forms.F_z)
        self.F_z = [form.matrix(self.h, into) for form, into in zip(forms.F_z, before, strict=True)]
        if forms.F_U is not None:
            self.F_U = forms.F_U.matrix(self.h, self.F_U)


class StepMemory:
    """Of a step.

    Parameters
    ----------
    forms
        Of the level.
    keep
        Whether stages may have solvers of their own.
    refine
        Whether solves may be by refinement, to save a factorisation.

    Attributes
    ----------
    stages : list of StageMemory
    control : ndarray or None
        Of the step at which the stages were solved; not to be changed.
    current : bool
        Whether the matrices are those of the present linearisation.
    adjoints : dict
        By use: an adjoint variable, and what came of it.
    tangent : tuple or None
        The direction that was taken last, and what came of it.
    """

    def __init__(self, forms: StageForms, *, keep: bool = True, refine: bool = True):
        self.stages: list[StageMemory] = []
        for index, h in enumerate(forms.step_sizes):
            lender = next((stage for stage in self.stages if stage.h == h), None)
            self.stages.append(StageMemory(index, h, lender, constant=forms.J.constant, keep=keep, refine=refine))
        self.control: np.ndarray | None = None
        self.current = False
        self.adjoints: dict[str, tuple] = {}
        self.tangent: tuple | None = None

    def renew(self) -> None:
        """The control or the trajectory is another one now."""
        self.current = False
        self.adjoints.clear()
        self.tangent = None

    def forget(self) -> None:
        """What solves of the stages have left, too, but for factors."""
        self.renew()
        self.control = None
        for stage in self.stages:
            stage.W = stage.U = stage.remainder = stage.sweep = stage.rate = None

    def restart(self) -> None:
        """Go to another step: factors, too, are of no use but for their structure."""
        self.forget()
        for stage in self.stages:
            if stage.solver is not None:
                stage.solver.holds = None


class Memories:
    """Of the own steps of all levels of a forward and a backward hierarchy.

    The finest level's steps are the same in both; coarse ones have their own, as another fine step lends them its
    control.

    Parameters
    ----------
    propagators
        Of the levels.
    forward, backward
        Own steps of each level.
    comm
        All ranks.
    finest
        Whether the finest level's steps are remembered.
    """

    def __init__(
        self, propagators: Sequence, forward: Sequence[int], backward: Sequence[int], comm, *, finest: bool = True
    ):
        self._comm, often = comm, len(propagators) > 1
        make = lambda counts: [p.memory(count, often=often) for p, count in zip(propagators, counts, strict=True)]
        self.forward, self.backward = make([forward[0] if finest else 0, *forward[1:]]), make([0, *backward[1:]])
        if not finest:
            self.forward[0] = None
        self.fine = self.forward[0]
        self.backward[0] = None if self.fine is None else self.fine[::-1]
        self._at: tuple[np.ndarray, np.ndarray] | None = None

    def __iter__(self):
        for level in (*self.forward, *self.backward[1:]):
            yield from level or ()

    def linearise(self, z: np.ndarray | None, U: np.ndarray) -> None:
        """Derivatives will be taken at a control and a trajectory ``(k + 1, n)``; collective."""
        if all(level is None for level in self.forward):
            return
        z = np.zeros(0) if z is None else z
        same = self._at is not None and all(np.array_equal(a, b) for a, b in zip(self._at, (z, U), strict=True))
        if self._comm.allreduce(same, op=MPI.LAND):
            return
        self._at = z.copy(), U.copy()
        for step in self:
            step.renew()

    def forget(self, *, factors: bool = False) -> None:
        """Start as if nothing had been computed, but for factors, or with ``factors`` as if they had not, either."""
        self._at = None
        for step in self:
            step.restart() if factors else step.forget()

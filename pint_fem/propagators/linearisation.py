"""Cached linearisations of steps: stage values, matrices, factors and stage adjoints of a control and a trajectory.

All that derivatives require of a step is computed once, when first used; sweeps are then products and triangular
solves. The next linearisation reuses what it can: factors as approximate ones (:mod:`~pint_fem.kernels.factors`), the
corrections of first iterates, which save iterations and change no result (:mod:`~pint_fem.propagators.newton`), and the
storage of matrices. So nothing grows from one linearisation to the next.

A step with ``s`` stages has ``4 s`` states (with the diagonals of factors), two adjoints with ``s + 2`` states each, a
tangent with ``2 s + 1`` states and a control vector, for each stage the Jacobian and those of the matrices ``F_W`` and
``F_z`` that are not constant, and factors as far as their budget goes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from firedrake.petsc import PETSc
from mpi4py import MPI

from pint_fem.kernels.updatable_factor import UpdatableFactor
from pint_fem.propagators.base import FEPropagator
from pint_fem.propagators.stage import StageForms

__all__ = ["FirstCorrection", "LinearisationCache", "StageLinearisation", "StepLinearisation"]


class FirstCorrection(NamedTuple):
    """The difference between a stage's root and the first iterate of the solve that found it.

    Attributes
    ----------
    version : object
        Identifies the matrix whose factor the iterate was computed with.
    array : ndarray
        The difference, ``(n,)``.
    """

    version: object
    array: np.ndarray


@dataclass(eq=False)
class StageLinearisation:
    """The linearisation of a stage, and what solves of the stage reuse.

    Attributes
    ----------
    index, h, earlier
        Number of the stage, its coefficient ``a_ii dt``, and an earlier stage of the step with the same ``h``, if any.
    constant, may_keep, may_refine
        Whether the Jacobian is constant, the stage may have a solver of its own, and solves may be by refinement.
    W, U
        Base and stage value.
    J, F_W, F_z, F_U
        Matrices of the linearisation; shared where constant. ``F_U`` is without conditions, where controls are in them.
    version
        Identifies the linearisation.
    solver
        The stage's own solver, with the factor of this or an earlier Jacobian.
    iterations, expected
        Iterations with a factor of another matrix in this linearisation, and those expected of the next solve.
    correction
        That of the last solve that began at its base value.
    sweep, moved, rate
        The sweep of the last solve; how far root and base value have moved since one began at the base value; the
        contraction of the last increments.
    """

    index: int
    h: float
    earlier: StageLinearisation | None
    constant: bool
    may_keep: bool
    may_refine: bool
    W: np.ndarray | None = None
    U: np.ndarray | None = None
    J: PETSc.Mat | None = None
    F_W: PETSc.Mat | None = None
    F_U: PETSc.Mat | None = None
    F_z: list[PETSc.Mat | None] | None = None
    version: object = None
    solver: UpdatableFactor | None = None
    iterations: int = 0
    expected: int = 1
    correction: FirstCorrection | None = None
    sweep: object = None
    moved: float = 0.0
    rate: float | None = None

    def linearise(self, forms: StageForms) -> None:
        """Assemble the matrices at the values that the forms have."""
        self.version, self.iterations, self.expected = object(), 0, 1
        self.J, self.F_W = forms.J.matrix(self.h, self.J), forms.F_W.matrix(self.h, self.F_W)
        before = self.F_z or [None] * len(forms.F_z)
        self.F_z = [form.matrix(self.h, into) for form, into in zip(forms.F_z, before, strict=True)]
        if forms.F_U is not None:
            self.F_U = forms.F_U.matrix(self.h, self.F_U)


class StepLinearisation:
    """The linearisation of a step.

    Parameters
    ----------
    forms
        The forms of the level.
    keep
        Whether stages may have solvers of their own.
    refine
        Whether solves may be by refinement, to save a factorisation.

    Attributes
    ----------
    stages : list of StageLinearisation
        Those of the stages.
    control : ndarray or None
        The control of the step for which the stages were solved; not to be changed.
    current : bool
        Whether the matrices are those of the present linearisation.
    adjoints : dict
        By use and member of a batch: an adjoint variable, and the results for it.
    tangents : dict
        By member of a batch: the last direction, and the results for it.
    """

    def __init__(self, forms: StageForms, *, keep: bool = True, refine: bool = True):
        self.stages: list[StageLinearisation] = []
        for index, h in enumerate(forms.step_sizes):
            earlier = next((stage for stage in self.stages if stage.h == h), None)
            self.stages.append(StageLinearisation(index, h, earlier, forms.J.constant, keep, refine))
        self.control: np.ndarray | None = None
        self.current = False
        self.adjoints: dict[tuple[str, int], tuple] = {}
        self.tangents: dict[int, tuple] = {}

    def invalidate(self) -> None:
        """Discard matrices and results, as the control or the trajectory has changed."""
        self.current = False
        self.adjoints.clear()
        self.tangents.clear()

    def discard_members(self) -> None:
        """Discard the results for the members of a batch but the first, which is what single sweeps use."""
        self.adjoints = {key: result for key, result in self.adjoints.items() if key[1] == 0}
        self.tangents = {member: result for member, result in self.tangents.items() if member == 0}

    def reset(self, *, factors: bool = False) -> None:
        """Discard also the first guesses of stages, and with ``factors`` the factors but for their structure."""
        self.invalidate()
        self.control = None
        for stage in self.stages:
            stage.W = stage.U = stage.correction = stage.sweep = stage.rate = None
            if factors and stage.solver is not None:
                stage.solver.version = None


class LinearisationCache:
    """The linearisations of a rank's steps on all levels, forward and backward in time.

    The finest level's steps are the same in both directions; coarse ones have linearisations of their own in each, as
    their control is that of another fine step.

    Parameters
    ----------
    propagators
        Those of the levels.
    forward, backward
        Number of own steps on each level.
    comm
        All ranks.
    finest
        Whether linearisations of the finest level's steps are cached.

    Attributes
    ----------
    forward, backward : list
        A list of linearisations for each level, or ``None``.
    fine : list or None
        Those of the finest level.
    """

    def __init__(
        self,
        propagators: Sequence[FEPropagator],
        forward: Sequence[int],
        backward: Sequence[int],
        comm: MPI.Comm,
        *,
        finest: bool = True,
    ):
        self._comm, repeated = comm, len(propagators) > 1
        make = lambda counts: [
            p.step_linearisations(count, repeated=repeated) for p, count in zip(propagators, counts, strict=True)
        ]
        self.forward, self.backward = make([forward[0] if finest else 0, *forward[1:]]), make([0, *backward[1:]])
        if not finest:
            self.forward[0] = None
        self.fine = self.forward[0]
        self.backward[0] = None if self.fine is None else self.fine[::-1]
        self._at: tuple[np.ndarray, np.ndarray] | None = None

    def __iter__(self) -> Iterator[StepLinearisation]:
        for level in (*self.forward, *self.backward[1:]):
            yield from level or ()

    def linearise(self, z: np.ndarray | None, U: np.ndarray) -> None:
        """Set the control and the trajectory ``(k + 1, n)`` at which derivatives are evaluated (collective)."""
        if all(level is None for level in self.forward):
            return
        z = np.zeros(0) if z is None else z
        same = self._at is not None and all(np.array_equal(a, b) for a, b in zip(self._at, (z, U), strict=True))
        if self._comm.allreduce(same, op=MPI.LAND):
            return
        self._at = z.copy(), U.copy()
        for step in self:
            step.invalidate()

    def discard_members(self) -> None:
        """Discard the results for the members of a batch but the first."""
        for step in self:
            step.discard_members()

    def reset(self, *, factors: bool = False) -> None:
        """Discard all results and first guesses, and with ``factors`` the factors, too."""
        self._at = None
        for step in self:
            step.reset(factors=factors)

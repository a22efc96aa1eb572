r"""Cycles in full approximation form.

On a level, after relaxation, with ``V`` the C-points' values and ``r`` the residual there, the next level solves

.. math::  U^c_j - \Phi^c_j(U^c_{j-1}) = V_j - \Phi^c_j(V_{j-1}) + r_j ,\qquad U^c_0 = V_0,

from the first guess ``V``, and the C-points take its solution. The exact solution has ``r = 0``, then ``U^c = V``
solves the coarse problem: it is a fixed point, whatever the coarse propagator. (Falgout, Friedhoff, Kolev,
MacLachlan, Schroder, SISC 36(6), 2014.)

A V-cycle solves the coarse problem by one V-cycle, an F-cycle by an F-cycle followed by a V-cycle. The transposed
cycle corrects first and relaxes afterwards, and does the V-cycle before the F-cycle: with the transposed propagators
and transfers, on the reversed time grid, its linear map is exactly the transpose of the forward cycle's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from pint_fem.all_at_once.arrays import Array, ArrayKind, NumpyArrays, finite_rows, is_tensor, kind_of, subtract
from pint_fem.all_at_once.callbacks import call_protected, require_block, returned_block
from pint_fem.all_at_once.levels import Level
from pint_fem.errors import FAILURES
from pint_fem.mgrit.c_point_relaxation import CPointRelaxation
from pint_fem.mgrit.coarsest import coarsest_solver
from pint_fem.mgrit.nested_iteration import coarse_rhs
from pint_fem.mgrit.options import MGRITOptions
from pint_fem.mgrit.relaxation import Relaxation
from pint_fem.mgrit.transfer import Transfer

__all__ = ["Cycle", "exact_termination"]


class Cycle:
    """Work arrays of a hierarchy and the cycles on it.

    Parameters
    ----------
    levels
        Finest first; the finest level's ``U`` and ``G`` are set by the caller.
    options
        Relaxation, weights, coarsest solve and storage.
    state_shape
        Shape of one state on the finest level.
    transfers
        One per level but the coarsest: spatial coarsening to the next, or ``None``.
    transposed
        Whether to correct first, then relax; in an F-cycle the V-cycle first.
    linear
        Whether the propagators are linear.
    kind
        What makes the work arrays, of the type of the states and on their device; default: numpy, float64.
    batch
        Whether the first axis of a state numbers the members of a batch, each of which transfers map by itself.
    """

    def __init__(
        self,
        levels: Sequence[Level],
        options: MGRITOptions,
        state_shape: tuple[int, ...],
        transfers: Sequence[Transfer | None],
        *,
        transposed: bool = False,
        linear: bool = False,
        kind: ArrayKind | None = None,
        batch: bool = False,
    ):
        self.levels, self.options, self.transfers = list(levels), options, list(transfers)
        if batch:
            self.transfers = [None if transfer is None else transfer.of_batches() for transfer in self.transfers]
        self.transposed, self.linear, self.state_shape = transposed, linear, tuple(state_shape)
        kind = NumpyArrays(np.dtype(float)) if kind is None else kind
        self.state = self.state_shape, kind, batch
        self.relaxations: list[Relaxation] = []
        #: Residual at the own C-points, in fine space; C-points' values in coarse space.
        self.residuals, self.restricted = [], []
        shape = self.state_shape
        for index, (level, coarse) in enumerate(zip(self.levels, self.levels[1:], strict=False)):
            relaxation = CPointRelaxation if index == 0 and options.storage == "C" else Relaxation
            self.relaxations.append(relaxation(level, options.weight(index)))
            self.residuals.append(kind.zeros(coarse.k, *shape))
            if self.transfers[index] is not None:
                fine_shape, zero = shape, kind.zeros(1, *shape)
                block = call_protected("restrict", self.transfers[index].restrict, zero)
                shape = tuple(np.shape(block))[1:]
                require_block("restrict", block, (1, *shape), zero if is_tensor(zero) else None)
                self.transfers[index] = _Guarded(self.transfers[index], level, fine_shape, shape)
            coarse.U = kind.zeros(coarse.k + 1, *shape)
            coarse.G = kind.zeros(coarse.k, *shape)
            self.restricted.append(kind.zeros(coarse.k + 1, *shape))
        last = len(self.levels) - 1
        self.extra_states = [relaxation.extra_states for relaxation in self.relaxations]
        self._solve_coarsest = coarsest_solver(
            self.levels[-1], options.coarse_solver, options.coarse_sweeps, options.weight(last)
        )

    def residual(self, index: int) -> Array:
        """Compute the residual at the own C-points of an F-relaxed level."""
        self.relaxations[index].c_residual(self.residuals[index])
        return self.residuals[index]

    def relax_and_restrict(self, index: int, *, f_is_done: bool = False, has_residual: bool = False) -> None:
        """Relax a level before its correction by its scheme and compute its residual.

        Parameters
        ----------
        index
            The level.
        f_is_done
            The first F-relaxation would change nothing.
        has_residual
            ``residuals[index]`` is that of the current values.
        """
        sweeps = 0 if self.transposed else self.options.sweeps(index)
        residual = self.residuals[index] if has_residual else None
        self.relaxations[index].relax(sweeps, f_is_done=f_is_done, residual=residual)
        if sweeps or not has_residual:
            self.residual(index)

    def _restrict_values(self, index: int) -> Array:
        """Values at the C-points and the initial one, in coarse space, without the ghost."""
        level, coarse, V = self.levels[index], self.levels[index + 1], self.restricted[index]
        transfer, values, initial = self.transfers[index], self.relaxations[index].c_values(level.U), level.U[:1]
        V[1:] = values if transfer is None else transfer.restrict(values)
        if coarse.left is None:
            V[:1] = initial if transfer is None else transfer.restrict(initial)
        return V

    def _interpolate(self, index: int) -> None:
        """C-points take the coarse solution, or its change prolonged; F-points follow."""
        level, coarse, relaxation = self.levels[index], self.levels[index + 1], self.relaxations[index]
        transfer = self.transfers[index]
        if coarse.active:
            new = coarse.U[1:]
            if transfer is not None:
                new = relaxation.c_values(level.U) + transfer.prolong(new - self.restricted[index][1:])
            relaxation.set_c_values(level.U, new)
        relaxation.f_relax()

    def correct(self, index: int, kind: str = "V") -> None:
        """Solve the next level for the C-points of ``index`` by a cycle and interpolate by F-relaxation."""
        coarse = self.levels[index + 1]
        if coarse.active:
            V = self._restrict_values(index)
            coarse.phi_of_all(V, coarse.G)
            subtract(V[1:], coarse.G, coarse.G)
            r = self.residuals[index]
            coarse.G += r if self.transfers[index] is None else self.transfers[index].restrict(r)
            coarse.U[...] = V
        self.solve(index + 1, kind)
        self._interpolate(index)
        if self.transposed:
            self.relaxations[index].relax(self.options.sweeps(index), f_is_done=True)

    def solve(self, index: int, kind: str = "V") -> None:
        """One cycle on ``index`` and the levels below it."""
        if index == len(self.levels) - 1:
            self._solve_coarsest()
            return
        kinds = ("F", "V") if kind == "F" else ("V",)
        for place, each in enumerate(reversed(kinds) if self.transposed else kinds):
            self.relax_and_restrict(index, f_is_done=place > 0)
            self.correct(index, each)

    def first_guess(self, *, nested: bool, coarse_rhs_given: Sequence[Array | None] | None = None) -> None:
        """Replace the finest level's guess: solve the coarsest level's own problem and interpolate.

        Parameters
        ----------
        nested
            Nested iteration: V-cycles on every level on the way up. Else a skipped first down-cycle (as in XBraid):
            F-relaxation only.
        coarse_rhs_given
            Right-hand sides of the own steps of the levels below the finest; default: restricted from the finest one's.
        """
        zero = self.levels[0].G is None
        for index in range(len(self.levels) - 1):
            fine, coarse = self.levels[index], self.levels[index + 1]
            if coarse.active:
                V = self._restrict_values(index)
                coarse.exchange(V)
                coarse.U[...] = V
            given = coarse_rhs_given[index] if coarse_rhs_given is not None else None
            if given is not None:
                coarse.G[...] = given
                zero = False
            elif zero:
                coarse.G[...] = 0
            elif index == 0 and self.relaxations[0].is_condensed(fine.G):
                transfer = self.transfers[0]
                coarse.G[...] = fine.G if transfer is None else transfer.restrict(fine.G)
            else:
                coarse_rhs(fine, coarse, self.relaxations[index], self.transfers[index], linear=self.linear)
        self._solve_coarsest()
        for index in reversed(range(len(self.levels) - 1)):
            self._interpolate(index)
            for _ in range(self.options.nested_cycles if nested and index > 0 else 0):
                self.relax_and_restrict(index, f_is_done=True)
                self.correct(index)


def exact_termination(coarse_steps: float, nu: int, weight: float = 1.0) -> float:
    """Number of cycles after which the iteration is exact whatever the propagators: each makes ``1 + nu`` more C-points
    exact, and one more where weighted C-relaxation keeps part of the old values.

    Parameters
    ----------
    coarse_steps
        Steps of the second level; may be infinite.
    nu
        C-relaxations per cycle on the finest level.
    weight
        Weight of C-relaxation.
    """
    shifts = 1 + nu if weight == 1 else 1  # powers of the shift that a cycle contains
    return math.ceil(coarse_steps / shifts) if math.isfinite(coarse_steps) else math.inf


class _Guarded:
    """A transfer whose failures become NaN, which the norm carries to every rank: none waits for another."""

    def __init__(self, transfer: Transfer, level: Level, fine_shape: tuple[int, ...], coarse_shape: tuple[int, ...]):
        self._transfer, self._level, self._shapes = transfer, level, (fine_shape, coarse_shape)

    def restrict(self, block: Array) -> Array:
        """Restrict a block of fine states."""
        return self._apply("restrict", block, self._shapes[1])

    def prolong(self, block: Array) -> Array:
        """Prolong a block of coarse states."""
        return self._apply("prolong", block, self._shapes[0])

    def _apply(self, name: str, block: Array, shape: tuple[int, ...]) -> Array:
        full_shape = (len(block), *shape)
        try:
            return returned_block(name, getattr(self._transfer, name), full_shape, block)
        except FAILURES as error:
            if finite_rows(block).all() or not isinstance(error, Exception):
                self._level.note(name, error)
            return kind_of(block).full(np.nan, *full_shape)

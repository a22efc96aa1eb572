"""Where each control of a problem stands in the flat vector that solvers and optimisers see.

A rank's part of the vector holds its own values of the static controls, of the initial condition, and of the controls
with a value a step for its own steps, in this order. What is static is the same on all ranks in time; it counts once
in inner products.
"""

from __future__ import annotations

import numpy as np
from firedrake import Function

from pint_fem.evolution.evolution import Evolution
from pint_fem.kernels.arrays import own_size
from pint_fem.spacetime import Slab, SpaceTime

__all__ = ["ControlLayout"]


class ControlLayout:
    """See the module.

    Parameters
    ----------
    evolution
        With at least one control.
    spacetime, slab
        Process grid and own steps.

    Attributes
    ----------
    size : int
        Length of this rank's part.
    static_size : int
        How many of its first entries are of static controls and the initial condition.
    """

    def __init__(self, evolution: Evolution, spacetime: SpaceTime, slab: Slab):
        #: As the user gave it: controls are the user's own functions here, as keys.
        self.evolution = evolution = evolution.posed
        self.spacetime, self.slab = spacetime, slab
        self._static = [c for c in evolution.parameters if c not in evolution.stepwise]
        initial = [] if evolution.initial_control is None else [evolution.initial_control]
        self._slices: dict[Function, slice] = {}
        place = 0
        for control in [*self._static, *initial, *evolution.stepwise]:
            rows = slab.k if control in evolution.stepwise else 1
            size = rows * own_size(control.function_space())
            self._slices[control] = slice(place, place + size)
            place += size
        self.size = place
        self.static_size = min((self._slices[c].start for c in evolution.stepwise), default=place)
        self._nstatic = sum(own_size(c.function_space()) for c in self._static)

    # -- between the vector and the controls' own values ---------------------------------------------------------------
    def part(self, z: np.ndarray, control: Function) -> np.ndarray:
        """View of a control's values in a vector: ``(n,)``, or ``(k, n)`` for one a step."""
        view = z[self._slices[control]]
        return view.reshape(self.slab.k, -1) if control in self.evolution.stepwise else view

    def parts(self, z: np.ndarray) -> list[np.ndarray]:
        """Views of all, in the order of the evolution's ``controls``."""
        return [self.part(z, control) for control in self.evolution.controls]

    def join(self, values) -> np.ndarray:
        """The vector of all controls' values, in the order of the evolution's ``controls``."""
        z = np.empty(self.size)
        for target, value in zip(self.parts(z), values, strict=True):
            target[...] = value
        return z

    # -- between the vector and what sweeps want -----------------------------------------------------------------------
    def steps(self, z: np.ndarray) -> np.ndarray | None:
        """The vectors of controls of the own steps: ``(nz,)`` if all are the same, else ``(k, nz)``; ``None`` without.

        Static controls stand in each row where others have a value a step.
        """
        ev = self.evolution
        if not ev.parameters:
            return None
        if not ev.per_step:
            return z[: self._nstatic]
        if not self._static and len(ev.stepwise) == 1:
            return self.part(z, ev.stepwise[0])
        rows = np.empty((self.slab.k, ev.control_size))
        rows[:, : self._nstatic] = z[: self._nstatic]
        for control, target in zip(ev.parameters, ev.split_controls(rows), strict=True):
            if control in ev.stepwise:
                target[...] = self.part(z, control)
        return rows

    def initial(self, z: np.ndarray) -> np.ndarray | None:
        """The initial condition in a vector, ``None`` where it is no control."""
        control = self.evolution.initial_control
        return None if control is None else self.part(z, control)

    def gradient(self, steps: np.ndarray | None, first_adjoint: np.ndarray) -> np.ndarray:
        """The dual vector of derivatives by the own steps' controls, ``(nz,)`` or ``(k, nz)``, summed over time where
        static, and by the initial condition: the adjoint ``(n,)`` of the first point, given on the first rank in time.
        """
        ev, g = self.evolution, np.empty(self.size)
        if ev.per_step:
            for control, rows in zip(ev.parameters, ev.split_controls(steps), strict=True):
                if control in ev.stepwise:
                    self.part(g, control)[...] = rows
            steps = np.add.reduce(steps[:, : self._nstatic], axis=0)
        if self._static:
            g[: self._nstatic] = self.spacetime.sum_over_time(steps)
        if ev.initial_control is not None:
            row = np.array(first_adjoint)  # a copy: on other ranks in time it is a row of a stored adjoint
            self.spacetime.time_comm.Bcast(row, root=0)
            self.part(g, ev.initial_control)[...] = row
        return g

    def pairing(self, dual: np.ndarray, primal: np.ndarray) -> float:
        """A dual vector's value at a primal one; the same bits on every rank."""
        split = self.static_size
        local = np.array([dual[:split] @ primal[:split], dual[split:] @ primal[split:]])
        local = self.spacetime.sum_over_space(local)
        return float(local[0] + (self.spacetime.sum_over_time(local[1:])[0] if self.evolution.per_step else 0.0))

    def share(self, z: np.ndarray) -> None:
        """Give what is static to all ranks in time from the first."""
        split = self.static_size
        if self.spacetime.time_comm.size > 1:
            static = np.ascontiguousarray(z[:split])
            self.spacetime.time_comm.Bcast(static, root=0)
            z[:split] = static

    @property
    def owned(self) -> np.ndarray:
        """Which entries this rank contributes; the others are copies of those of the first rank in time."""
        mask = np.ones(self.size, dtype=bool)
        if self.spacetime.time_comm.rank:
            for control in self.evolution.controls:
                if control not in self.evolution.stepwise:
                    mask[self._slices[control]] = False
        return mask

"""Position of each control in the flat vector on which solvers and optimisers work.

A rank's part of the vector holds, in this order, its own values of the static controls, of the initial condition, and
of the controls with one value per step for its own steps. Static values are the same on all ranks in time, and count
once in inner products. On a grid with several groups of experiments each group has a copy of the whole vector, and
numbers are those of the first group.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from firedrake import Function

from pint_fem.errors import InputError
from pint_fem.evolution.evolution import Evolution
from pint_fem.kernels.arrays import own_size
from pint_fem.spacetime import Slab, SpaceTime

__all__ = ["ControlLayout", "ControlSet"]


class ControlSet:
    """The controls of one or several evolutions, each once, in the attributes that an evolution has for its own; of one
    evolution it has all others, too.

    Parameters
    ----------
    evolutions
        A control is shared where it is the same Function. Of an evolution whose initial condition is an expression, the
        controls in the expression are taken instead of the initial condition.

    Attributes
    ----------
    controls, stepwise, parameters : tuple of Function
        All, in the order in which they come; those with one value per step; all, the static ones first.
    dt, nsteps : float, int
        Of the controls with one value per step.
    reproducible : bool
        Whether one of the evolutions is, so that the solves for its controls have to be.

    Raises
    ------
    InputError
        On every rank, if a control is static in one evolution and has one value per step in another, or time steps of
        such controls differ.
    """

    initial_control = None  # initial conditions are static controls here

    def __init__(self, evolutions: Sequence[Evolution | ControlSet]):
        own = {ev: ev.sought if isinstance(ev, Evolution) else ev.controls for ev in evolutions}
        self.controls = tuple(dict.fromkeys(c for controls in own.values() for c in controls))
        self.stepwise = tuple(dict.fromkeys(c for ev in own for c in ev.stepwise))
        for control in self.stepwise:
            if any(control in controls and control not in ev.stepwise for ev, controls in own.items()):
                raise InputError(
                    f"control {control.name()!r} is static in one evolution and has a value in each step in another: "
                    "give both the same per_step="
                )
        self.parameters = tuple(sorted(self.controls, key=lambda c: c in self.stepwise))
        self.per_step = bool(self.stepwise)
        moving = [ev for ev in own if ev.stepwise]
        steps = {(ev.dt, ev.nsteps) for ev in moving}
        if len(steps) > 1:
            raise InputError(
                "controls with a value in each step in evolutions with different steps (dt, nsteps), "
                f"{sorted(steps)}: give these evolutions the same ones"
            )
        first = (moving or list(own))[0]
        self.dt, self.nsteps = first.dt, first.nsteps
        self.reproducible = any(ev.reproducible for ev in own)
        self._only = first if len(own) == 1 and isinstance(first, Evolution) else None

    def __getattr__(self, name: str) -> Any:
        if vars(self).get("_only") is None:
            raise AttributeError(f"several evolutions have no common {name!r}: use the one that is meant")
        return getattr(self._only, name)


class ControlLayout:
    """Views of each control's values in a flat vector, and products of such vectors.

    Parameters
    ----------
    evolution
        The controls, at least one; the user's own functions, which serve as keys.
    spacetime, slab
        Process grid and own steps.

    Attributes
    ----------
    size : int
        Length of this rank's part of a vector.
    static_size : int
        Number of its first entries that belong to static controls and the initial condition.
    owned : ndarray of bool, shape (size,)
        Entries that this rank contributes; the others are copies of those of the first rank in time or of the first
        group of experiments.
    """

    def __init__(self, evolution: Evolution | ControlSet, spacetime: SpaceTime, slab: Slab):
        self.evolution, self.spacetime, self.slab = evolution, spacetime, slab
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
        self.owned = np.full(self.size, spacetime.experiments_comm.rank == 0)
        if spacetime.time_comm.rank:
            self.owned[: self.static_size] = False

    # -- between the vector and the controls' own values ---------------------------------------------------------------
    def part(self, z: np.ndarray, control: Function) -> np.ndarray:
        """Return a view of a control's values in a vector: ``(n,)``, or ``(k, n)`` for one value per step; in the rows
        of an array ``(..., size)``, ``(..., n)`` or ``(..., k, n)``.
        """
        view, k = z[..., self._slices[control]], self.slab.k
        return view.reshape(*z.shape[:-1], k, view.shape[-1] // k) if control in self.evolution.stepwise else view

    def parts(self, z: np.ndarray) -> list[np.ndarray]:
        """Return views of all controls' values, in the order of the evolution's ``controls``."""
        return [self.part(z, control) for control in self.evolution.controls]

    def join(self, values: Iterable[np.ndarray]) -> np.ndarray:
        """Return the vector of all controls' values, given in the order of the evolution's ``controls``."""
        z = np.empty(self.size)
        for target, value in zip(self.parts(z), values, strict=True):
            target[...] = value
        return z

    # -- between the vector and sweeps, for one evolution --------------------------------------------------------------
    def steps(self, z: np.ndarray) -> np.ndarray | None:
        """Return the controls of the own steps: ``(nz,)`` if all steps have the same ones, else ``(k, nz)`` with the
        static ones repeated in each row; ``None`` where no step has a control.
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

    def from_steps(self, rows: np.ndarray) -> np.ndarray:
        """Return the vector of controls that all have one value per step, from those of the own steps ``(k, nz)``."""
        z, ev = np.empty(self.size), self.evolution
        for control, values in zip(ev.parameters, ev.split_controls(rows), strict=True):
            self.part(z, control)[...] = values
        return z

    def initial(self, z: np.ndarray) -> np.ndarray | None:
        """Return the initial condition in a vector, ``(n,)``; ``None`` where it is no control."""
        control = self.evolution.initial_control
        return None if control is None else self.part(z, control)

    def gradient(self, steps: np.ndarray | None, first_adjoint: np.ndarray) -> np.ndarray:
        """Return the dual vector of derivatives by all controls (collective over time).

        Parameters
        ----------
        steps
            Derivatives by the controls of the own steps, ``(nz,)`` or ``(k, nz)``; static ones are summed over time.
        first_adjoint
            Adjoint of the slab's first point, ``(n,)``; on the first rank in time the derivative by the initial
            condition.
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

    # -- over the process grid -----------------------------------------------------------------------------------------
    def pairing(self, dual: np.ndarray, primal: np.ndarray) -> float:
        """Return the value of a dual vector at a primal one, the identical number on every rank (collective)."""
        split = self.static_size
        local = np.array([dual[:split] @ primal[:split], dual[split:] @ primal[split:]])
        local = self.spacetime.sum_over_space(local)
        value = local[0] + (self.spacetime.sum_over_time(local[1:])[0] if self.evolution.per_step else 0.0)
        return float(self.spacetime.from_group(0, np.array([value]), (1,))[0])

    def share(self, z: np.ndarray) -> None:
        """Overwrite the static part of a vector by that of the first rank in time, and all of it by that of the first
        group of experiments (collective over both).
        """
        if self.spacetime.time_comm.size > 1:
            static = np.ascontiguousarray(z[: self.static_size])
            self.spacetime.time_comm.Bcast(static, root=0)
            z[: self.static_size] = static
        if self.spacetime.experiments_size > 1:
            z[:] = self.spacetime.from_group(0, z, z.shape)

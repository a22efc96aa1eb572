"""Checks of the propagators of all levels, their derivatives and the transfers between meshes, on random vectors."""

from __future__ import annotations

from typing import cast

import numpy as np

from pint_fem.errors import InputError
from pint_fem.mgrit.checks.check import CheckReport, check
from pint_fem.mgrit.options import MGRITOptions
from pint_fem.propagators.base import FEPropagator, StepData
from pint_fem.propagators.linear import LinearPropagator
from pint_fem.sweeps.sweeps import Sweeps

__all__ = ["check_sweeps"]


class _Steps:
    """Any steps of a level at a given control, with the signatures that :func:`pint_fem.mgrit.check` calls."""

    def __init__(self, propagator: FEPropagator, z: np.ndarray | None):
        self.propagator, self.z = propagator, z
        if propagator.is_linear:
            self.sweep = self._sweep

    def _data(self, steps: range, u: np.ndarray | None) -> StepData:
        stride, evolution = self.propagator.stride, self.propagator.evolution
        start = np.arange(steps.start, steps.stop, steps.step) * stride
        own = self.z if self.z is None or self.z.ndim == 1 else self.z[start + stride - 1]
        return StepData(evolution.time(start), own, u)

    def step(self, steps: range, u: np.ndarray, out: np.ndarray) -> None:
        """Write the results of steps from ``u`` to ``out``."""
        self.propagator.step(self._data(steps, u), u, out)

    def tangent(self, steps: range, u: np.ndarray, du: np.ndarray, out: np.ndarray) -> None:
        """Write the derivatives of steps at ``u`` in the direction ``du`` to ``out``."""
        self.propagator.tangent(self._data(steps, u), du, None, out)

    def adjoint(self, steps: range, u: np.ndarray, lam: np.ndarray, out: np.ndarray) -> None:
        """Write the transposed derivatives of steps at ``u``, applied to ``lam``, to ``out``."""
        self.propagator.adjoint(self._data(steps, u), lam, out)

    def _sweep(self, first: int, U: np.ndarray, G: np.ndarray | None) -> None:
        """Take consecutive steps of a linear evolution: homogeneous ones with the forcing as right-hand side."""
        propagator = cast(LinearPropagator, self.propagator)
        forcing = propagator.forcing(self._data(range(first, first + len(U) - 1), None))
        propagator.sweep(U, forcing if G is None else forcing + G)


def check_sweeps(sweeps: Sweeps, z: np.ndarray | None = None, *, seed: int = 0, rtol: float = 1e-10) -> CheckReport:
    """Check the propagators of all levels, their derivatives and the transfers between meshes (collective).

    For small problems: every rank takes some hundred steps per level and stores the controls of all steps.

    Parameters
    ----------
    sweeps
        The sweeps of a reduced functional: ``rf.problem.sweeps``.
    z
        Control ``(nz,)`` or ``(k, nz)`` of the own steps; default: the value of the evolution's control.
    seed
        Seed of the random vectors.
    rtol
        Relative difference up to which two results count as equal.

    Returns
    -------
    CheckReport
        What was checked, with the differences that were found; :func:`pint_fem.mgrit.check` describes the checks.

    Raises
    ------
    InputError
        On every rank, if the arguments do not fit.
    """
    evolution, spacetime = sweeps.evolution, sweeps.spacetime
    options = sweeps.options if isinstance(sweeps.options, MGRITOptions) else MGRITOptions()  # of ParaDiag's one level
    if z is None and evolution.parameters:
        z = evolution.posed.get_controls()
    elif z is not None and z.ndim == 2:
        z = np.concatenate(spacetime.time_comm.allgather(z))
    try:
        return check(
            [_Steps(p, sweeps.solvers.space.controls(level, z)) for level, p in enumerate(sweeps.propagators)],
            evolution.nsteps,
            sweeps.initial,
            coarsening=options.coarsening,
            transfers=sweeps.solvers.space.transfers,
            comm=spacetime.time_comm,
            space_comm=spacetime.space_comm,
            seed=seed,
            rtol=rtol,
        )
    except ValueError as error:
        raise InputError(str(error)) from error

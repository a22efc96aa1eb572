"""The space in which the spectrum of an inverse problem is computed: that of the readings or of the controls, or a
subspace of low rank where both are large.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pint_fem.inverse.laws.noise import Noise
from pint_fem.inverse.laws.priors import Prior
from pint_fem.inverse.memory import posterior_bytes, state_memory
from pint_fem.inverse.per_step.applied_modes import dense_modes, low_rank_modes
from pint_fem.inverse.reduction import estimated_size
from pint_fem.inverse.spectra import DataSpace, ParameterSpace, Spectrum

if TYPE_CHECKING:
    from pint_fem.inverse.map import ParameterToObservable

__all__ = ["LARGEST_DENSE", "choose_spectrum"]

LARGEST_DENSE = 6000
"""The largest number of rows of a dense matrix that is diagonalised."""


def choose_spectrum(F: ParameterToObservable, prior: Prior, noise: Noise, tolerance: float) -> Spectrum:
    """The spectral decomposition in the smaller one of the spaces of readings and of controls (collective).

    Parameters
    ----------
    F
        The map.
    prior, noise
        Prior of the controls and noise of the readings.
    tolerance
        Bound of the eigenvalues that may be left out where both spaces are large.

    Raises
    ------
    InputError
        On every rank, if it does not fit the memory of the machines.
    """
    static = F.layout.static_size
    if F.steps is not None:
        static, step = F.spacetime.sum_over_space(np.array([static, F.steps.columns.size]))
        # random vectors find the whole spectrum of few unknowns at less cost
        if F.table.size <= min(LARGEST_DENSE, 2 * (static + F.layout.slab.nsteps * step)):
            return dense_modes(F, prior, noise)
        return low_rank_modes(F, prior, noise, tolerance=tolerance)
    unknowns = int(F.spacetime.space_comm.allreduce(static))
    few = unknowns <= F.table.sensors
    estimated = 0.0 if few else estimated_size(F.rows, [own.rows for own in F.readings], F.spacetime)
    if not few and min(unknowns, estimated) > LARGEST_DENSE:
        return low_rank_modes(F, prior, noise, tolerance=tolerance)
    if few or unknowns <= estimated:
        _state_memory(F, int(F.spacetime.comm.allreduce(len(F.partition.own))), data_space=False)
        return ParameterSpace(F, prior, noise)
    _state_memory(F, F.reduced.size, data_space=True)
    return DataSpace(F, prior, noise)


def _state_memory(F: ParameterToObservable, modes: int, *, data_space: bool) -> None:
    """Refuse a posterior that does not fit the memory of the machines (collective)."""
    parts = posterior_bytes(F, modes, data_space=data_space)
    what = f"the posterior in the space of {modes} {'combinations of readings' if data_space else 'controls'}"
    state_memory(F, parts, what, "give fewer readings, a coarser control, or more ranks")

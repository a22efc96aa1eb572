"""The choice of the solves of the frequencies for a problem."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np

from pint_fem.collective import collectively
from pint_fem.errors import SolverFailure
from pint_fem.kkt.circulant import CirculantKKT, FrequencySystems
from pint_fem.kkt.commuting import CommutingSystems
from pint_fem.kkt.control_weights import ControlWeights
from pint_fem.kkt.coupled.problem import coupled_systems
from pint_fem.kkt.few_controls import MOST_CONTROLS, FewControlsSystems, control_count
from pint_fem.kkt.model import ControlModel, require_model
from pint_fem.kkt.partial_fractions import partial_fractions
from pint_fem.kkt.structure import Pencil, find_pencil
from pint_fem.kkt.transform import SkewCirculant
from pint_fem.misfits.base import Misfit
from pint_fem.paradiag.options import ParaDiagOptions
from pint_fem.sweeps.frequencies.systems import frequency_systems
from pint_fem.sweeps.sweeps import Sweeps

__all__ = ["circulant_kkt"]


def circulant_kkt(
    sweeps: Sweeps,
    misfits: Sequence[Misfit],
    forms: Sequence,
    rates: Sequence | None = None,
    *,
    memory: float = 4e9,
    single: bool = False,
    parameters: Mapping | None = None,
    **given: float,
) -> tuple[CirculantKKT, str]:
    """The circulant KKT system of a problem, and how its frequencies are solved in a few words (collective).

    Parameters
    ----------
    sweeps, misfits
        The evolution's sweeps and the bound misfits.
    forms
        The second derivative of the regularisation by each parameter of the evolution, for one step without ``dt``.
    rates
        That of the regularisation of its rates of change, or ``None``.
    memory
        Bytes of factors that a rank keeps.
    single
        Whether systems are solved in single precision.
    parameters
        PETSc options of the systems.
    **given
        Options of :class:`~pint_fem.kkt.circulant.CirculantKKT`.

    Raises
    ------
    InputError
        On every rank, where there is no such system; the message is the reason.
    """
    require_model(sweeps)
    model = ControlModel(sweeps, misfits, ControlWeights(sweeps.evolution, forms, rates))
    transform = SkewCirculant(
        model.nsteps, model.size, comm=sweeps.spacetime.time_comm, bounds=sweeps.slab.bounds
    )  # fmt: skip
    options = dict(memory=memory, single=single, parameters=dict(parameters or {}))
    pencil = find_pencil(model)
    if not isinstance(pencil, str):
        try:
            systems = collectively(
                sweeps.spacetime.comm, "", partial(_commuting, model, transform, pencil, **options)
            )  # fmt: skip
            return CirculantKKT(model, systems, transform, **given), f"{systems.poles} shifted systems per frequency"
        except SolverFailure as error:  # on all ranks
            pencil = str(error)
    others, how = _other_systems(model, transform, pencil, **options)
    return CirculantKKT(model, others, transform, **given), how


def _commuting(
    model: ControlModel, transform: SkewCirculant, pencil: Pencil, *, memory: float, single: bool, parameters: dict
) -> CommutingSystems:
    """The systems of a problem that is a function of one pencil (collective over space)."""
    propagator = model.propagator
    fractions = partial_fractions(
        propagator.dirk, propagator.dt, pencil.coefficients, np.ones(len(transform.mu)), transform.mu, pencil.largest
    )
    return CommutingSystems(
        fractions, pencil.K, pencil.M, fields=pencil.fields, free=pencil.free, parameters=parameters,
        prefix=f"{propagator.evolution.options_prefix}kkt_systems_", memory=memory, single=single,
    )  # fmt: skip


def _other_systems(
    model: ControlModel, transform: SkewCirculant, why: str, *, memory: float, single: bool, parameters: dict
) -> tuple[FrequencySystems, str]:
    """The systems of any other problem, and how they are solved (collective over space)."""
    _, count = control_count(model)
    if count > MOST_CONTROLS:
        return coupled_systems(model, memory=memory), f"coupled systems, as {why}"
    shifted = frequency_systems(model.propagator, ParaDiagOptions(memory=memory / 1e9), parameters)
    systems = FewControlsSystems(model, shifted, transform.own, transform.mu, single=single)
    return systems, f"Hessians of {count} controls per frequency"

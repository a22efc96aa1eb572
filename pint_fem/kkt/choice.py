"""The choice of the solves of the frequencies for a problem."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from pint_fem.errors import SolverFailure
from pint_fem.kkt.circulant import CirculantKKT, FrequencySystems
from pint_fem.kkt.commuting import CommutingSystems
from pint_fem.kkt.control_weights import ControlWeights
from pint_fem.kkt.coupled.problem import coupled_systems
from pint_fem.kkt.few_controls import MOST_CONTROLS, FewControlsSystems, control_count
from pint_fem.kkt.model import ControlModel, require_model
from pint_fem.kkt.partial_fractions import partial_fractions
from pint_fem.kkt.structure import find_pencil
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
    propagator = require_model(sweeps)
    model = ControlModel(sweeps, misfits, ControlWeights(sweeps.evolution, forms, rates))
    transform = SkewCirculant(
        model.nsteps, model.size, comm=sweeps.spacetime.time_comm, bounds=sweeps.slab.bounds
    )  # fmt: skip
    parameters = dict(parameters or {})
    pencil = find_pencil(model)
    systems: FrequencySystems
    fractions = None
    if not isinstance(pencil, str):
        try:
            fractions = partial_fractions(
                propagator.dirk, propagator.dt, pencil.coefficients, np.ones(len(transform.mu)), transform.mu,
                pencil.largest,
            )  # fmt: skip
        except SolverFailure as error:  # the same numbers on all ranks
            pencil = str(error)
    prefix = f"{propagator.evolution.options_prefix}kkt_systems_"
    if fractions is not None:
        systems = CommutingSystems(
            fractions, pencil.K, pencil.M, fields=pencil.fields, free=pencil.free, parameters=parameters,
            prefix=prefix, memory=memory, single=single,
        )  # fmt: skip
        how = f"{systems.poles} shifted systems per frequency"
    elif control_count(model)[1] > MOST_CONTROLS:
        systems, how = coupled_systems(model, memory=memory), f"coupled systems, as {pencil}"
    else:
        _, count = control_count(model)
        shifted = frequency_systems(propagator, ParaDiagOptions(memory=memory / 1e9), parameters)
        systems = FewControlsSystems(model, shifted, transform.own, transform.mu, single=single)
        how = f"Hessians of {count} controls per frequency"
    return CirculantKKT(model, systems, transform, **given), how

"""Optimisation constrained by time, parallel in time, on Firedrake.

The names below are what a user types. Each is loaded, with what it needs, when it is first used: ``MGRIT``,
``ParaDiag``, ``SpaceTime``, ``minimize_trust_region`` and the errors need numpy and mpi4py only, those of
``pint_fem.resnet`` torch as well, and all others Firedrake. A name whose library is missing raises
``ModuleNotFoundError``, which names what to install.
"""

import importlib
from typing import TYPE_CHECKING

__version__ = "0.2.0"

if TYPE_CHECKING:
    from pint_fem.adjoint import TimeParallelReducedFunctional
    from pint_fem.adjoint.experiments.given import Experiments
    from pint_fem.adjoint.minimisation.low_rank import LowRankPreconditioner
    from pint_fem.adjoint.minimisation.penalty_path import follow_penalty
    from pint_fem.adjoint.regularisation_in_time.rate_of_change import RateOfChange
    from pint_fem.adjoint.total_variation.functional import TotalVariation
    from pint_fem.all_at_once.propagator import Propagator
    from pint_fem.all_at_once.stopping import DivergedError, SolveResult
    from pint_fem.errors import InputError, InputTypeError, SolverFailure
    from pint_fem.evolution import SDIRK2, BackwardEuler, Evolution, ImplicitMidpoint, time_function
    from pint_fem.inverse.laws.covariance_fields import BilaplacianPrior
    from pint_fem.mgrit import MGRIT, MGRITOptions, Transfer
    from pint_fem.misfits import (
        BlockMisfit,
        LinearObservations,
        Misfit,
        PointSensors,
        RunningMisfit,
        StateBounds,
        TerminalMisfit,
    )
    from pint_fem.optimize import (
        InexactOptions,
        NonFiniteError,
        OneShotResult,
        ScipyResult,
        TrustRegionResult,
        minimize_trust_region,
    )
    from pint_fem.paradiag import ParaDiag, ParaDiagOptions
    from pint_fem.propagators import (
        CoefficientPropagator,
        FEPropagator,
        FormPropagator,
        LinearPropagator,
        TapePropagator,
        make_propagator,
    )
    from pint_fem.propagators.choice import leapfrog
    from pint_fem.resnet import LayerParallelResNet
    from pint_fem.scaling.grid_choice import GridChoice, choose_grid
    from pint_fem.spacetime import SpaceTime
    from pint_fem.sweeps.checking import check_sweeps

_MODULES = {
    "pint_fem.adjoint": ("TimeParallelReducedFunctional",),
    "pint_fem.adjoint.experiments.given": ("Experiments",),
    "pint_fem.adjoint.minimisation.low_rank": ("LowRankPreconditioner",),
    "pint_fem.adjoint.minimisation.penalty_path": ("follow_penalty",),
    "pint_fem.adjoint.regularisation_in_time.rate_of_change": ("RateOfChange",),
    "pint_fem.adjoint.total_variation.functional": ("TotalVariation",),
    "pint_fem.all_at_once.propagator": ("Propagator",),
    "pint_fem.all_at_once.stopping": ("DivergedError", "SolveResult"),
    "pint_fem.errors": ("InputError", "InputTypeError", "SolverFailure"),
    "pint_fem.evolution": ("BackwardEuler", "Evolution", "ImplicitMidpoint", "SDIRK2", "time_function"),
    "pint_fem.inverse.laws.covariance_fields": ("BilaplacianPrior",),
    "pint_fem.mgrit": ("MGRIT", "MGRITOptions", "Transfer"),
    "pint_fem.misfits": (
        "BlockMisfit",
        "LinearObservations",
        "Misfit",
        "PointSensors",
        "RunningMisfit",
        "StateBounds",
        "TerminalMisfit",
    ),
    "pint_fem.optimize": (
        "InexactOptions",
        "NonFiniteError",
        "OneShotResult",
        "ScipyResult",
        "TrustRegionResult",
        "minimize_trust_region",
    ),
    "pint_fem.paradiag": ("ParaDiag", "ParaDiagOptions"),
    "pint_fem.propagators": (
        "CoefficientPropagator",
        "FEPropagator",
        "FormPropagator",
        "LinearPropagator",
        "TapePropagator",
        "make_propagator",
    ),
    "pint_fem.propagators.choice": ("leapfrog",),
    "pint_fem.resnet": ("LayerParallelResNet",),
    "pint_fem.scaling.grid_choice": ("GridChoice", "choose_grid"),
    "pint_fem.spacetime": ("SpaceTime",),
    "pint_fem.sweeps.checking": ("check_sweeps",),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> object:
    if name in _MODULE_OF:
        try:
            return getattr(importlib.import_module(_MODULE_OF[name]), name)
        except ModuleNotFoundError as error:
            from pint_fem.requirements import missing

            raise missing(error, f"pint_fem.{name}") or error from error.__cause__
    raise AttributeError(f"module 'pint_fem' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

"""Optimisation constrained by time, parallel in time, on Firedrake.

The names below load Firedrake when they are first used; ``pint_fem.mgrit``, ``pint_fem.resnet`` and
``pint_fem.spacetime`` never do. Only ``pint_fem.resnet`` needs torch.
"""

import importlib

__version__ = "0.1.0"

_NAMES = {
    "InputError": "pint_fem.errors",
    "SpaceTime": "pint_fem.spacetime",
    "MGRIT": "pint_fem.mgrit",
    "MGRITOptions": "pint_fem.mgrit",
    "minimize_trust_region": "pint_fem.optimize",
    "LayerParallelResNet": "pint_fem.resnet",
}
_NAMES |= dict.fromkeys(
    ("BackwardEuler", "Evolution", "ImplicitMidpoint", "SDIRK2", "time_function"), "pint_fem.evolution"
)
_NAMES |= dict.fromkeys(("PointSensors", "RunningMisfit", "TerminalMisfit"), "pint_fem.misfits")
_NAMES |= {"TimeParallelReducedFunctional": "pint_fem.adjoint"}

__all__ = sorted(_NAMES)


def __getattr__(name):
    if name in _NAMES:
        return getattr(importlib.import_module(_NAMES[name]), name)
    raise AttributeError(f"module 'pint_fem' has no attribute {name!r}")

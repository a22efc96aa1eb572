"""The posterior of the plate of ``make demo``, computed once for all pictures that show it."""

from functools import cache

import numpy as np
import style  # noqa: F401 (makes the package importable)
from firedrake import COMM_SELF

from demos.inversion import posterior_of
from demos.pictures import Raster
from pint_fem.spacetime import SpaceTime
from problems.heat_source import heat_source

STEPS = 256


@cache
def solved():
    """The problem with its posterior, by one adjoint sweep per sensor."""
    problem = heat_source(SpaceTime(comm=COMM_SELF), steps=STEPS, solver_parameters={"time_solver": "serial"})
    return problem, posterior_of(problem.rf.parameter_to_observable())


@cache
def raster(width=360):
    """Pixels of the plate."""
    return Raster(solved()[0].evolution.V.mesh(), width=width)


def image(values):
    """The image of a control that is given by its coefficients."""
    return raster()(solved()[0].rf.function(np.ascontiguousarray(values)))

r"""Find the current in a cavity in space from readings of the electric field by 64 antennas: the inverse problem, posed
in UFL.

The state is (E, B) of :mod:`problems.maxwell` in N1curl and Raviart-Thomas on a generated hierarchy of meshes, of which
B is eliminated: a step solves for E. The control is the static vector J in P1, the current being J(x) s(t) with the
time course s known; and

.. math::
    \mathcal{J}(J) = \frac{1}{2 n \sigma^2} \sum_r \sum_a |\ell_a(E(t_r)) - d_{ra}|^2
           + \frac{1}{2} \int \alpha |\nabla J|^2 + \beta |J|^2 ,

for the averages :math:`\ell_a` of E that antennas read (:mod:`problems.maxwell_box_setting`) and n readings with noise
of standard deviation sigma: the misfit is 1/2 where a current explains the readings up to their noise.

=========  =======  =============  =============
refine     cells    E of degree 1  B of degree 1
=========  =======  =============  =============
0          4^3      604            864
1          8^3      4,184          6,528
2          16^3     31,024         50,688
3          32^3     238,688        399,360
=========  =======  =============  =============
"""

from __future__ import annotations

from pathlib import Path

from firedrake import SpatialCoordinate, split

from pint_fem.errors import InputError
from pint_fem.misfits import LinearObservations
from pint_fem.propagators import make_propagator
from pint_fem.propagators.choice import leapfrog
from pint_fem.spacetime import SpaceTime
from problems.box import BoxSource, box_hierarchy, box_source, first_readings, require_refinements
from problems.maxwell import E
from problems.maxwell_box_readings import NOISE, READINGS
from problems.maxwell_box_setting import CELLS, COLUMNS, SETTING, antenna_functionals, true_current
from problems.maxwell_source import evolution_of
from problems.meshfile import locate
from problems.readings import Readings, misfit_weight, read_readings, require_weights

__all__ = ["ALPHA", "BETA", "MOST_REFINEMENTS", "maxwell_box"]

ALPHA = 5e-2
BETA = 1e-2
MOST_REFINEMENTS = 3


def maxwell_box(
    spacetime: SpaceTime,
    *,
    refine: int = 2,
    degree: int = 1,
    readings: str | Path | Readings = READINGS,
    steps: int = SETTING.steps,
    integrator: str = SETTING.integrator,
    alpha: float = ALPHA,
    beta: float = BETA,
    noise: float = NOISE,
    first_steps: int | None = None,
    solver_parameters: dict | None = None,
    step_parameters: dict | None = None,
) -> BoxSource:
    """Pose the problem on a process grid.

    Parameters
    ----------
    spacetime, readings, steps, alpha, beta, noise, first_steps, solver_parameters
        As for :func:`problems.heat_box.heat_box`.
    refine, degree
        Refinements of the coarsest mesh, 0 to 3, and degree of the elements.
    integrator
        A name of :func:`pint_fem.evolution.named_tableau`, or ``"Leapfrog"`` with implicit midpoint steps on coarse
        levels.
    step_parameters
        PETSc options of the steps' systems for E; default: the package's.

    Raises
    ------
    InputError
        On every rank, on a bad file or value.
    """
    require_weights(alpha, beta, noise)
    if degree < 1:
        raise InputError(f"degree = {degree}: give at least 1")
    given, explicit = SETTING, integrator == "Leapfrog"
    data = read_readings(readings, given.final_time, COLUMNS)
    weight = misfit_weight(data, noise)
    if first_steps is not None:
        data = first_readings(data, first_steps * given.final_time / steps)
    along = CELLS * 2 ** max(refine, 0)
    require_refinements(spacetime, CELLS, refine, MOST_REFINEMENTS, 19 * (degree * along) ** 3)
    mesh = box_hierarchy(spacetime, CELLS, refine)[-1]
    locate(data.points, mesh, data.sensors)
    evolution = evolution_of(
        mesh, given, steps=steps, integrator="ImplicitMidpoint" if explicit else integrator, degree=degree,
        solver_parameters=step_parameters, first_steps=first_steps,
    )  # fmt: skip
    values = data.values.reshape(len(data.times), -1)
    functionals = antenna_functionals(split(evolution.u)[E], mesh, data.points)
    antennas = LinearObservations(functionals, data.times, values, weight=weight)
    return box_source(
        spacetime, data, evolution, [antennas], true_current(SpatialCoordinate(mesh)), alpha=alpha, beta=beta,
        solver_parameters=solver_parameters, propagator=leapfrog if explicit else make_propagator,
    )  # fmt: skip

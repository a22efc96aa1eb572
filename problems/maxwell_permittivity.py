r"""Ground-penetrating radar: permittivity and conductivity of soil from readings of the electric field above it.

The state is (E, B) of :mod:`problems.maxwell` in the setting of :mod:`problems.maxwell_soil`; each antenna makes an
evolution from rest,

.. math::
    \epsilon\, \partial_t E + \sigma E = \nabla \times B - J_k(x)\, r(t) , \qquad  \partial_t B = -\nabla \times E ,

with a Ricker pulse r and absorbing walls of the impedance of air and background. In the soil, with the background's
values :math:`\epsilon_b, \sigma_b`,

.. math::
    \epsilon = \epsilon_b\, e^m , \qquad  \sigma = \sigma_b\, e^s ,

where m and s in P1 are the controls, which all evolutions share, and

.. math::
    \mathcal{J}(m, s) = \frac{1}{2 n \delta^2} \sum_k \sum_r \sum_i (E_x^k(x_i, t_r) - d_{kri})^2
           + \frac12 \int \alpha_m |\nabla m|^2 + \beta_m m^2 + \alpha_s |\nabla s|^2 + \beta_s s^2 ,

for n readings with noise of standard deviation :math:`\delta`. The regularisation's own inner product is the trust
region's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from firedrake import (
    Constant,
    Function,
    FunctionSpace,
    SpatialCoordinate,
    TestFunction,
    TestFunctions,
    TrialFunction,
    conditional,
    dx,
    exp,
    inner,
)
from irksome.tableaux.ButcherTableaux import ButcherTableau

from pint_fem.adjoint import TimeParallelReducedFunctional
from pint_fem.capacity import require_memory
from pint_fem.evolution import Evolution, named_tableau, time_function
from pint_fem.spacetime import SpaceTime
from problems.experiments import (
    Coefficient,
    CoefficientProblem,
    ExperimentReadings,
    columns_of,
    point_misfits,
    read_experiments,
)
from problems.maxwell import B, E, residual, state_space
from problems.maxwell_soil import (
    ANTENNAS,
    BACKGROUND,
    CELLS,
    CONDUCTIVITY_OF,
    FINAL_TIME,
    PERMITTIVITY_OF,
    STEPS,
    WALLS,
    current,
    in_soil,
    pulse,
    soil_mesh,
    true_controls,
)
from problems.priors import prior_of
from problems.readings import require_weights

__all__ = [
    "ALPHA",
    "ALPHA_CONDUCTIVITY",
    "BETA",
    "COLUMNS",
    "DEGREE",
    "NOISE",
    "READINGS",
    "Soil",
    "evolution_of",
    "maxwell_permittivity",
]

READINGS = Path(__file__).resolve().parent / "maxwell_permittivity_readings.csv"
COLUMNS = columns_of("ex")
NOISE = 0.02
#: Weights of the regularisation: of the gradients of permittivity and conductivity, and of both controls' size.
ALPHA, ALPHA_CONDUCTIVITY, BETA = 3e-3, 3e-4, 1e-4
#: Of the elements of E.
DEGREE = 2
#: Quadrature degrees of the operators and of the antennas' currents.
OPERATOR_DEGREE, LOAD_DEGREE = 6, 12


@dataclass(frozen=True)
class Soil:
    """A medium as :func:`problems.maxwell.residual` takes it, whose walls have the admittance of the background.

    Attributes
    ----------
    epsilon, sigma
        Relative permittivity and conductivity, in UFL.
    admittance
        Of the absorbing walls.
    mu : float
    """

    epsilon: object
    sigma: object
    admittance: object
    mu: float = 1.0

    @classmethod
    def of_controls(cls, x, m, s) -> Soil:
        """The soil of the logarithms of the factors by which its permittivity and conductivity differ from the
        background's, functions or expressions of the coordinates ``x``; the air above it has permittivity 1 and does
        not conduct.
        """
        epsilon, sigma = (value * exp(f) for value, f in zip(BACKGROUND, (m, s), strict=True))
        below = lambda value, above: conditional(in_soil(x), value, above)
        return cls(below(epsilon, 1.0), below(sigma, 0.0), below(math.sqrt(BACKGROUND[0]), 1.0))


def evolution_of(
    mesh,
    soil: Soil,
    place,
    *,
    control: Function | Sequence[Function],
    steps: int,
    tableau: ButcherTableau,
    degree: int = DEGREE,
    amplitude=1.0,
    step_parameters: dict | None = None,
) -> Evolution:
    """The evolution of the antenna at a place, from rest.

    Parameters
    ----------
    mesh
        Of :func:`problems.maxwell_soil.soil_mesh`.
    soil
        What is in it.
    place
        Coordinates of the antenna, numbers or a Constant.
    control
        Functions in ``soil`` or in ``amplitude``.
    steps, tableau, degree
        Time steps, Butcher tableau and degree of the elements.
    amplitude
        A factor of the current.
    step_parameters
        PETSc options of the steps' systems for E.
    """
    space, t = state_space(mesh, degree), time_function(mesh)
    u = Function(space, name="field")
    v, _ = TestFunctions(space)
    load = amplitude * pulse(t) * inner(current(SpatialCoordinate(mesh), place), v) * dx(degree=LOAD_DEGREE)
    return Evolution(
        residual(u, soil, walls=WALLS, degree=OPERATOR_DEGREE) + load,
        u,
        tableau=tableau,
        dt=FINAL_TIME / steps if steps else 0.0,
        nsteps=steps,
        control=control,
        t=t,
        solver_parameters=step_parameters,
        eliminate=B,
    )


def maxwell_permittivity(
    spacetime: SpaceTime,
    *,
    cells: int = CELLS,
    degree: int = DEGREE,
    readings: str | Path | ExperimentReadings = READINGS,
    steps: int = STEPS,
    integrator: str = "ImplicitMidpoint",
    alpha: float = ALPHA,
    alpha_conductivity: float = ALPHA_CONDUCTIVITY,
    beta: float = BETA,
    noise: float = NOISE,
    bounds: tuple[float, float] | None = None,
    experiments: Sequence[int] | None = None,
    solver_parameters: dict | None = None,
    step_parameters: dict | None = None,
) -> CoefficientProblem:
    """Pose the problem on a process grid.

    Parameters
    ----------
    spacetime
        The process grid.
    cells, degree
        Cells along the depth of the soil, a multiple of 4, and degree of the elements of E.
    readings
        A CSV as :mod:`problems.experiments` reads it, or what was read.
    steps, integrator
        Time steps and a name of :func:`pint_fem.evolution.named_tableau`.
    alpha, alpha_conductivity, beta
        Weights of the regularisation: of the gradient of m and of s, and of the size of both.
    noise
        Standard deviation of the readings' noise relative to the largest reading.
    bounds
        Of the permittivity over its background, or ``None``.
    experiments
        Numbers of the antennas in the functional, each with its weight in the sum of all; default: all.
    solver_parameters
        Of the functional.
    step_parameters
        PETSc options of the steps' systems for E.

    Raises
    ------
    InputError
        On every rank, on a bad file or value.
    """
    require_weights(alpha, beta, noise)
    require_weights(alpha_conductivity, beta, noise)
    data = read_experiments(readings, FINAL_TIME, COLUMNS, count=len(ANTENNAS))
    unknowns = 5 * cells**2 * (degree + 1) * (degree + 2)  # of the elements, which share some
    least = (500 * cells**2 + 8 * unknowns * (degree + 1) * (degree + 2)) // spacetime.space_size
    require_memory(spacetime.comm, least, f"{cells} cells of degree {degree}", "give fewer cells or a lower degree")
    mesh = spacetime.mesh(soil_mesh, cells)
    chosen = range(len(ANTENNAS)) if experiments is None else experiments
    controls = [Function(FunctionSpace(mesh, "CG", 1), name=name) for name in ("permittivity", "conductivity")]
    x = SpatialCoordinate(mesh)
    evolutions = [
        evolution_of(
            mesh,
            Soil.of_controls(x, *controls),
            Constant(ANTENNAS[k]),
            control=controls,
            steps=steps,
            tableau=named_tableau(integrator),
            degree=degree,
            step_parameters=step_parameters,
        )
        for k in chosen
    ]
    every = point_misfits(data, noise, [(E, 0)])
    misfits = [every[k] for k in chosen]
    priors = [prior_of(alpha, beta), prior_of(alpha_conductivity, beta)]
    a, b = TrialFunction(controls[0].function_space()), TestFunction(controls[0].function_space())
    rf = TimeParallelReducedFunctional(
        evolutions,
        misfits,
        regularisation=sum(0.5 * own(control, control) for own, control in zip(priors, controls, strict=True)),
        spacetime=spacetime,
        solver_parameters=solver_parameters,
        riesz_map=[own(a, b) for own in priors],
    )
    coefficients = [
        Coefficient(
            control,
            control.name(),
            f"log2 of the {what} over {value:g}",
            exp,
            lambda q: q / math.log(2),
            truth,
            inclusions,
        )
        for control, what, value, truth, inclusions in zip(
            controls,
            ("relative permittivity", "conductivity"),
            BACKGROUND,
            true_controls(x),
            (PERMITTIVITY_OF, CONDUCTIVITY_OF),
            strict=True,
        )
    ]
    sources = np.array([ANTENNAS[k] for k in chosen])
    limits = None if bounds is None else tuple([math.log(bound), None] for bound in bounds)
    return CoefficientProblem(spacetime, data, evolutions, misfits, rf, coefficients, priors, sources, limits)

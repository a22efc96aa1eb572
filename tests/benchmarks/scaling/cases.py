"""The problems that are calibrated: how each is posed for a process grid and steps, and what is counted of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from pint_fem.adjoint import TimeParallelReducedFunctional
from pint_fem.misfits import PointSensors
from pint_fem.scaling.calibrate import Case
from pint_fem.spacetime import SpaceTime
from problems import layers
from problems.heat_source import heat_source
from problems.heat_square import field as square_field
from problems.heat_square import square
from problems.maxwell_source import maxwell_source
from problems.scaling_box import box
from problems.serial_maxwell import serial_maxwell_source
from problems.serial_pyadjoint import SQUARE_TIME, SerialSource, serial_heat_source, serial_square, square_functionals

__all__ = [
    "BOXES",
    "HEAT_BOX",
    "HEAT_BOX_EULER",
    "HEAT_BOX_LARGE",
    "HEAT_BOX_LARGE_EULER",
    "HEAT_SOURCE",
    "HEAT_SQUARE",
    "LAYERS",
    "MAXWELL_CAVITY",
    "MAXWELL_LOSSY",
    "STUDIES",
    "LayersCase",
    "Study",
    "square_with_sensors",
]


SERIAL = {"levels": 1}
FCF = {"levels": 3, "coarsening": [8, 4], "relax": "FCF"}


@dataclass(frozen=True)
class Study:
    """What is counted and measured of a problem for the report.

    Attributes
    ----------
    case
        The problem.
    serial
        ``steps`` to the same problem on a pyadjoint tape.
    inversions, inversion_steps, gtol
        Options of the solvers with which whole inversions are counted, their steps and the relative tolerance of their
        gradients.
    with_sensors
        As a case's ``pose``, with sensors in the place of a misfit that observes the state everywhere: the inversion by
        sequential stepping that the map is compared with; default: the case's.
    """

    case: Case
    serial: Callable[[int], SerialSource]
    inversions: tuple[dict, ...]
    inversion_steps: int = 512
    gtol: float = 1e-6
    with_sensors: Callable | None = None


def _menu(*coarsenings: tuple[int, ...]) -> tuple[dict, ...]:
    """Each with F- and with FCF-relaxation."""
    return tuple(
        {"levels": len(factors) + 1, "coarsening": list(factors), "relax": relax}
        for factors in coarsenings
        for relax in ("FCF", "F")
    )


def _repeated(*levels: tuple[int, int]) -> tuple[dict, ...]:
    """Two levels with F-relaxation and several coarse steps for each interval."""
    return tuple({"levels": 2, "coarsening": [m], "relax": "F", "coarse_steps": steps} for m, steps in levels)


#: An iteration contracts by ``alpha``; round-off is about 1e-16 over it.
PARADIAG = tuple({"time_solver": "paradiag", "alpha": alpha} for alpha in (1e-4, 1e-6))


def _square(size: int):
    return lambda grid, steps, parameters: square(steps, "SDIRK2", size=size, spacetime=grid, **parameters)


def square_with_sensors(size: int, side: int = 8, times: int = 64):
    """The square with ``side x side`` sensors in the place of the running misfit, for which there is no finite number
    of readings; the source is that of the square's control, and a hundredth of the largest reading is noise.
    """

    def pose(grid: SpaceTime, steps: int, parameters: dict) -> TimeParallelReducedFunctional:
        whole = square(steps, "SDIRK2", size=size, spacetime=grid, **parameters)
        evolution, control = whole.evolution, whole.evolution.control
        along = (np.arange(side) + 0.5) / side
        points = np.stack(np.meshgrid(along, along), axis=-1).reshape(-1, 2)
        at = SQUARE_TIME * np.arange(1, times + 1) / times
        regularisation = square_functionals(control.function_space())["regularisation"](control)
        given = dict(regularisation=regularisation, spacetime=grid, solver_parameters=parameters)
        sensors = PointSensors(points, at, np.zeros((times, side**2)))
        posed = TimeParallelReducedFunctional(evolution, sensors, **given)
        exact = sensors.readings(posed.problem.observations(square_field(whole, "control"), sensors))
        noise = 1e-2 * np.abs(exact).max()
        values = exact + noise * np.random.default_rng(0).standard_normal(exact.shape)
        measured = PointSensors(points, at, values, weight=1 / (noise**2 * values.size))
        return TimeParallelReducedFunctional(evolution, measured, **given)

    return pose


def _plate(grid: SpaceTime, steps: int, parameters: dict) -> TimeParallelReducedFunctional:
    return heat_source(grid, steps=steps, solver_parameters=parameters).rf


def _maxwell(regime: str):
    return lambda grid, steps, parameters: (
        maxwell_source(grid, regime=regime, steps=steps, solver_parameters=parameters).rf
    )


HEAT_SOURCE = Case(  # the plate of demos/heat_source_inversion.py, P1, SDIRK2
    "heat-source", _plate, 512,
    _menu((8, 4), (8,), (16,), (8, 8), (4, 4, 4), (4, 4)) + _repeated((16, 2), (32, 3)) + PARADIAG,
)  # fmt: skip
HEAT_SQUARE = Case(  # heat on the unit square, 128 x 128 P1, SDIRK2, distributed control, running misfit
    "heat-square", _square(128), 16384,
    _menu((8, 4, 4), (8, 4, 4, 4), (16, 8), (16, 8, 8), (4, 4, 4, 4, 4)) + _repeated((64, 2), (128, 2)) + PARADIAG,
    smaller=_square(32), with_sensors=square_with_sensors(128),
)  # fmt: skip
MAXWELL_LOSSY = Case(  # the lossy box of demos/maxwell_source_inversion.py, degree 2, SDIRK2
    "maxwell-lossy", _maxwell("lossy"), 256, _menu((4, 4), (8, 4), (8,), (4,)) + _repeated((8, 2), (8, 4)) + PARADIAG
)
MAXWELL_CAVITY = Case(  # the cavity without losses of that demo, degree 2, implicit midpoint
    "maxwell-cavity", _maxwell("cavity"), 256, PARADIAG, solver=PARADIAG[0]
)

#: Steps of the boxes, of which some dozens of a hundred thousand unknowns are timed.
BOX_STEPS, BOX_SMALL = 256, 32


def _box(name: str, cells: int, integrator: str) -> Case:
    """Heat in the unit cube, P1, whose solver in space is what is measured; cycles are counted on 8 x 8 x 8 cubes."""
    posed = lambda cells: (
        lambda grid, steps, parameters: box(
            grid, steps=steps, cells=cells, integrator=integrator, solver_parameters=parameters
        )
    )
    menu = _menu((8, 4), (8,), (16,)) + _repeated((16, 2), (32, 3))
    return Case(name, posed(cells), BOX_STEPS, menu, smaller=posed(8), small=BOX_SMALL)


HEAT_BOX = _box("heat-box", 32, "SDIRK2")  # 35,937 unknowns
HEAT_BOX_EULER = _box("heat-box-euler", 32, "BackwardEuler")
HEAT_BOX_LARGE = _box("heat-box-large", 48, "SDIRK2")  # 117,649 unknowns
HEAT_BOX_LARGE_EULER = _box("heat-box-large-euler", 48, "BackwardEuler")
BOXES = {case.name: case for case in (HEAT_BOX, HEAT_BOX_EULER, HEAT_BOX_LARGE, HEAT_BOX_LARGE_EULER)}
"""Calibrated for the model of solvers in space; nothing else is counted of them."""

STUDIES = {
    "heat-source": Study(
        HEAT_SOURCE,
        lambda steps: serial_heat_source(steps=steps),
        (SERIAL, FCF, *_menu((16,))[1:], PARADIAG[0]),
        gtol=1e-8,
    ),
    "heat-square": Study(
        HEAT_SQUARE,
        lambda steps: serial_square(n=128, steps=steps, integrator="SDIRK2"),
        (SERIAL, *_menu((8, 4, 4))[:1], *_menu((16, 8))[:1], PARADIAG[0]),
        inversion_steps=1024,
        with_sensors=square_with_sensors(32),
    ),
    "maxwell-lossy": Study(
        MAXWELL_LOSSY,
        lambda steps: serial_maxwell_source(regime="lossy", steps=steps),
        (SERIAL, FCF, *_menu((4, 4))[:1], PARADIAG[0]),
        inversion_steps=256,
        gtol=1e-5,
    ),
    "maxwell-cavity": Study(
        MAXWELL_CAVITY,
        lambda steps: serial_maxwell_source(regime="cavity", steps=steps),
        (SERIAL, PARADIAG[0]),
        inversion_steps=256,
        gtol=1e-5,
    ),
}


@dataclass(frozen=True)
class LayersCase:
    """A network whose training steps are calibrated.

    Attributes
    ----------
    nlayers
        Residual layers.
    parts, training
        To opening, layer, closing, batch and labels; ``(network, batch, labels)`` to a training step.
    menu
        Options of MGRIT whose gradient errors are counted.
    solver
        Those that are validated.
    """

    nlayers: int
    parts: Callable = layers.parts
    training: Callable = layers.Training
    menu: tuple[dict, ...] = ()
    solver: dict = field(default_factory=lambda: dict(layers.SETTINGS))


def _depths(*coarsenings: tuple[int, ...]) -> tuple[dict, ...]:
    return tuple({"levels": len(c) + 1, "coarsening": list(c), "relax": "F"} for c in coarsenings)


# dense layers, width 8, batches of 200, tanh, float64 (tests/benchmarks/layers.py)
LAYERS = {
    "resnet-1024": LayersCase(1024, menu=_depths((32,), (16,), (64,), (8, 8), (16, 8), (8, 4, 4), (4, 4, 4))),
    "resnet-4096": LayersCase(4096, menu=_depths((32,), (64,), (128,), (16, 16), (32, 8), (8, 8, 8), (4, 4, 4, 4))),
}

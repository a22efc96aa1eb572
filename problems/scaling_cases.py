"""The problems whose costs :mod:`pint_fem.scaling` knows: how each is posed for a process grid and steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from pint_fem.adjoint import TimeParallelReducedFunctional
from pint_fem.spacetime import SpaceTime
from problems import layers
from problems.heat_source import heat_source
from problems.heat_square import square
from problems.maxwell_source import maxwell_source
from problems.serial_maxwell import serial_maxwell_source
from problems.serial_pyadjoint import SerialSource, serial_heat_source, serial_square

__all__ = ["CASES", "LAYERS", "Case", "LayersCase"]


SERIAL = {"levels": 1}
FCF = {"levels": 3, "coarsening": [8, 4], "relax": "FCF"}


@dataclass(frozen=True)
class Case:
    """A problem to calibrate.

    Attributes
    ----------
    pose
        ``(spacetime, steps, solver_parameters)`` to the reduced functional.
    nsteps
        Steps that the model has by default.
    serial
        ``steps`` to the same problem on a pyadjoint tape, or ``None``.
    smaller
        Like ``pose``, on a coarser mesh with the same time grid, where cycles are counted, or ``None`` for ``pose``.
    menu
        Options of MGRIT and ParaDiag whose cycles are counted: what the planner chooses from.
    inversions, inversion_steps, gtol
        Options of the solvers with which whole inversions are counted, their steps and the relative tolerance of their
        gradients.
    rtol
        Tolerances of solves that are counted; inversions have the smallest.
    solver
        Options of solves that are validated.
    about
        What it is.
    """

    pose: Callable[[SpaceTime, int, dict], TimeParallelReducedFunctional]
    nsteps: int
    about: str
    serial: Callable[[int], SerialSource] | None = None
    smaller: Callable[[SpaceTime, int, dict], TimeParallelReducedFunctional] | None = None
    menu: tuple[dict, ...] = ()
    inversions: tuple[dict, ...] = ()
    inversion_steps: int = 512
    gtol: float = 1e-6
    rtol: tuple[float, ...] = (1e-6, 1e-9)
    solver: dict = field(default_factory=lambda: dict(FCF))

    @property
    def paradiag(self) -> bool:
        """Whether ParaDiag is on the menu."""
        return any("time_solver" in options for options in self.menu)


def _menu(*coarsenings: tuple[int, ...]) -> tuple[dict, ...]:
    """Each with F- and with FCF-relaxation."""
    return tuple(
        {"levels": len(factors) + 1, "coarsening": list(factors), "relax": relax}
        for factors in coarsenings
        for relax in ("FCF", "F")
    )


#: An iteration contracts by ``alpha``; round-off is about 1e-16 over it.
PARADIAG = tuple({"time_solver": "paradiag", "alpha": alpha} for alpha in (1e-4, 1e-6))


def _square(size: int):
    return lambda grid, steps, parameters: square(steps, "SDIRK2", size=size, spacetime=grid, **parameters)


def _plate(grid: SpaceTime, steps: int, parameters: dict) -> TimeParallelReducedFunctional:
    return heat_source(grid, steps=steps, solver_parameters=parameters, printer=lambda text: None).rf


def _maxwell(regime: str):
    return lambda grid, steps, parameters: (
        maxwell_source(grid, regime=regime, steps=steps, solver_parameters=parameters, printer=lambda text: None).rf
    )


CASES = {
    "heat-source": Case(
        _plate,
        512,
        "the plate of demos/heat_source_inversion.py, P1, SDIRK2",
        serial=lambda steps: serial_heat_source(steps=steps),
        menu=_menu((8, 4), (8,), (16,), (8, 8), (4, 4, 4), (4, 4)) + PARADIAG,
        inversions=(SERIAL, FCF, *_menu((16,))[1:], PARADIAG[0]),
        gtol=1e-8,
    ),
    "heat-square": Case(
        _square(128),
        16384,
        "heat on the unit square, 128 x 128 P1, SDIRK2, distributed control, running misfit",
        serial=lambda steps: serial_square(n=128, steps=steps, integrator="SDIRK2"),
        smaller=_square(32),
        menu=_menu((8, 4, 4), (8, 4, 4, 4), (16, 8), (16, 8, 8), (4, 4, 4, 4, 4)) + PARADIAG,
        inversions=(SERIAL, *_menu((8, 4, 4))[:1], *_menu((16, 8))[:1], PARADIAG[0]),
        inversion_steps=1024,
    ),
    "maxwell-lossy": Case(
        _maxwell("lossy"),
        256,
        "the lossy box of demos/maxwell_source_inversion.py, degree 2, SDIRK2",
        serial=lambda steps: serial_maxwell_source(regime="lossy", steps=steps),
        menu=_menu((4, 4), (8, 4), (8,), (4,)) + PARADIAG,
        inversions=(SERIAL, FCF, *_menu((4, 4))[:1], PARADIAG[0]),
        inversion_steps=256,
        gtol=1e-5,
    ),
    "maxwell-cavity": Case(
        _maxwell("cavity"),
        256,
        "the cavity without losses of demos/maxwell_source_inversion.py, degree 2, implicit midpoint",
        serial=lambda steps: serial_maxwell_source(regime="cavity", steps=steps),
        menu=PARADIAG,
        inversions=(SERIAL, PARADIAG[0]),
        inversion_steps=256,
        gtol=1e-5,
        solver=PARADIAG[0],
    ),
}


@dataclass(frozen=True)
class LayersCase:
    """A network whose training steps are calibrated.

    Attributes
    ----------
    nlayers
        Residual layers.
    about
        What it is.
    parts, training
        To opening, layer, closing, batch and labels; ``(network, batch, labels)`` to a training step.
    menu
        Options of MGRIT whose gradient errors are counted.
    solver
        Those that are validated.
    """

    nlayers: int
    about: str
    parts: Callable = layers.parts
    training: Callable = layers.Training
    menu: tuple[dict, ...] = ()
    solver: dict = field(default_factory=lambda: dict(layers.SETTINGS))


def _depths(*coarsenings: tuple[int, ...]) -> tuple[dict, ...]:
    return tuple({"levels": len(c) + 1, "coarsening": list(c), "relax": "F"} for c in coarsenings)


_ABOUT = "{} dense layers, width 8, batches of 200, tanh, float64 (tests/benchmarks/layers.py)"
LAYERS = {
    "resnet-1024": LayersCase(
        1024, _ABOUT.format(1024), menu=_depths((32,), (16,), (64,), (8, 8), (16, 8), (8, 4, 4), (4, 4, 4))
    ),
    "resnet-4096": LayersCase(
        4096, _ABOUT.format(4096), menu=_depths((32,), (64,), (128,), (16, 16), (32, 8), (8, 8, 8), (4, 4, 4, 4))
    ),
}

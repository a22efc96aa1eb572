r"""The setting of the ground-penetrating radar: antennas and receivers above soil, and what is buried in it.

Units: lengths in metres, times in metres of light in vacuum (c = 1), the impedance of vacuum is one. Then

=================  ============  ==========================
quantity           value 1 here  in SI units
=================  ============  ==========================
length             1             1 m
time               1             3.3356 ns
frequency          1             299.79 MHz
permittivity       1             that of vacuum
conductivity       1             2.6544 mS/m
=================  ============  ==========================

The soil (depth 1.2 m, width 2.4 m, relative permittivity 5, 2.7 mS/m) is below 0.3 m of air. Eight antennas, line
currents along x with the profile of a bell of 0.1 m, take turns on sending a Ricker pulse of 180 MHz, whose wave in
the soil is 0.75 m long. Receivers read :math:`E_x`. Two objects are buried: a pipe of plastic and a lens of wet soil.
"""

from __future__ import annotations

import math

import numpy as np
from firedrake import RectangleMesh, as_vector, exp
from ufl.core.expr import Expr

from pint_fem.errors import InputError
from problems.experiments import Inclusion
from problems.maxwell import Walls

__all__ = [
    "AIR",
    "ANTENNAS",
    "BACKGROUND",
    "CELLS",
    "CONDUCTIVITY_OF",
    "DEPTH",
    "FINAL_TIME",
    "NEAREST",
    "PEAK",
    "PERMITTIVITY_OF",
    "RECEIVERS",
    "STEPS",
    "WALLS",
    "WIDTH",
    "current",
    "in_soil",
    "pulse",
    "receivers_of",
    "soil_mesh",
    "true_controls",
]

WIDTH, DEPTH, AIR = 2.4, 1.2, 0.3
#: Cells along the depth of the soil, of side 0.1 m.
CELLS = 12
#: Relative permittivity and conductivity of the soil around the objects.
BACKGROUND = (5.0, 1.0)
#: Peak of the pulse's spectrum.
PEAK = 0.6
DELAY = 1.1 / PEAK
FINAL_TIME = 8.4
STEPS = 192
WALLS = Walls(conductor=(), impedance=(1, 2, 3, 4))

_HEIGHT, _SPREAD = 0.137, 0.1
#: Places of the antennas and of the receivers, off the sides of cells, where the electric field is not continuous.
ANTENNAS = np.array([(0.171 + 0.294 * k, _HEIGHT) for k in range(8)])
RECEIVERS = np.array([(0.137 + 0.0924 * k, 0.043) for k in range(24)])

#: Receivers nearer to the antenna than this are not read: the field there is that of the antenna's own charges.
NEAREST = 0.36

_PIPE, _LENS = ((0.75, -0.48), (0.2, 0.2)), ((1.6, -0.62), (0.42, 0.18))
#: What is buried, with the factors by which permittivity and conductivity differ from the background.
PERMITTIVITY_OF = (Inclusion("pipe", *_PIPE, 0.5), Inclusion("wet lens", *_LENS, 1.8))
CONDUCTIVITY_OF = (Inclusion("pipe", *_PIPE, 0.2), Inclusion("wet lens", *_LENS, 6.0))


def soil_mesh(cells: int, comm, distribution_parameters=None):
    """The box of soil and air, with walls 1 to 4 (left, right, bottom, top); the surface of the soil is at y = 0.

    Parameters
    ----------
    cells
        Cells along the depth of the soil, a multiple of 4.
    comm, distribution_parameters
        Communicator, and how the mesh is divided over it: ``spacetime.mesh(soil_mesh, cells)`` gives both.

    Raises
    ------
    InputError
        If the surface would not be on the mesh's lines.
    """
    if cells < 4 or cells % 4:
        raise InputError(f"cells = {cells}: give a multiple of 4, as the air is a quarter as high as the soil is deep")
    return RectangleMesh(
        2 * cells,
        cells + cells // 4,
        WIDTH,
        AIR,
        originX=0.0,
        originY=-DEPTH,
        comm=comm,
        distribution_parameters=distribution_parameters,
    )


def in_soil(x):
    """UFL condition of the coordinates."""
    return x[1] < 0.0


def pulse(t, peak: float = PEAK):
    """Ricker pulse, at most 1, of a time in UFL or numbers."""
    square = (math.pi * peak * (t - DELAY)) ** 2
    return (1 - 2 * square) * (np.exp if isinstance(t, (float, np.ndarray)) else exp)(-square)


def current(x, place):
    """Profile of the current of an antenna at ``place``, a vector along x in UFL; its integral is 1."""
    square = ((x[0] - place[0]) ** 2 + (x[1] - place[1]) ** 2) / _SPREAD**2
    return as_vector((exp(-square) / (math.pi * _SPREAD**2), 0.0))


def receivers_of(antenna: int) -> np.ndarray:
    """Places of the receivers that are read while an antenna sends, ``(count, 2)``."""
    return RECEIVERS[np.abs(RECEIVERS[:, 0] - ANTENNAS[antenna, 0]) > NEAREST]


def true_controls(x) -> tuple[Expr, Expr]:
    """Logarithms of the factors of permittivity and conductivity behind the shipped readings, in UFL."""
    logarithm = lambda objects: sum(math.log(o.contrast) * o.inside(x) for o in objects)
    return logarithm(PERMITTIVITY_OF), logarithm(CONDUCTIVITY_OF)

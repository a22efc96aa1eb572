r"""The setting of the full-waveform inversion: a section through the ground, its shots, receivers and wave speeds.

The section is 2 km wide and 1 km deep, below a free surface. An absorbing layer on its left, right and lower side ends
in absorbing walls. The true speed is that of three layers, with a fast lens in the second; the inversion starts from a
speed that rises linearly with depth.

**Bands.** The time course of all shots is a Ricker pulse of peak frequency f, centred at the time :math:`t_p`,

.. math::  r_f(t) = (1 - 2 a^2)\, e^{-a^2} , \quad a = \pi f (t - t_p) .

It is, up to a factor, the second derivative of a Gaussian of standard deviation :math:`s_f = 1/(\sqrt 2 \pi f)`.
Convolution with the normalised Gaussian :math:`g_\tau` of standard deviation :math:`\tau = \sqrt{s_b^2 - s_f^2}` is a
low-pass filter that makes of it a pulse of a lower peak frequency b < f:

.. math::  g_\tau * r_f = (b/f)^3\, r_b .

The equations are linear and their coefficients do not depend on time. So the same filter applied to the readings of the
pulse :math:`r_f` gives the readings of :math:`(b/f)^3\, r_b`: one set of readings serves the inversions of all bands,
from low frequencies to high ones.
"""

from __future__ import annotations

import numpy as np
from firedrake import RectangleMesh, conditional, exp, max_value
from ufl.core.expr import Expr

from pint_fem.errors import InputError
from problems.experiments import Inclusion, columns_of

__all__ = [
    "BANDS",
    "CELLS",
    "COLUMNS",
    "DEPTH",
    "FINAL_TIME",
    "INCLUSIONS",
    "LAYER",
    "LAYER_SPEEDS",
    "PEAK",
    "PEAK_FREQUENCY",
    "RECEIVERS",
    "RECORD_END",
    "SAMPLING",
    "SHOTS",
    "SURFACE",
    "WALLS",
    "WIDTH",
    "damping",
    "filter_width",
    "filtered_pulse",
    "ground_mesh",
    "low_pass",
    "ricker",
    "shot_shape",
    "start_speed",
    "true_speed",
]

COLUMNS = columns_of("pressure")

#: Width and depth of the section, and thickness of the absorbing layer around it, in km.
WIDTH, DEPTH, LAYER = 2.0, 1.0, 0.25
#: Numbers of the boundary's absorbing parts (left, right, bottom) and of the free surface.
WALLS, SURFACE = (1, 2, 3), (4,)
#: Cells per kilometre.
CELLS = 12
#: Largest damping rate in the absorbing layer, at its outer end, per second.
_LARGEST_DAMPING = 20.0

#: Peak frequency of the pulse of all shots in Hz, and the time of its centre in s.
PEAK_FREQUENCY, PEAK = 4.5, 0.6
#: Peak frequencies of the bands that are inverted one after another.
BANDS = (2.0, 3.0, PEAK_FREQUENCY)
#: End of the simulated interval, and of the longer record, of which filters require what follows; time between samples.
FINAL_TIME, RECORD_END, SAMPLING = 1.8, 2.24, 0.02

#: Places of the 8 shots and of the 24 receivers, 150 m and 100 m below the surface, at y = 0.
SHOTS = np.array([(x, -0.15) for x in np.linspace(0.06, 1.94, 8)])
RECEIVERS = np.array([(x, -0.1) for x in np.linspace(0.02, 1.98, 24)])
#: Standard deviation of a shot's Gaussian shape, in km.
_SHOT_WIDTH = 0.05

#: Depths of the layers' lower ends and their speeds.
_INTERFACES, LAYER_SPEEDS = (0.25, 0.75), (1.8, 2.1, 2.5)
_LENS_SPEED = 2.6
#: The lens; its contrast is its speed over that of the layer around it, less 1.
INCLUSIONS = (Inclusion("lens", (1.0, -0.5), (0.30, 0.14), _LENS_SPEED / LAYER_SPEEDS[1] - 1),)


def ground_mesh(cells: int, comm, distribution_parameters=None):
    """The section with its absorbing layer.

    Parameters
    ----------
    cells
        Cells per kilometre, a multiple of 4, so that layers begin and end at lines of the mesh.
    comm, distribution_parameters
        Communicator, and how the mesh is divided over it: ``spacetime.mesh(ground_mesh, cells)`` gives both.

    Raises
    ------
    InputError
        On another number of cells.
    """
    if cells < 4 or cells % 4:
        raise InputError(f"cells = {cells}: give a multiple of 4, as layers begin and end at multiples of 1/4 km")
    across, down = round((WIDTH + 2 * LAYER) * cells), round((DEPTH + LAYER) * cells)
    return RectangleMesh(
        across, down, WIDTH + LAYER, 0.0, originX=-LAYER, originY=-DEPTH - LAYER, comm=comm,
        distribution_parameters=distribution_parameters,
    )  # fmt: skip


def damping(x) -> Expr:
    """Return the damping rate at ``x``, a ``SpatialCoordinate``: it rises quadratically from the layer's inner end."""
    beside, below = max_value(-x[0], x[0] - WIDTH), -DEPTH - x[1]
    return _LARGEST_DAMPING * (max_value(max_value(beside, below), 0.0) / LAYER) ** 2


def start_speed(x) -> Expr:
    """Return the speed that the inversion starts from at ``x``, a ``SpatialCoordinate``."""
    return 1.5 - 0.6 * x[1]


def true_speed(x) -> Expr:
    """Return the speed behind the shipped readings at ``x``, a ``SpatialCoordinate``."""
    first, second = _INTERFACES
    top, middle, bottom = LAYER_SPEEDS
    layers = conditional(x[1] > -first, top, conditional(x[1] > -second, middle, bottom))
    return layers + (_LENS_SPEED - middle) * INCLUSIONS[0].inside(x)


def shot_shape(x, place) -> Expr:
    """Return the shape of a shot at ``place``, a Gaussian with integral 1, at ``x``, a ``SpatialCoordinate``."""
    square = (x[0] - place[0]) ** 2 + (x[1] - place[1]) ** 2
    return exp(-square / (2 * _SHOT_WIDTH**2)) / (2 * np.pi * _SHOT_WIDTH**2)


# -- pulses and filters ------------------------------------------------------------------------------------------------
def ricker(t, frequency: float):
    """Return the Ricker pulse of a peak frequency at time ``t``, in UFL, a number or an array; 1 at its centre."""
    square = (np.pi * frequency * (t - PEAK)) ** 2
    return (1 - 2 * square) * (np.exp if isinstance(t, (float, np.ndarray)) else exp)(-square)


def filtered_pulse(t, band: float, frequency: float = PEAK_FREQUENCY):
    """Return the pulse of the shots filtered to a band, :math:`(b/f)^3 r_b(t)`."""
    return (band / frequency) ** 3 * ricker(t, band)


def filter_width(band: float, frequency: float = PEAK_FREQUENCY) -> float:
    r"""Return the standard deviation :math:`\tau` in time of the filter that makes of a pulse one of a lower band.

    Raises
    ------
    InputError
        If the band's peak frequency is not positive or above that of the pulse.
    """
    if not 0 < band <= frequency:
        raise InputError(f"band = {band:g} Hz: give a positive peak frequency of at most {frequency:g} Hz")
    return float(np.sqrt(max(1 / band**2 - 1 / frequency**2, 0.0) / 2) / np.pi)


def low_pass(times: np.ndarray, width: float) -> np.ndarray:
    """Return the matrix ``(nt, nt)`` that filters samples at evenly spaced times by a Gaussian.

    Rows are the trapezoidal rule for the convolution, which for smooth records is exact to round-off where the Gaussian
    is wider than a sample's distance. A row within four widths of the record's end lacks samples.

    Parameters
    ----------
    times
        ``(nt,)``; before them and at time zero the record is zero.
    width
        Standard deviation of the Gaussian; 0 for the identity.
    """
    if width == 0:
        return np.eye(len(times))
    apart = np.subtract.outer(times, times) / width
    return np.exp(-(apart**2) / 2) * (times[1] - times[0]) / (width * np.sqrt(2 * np.pi))

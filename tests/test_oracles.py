"""Recorded runs of XBraid and PyMGRIT, reproduced to the digits that they print.

XBraid 3.x: ``test/ode1D.saved``, ``diffusion1D*.saved`` and further runs of its ex-01, ex-01-expanded and ex-02; its
``r_k`` is the 2-norm over C-points after relaxation, before the k-th correction, and its count of iterations includes
a skipped first down-cycle. PyMGRIT 1.0.6: histories of ``conv`` from its own classes; its residual is taken after a
cycle, before the next relaxation, and its nested iteration comes before the first.
"""

import itertools
import math

import numpy as np
import pytest

from pint_fem.mgrit import MGRIT, coarse_points
from pint_fem.theory import two_level_bound


# -- XBraid's ex-01: u' = -u, backward Euler, dt = 1/2, 0.456 everywhere behind the initial value -------------------
class Decay:
    """Backward Euler on the given times."""

    def __init__(self, t):
        self.dt = np.diff(np.asarray(t, dtype=float))

    def step(self, steps, u, out):
        out[...] = u / (1 + self.dt[steps.start : steps.stop : steps.step, None])


def ode(nsteps, levels, cycles, *, t=None, **options):
    """Residuals."""
    options = dict(coarsening=2, rtol=0, max_it=cycles, dtol=1e300) | options
    factors = [options["coarsening"]] * (levels - 1)
    t = np.arange(nsteps + 1) / 2 if t is None else t
    U = np.full((nsteps + 1, 1), 0.456)
    U[0] = 1
    propagators = [Decay(t[points]) for points in coarse_points(nsteps, factors)]
    return MGRIT(propagators, nsteps, options=options).solve(U).residuals


def nonuniform_times(nsteps):
    """ex-01-expanded's ``-tg 2``: steps of dt/2 in the first half, 3 dt/2 in the second."""
    dt = np.where(np.arange(nsteps) < nsteps // 2, 0.25, 0.75)
    return np.concatenate([[0.0], np.cumsum(dt)])


COARSE_RELAX = dict(coarse_solver="relax")


@pytest.mark.parametrize(
    ("nsteps", "levels", "options", "expected"),
    [
        (24, 2, {}, [3.560861e-1, 1.403540e-2]),
        (24, 2, COARSE_RELAX, [3.560861e-1, 2.558119e-2, 8.862579e-4, 3.874981e-5, 1.032798e-7]),
        (24, 2, dict(start="skip", coarse_sweeps=2, **COARSE_RELAX), [3.240160e-2]),
        (24, 2, dict(start="skip"), [2.851112e-2]),
        (24, 3, dict(relax=[1, 2], coarse_sweeps=2, **COARSE_RELAX), [3.560861e-1, 1.420885e-2]),
        (24, 3, dict(start="skip", **COARSE_RELAX), [6.155653e-2]),
        (24, 3, dict(relax=[1, 2], start="skip"), [5.856029e-2]),
        (24, 3, dict(relax=[1, 2]), [3.560861e-1, 1.420885e-2]),
        (48, 3, dict(start="skip"), [5.856070e-2, 2.454379e-3]),
        (10, 3, dict(start="skip"), [5.819809e-2, 1.641568e-3]),
        (10, 2, dict(start="skip"), [2.845538e-2, 8.621939e-4]),
        (24, 3, dict(cycle="F"), [3.560861e-1, 1.403499e-2, 4.874639e-4, 1.224714e-5, 1.381036e-7]),
        (24, 3, dict(cycle="F", start="nested"), [2.850230e-2, 1.046056e-3, 4.387666e-5, 1.754639e-6, 4.236840e-8]),
        (
            24,
            4,
            dict(cycle="F", relax="F"),
            [8.402911e-1, 7.365735e-2, 6.611036e-3, 5.783155e-4, 4.812041e-5, 3.581713e-6],
        ),
        (37, 3, dict(coarsening=3), [3.043645e-1, 1.321907e-2, 5.247078e-4, 1.700300e-5, 3.283547e-7]),
        (24, 2, dict(t=nonuniform_times(24)), [3.334243e-1, 9.974833e-3, 2.689384e-4, 4.720658e-6]),
    ],
)
def test_xbraid_ex01(nsteps, levels, options, expected):
    residuals = ode(nsteps, levels, len(expected) - 1 or 1, **options)[: len(expected)]
    assert [f"{r:.6e}" for r in residuals] == [f"{r:.6e}" for r in expected]


# -- XBraid's ex-02: u_t = u_xx + f on [0, pi] x [0, 2 pi], u = sin x cos t, from random C-points ---------------------
class Heat:
    """Central differences and backward Euler; the tridiagonal systems through their eigenvectors."""

    def __init__(self, t, nspace):
        self.t, self.x = np.asarray(t), np.linspace(0, math.pi, nspace)
        self.dt, n = self.t[1] - self.t[0], nspace - 1
        k = np.arange(1, n)
        self.S = np.sqrt(2 / n) * np.sin(math.pi * np.outer(k, k) / n)
        self.lam = 1 / (1 + self.dt * (2 * np.sin(math.pi * k / (2 * n)) / (math.pi / n)) ** 2)

    def step(self, steps, u, out):
        t = self.t[steps.start + 1 : steps.stop + 1 : steps.step, None]
        f = np.sin(self.x) * (np.cos(t) - np.sin(t))
        out[...] = 0
        out[:, 1:-1] = (u + self.dt * f)[:, 1:-1] @ (self.S * self.lam) @ self.S


def xbraid_guess(U, ranks):
    """Fill the C-points (m = 2) by ``braid_Rand() / braid_RAND_MAX``, which starts anew on each of XBraid's ranks."""
    share, rest = divmod(len(U), ranks)
    for rank in range(ranks):
        state, first = 1, rank * share + min(rank, rest)
        for point in range(first, first + share + (rank < rest)):
            for i in range(U.shape[1] if point and point % 2 == 0 else 0):
                state = (state * 1103515245 + 12345) % 2**64
                U[point, i] = ((state // 65536) % 2**32 % 32768) / 32768


def transfer(n_fine):
    """Full weighting and linear interpolation on ``n`` points, ends kept."""
    n = (n_fine - 1) // 2 + 1
    R, P = np.zeros((n, n_fine)), np.zeros((n_fine, n))
    for i in range(n):
        P[2 * i, i] = 1
        R[i, 2 * i] = 0.5
        if 0 < i < n - 1:
            R[i, 2 * i - 1] = R[i, 2 * i + 1] = 0.25
    P[1::2] = 0.5 * (P[:-1:2] + P[2::2])
    R[0, 0] = R[-1, -1] = 1
    return R, P


def heat(ntime, nspace, *, levels=None, min_coarse=3, spatial=False, ranks=1, **options):
    """Residuals of ex-02, with XBraid's limits on the number of levels."""
    factors, n = [], ntime
    while n // 2 >= min_coarse and len(factors) + 1 < (levels or 99):
        factors.append(2)
        n //= 2
    t = np.linspace(0, 2 * math.pi, ntime + 1)
    sizes, transfers = [nspace], []
    for level in range(len(factors)):
        coarsen = spatial and level < math.floor(math.log2(nspace)) - 1
        transfers.append(transfer(sizes[-1]) if coarsen else None)
        sizes.append((sizes[-1] - 1) // 2 + 1 if coarsen else sizes[-1])
    points = coarse_points(ntime, factors)
    propagators = [Heat(t[p], n) for p, n in zip(points, sizes, strict=True)]
    U = np.zeros((ntime + 1, nspace))
    xbraid_guess(U, ranks)
    U[0] = np.sin(propagators[0].x)
    atol = 1e-7 / (math.sqrt(2 * math.pi / (ntime - 1)) * math.sqrt(math.pi / (nspace - 1)))
    options = dict(levels=len(points), coarsening=2, rtol=0, atol=atol, max_it=29, dtol=1e300) | options
    return MGRIT(propagators, ntime, options=options, transfers=transfers).solve(U).residuals


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [1.894651e0, 6.805108e-2]),
        (dict(cycle="F"), [1.894651e0, 6.816609e-2, 1.018626e-3, 1.600352e-7]),
        (dict(c_weight=1.5), [2.580916e0, 7.020537e-2, 2.572337e-3, 1.111550e-4]),
    ],
)
def test_xbraid_ex02(options, expected):
    """Three levels, 16 steps, 9 points in space; XBraid's own random numbers."""
    residuals = heat(16, 9, levels=3, atol=0, max_it=len(expected) - 1, **options)
    assert [f"{r:.6e}" for r in residuals] == [f"{r:.6e}" for r in expected]


def test_xbraid_ex02_spatial_coarsening():
    """Full weighting and linear interpolation on the coarse levels."""
    expected = [3.154717e0, 1.243093e-1, 2.188059e-3, 7.749836e-5]
    residuals = heat(32, 17, levels=3, spatial=True, atol=0, max_it=3)
    assert [f"{r:.6e}" for r in residuals] == [f"{r:.6e}" for r in expected]


SIZES = [(32, 17), (128, 33), (512, 65), (2048, 129)]


@pytest.mark.parametrize(
    ("options", "iterations"),
    [
        (dict(levels=2, relax="FCF"), [6, 6, 6, 6]),
        (dict(relax="FCF"), [6, 7, 7, 8]),
        (dict(relax="FCF", cycle="F"), [6, 6, 6, 6]),
        (dict(levels=2, relax="F"), [9, 9, 8, 8]),
        (dict(relax="F"), [10, 15, 19, 23]),
        (dict(relax="F", cycle="F"), [8, 8, 8, 8]),
    ],
)
def test_xbraid_ex02_iterations(options, iterations):
    """The scaling table (``diffusion1D_scaling.saved``), which was run on 8 ranks."""
    counts = [len(heat(ntime, nspace, ranks=8, **options)) for ntime, nspace in SIZES]
    assert counts == iterations


@pytest.mark.parametrize(
    ("options", "iterations"),
    [({}, 7), (dict(cycle="F"), 6), (dict(start="skip"), 7), (dict(start="nested", cycle="F"), 4)],
)
def test_xbraid_ex02_first_guesses(options, iterations):
    """256 steps, 33 points (``diffusion1D.saved``, tests 0-3); a first guess counts as one of XBraid's iterations."""
    residuals = heat(256, 33, **options)
    assert len(residuals) + ("start" in options) == iterations


def test_undamped_waves_do_not_contract():
    """|lam| = 1: bounds of 1.3-1.6 for backward Euler coarse, above 100 for Crank-Nicolson, at Nc = 64; FCF alike."""
    y = np.linspace(0, 40, 20001)
    fine = (1 + 0.5j * y) / (1 - 0.5j * y)
    for m, relax in itertools.product((2, 4, 8), ("F", "FCF")):
        euler = two_level_bound(fine, 1 / (1 - 1j * m * y), m, 64, relax)
        trapezoidal = two_level_bound(fine, (1 + 0.5j * m * y) / (1 - 0.5j * m * y), m, 64, relax)
        assert 1.2 < euler < 1.7
        assert trapezoidal > 100


# -- PyMGRIT's own problems ------------------------------------------------------------------------------------------
def pymgrit(propagators, nsteps, U, expected, *, m, norm_kind=2, **options):
    """Compare with ``conv``; PyMGRIT looks at the residual after a cycle, so its history starts with our second."""
    options = dict(coarsening=m, check="cycle", time_norm=norm_kind, rtol=0, max_it=len(expected)) | options
    residuals = MGRIT(propagators, nsteps, options=options).solve(U).residuals[1:]
    np.testing.assert_allclose(residuals, expected, rtol=2e-7, atol=1e-15)


@pytest.mark.parametrize(
    ("levels", "m", "options", "expected"),
    [
        (2, 2, dict(start="nested"), [7.18618594e-05, 1.24610671e-06, 2.10155661e-08, 3.14412739e-10]),
        (2, 5, {}, [1.68531060e-02, 7.65247328e-04, 3.85244008e-05, 1.59474945e-06, 4.60294353e-08]),
        (3, 2, dict(start="nested", cycle="F"), [6.73539125e-05, 1.12443365e-06, 1.86222242e-08, 2.79017082e-10]),
        (3, 2, dict(cycle="F", relax=2), [3.67333735e-03, 4.72633976e-05, 7.15854949e-07, 1.01581703e-08]),
        (3, 3, dict(relax="F"), [3.42253216e-02, 3.76991904e-03, 4.41650209e-04, 4.53998778e-05, 3.71579722e-06]),
        (3, 3, dict(start="nested", c_weight=1.3), [7.45932662e-04, 3.69966397e-05, 1.22695716e-06, 2.30248018e-08]),
        (2, 4, dict(start="nested", norm_kind=1), [3.10299436e-03, 1.33968419e-04, 4.71605134e-06]),
        (2, 4, dict(start="nested", norm_kind="inf"), [2.24194267e-04, 8.66806382e-06, 3.76680585e-07]),
    ],
)
def test_pymgrit_dahlquist(levels, m, options, expected):
    """``Dahlquist(t_start=0, t_stop=5, nt=101)``: u' = -u, backward Euler."""
    t = np.linspace(0, 5, 101)
    U = np.zeros((101, 1))
    U[0] = 1
    propagators = [Decay(t[p]) for p in coarse_points(100, [m] * (levels - 1))]
    pymgrit(propagators, 100, U, expected, m=m, **options)


class PyMGRITHeat(Heat):
    """Its Heat1D on [0, 1]."""

    def __init__(self, t, nspace):
        super().__init__(t, nspace)
        n = nspace - 1
        self.x = np.linspace(0, 1, nspace)
        self.lam = 1 / (1 + self.dt * (2 * n * np.sin(math.pi * np.arange(1, n) / (2 * n))) ** 2)

    def step(self, steps, u, out):
        t = self.t[steps.start + 1 : steps.stop + 1 : steps.step, None]
        f = -np.sin(math.pi * self.x) * (np.sin(t) - math.pi**2 * np.cos(t))
        out[...] = 0
        out[:, 1:-1] = (u + self.dt * f)[:, 1:-1] @ (self.S * self.lam) @ self.S


@pytest.mark.parametrize(
    ("levels", "m", "options", "expected"),
    [
        (3, 4, dict(start="nested"), [1.89898353e-03, 1.20569205e-04, 7.23278750e-06, 3.78719692e-07]),
        (2, 8, {}, [1.53300236e-01, 3.81251511e-03, 6.03611632e-05]),
        (
            4,
            2,
            dict(start="nested", cycle="F", relax="F"),
            [5.37165346e-04, 3.91325506e-05, 2.85162239e-06, 2.09174262e-07, 1.54021885e-08],
        ),
    ],
)
def test_pymgrit_heat(levels, m, options, expected):
    """``Heat1D(nx=33, t_stop=2, nt=65)``, u = sin(pi x) cos t."""
    t = np.linspace(0, 2, 65)
    propagators = [PyMGRITHeat(t[p], 33) for p in coarse_points(64, [m] * (levels - 1))]
    U = np.zeros((65, 33))
    U[0, 1:-1] = np.sin(math.pi * propagators[0].x[1:-1])
    pymgrit(propagators, 64, U, expected, m=m, **options)

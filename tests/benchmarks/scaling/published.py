r"""XBraid's published experiment in the model, and ours in the same setting.

Two-dimensional heat, 129 x 129 points and 16,192 steps, 16 processes in space, coarsening 16 and then 2,
FCF-relaxation, 10 to 15 V-cycles: a crossover with space-parallel sequential stepping near 256 processes and a best
speed-up near 10 (Falgout, Friedhoff, Kolev, MacLachlan, Schroder, SISC 36(6), 2014). All levels are entered with the
same kernel cost; the baseline is sequential stepping on as many processes in space as are fastest, by the
surface-to-volume model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from pint_fem.mgrit.solver import MGRIT
from pint_fem.scaling.costs import Calibration, Kernel
from pint_fem.scaling.model import Model, Solve
from pint_fem.scaling.network import Network
from pint_fem.theory.stability import dirk_stability

__all__ = ["NSTEPS", "Setting", "count_on_modes", "equal_accuracy", "sequential_seconds", "speedups", "xbraid"]

NSTEPS, POINTS, SPACE = 16192, 129, 16
#: A step on one process and the network of that machine, as orders of magnitude: ratios hardly depend on them.
STEP, NETWORK = 10e-3, Network(3e-6, 1.5e9, "an IBM Blue Gene/Q's, order of magnitude")
#: Ten multigrid cycles a solve on seven grids, each grid with the messages of an iteration of the surface-to-volume
#: model. With that the fastest number of space ranks is the published one.
SPACE_ITERATIONS = 70.0
GAMMA = 1 - 1 / math.sqrt(2)
TABLEAUX = {"backward Euler": ([[1.0]], [1.0]), "SDIRK2": ([[GAMMA, 0], [1 - GAMMA, GAMMA]], [1 - GAMMA, GAMMA])}


class _Modes:
    """``u -> R(-stride dt kappa) u`` for eigenvalues ``kappa``: heat in the basis of its modes."""

    def __init__(self, values: np.ndarray):
        self.values = values

    def step(self, steps, u, out):
        """Step."""
        np.multiply(self.values, u, out=out)


def count_on_modes(
    options: Mapping,
    tableau: str,
    *,
    start: str,
    rtol: float,
    nearby: float | None = None,
    nsteps: int = NSTEPS,
    longer: float = 1.0,
    modes: int = 24,
) -> int:
    """Cycles of a real solve of the published problem, ``dt = h^2``, in the basis of its modes: they do not couple, and
    a logarithmic selection of them stands for all.

    The right-hand side is smooth in time and the same for all modes relative to their size. ``nearby``: start from the
    solution of a problem whose right-hand side differs by so much. ``longer``: steps are so many times ``h^2``.
    """
    kappa = longer * np.geomspace(
        2 * (np.pi / (POINTS - 1)) ** 2, 8.0, modes
    )  # dt times the eigenvalues of the five-point star
    made = {k: v for k, v in options.items() if k != "levels"}
    factors = MGRIT([_Modes(kappa)] * options["levels"], nsteps, options=options).options.factors(nsteps)
    R = lambda z: dirk_stability(*TABLEAUX[tableau], z)
    strides = np.cumprod([1, *factors])
    propagators = [_Modes(np.real(R(-float(s) * kappa))) for s in strides]
    U = np.zeros((nsteps + 1, modes))
    U[0] = 1
    t = np.arange(1, nsteps + 1)[:, None] * (2 * np.pi / nsteps)
    G = np.cos(t) * (1 - propagators[0].values)
    made |= {"rtol": rtol, "check": "cycle", "max_it": 60, "levels": len(propagators)}
    if nearby is not None:
        MGRIT(propagators[:1], nsteps, options={"levels": 1}).solve(U, (1 + nearby * np.sin(3 * t)) * G)
    return MGRIT(propagators, nsteps, options=made, linear=True).solve(U, G, start=start).cycles


@dataclass(frozen=True)
class Setting:
    """A configuration of the model in the published setting.

    Attributes
    ----------
    name : str
    options : dict
        Of MGRIT.
    cycles : int
    start : str
    stages, block, coarse : float
        Cost of a step in solves; cost of a state among eight on lanes relative to one alone; cost of a level's step
        relative to that of the finer one.
    nsteps : int
    """

    name: str
    options: Mapping
    cycles: int
    start: str
    stages: int = 1
    block: float = 1.0
    coarse: float = 1.0
    nsteps: int = NSTEPS

    def calibration(self) -> Calibration:
        """Costs of this setting."""
        n = POINTS**2
        levels = range(self.options["levels"])
        unit = STEP * self.stages
        factor = [max(self.coarse**i, 1e-3) for i in levels]
        # one state alone, or eight of them on lanes
        kernels = [Kernel((1, 8), (f * unit, f * unit * 8 * self.block), lanes=True) for f in factor]
        one = {"step": kernels, "adjoint": kernels}
        return Calibration(
            self.name, "published", n, self.nsteps, {1: one}, network=NETWORK, space_iterations=SPACE_ITERATIONS,
            stages=self.stages, overlap=1,
        )  # fmt: skip


def xbraid(cycles: int) -> Setting:
    """The published one."""
    factors = (16, *[2] * 9)
    return Setting(
        f"as published, {cycles} cycles",
        {"levels": len(factors) + 1, "coarsening": factors, "relax": "FCF"},
        cycles,
        "skip",
    )


@cache
def sequential_seconds(stages: int, nsteps: int, processes: int) -> float:
    """Predicted seconds of sequential stepping on as many processes in space, a power of two, as are fastest."""
    setting = Setting("sequential", {"levels": 1}, 0, "guess", stages, nsteps=nsteps)
    here = Model(setting.calibration(), {"levels": 1}, (processes, 1)).run(Solve("state")).seconds
    return here if processes == 1 else min(here, sequential_seconds(stages, nsteps, processes // 2))


def speedups(setting: Setting, ranks: Sequence[int], space: int = SPACE) -> list[tuple[int, float, float]]:
    """``(processes, predicted seconds, speed-up over the best sequential stepping on at most as many processes)``;
    ``ranks`` are powers of two.
    """
    calibration, out = setting.calibration(), []
    for count in sorted(ranks):
        if count < 2 * space or count % space:
            continue
        said = Model(calibration, setting.options, (space, count // space)).run(
            Solve("state", setting.start, setting.cycles)
        )
        out.append((count, said.seconds, sequential_seconds(setting.stages, setting.nsteps, count) / said.seconds))
    return out


def equal_accuracy() -> tuple[int, float]:
    """Steps of SDIRK2 that are as accurate as the published ones of backward Euler, and that error: the largest over
    time, for the published solution ``sin x sin y cos t``.
    """
    wanted, steps = _error("backward Euler", NSTEPS), 16
    while _error("SDIRK2", steps) > wanted:
        steps += 16
    return steps, wanted


def _error(tableau: str, steps: int) -> float:
    A, b = map(np.asarray, TABLEAUX[tableau])
    h = np.pi / (POINTS - 1)
    dt, rate = NSTEPS * h**2 / steps, 2 * (2 * np.sin(h / 2) / h) ** 2  # of that mode on the five-point star
    load, u, worst = (lambda t: rate * np.cos(t) - np.sin(t)), 1.0, 0.0
    for n in range(steps):
        slopes: list[float] = []
        for i, (row, c) in enumerate(zip(A, A.sum(axis=1), strict=True)):
            known = u + dt * sum(row[j] * slopes[j] for j in range(i))
            slopes.append((load((n + c) * dt) - rate * known) / (1 + dt * row[i] * rate))
        u += dt * sum(w * k for w, k in zip(b, slopes, strict=True))
        worst = max(worst, abs(u - np.cos((n + 1) * dt)))
    return float(worst)

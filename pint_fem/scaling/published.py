r"""XBraid's published experiment in the model, and ours in the same setting.

Two-dimensional heat, 129 x 129 points and 16,192 steps, 16 processes in space, coarsening 16 and then 2,
FCF-relaxation, 10 to 15 V-cycles: a crossover with space-parallel sequential stepping near 256 processes and a best
speed-up near 10 (Falgout, Friedhoff, Kolev, MacLachlan, Schroder, SISC 36(6), 2014). All levels are entered with the
same kernel cost; the opponent is sequential stepping on as many processes in space as are fastest, by the
surface-to-volume model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pint_fem.mgrit import MGRIT, dirk_stability
from pint_fem.scaling.costs import Calibration, Kernel
from pint_fem.scaling.model import Model, Solve
from pint_fem.scaling.network import Network

__all__ = ["NSTEPS", "Setting", "count_on_modes", "settings", "speedups", "xbraid"]

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
    modes: int = 24,
) -> int:
    """Cycles of a real solve of the published problem, ``dt = h^2``, in the basis of its modes: they do not couple, and
    a logarithmic selection of them stands for all.

    The right-hand side is smooth in time and the same for all modes relative to their size. ``nearby``: start from the
    solution of a problem whose right-hand side differs by so much.
    """
    kappa = np.geomspace(2 * (np.pi / (POINTS - 1)) ** 2, 8.0, modes)  # dt times the eigenvalues of the five-point star
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
        Cost of a step in solves; cost of a state in a full block relative to one alone; cost of a level's step relative
        to that of the finer one.
    """

    name: str
    options: Mapping
    cycles: int
    start: str
    stages: int = 1
    block: float = 1.0
    coarse: float = 1.0

    def calibration(self) -> Calibration:
        """Costs of this setting."""
        n = POINTS**2
        levels = range(self.options["levels"])
        unit = STEP * self.stages
        factor = [max(self.coarse**i, 1e-3) for i in levels]
        if self.block < 1:
            block = lambda f: Kernel((1, 8), (f * unit, f * unit * 8 * self.block), 0)
        else:
            block = lambda f: Kernel.constant(f * unit)
        one = {
            "step": [block(f) for f in factor],
            "adjoint": [block(f) for f in factor],
            "sweep": [Kernel.constant(f * unit) for f in factor],
            "adjoint sweep": [Kernel.constant(f * unit) for f in factor],
        }
        return Calibration(
            self.name, "published", n, NSTEPS, {1: one}, network=NETWORK, space_iterations=SPACE_ITERATIONS,
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


def settings(block: float = 0.35) -> list[Setting]:
    """From the published configuration to ours, one choice at a time, each on top of the ones before; cycles by real
    solves to ``1e-9``, then ``1e-6``, then from the solution of a problem whose data differ by a thousandth, as those
    of an optimiser's later iterations do.

    ``block``: measured cost of a state in a block.
    """
    out = []
    deep = (16, *[2] * 9)
    three = (16, 4, 4)

    def add(name, factors, tableau, start, rtol, nearby=None, **costs):
        options = {"levels": len(factors) + 1, "coarsening": factors, "relax": "FCF"}
        cycles = count_on_modes(options, tableau, start=start, rtol=rtol, nearby=nearby)
        out.append(Setting(name, options, cycles, start, **costs))

    add("published options", deep, "backward Euler", "skip", 1e-9)
    add("+ nested iteration", deep, "backward Euler", "nested", 1e-9)
    add("+ coarsening 16, 4, 4", three, "backward Euler", "nested", 1e-9)
    add("+ SDIRK2", three, "SDIRK2", "nested", 1e-9, stages=2)
    add("+ lock-step blocks", three, "SDIRK2", "nested", 1e-9, stages=2, block=block)
    add("+ spatial coarsening", three, "SDIRK2", "nested", 1e-9, stages=2, block=block, coarse=0.25)
    add("+ inexact, 1e-6", three, "SDIRK2", "nested", 1e-6, stages=2, block=block, coarse=0.25)
    add("+ warm start", three, "SDIRK2", "guess", 1e-6, nearby=1e-3, stages=2, block=block, coarse=0.25)
    return out


def speedups(setting: Setting, ranks: Sequence[int], space: int = SPACE) -> list[tuple[int, float, float]]:
    """``(processes, predicted seconds, speed-up over the best sequential stepping on at most as many processes)``."""
    calibration = setting.calibration()
    serial, out = math.inf, []
    for count in sorted(ranks):
        model = Model(calibration, {"levels": 1}, (count, 1), busy=1.0)
        serial = min(serial, model.run(Solve("state")).seconds)
        if count < 2 * space or count % space:
            continue
        said = Model(calibration, setting.options, (space, count // space), busy=1.0).run(
            Solve("state", setting.start, setting.cycles)
        )
        out.append((count, said.seconds, serial / said.seconds))
    return out

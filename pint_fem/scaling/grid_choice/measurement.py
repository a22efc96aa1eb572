"""The measurement of a problem's steps on each number of ranks in space that may pay.

*What is not measured.* Where linear systems are small, ranks in space share the states of a call, as ranks in time do
with fewer messages, so that one rank in space is measured only, and nothing where that leaves one grid. Otherwise few
ranks in space come first; more are left out where they could not be the fastest even if a step took :math:`d^{-4/3}` of
the time. Linear systems whose factorisation on one rank would take long begin with all ranks in space. Where posing and
factoring would exceed the budget of seconds, by the operations of nested dissection, nothing is measured, nor after the
budget is spent. What was left out is said.
"""

from __future__ import annotations

import gc
import importlib.util
import math
import time
from collections.abc import Callable, Iterable
from typing import Any

from mpi4py import MPI

from pint_fem.collective import collectively, on_first_rank, require_same
from pint_fem.errors import InputError
from pint_fem.evolution.evolution import Evolution
from pint_fem.kernels.direct import REDUNDANT
from pint_fem.kernels.garbage import clean
from pint_fem.propagators import make_propagator
from pint_fem.propagators.base import FEPropagator
from pint_fem.scaling.actions import solver_in_space
from pint_fem.scaling.costs import Calibration, Kernel
from pint_fem.scaling.grid_choice.kernels import measured_network, step_kernels, update_seconds
from pint_fem.scaling.grid_choice.shapes import (
    GROWTH,
    Measured,
    Shape,
    SolverUse,
    all_shapes,
    grid_text,
    least_seconds,
    seconds_of,
)
from pint_fem.scaling.grid_choice.solvers import SolverRule, solver_rule
from pint_fem.spacetime import SpaceTime
from pint_fem.theory.spectrum import spectrum

__all__ = ["Measurement", "in_few_words"]

POSING, FACTORING_2D, FACTORING_3D = 3e-5, 1e-8, 5e-10
"""Seconds, about, of posing a problem per unknown, and of a factorisation per operation of nested dissection: of the
unknowns to the power 3/2 in two dimensions, to the power 2 in three.
"""
MOST_STEPS = 100_000
"""Steps beyond which runs on virtual ranks, which count messages of each step, take longer than they save."""


class Measurement:
    """The measurements of a choice; all methods are collective over all ranks."""

    def __init__(self, pose: Callable, comm: MPI.Comm, experiments: int, parameters: dict, budget: float):
        self.pose, self.comm, self.experiments = pose, comm, experiments
        self.parameters, self.budget = parameters, budget
        self.start, self.left_out = time.perf_counter(), []  # type: ignore[var-annotated]
        self.kernels: dict[int, dict[str, list[Kernel]]] = {}
        self.update: dict[int, float] = {}
        self.rule: SolverRule | None = None
        self.costs: Calibration | None = None
        self.is_linear, self.solver = False, {}  # type: ignore[var-annotated]

    # -- what is measured ----------------------------------------------------------------------------------------------
    @property
    def spent(self) -> float:
        """Seconds so far, the same on all ranks."""
        return self.comm.bcast(time.perf_counter() - self.start)

    def choice(self) -> tuple[dict, tuple[str, ...]]:
        """Predicted seconds by grid, NaN where there is one grid only; and what was left out."""
        posed, possible = self._prepared()
        if len(possible) == 1 and len(self._shapes(possible[0])) == 1:
            return {self._shapes(possible[0])[0]: math.nan}, tuple(self.left_out)
        self._measure_all(posed, possible)
        seconds, missing = on_first_rank(self.comm, "", self._predicted)
        return seconds, (*self.left_out, *missing)

    def costs_here(self) -> Calibration:
        """A calibration of what is measured on the ranks of this run, with cycles by theory, for predictions on more
        ranks.
        """
        posed, possible = self._prepared()
        self._measure_all(posed, possible)
        assert self.costs is not None
        assert self.rule is not None
        cycles = on_first_rank(self.comm, "", self.rule.menu)
        left_out = [f"not measured: {text}" for text in self.left_out]
        notes = [f"measured on {self.comm.size} processes at once, cycles by a-priori estimates", *left_out]
        return self.costs.with_changes(kernels=self.kernels, cycles=cycles, notes=notes, **self.solver)

    def _prepared(self) -> tuple[tuple[Evolution, int], list[int]]:
        """The problem on a number of ranks in space, and the numbers of these that may pay."""
        collectively(self.comm, "", _require_model)
        size = self.comm.size
        divisors = [n for n in range(1, size + 1) if size % n == 0]
        posed, space = self._first_posed(divisors[::-1])
        self._describe(posed)
        if posed.nsteps > MOST_STEPS:
            raise InputError(f"{posed.nsteps} steps are too many for a prediction of each message")
        possible = [d for d in divisors if self._shapes(d)]
        self.is_linear, unknowns = posed.affine_parts is not None, posed.V.dim()
        is_small = self.is_linear and not posed.solver_parameters and unknowns <= REDUNDANT
        if is_small and len(possible) > 1:
            least, *more = possible
            self._leave_out(more, f"every rank in space solves systems of {unknowns} unknowns whole")
            possible = [least]
        return (posed, space), possible

    def _measure_all(self, posed: tuple[Evolution, int], possible: list[int]) -> None:
        """Measure the kernels on numbers of ranks in space, within the budget."""
        large = self.is_linear and self._forecast(possible[0]) > self.budget / 4
        for d in possible[::-1] if large else possible:
            if not self.kernels or not self._cannot_be_done(d, large):
                self._measure(d, posed[0] if d == posed[1] else None)
        if not self.kernels:
            raise InputError(f"no grid could be measured: {'; '.join(self.left_out)}")

    def _forecast(self, d: int) -> float:
        """About the seconds of posing a linear problem on ``d`` ranks in space and of its factorisation."""
        assert self.costs is not None
        own, dimension = self.costs.unknowns / d, self.costs.dimension
        return POSING * own + {3: FACTORING_3D * own**2, 2: FACTORING_2D * own**1.5}.get(dimension, 0.0)

    def _cannot_be_done(self, d: int, large: bool) -> bool:
        """Whether a number of ranks in space is left out, with the reason noted."""
        if self.spent > self.budget:
            self._leave_out([d], f"{self.budget:g} s of measurements are over")
            return True
        if self.is_linear and self.spent + self._forecast(d) > self.budget:
            self._leave_out([d], f"posing and factoring would take about {self._forecast(d):.2g} s")
            return True
        if not large and on_first_rank(self.comm, "", self._cannot_win, d):
            self._leave_out([d], "it could not be the fastest")
            return True
        return False

    def _leave_out(self, numbers: list[int], why: str) -> None:
        if numbers:
            self.left_out.append(f"{', '.join(map(str, numbers))} in space ({why})")

    def _first_posed(self, numbers: list[int]) -> tuple[Evolution, int]:
        """The evolution on the largest number of ranks in space on which it can be posed."""
        for place, d in enumerate(numbers):
            try:
                return self._posed(d), d
            except Exception as error:
                if place == len(numbers) - 1:
                    raise
                self._leave_out([d], in_few_words(error))
        raise InputError("no number of ranks in space")

    def _posed(self, d: int) -> Evolution:
        """The evolution on ``d`` ranks in space."""
        shapes = self._shapes(d) if self.costs is not None else [(d, self.comm.size // d, 1)]
        grid = SpaceTime(min(shapes, key=lambda shape: shape[2]), self.comm)
        made = collectively(self.comm, "posing the problem", self.pose, grid.group)
        return collectively(self.comm, "posing the problem", _evolution_of, made)

    def _describe(self, ev: Evolution) -> None:
        """Sizes of the problem, and the network."""
        require_same(self.comm, nsteps=ev.nsteps, unknowns=ev.V.dim())
        self.costs = Calibration(
            "measured here", "this machine", ev.V.dim(), ev.nsteps, {}, stages=ev.dirk.stages,
            dimension=ev.V.mesh().unique().topological_dimension,
            network=measured_network(self.comm),
        )  # fmt: skip

    def _measure(self, d: int, ev: Evolution | None) -> None:
        """Measure the kernels on ``d`` ranks in space where that is possible."""
        try:
            ev = self._posed(d) if ev is None else ev
            made = collectively(self.comm, "step", make_propagator, ev)
            update = update_seconds(self.comm, made)
            most = max(1.0, (self.budget - self.spent) / 2)
            kernels = step_kernels(self.comm, made, most=most)
            if self.rule is None:
                self.rule = self._rule(made.evolution)
            solver = collectively(self.comm, "", _solver, made) if self.is_linear else {}
        except Exception as error:
            self._leave_out([d], in_few_words(error))
            return
        self.kernels[d], self.update[d] = kernels, update
        if d >= max(self.kernels):
            self.solver = solver
        space_comm = ev.V.mesh().comm
        del made, ev
        gc.collect()
        clean(space_comm)

    def _rule(self, ev: Evolution) -> SolverRule:
        """The rule by which the time solver is chosen, with the spectrum where that decides."""
        needs = self.parameters.get("time_solver", "mgrit") != "serial" and ev.affine_parts is not None
        found = collectively(self.comm, "spectrum", spectrum, ev) if needs else None
        return collectively(self.comm, "", solver_rule, ev, found, self.parameters)

    # -- what is predicted ---------------------------------------------------------------------------------------------
    def _shapes(self, d: int) -> list[Shape]:
        """All grids with ``d`` ranks in space."""
        assert self.costs is not None
        return [s for s in all_shapes(self.comm.size, self.costs.nsteps, self.experiments) if s[0] == d]

    def _measured(self, kernels: dict[int, dict[str, list[Kernel]]], update: dict[int, float]) -> Measured:
        assert self.costs is not None
        return Measured(self.costs.with_changes(kernels=kernels), self.experiments, self.is_linear, update)

    def _bounds(self, measured: Measured, numbers: Iterable[int]) -> list[tuple[float, Shape, SolverUse]]:
        """Grids with some numbers of ranks in space by lower bounds of their times, with their time solvers."""
        assert self.rule is not None
        found = []
        for shape in (shape for d in numbers for shape in self._shapes(d)):
            use = self.rule.on(shape[1], measured.costs.kernels[shape[0]]["step"][0])
            found.append((least_seconds(measured, shape, use), shape, use))
        return sorted(found, key=lambda each: each[:2])

    def _predicted(self) -> tuple[dict[Shape, float], list[str]]:
        """Predicted seconds of the grids that may be the fastest, of all measured numbers of ranks in space, the most
        promising ones first; and what is left out as that takes too long.
        """
        measured, best, out = self._measured(self.kernels, self.update), math.inf, {}
        start, missing = time.perf_counter(), []
        for least, shape, use in self._bounds(measured, self.kernels):
            if out and time.perf_counter() - start > self.budget:
                missing.append(f"{grid_text(shape)} (predictions took {self.budget:g} s)")
            elif least < best:
                out[shape] = seconds_of(measured, shape, use)
                best = min(best, out[shape])
        return out, missing

    def _cannot_win(self, d: int) -> bool:
        """Whether ``d`` ranks in space are slower than what is measured even where a step's work is divided ideally."""
        one = min(self.kernels)
        share = (one / d) ** GROWTH
        ideal = {kind: [k.scaled(share) for k in levels] for kind, levels in self.kernels[one].items()}
        measured = self._measured({d: ideal}, {d: share * self.update[one]})
        return self._bounds(measured, [d])[0][0] >= min(self._predicted()[0].values())


def _solver(propagator: FEPropagator) -> dict[str, Any]:
    """What a calibration has of the solver in space (collective over space)."""
    factors = getattr(getattr(propagator, "frozen", propagator), "factors", {})
    if not factors:
        return {}
    kind, sizes = solver_in_space(next(iter(factors.values())))
    return {"space_solver": kind, "space_iterations": sizes.pop("iterations", 0.0), "space": sizes}


def in_few_words(error: Exception) -> str:
    """An exception in a few words."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text if len(text) < 160 else text[:160] + '...'}"


def _require_model() -> None:
    """Raise where virtual ranks cannot be run."""
    if importlib.util.find_spec("greenlet") is None:
        raise InputError("predictions require the package greenlet: pip install greenlet")


def _evolution_of(made: Any) -> Evolution:
    """The evolution of what a problem was posed as."""
    several = getattr(made, "evolutions", None)
    found = several[0] if several else getattr(made, "evolution", made)
    if not isinstance(found, Evolution):
        raise InputError(
            f"pose returns {type(made).__name__}: return an Evolution, or an object with one as 'evolution'"
        )
    return found

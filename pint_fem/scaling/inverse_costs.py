"""Measurement of the costs of an inversion by the map from controls to readings, for a calibration.

Timed are parts of :mod:`pint_fem.inverse` as they are: a block of lags of the sweep, what is collected from it, solves
and products of the prior, dense algebra. Sizes are counted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from scipy.linalg import eigh, qr, svd

from pint_fem.adjoint.reduced_functional import TimeParallelReducedFunctional
from pint_fem.errors import InputError
from pint_fem.inverse.impulse_responses import GROUP, LagBlock, lags_of_block
from pint_fem.inverse.inversion import PriorForms
from pint_fem.inverse.laws.priors import make_prior
from pint_fem.inverse.map import ParameterToObservable
from pint_fem.inverse.readings import ReadingTable
from pint_fem.inverse.response_rows import collectors, own_readings
from pint_fem.scaling.actions import Action

__all__ = ["inverse_costs"]

DENSE = 400
"""Size of the matrices with which rates of dense algebra are measured."""
GENERAL = 300
"""Size of the generalised eigenproblem."""
ROWS = 64
"""Vectors of the prior's solves and products."""
Watch = Callable[[Mapping[object, Action]], dict]


def inverse_costs(
    rf: TimeParallelReducedFunctional, watch: Watch, kernel: Callable[[int], float] | None = None
) -> dict[str, float]:
    """Measure the costs of the map and the posterior of a functional on one rank.

    Parameters
    ----------
    rf
        The functional, on one rank, with its steps and readings as they are.
    watch
        Measures actions: names, with what is timed and what its seconds are divided by, to seconds.
    kernel
        Calibrated seconds of a step of the finest level's adjoint by the number of states; default: those measured
        beside the costs. Where they are given all costs are scaled by their ratio to the measured ones, as the machine
        may be slower than when it was calibrated.

    Returns
    -------
    dict
        ``linear_inverse`` of :class:`~pint_fem.scaling.costs.Calibration`; empty where the functional has no map, or
        controls with one value per step, which the model does not cover.
        Counts: ``sensors``; ``readings`` of a sensor; ``columns``, the controls; ``reduced``, reduced rows of all
        sensors; ``last``, the share of the steps up to the last reading; ``constant``, 1 where all loads are constant
        in time. Seconds: ``stages``, a step with the adjoints of its stages relative to one without; ``pull back`` of
        an adjoint to the controls; ``collect``, all else that is done with the adjoint of a sensor at a lag; ``setup``
        of the map; ``prior``, to make it; ``prior solve`` and ``prior product`` with a vector; ``mean``, for new
        readings; ``gemm`` and ``qr`` of an operation; ``svd``, ``eigh`` and ``eigh general``, of the cube of the size.
    """
    if rf.evolution.stepwise:
        return {}
    try:
        F = rf.parameter_to_observable()
    except InputError:
        return {}
    posterior, ev = F.posterior(), rf.evolution
    parts = _Parts(rf, F)
    rows = np.random.default_rng(2).standard_normal((ROWS, F.layout.size))
    columns = F.layout.static_size
    readings = ceil_mean(F.table.size, F.table.sensors)
    actions: dict[object, Action] = {
        "with stages": (parts.step_with_stages, parts.lags),
        "without": (parts.step, parts.lags),
        "collected": (parts.collect, len(parts.sensors) * parts.lags),
        "pull back": (parts.pull_back, len(parts.sensors) * parts.lags * max(1, len(parts.terms))),
        "setup": (parts.set_up, 1),
        "prior": (parts.prior, 1),
        "prior solve": (lambda: posterior.prior.covariance(rows), ROWS),
        "prior product": (lambda: posterior.prior.precision(rows), ROWS),
        "mean": (lambda: posterior.with_data(F.data), 1),
        **_dense(columns, readings),
    }
    found = watch(actions)
    slower = 1.0 if kernel is None else kernel(len(parts.sensors)) / found["without"]
    stages = found.pop("with stages") / found.pop("without")
    out = {name: slower * seconds for name, seconds in found.items()}
    out["pull back"] *= len(parts.terms)
    out["collect"] = max(out.pop("collected") - parts.pulled_back / parts.lags * out["pull back"], 0.0)
    counts = {
        "sensors": F.table.sensors,
        "readings": readings,
        "columns": columns,
        "reduced": F.reduced.size,
        "last": int(F.table.point.max()) / ev.nsteps,
        "constant": int(parts.constant),
    }
    return {**{name: float(number) for name, number in counts.items()}, "stages": stages, **out}


def ceil_mean(total: int, parts: int) -> int:
    """The mean of a number over parts, rounded up."""
    return -(-total // parts)


class _Parts:
    """Actions of the map's sweep for a group of sensors, in the middle of the lags, and around it."""

    def __init__(self, rf: TimeParallelReducedFunctional, F: ParameterToObservable):
        self.rf, self.F, self.propagator = rf, F, F.propagator
        self.sensors = F.sensors[:GROUP]
        self.comm, n = rf.spacetime.space_comm, rf.evolution.state_size
        self.points = int(F.table.point.max())
        self.lags = min(lags_of_block(self.comm, n), self.points)
        count, stages = len(self.sensors), self.propagator.dirk.stages
        rng = np.random.default_rng(1)
        self._start = rng.standard_normal((count, n))
        self._adjoints = np.zeros((count, self.lags + 1, n))
        self._stages = rng.standard_normal((stages, count, self.lags, n))
        middle = (self.points - self.lags) // 2
        self._block = LagBlock(middle, self._adjoints[:, : self.lags], self._stages)
        numbers, readings = own_readings(F.table, list(self.sensors))
        self._found = collectors(self.propagator, readings, np.zeros((len(numbers), F.layout.static_size)), [])
        steps = rf.evolution.time(np.arange(rf.evolution.nsteps))
        self.terms = self.propagator.loads.terms(steps) if rf.evolution.parameters else []
        self.constant = all((term.weights == 1).all() for term in self.terms)
        inside = np.unique(F.table.point[(F.table.point > middle) & (F.table.point < middle + self.lags)])
        self.pulled_back = len(inside) + 1 if self.constant else self.lags
        """Adjoints of the block, of each sensor, that are pulled back to the controls."""

    def step_with_stages(self) -> None:
        """Transposed steps as the map takes them."""
        self.propagator.transposed_with_stages(self._start, self._adjoints[:, 1:], self._stages)

    def step(self) -> None:
        """Transposed steps alone."""
        self.propagator.advance(self._start, self._adjoints[:, 1:], transposed=True)

    def collect(self) -> None:
        """What is collected from a block."""
        for collector in self._found:
            collector.add(self._block)

    def pull_back(self) -> None:
        """Adjoints of all lags of the block pulled back."""
        flat = self._stages.reshape(len(self._stages), -1, self._stages.shape[-1])
        for term in self.terms:
            self.propagator.loads.pull_back_rows(term, flat)

    def set_up(self) -> None:
        """What the map does before its sweep."""
        table = ReadingTable(self.rf.problem.misfits)
        numbers, readings = own_readings(table, list(self.F.sensors))
        table.impulses(self.F.sensors)
        collectors(self.propagator, readings, np.zeros((len(numbers), self.F.layout.static_size)), [])

    def prior(self) -> None:
        """The default prior."""
        F = self.F
        found = PriorForms(None, None) if F.regularisation is None else F.regularisation()
        given = {"regularisation_forms": found.forms, "regularisation_gradient": found.gradient}
        make_prior(None, F.layout, inner=F.inner, **given)


def _dense(columns: int, readings: int) -> dict[object, Action]:
    """Dense algebra, by operations and cubes of the size."""
    rng = np.random.default_rng(3)
    wide, other = rng.standard_normal((2, DENSE, max(columns, 1)))
    square = rng.standard_normal((DENSE, DENSE))
    tall, small = rng.standard_normal((max(columns, readings), readings)), rng.standard_normal((readings, readings))
    symmetric = square @ square.T
    one = np.eye(GENERAL) + symmetric[:GENERAL, :GENERAL] / DENSE
    return {
        "gemm": (lambda: wide @ other.T, 2 * DENSE**2 * wide.shape[1]),
        "qr": (lambda: qr(tall, mode="r", check_finite=False), 2 * tall.size * readings - 2 * readings**3 / 3),
        "svd": (lambda: svd(small, full_matrices=False, check_finite=False), readings**3),
        "eigh": (lambda: eigh(symmetric, driver="evd", check_finite=False), DENSE**3),
        "eigh general": (
            lambda: eigh(symmetric[:GENERAL, :GENERAL], one, driver="gvd", check_finite=False),
            GENERAL**3,
        ),
    }

r"""Predicted times of linear inverse problems that are solved by the map from controls to readings.

The map is that of :mod:`pint_fem.inverse`. On :math:`P_{space}` ranks in space and ``T`` in time, the sensors are
divided among ``g`` groups of ``k`` ranks in time, :math:`g k \le T`. A group with one rank takes the transposed steps
of its sensors one after another, with the sensors on lanes; a group with several solves the adjoint of each sensor
in turn by MGRIT or ParaDiag, on virtual ranks (:class:`~pint_fem.scaling.model.Model`), and its ranks collect the rows
of their own lags, which are then summed. All that follows is dense algebra whose sizes are known, with ``m`` readings,
``n`` controls and ``r`` reduced rows:

* an estimate of ``r`` from two sensors of each rank;
* for the data space the reduction of each sensor's rows, and :math:`C \Gamma` of a rank's own reduced rows; the
  exchange of rows, after which each of the ``T`` ranks has all of them in its part of the columns;
* the data space: products of :math:`r \times n` matrices by columns, an eigenproblem of size ``r`` on one rank, and its
  broadcast; or, where ``n`` is smaller than ``r``, the parameter space with an eigenproblem of size ``n``.

A part takes as long as on its slowest rank, since a collective operation ends each. Distribution, operations and bytes
are those of :mod:`pint_fem.inverse`, with which tests compare them. Rates of dense algebra, prior solves and what
surrounds the sweep are measured (``linear_inverse`` of a calibration).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from math import ceil, log2
from typing import NamedTuple

from pint_fem.all_at_once.grids import split_steps
from pint_fem.errors import InputError
from pint_fem.scaling.costs import Calibration
from pint_fem.scaling.model import Model, Solve
from pint_fem.scaling.network import Network

__all__ = ["Division", "Exchange", "LinearInverse", "MapPrediction"]

PRIOR_BLOCK = 256
"""Columns of the prior's precision that :mod:`pint_fem.inverse.spectra` computes at once."""
SAMPLED = 2
"""Sensors of a rank from which the number of reduced rows is estimated, as in :mod:`pint_fem.inverse.reduction`."""
LAG_NUMBERS, LAGS = 140_000, (2, 64)
"""Rule for the lags of a block, as in :mod:`pint_fem.inverse.impulse_responses`."""
PICKLED = 2
"""Collective operations that an allreduce of objects takes: a reduction and a broadcast."""


class Division(NamedTuple):
    """Ranks in space, in time, groups of sensors, and ranks in time of a group."""

    space: int
    time: int
    groups: int
    each: int

    @property
    def ranks(self) -> int:
        """Number of ranks."""
        return self.space * self.time


class Exchange(NamedTuple):
    """A communication: the part of the inversion it belongs to, its kind, the number of ranks, the bytes that pass each
    of them in all calls, and the number of calls.

    Kinds are ``"gather"`` (allgather), ``"reduce"``, ``"broadcast"``, ``"alltoall"`` and ``"objects"`` (an allreduce of
    objects, whose messages take all bytes in each of its rounds).
    """

    part: str
    kind: str
    ranks: int
    nbytes: float
    calls: int = 1

    def seconds(self, network: Network) -> float:
        """Seconds on a network."""
        if self.ranks <= 1:
            return 0.0
        each = self.nbytes / self.calls
        if self.kind == "alltoall":
            return self.calls * network.alltoall(self.ranks, each)
        if self.kind == "objects":
            return self.calls * PICKLED * ceil(log2(self.ranks)) * network.message(each)
        return self.calls * network.collective(self.ranks, each)


@dataclass(frozen=True)
class MapPrediction:
    """The predicted time of an inversion by the map.

    Attributes
    ----------
    division : Division
    solver, options : str, dict
        ``"serial"``, ``"mgrit"`` or ``"paradiag"`` of the sweeps, and its options.
    parts : dict
        Seconds of each part, with its communication.
    exchange : float
        Seconds of all communication outside the sweeps.
    bytes_per_rank : float
        Largest memory of a rank's rows, modes and dense matrices.
    """

    division: Division
    solver: str
    options: dict
    parts: dict[str, float]
    exchange: float
    bytes_per_rank: float

    @property
    def seconds(self) -> float:
        """Seconds from the posed problem to the mean of the posterior."""
        return sum(seconds for part, seconds in self.parts.items() if part != "deviation")

    @property
    def with_deviation(self) -> float:
        """Seconds to the mean and the pointwise standard deviation."""
        return sum(self.parts.values())


class LinearInverse:
    """An inversion by the map on a division of ranks.

    Parameters
    ----------
    calibration, division
        Costs, with ``linear_inverse``; ranks.
    options, cycles
        Solver and cycles of an adjoint sweep where a group has several ranks in time, as for
        :class:`~pint_fem.scaling.model.Model`.
    nsteps, network
        Fine steps and network; default: the calibration's.

    Raises
    ------
    InputError
        If the calibration has no costs of the map, or the division does not fit the sensors.
    """

    def __init__(
        self,
        calibration: Calibration,
        division: Division = Division(1, 1, 1, 1),  # noqa: B008
        *,
        options: Mapping | None = None,
        cycles: int = 0,
        nsteps: int | None = None,
        network: Network | None = None,
    ):
        if not calibration.linear_inverse:
            raise InputError(
                f"calibration {calibration.problem} has no costs of the map from controls to readings: calibrate a "
                "linear problem with point sensors"
            )
        self.calibration, self.division, self.costs = calibration, division, calibration.linear_inverse
        self.options, self.cycles = {"levels": 1} if division.each == 1 else dict(options or {}), cycles
        self.nsteps, self.network = nsteps or calibration.nsteps, network or calibration.network
        space, time, groups, each = division
        if min(division) < 1 or groups * each > time or groups > self.sensors:
            raise InputError(
                f"{groups} groups of {each} ranks in time for {self.sensors} sensors on {space} x {time} ranks: use at "
                "most one group per sensor, and no more ranks in groups than in time"
            )
        self.slowdown = calibration.slowdown_with(division.ranks)

    # -- sizes ---------------------------------------------------------------------------------------------------------
    @property
    def sensors(self) -> int:
        """Number of sensors."""
        return int(self.costs["sensors"])

    @property
    def readings(self) -> int:
        """Number of readings of a sensor."""
        return int(self.costs["readings"])

    @property
    def columns(self) -> int:
        """Number of controls, of all ranks in space."""
        return int(self.costs["columns"])

    @property
    def reduced(self) -> int:
        """Number of reduced rows of all sensors."""
        return int(self.costs["reduced"])

    @cached_property
    def lags(self) -> int:
        """Number of lags: steps up to the last reading."""
        return max(1, round(self.costs["last"] * self.nsteps))

    @property
    def own_sensors(self) -> int:
        """Number of sensors of the group that has most."""
        return ceil(self.sensors / self.division.groups)

    @property
    def own_columns(self) -> float:
        """Number of columns in dense products on a rank: by space, and then by time."""
        return ceil(self.columns / self.division.space / self.division.time)

    @property
    def in_parameter_space(self) -> bool:
        """Whether the eigenproblem is that of the controls, as :meth:`ParameterToObservable.posterior` decides."""
        return self.columns <= max(self.sensors, self.reduced)

    @cached_property
    def pulled_back(self) -> int:
        """Number of adjoints per sensor that are pulled back to the controls: those of all lags, or, for a control
        whose load is constant in time, one for each reading and block of lags.
        """
        if not self.costs["constant"]:
            return self.lags
        fitting = max(LAGS[0], LAG_NUMBERS * self.division.space // self.calibration.unknowns)
        block = min(LAGS[1], 1 << (fitting.bit_length() - 1))
        return min(self.lags, self.readings + ceil(self.lags / block))

    # -- parts ---------------------------------------------------------------------------------------------------------
    def predict(self, *, sweep: float | None = None) -> MapPrediction:
        """Predict the times of all parts; ``sweep`` in the place of the predicted seconds of the sweeps."""
        work = self._work(sweep)
        solver = work.pop("solver")
        parts = {part: seconds if part == "sweep" else self.slowdown * seconds for part, seconds in work.items()}
        total = 0.0
        for exchange in self.exchanges():
            seconds = exchange.seconds(self.network)
            parts[exchange.part] += seconds
            total += seconds
        return MapPrediction(self.division, solver, self.options, parts, total, self._bytes())

    def _work(self, sweep: float | None) -> dict:
        """Seconds of work of each part on its slowest rank, alone on the machine."""
        c, (space, _, _, each) = self.costs, self.division
        own, m, r, n = self.own_sensors, self.sensors * self.readings, self.reduced, self.columns
        rows, columns = self.readings, n / space
        reduced = ceil(own * r / self.sensors)
        solver, sweep = self._sweep() if sweep is None else ("", sweep)
        gathered = own * (self.lags * c["collect"] + self.pulled_back * c["pull back"]) / (space * each)
        tall = _triangle(columns, rows) + (_triangle(space * min(rows, columns), rows) if space > 1 else 0.0)
        basis, sampled = c["qr"] * tall + c["svd"] * rows**3, min(SAMPLED, own)
        reduction = sampled * basis  # an estimate of the number of reduced rows
        if n <= self.sensors:
            reduction = 0.0
        elif not self.in_parameter_space:
            reduction += own * basis + c["gemm"] * 2 * rows * columns * reduced
        work = {"solver": solver, "setup": c["setup"], "sweep": sweep, "rows": gathered, "reduction": reduction}
        if self.in_parameter_space:
            product = c["gemm"] * self.own_columns * m * n  # of a symmetric matrix each rank computes half its rows
            work |= {"prior": c["prior"] + n * c["prior product"], "dense": product, "modes": 0.0}
            work["eigenproblem"] = c["eigh general"] * n**3
            modes = n
        else:
            dense = c["gemm"] * 2 * r**2 * self.own_columns
            work |= {"prior": c["prior"] + reduced * c["prior solve"], "dense": dense}
            work["modes"] = c["gemm"] * 2 * r**3 + dense
            work["eigenproblem"] = c["eigh"] * r**3 + c["gemm"] * (2 * r**2 * rows / self.sensors + (4 + 1 / 3) * r**3)
            modes = r
        work["mean"] = c["mean"]
        work["deviation"] = ceil(n / self.division.time) * c["prior solve"] + c["gemm"] * 3 * modes * self.own_columns
        return work

    def _sweep(self) -> tuple[str, float]:
        """The solver, and seconds of the adjoints of a group's sensors, with those of the stages."""
        space, _, _, each = self.division
        given = dict(nsteps=self.lags, network=self.network)
        model = Model(self.calibration, self.options, (space, each), **given)
        kernel = model.kernel("adjoint", 0)
        if each == 1:
            return "serial", self.slowdown * self.lags * self.costs["stages"] * kernel(self.own_sensors)
        found = model.run(Solve("adjoint", "nested", self.cycles))
        stages = kernel(ceil(self.lags / each)) * self.costs["stages"]  # one more step from the adjoints of all lags
        return model.solver, self.own_sensors * self.slowdown * (found.seconds / model.slowdown + stages)

    def exchanges(self, *, deviation: bool = True) -> list[Exchange]:
        """All communication of :mod:`pint_fem.inverse` outside the sweeps."""
        return [exchange for exchange in self._exchanges(deviation) if exchange.ranks > 1]

    def _exchanges(self, deviation: bool) -> Iterator[Exchange]:
        space, time, _, each = self.division
        ranks, r, n, m = self.division.ranks, self.reduced, self.columns, self.sensors * self.readings
        columns = n / space

        def total(part: str, numbers: float) -> Iterator[Exchange]:
            """``SpaceTime.sum_over_grid``."""
            yield Exchange(part, "gather", space, 8 * space * numbers)
            yield from over_time(part, numbers)

        def over_time(part: str, numbers: float) -> Iterator[Exchange]:
            yield Exchange(part, "reduce", time, 8 * numbers)
            yield Exchange(part, "broadcast", time, 8 * numbers)

        yield Exchange("rows", "reduce", each, 8 * self.own_sensors * self.readings * columns)
        if n > self.sensors:
            count = min(SAMPLED, self.own_sensors) + (0 if self.in_parameter_space else self.own_sensors)
            triangle = 8 * self.readings * min(self.readings, columns)
            yield Exchange("reduction", "gather", space, count * space * triangle, count)
            yield Exchange("reduction", "broadcast", space, 8 * count * self.readings * r / self.sensors, count)
        if not self.in_parameter_space:
            yield Exchange("reduction", "gather", time, 8 * (self.readings * r + m))
        yield Exchange("prior", "broadcast", time, 8 * columns)  # its mean
        if self.in_parameter_space:
            yield Exchange("dense", "gather", time, 8 * m)
            yield Exchange("dense", "alltoall", time, 8 * self.own_sensors * self.readings * columns)
            yield Exchange("dense", "broadcast", ranks, 8 * n * m, ranks)
            parts = split_steps(n, ranks)
            calls = sum(ceil((b - a) / PRIOR_BLOCK) for a, b in pairwise(parts))
            yield Exchange("prior", "gather", time, 8 * n * columns, calls)
            yield Exchange("prior", "broadcast", time, 8 * n * columns, calls)
            yield Exchange("dense", "objects", ranks, 2 * 8 * n**2, 2)
            yield Exchange("dense", "gather", ranks, 8 * n**2)
            yield Exchange("eigenproblem", "broadcast", ranks, 8 * (n**2 + n))
            yield from over_time("mean", columns)
            yield from total("mean", n)
        else:
            own = ceil(self.own_sensors * r / self.sensors)
            yield Exchange("dense", "alltoall", time, 2 * 8 * own * columns, 2)
            yield from total("dense", r**2)
            yield Exchange("eigenproblem", "broadcast", ranks, 8 * (2 * r**2 + r))
        yield from total("mean", m)
        yield Exchange("mean", "gather", time, 8 * columns)
        if deviation:
            yield Exchange("deviation", "objects", time, 8 * columns)
            yield Exchange("deviation", "broadcast", time, 8 * columns)
            yield Exchange("deviation", "gather", time, 8 * columns)

    def _bytes(self) -> float:
        """Bytes of a rank: own rows and reduced rows, own columns of all of them, matrices of the smaller space."""
        columns, size = self.columns / self.division.space, self.columns if self.in_parameter_space else self.reduced
        own = self.own_sensors * (self.readings + 2 * self.reduced / self.sensors) * columns
        return 8 * (own + 2 * size * self.own_columns + 4 * size**2)


def _triangle(rows: float, columns: int) -> float:
    """Operations of the triangular factor of a matrix, zero where it has too few rows to be reduced."""
    return 2 * rows * columns**2 - 2 * columns**3 / 3 if rows > columns else 0.0

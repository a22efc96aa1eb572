"""Predicted times of inversions by the map from controls to readings: limits, by hand, and beside real runs."""

from collections import Counter

import numpy as np
import pytest
from mpi4py import MPI

pytest.importorskip("greenlet")

from pint_fem.errors import InputError
from pint_fem.scaling.costs import Calibration, Kernel
from pint_fem.scaling.inverse_costs import inverse_costs
from pint_fem.scaling.linear_inverse import Division, LinearInverse
from pint_fem.scaling.model import Model, Solve
from pint_fem.scaling.network import Network
from pint_fem.scaling.planner import plan_map
from pint_fem.spacetime import SpaceTime
from tests.benchmarks.scaling.cases import square_with_sensors
from tests.scaling_traces import MENU, planned_calibration

COUNTS = {"sensors": 12.0, "readings": 10.0, "columns": 1000.0, "reduced": 60.0, "last": 0.5, "constant": 1.0}
SECONDS = {
    "stages": 2.0, "pull back": 1e-3, "collect": 1e-4, "setup": 0.5, "prior": 0.25, "prior solve": 1e-2,
    "prior product": 1e-3, "mean": 0.125, "gemm": 1e-9, "qr": 2e-9, "svd": 3e-9, "eigh": 1e-8, "eigh general": 2e-8,
}  # fmt: skip


def calibration(**changes) -> Calibration:
    """A plate of 256 steps, half of them until the last reading."""
    return planned_calibration(linear_inverse=COUNTS | SECONDS | changes)


def test_one_rank_is_the_sum_of_its_parts():
    """By hand; the control's load is constant, so that 10 readings and two blocks of 64 lags are pulled back."""
    made = LinearInverse(calibration(), nsteps=256)
    found, kernel = made.predict(), Kernel((1, 8, 16), (1e-2, 4e-2, 8e-2), lanes=True)
    assert made.lags == 128
    assert made.exchanges() == []
    assert made.pulled_back == 10 + 128 // 8  # blocks of 8 lags of 10,000 unknowns
    r, n, T = 60, 1000, 10
    expected = {
        "setup": 0.5,
        "sweep": 128 * 2.0 * kernel(12),
        "rows": 12 * (128 * 1e-4 + 26 * 1e-3),
        "reduction": (2 + 12) * (2e-9 * (2 * n * T**2 - 2 * T**3 / 3) + 3e-9 * T**3) + 1e-9 * 2 * T * n * r,
        "prior": 0.25 + r * 1e-2,
        "dense": 1e-9 * 2 * r**2 * n,
        "modes": 1e-9 * (2 * r**3 + 2 * r**2 * n),
        "eigenproblem": 1e-8 * r**3 + 1e-9 * (2 * r**2 * T / 12 + (4 + 1 / 3) * r**3),
        "mean": 0.125,
    }
    deviation = n * 1e-2 + 1e-9 * 3 * r * n
    assert found.parts == pytest.approx({**expected, "deviation": deviation})
    assert found.seconds == pytest.approx(sum(expected.values()))
    assert found.with_deviation == pytest.approx(found.seconds + deviation)
    assert found.exchange == 0
    assert plan_map(calibration(), 1).parts == found.parts


def test_parts_of_the_sensors_are_divided_without_loss():
    """On as many ranks as sensors each has one; on the way no part is slower."""
    given = dict(network=Network(0.0, 1e30, "free"))
    before = LinearInverse(calibration(), **given).predict().parts
    one = LinearInverse(calibration(sensors=1.0, reduced=5.0), **given).predict().parts
    for time in range(2, 13):
        found = LinearInverse(calibration(), Division(1, time, time, 1), **given).predict().parts
        for part in ("sweep", "rows", "reduction", "dense", "modes"):
            assert found[part] <= before[part] * (1 + 1e-12)
        before = found
    for part in ("sweep", "rows", "reduction"):
        assert before[part] == pytest.approx(one[part])


def test_ranks_of_a_group_solve_an_adjoint_as_the_model_says():
    c = calibration()
    made = LinearInverse(c, Division(1, 48, 12, 4), options=MENU[0], cycles=2)
    sweep = Model(c, MENU[0], (1, 4), nsteps=128).run(Solve("adjoint", "nested", 2)).seconds
    stages = 2.0 * Kernel((1, 8, 16), (1e-2, 4e-2, 8e-2), lanes=True)(32)
    found = made.predict()
    assert found.parts["sweep"] == pytest.approx(sweep + stages)
    (rows,) = (e for e in made.exchanges() if e.part == "rows")
    assert (rows.ranks, rows.nbytes) == (4, 8 * 10 * 1000)


@pytest.mark.parametrize("ranks", [1, 5, 12, 100])
def test_the_fastest_division_is_found(ranks):
    """As exhaustive search does among sequential sweeps and groups with all ranks in time."""
    c = calibration()
    best = plan_map(c, ranks)
    every = [
        LinearInverse(c, Division(space, time, min(time, 12), 1)).predict()
        for space in (s for s in range(1, ranks + 1) if ranks % s == 0)
        for time in range(1, ranks // space + 1)
    ]
    for space in (s for s in range(1, ranks + 1) if ranks % s == 0):
        for each in range(2, ranks // space // 12 + 1):
            for options, cycles in zip(MENU, (2, 3), strict=True):
                try:
                    made = LinearInverse(c, Division(space, 12 * each, 12, each), options=options, cycles=cycles)
                    every.append(made.predict())
                except InputError:
                    continue
    assert best.seconds <= min(found.seconds for found in every) * 1.05
    assert best.seconds >= min(found.seconds for found in every) * (1 - 1e-12)
    assert best.division.ranks <= ranks


def test_what_does_not_fit_is_refused():
    with pytest.raises(InputError, match="calibration test has no costs of the map"):
        LinearInverse(planned_calibration())
    for division in (Division(1, 4, 13, 1), Division(1, 4, 2, 3), Division(1, 4, 0, 1)):
        with pytest.raises(InputError, match="12 sensors on 1 x 4 ranks"):
            LinearInverse(calibration(), division)
    with pytest.raises(InputError, match="0 ranks"):
        plan_map(calibration(), 0)


class Counted:
    """A communicator that counts the bytes of arrays in collective operations, those that pass this rank."""

    def __init__(self, comm: MPI.Comm, found: Counter):
        self._comm, self._found = comm, found

    def __getattr__(self, name):
        return getattr(self._comm, name)

    def _count(self, kind: str, value) -> None:
        if (nbytes := array_bytes(value)) > 16:  # less than any vector: flags and numbers of rows
            self._found[kind, self._comm.size] += nbytes

    def Allgatherv(self, sent, received):
        self._count("gather", received[0])
        self._comm.Allgatherv(sent, received)

    def Allgather(self, sent, received):
        self._count("gather", received)
        self._comm.Allgather(sent, received)

    def Alltoallv(self, sent, received):
        self._count("alltoall", sent[0])
        self._comm.Alltoallv(sent, received)

    def Reduce(self, sent, received, **given):
        self._count("reduce", sent)
        self._comm.Reduce(sent, received, **given)

    def Bcast(self, array, **given):
        self._count("broadcast", array)
        self._comm.Bcast(array, **given)

    def allgather(self, value):
        found = self._comm.allgather(value)
        self._count("gather", found)
        return found

    def bcast(self, value=None, **given):
        found = self._comm.bcast(value, **given)
        self._count("broadcast", found)
        return found

    def allreduce(self, value, *given, **more):
        self._count("objects", value)
        return self._comm.allreduce(value, *given, **more)


def array_bytes(value) -> int:
    """Bytes of the arrays in a value."""
    if isinstance(value, np.ndarray):
        return value.nbytes
    return sum(map(array_bytes, value)) if isinstance(value, (list, tuple)) else 0


@pytest.mark.parallel([2, 3])
@pytest.mark.parametrize("side", [3, 6], ids=["data space", "parameter space"])
def test_communication_is_that_of_a_real_run(side):
    """Kinds of operations, communicators and bytes of a whole inversion with standard deviations."""
    comm = MPI.COMM_WORLD
    grids = [(1, comm.size)] + [(2, 1)] * (comm.size == 2)
    for grid in grids:
        st = SpaceTime(grid)
        rf = square_with_sensors(6, side, 5)(st, 10, {"time_solver": "serial"})
        F, found = rf.parameter_to_observable(), Counter()
        st.comm, st.time_comm, st.space_comm = (Counted(c, found) for c in (st.comm, st.time_comm, st.space_comm))
        posterior = F.posterior()
        posterior.variance()
        seen = comm.allgather(Counter(found))
        columns = comm.allreduce(F.layout.static_size) // grid[1]
        counts = {"sensors": side**2, "readings": 5, "columns": columns, "reduced": F.reduced.size, "last": 1.0}
        made = LinearInverse(calibration(**counts), Division(*grid, grid[1], 1), nsteps=10)
        assert made.in_parameter_space == (side == 6)
        assert type(posterior.spectrum).__name__ == ("ParameterSpace" if side == 6 else "DataSpace")
        expected = Counter()
        for exchange in made.exchanges():
            expected[exchange.kind, exchange.ranks] += exchange.nbytes
        real = Counter()
        for each in seen:
            real.update(each)
        assert {k: v for k, v in real.items() if k[1] > 1} == {
            key: pytest.approx(comm.size * nbytes, rel=0.1 if key[0] == "alltoall" or grid[0] > 1 else 1e-12)
            for key, nbytes in expected.items()
        }


def test_costs_are_measured():
    """Counts are those of the map; all costs are positive, and scaled to the calibrated step."""
    rf = square_with_sensors(6, 3, 5)(SpaceTime("1x1", comm=MPI.COMM_SELF), 10, {"time_solver": "serial"})

    def watch(actions):
        for action, _ in actions.values():
            action()
        return {name: 1e-3 / count for name, (_, count) in actions.items()}

    found = inverse_costs(rf, watch)
    F = rf.parameter_to_observable()
    assert {name: found[name] for name in COUNTS} == {
        "sensors": 9, "readings": 5, "columns": 49, "reduced": F.reduced.size, "last": 1.0, "constant": 1
    }  # fmt: skip
    assert set(found) == set(COUNTS) | set(SECONDS)
    assert all(found[name] >= 0 for name in SECONDS)
    scaled = inverse_costs(rf, watch, lambda states: 2e-3 / 10)
    assert scaled["prior"] == pytest.approx(2 * found["prior"])
    assert scaled["stages"] == found["stages"] == 1.0

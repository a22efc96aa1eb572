"""Greedy choice of sensors against dense matrices, brute force, and what is known of the criteria."""

from itertools import combinations

import numpy as np
import pytest

from pint_fem.errors import InputError
from pint_fem.inverse.inference import sensor_choice
from pint_fem.inverse.inference.sensor_designs import ParameterDesign, ReadingDesign
from pint_fem.spacetime import SpaceTime
from tests.linear_inverse import dense, mass, problem


@pytest.fixture(params=["readings", "controls"])
def space(request, monkeypatch):
    """Both spaces in which sets of sensors are evaluated."""
    if request.param == "controls":
        monkeypatch.setattr(sensor_choice, "estimated_size", lambda *_: np.inf)
    return request.param


@pytest.fixture(scope="module")
def posterior():
    return problem(SpaceTime()).parameter_to_observable().posterior(noise=0.03)


def of(posterior, case, sensors):
    """The dense problem with the readings of some sensors."""
    return case.restricted(np.flatnonzero(np.isin(posterior.F.table.sensor, sensors)))


def log_det(case):
    return np.linalg.slogdet(np.eye(len(case.F)) + np.linalg.solve(case.N, case.F @ np.linalg.solve(case.A, case.F.T)))[
        1
    ]


@pytest.mark.parallel([1, 3])
@pytest.mark.parametrize("criterion", ["D", "A", "L2"])
def test_greedy_choice_by_dense_algebra(posterior, criterion, space):
    """Each step takes the best of the sensors left; values and contributions are those of dense matrices."""
    F, case = posterior.F, dense(posterior)
    M = mass(posterior) if criterion == "L2" else np.eye(F.layout.size)
    value = log_det if criterion == "D" else lambda c: np.trace(M @ c.covariance())
    sign = 1 if criterion == "D" else -1
    extra = {"inner_product": "L2"} if criterion == "L2" else {}
    choice = F.choose_sensors(4, "A" if criterion == "L2" else criterion, noise=0.03, **extra)
    assert type(choice.design) is (ReadingDesign if space == "readings" else ParameterDesign)
    before = []
    for step, chosen in enumerate(choice.order):
        values = {s: value(of(posterior, case, [*before, s])) for s in range(4) if s not in before}
        assert chosen == max(values, key=lambda s: sign * values[s])
        before.append(chosen)
        assert choice.values[step + 1] == pytest.approx(values[chosen], rel=1e-9)
    assert choice.values[0] == pytest.approx(0 if criterion == "D" else np.trace(M @ np.linalg.inv(case.A)), rel=1e-9)
    assert (sign * np.diff(choice.values) > 0).all()
    for found, s in zip(choice.adds, choice.order, strict=True):
        others = [t for t in range(4) if t != s]
        assert found == pytest.approx(sign * (value(case) - value(of(posterior, case, others))), rel=1e-6)
    assert choice.value([2, 0]) == pytest.approx(value(of(posterior, case, [0, 2])), rel=1e-9)
    both = choice.contributions([1, 3])
    assert both[1] == pytest.approx(sign * (choice.value([1, 3]) - choice.value([1])), rel=1e-6)


def random_design(seed, traces, controls=False, sensors=7, rows=2, n=9):
    """Sensors with two rows each, in the space of readings or of controls, and their dense matrices."""
    rng = np.random.default_rng(seed)
    B = rng.standard_normal((sensors * rows, n)) * rng.uniform(0.2, 3, n)
    M = np.diag(rng.uniform(0.5, 2, n))
    if controls:
        numbers = np.arange(sensors * rows).reshape(sensors, rows)
        return ParameterDesign(B, list(numbers), M if traces else None), B, M
    design = ReadingDesign(B @ B.T, [slice(rows * s, rows * s + rows) for s in range(sensors)])
    if traces:
        design = ReadingDesign(B @ B.T, design.blocks, B @ M @ B.T, np.trace(M))
    return design, B, M


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("traces", [False, True])
@pytest.mark.parametrize("controls", [False, True])
def test_greedy_beside_brute_force(seed, traces, controls):
    """The first sensor is the best one, all values are those of dense matrices, and D reaches 1 - 1/e of the best."""
    design, B, M = random_design(seed, traces, controls)

    def value(sensors):
        part = np.concatenate([B[2 * s : 2 * s + 2] for s in sensors])
        H = np.eye(9) + part.T @ part
        return np.trace(M @ np.linalg.inv(H)) if traces else np.linalg.slogdet(H)[1]

    order, values = design.choose(3, range(7))
    sign = -1 if traces else 1
    for k in (1, 2, 3):
        best = max(sign * value(s) for s in combinations(range(7), k))
        assert values[k] == pytest.approx(value(order[:k]), rel=1e-10)
        assert sign * values[k] <= best + 1e-9
        if k == 1:
            assert sign * values[1] == pytest.approx(best)
        if not traces:
            assert values[k] >= (1 - np.exp(-1)) * best


def test_information_is_submodular():
    """A sensor adds no more to a larger set (D), and never harms (A and D)."""
    design, *_ = random_design(5, False)
    traces, *_ = random_design(5, True)
    for s, t, r in ((0, 1, 2), (3, 4, 5), (6, 0, 3)):
        small = design.value([s, r]) - design.value([s])
        assert 0 < design.value([s, t, r]) - design.value([s, t]) <= small + 1e-12
        assert traces.value([s, t, r]) < traces.value([s, t])
    assert design.value([]) == 0
    assert (design.contributions(range(7)) <= [design.value([s]) for s in range(7)]).all()


def test_of_equal_sensors_the_first_and_of_blind_ones_the_last():
    """Three equal rows, and a sensor without rows, which adds nothing."""
    B = np.array([[1.0, 2.0], [1.0, 2.0], [1.0, 2.0]])
    design = ReadingDesign(B @ B.T, [slice(0, 0), slice(0, 1), slice(1, 2), slice(2, 3)])
    order, values = design.choose(4, [0, 3, 1, 2])
    assert order == [3, 1, 2, 0]
    np.testing.assert_allclose(values, [0, *np.log([6, 11, 16, 16])], rtol=1e-12)


@pytest.mark.parallel([1, 3])
def test_candidates_and_correlated_noise(posterior, space):
    """Among two only; noise that is correlated in each sensor is allowed, between sensors it is not."""
    F = posterior.F
    assert set(F.choose_sensors(2, "D", candidates=[1, 3]).order) == {1, 3}
    same = F.table.sensor[:, None] == F.table.sensor
    N = 1e-3 * (np.eye(len(same)) + 0.5 * same)
    case = dense(F.posterior(noise=N))
    choice = F.choose_sensors(2, "D", noise=N)
    assert choice.values[2] == pytest.approx(log_det(of(posterior, case, choice.order)), rel=1e-9)
    N[0, 1] = N[1, 0] = 1e-4
    with pytest.raises(InputError, match="different sensors is correlated"):
        F.choose_sensors(2, "D", noise=N)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((0,), "from 1 to 4"),
        ((5,), "from 1 to 4"),
        ((2, "E"), "'A' or 'D'"),
        ((2, "A", [0, 0]), "different numbers from 0 to 3"),
        ((2, "A", [0, 7]), "different numbers from 0 to 3"),
        ((2, "D", None, "L2"), "does not depend on an inner product"),
        ((2, "A", None, "H1"), "'L2', a form"),
    ],
)
def test_refusals(posterior, arguments, words):
    count, criterion, candidates, product = (*arguments, *("A", None, None)[len(arguments) - 1 :])
    with pytest.raises(InputError, match=words):
        posterior.F.choose_sensors(count, criterion, candidates=candidates, inner_product=product)


@pytest.mark.parallel([2])
def test_ranks_in_space_and_traces_of_samples(monkeypatch):
    """Two ranks in space and two in time have the same values; of a large prior the trace is estimated."""
    found = []
    for grid in ("2x1", "1x2"):
        F = problem(SpaceTime(grid)).parameter_to_observable()
        found.append(F.choose_sensors(3, noise=0.03, inner_product="L2"))
    assert found[0].order == found[1].order
    np.testing.assert_allclose(found[0].values, found[1].values, rtol=1e-9)
    monkeypatch.setattr(sensor_choice, "EXACT", 10)
    estimated = F.choose_sensors(3, noise=0.03, inner_product="L2").values
    np.testing.assert_allclose(estimated - estimated[0], found[1].values - found[1].values[0], rtol=1e-9)
    assert 1e-6 < abs(estimated[0] / found[1].values[0] - 1) < 0.05

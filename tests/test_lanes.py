"""Programs on lanes against dense algebra, and the same bits in every lane, for every width and every layout."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from scipy.sparse import csr_matrix

from pint_fem.kernels.lanes import lane_steps
from pint_fem.kernels.lanes.lane_steps import LaneSteps
from pint_fem.kernels.lanes.products import LaneProduct
from pint_fem.kernels.lanes.structures import WIDTHS, scratch
from pint_fem.kernels.lanes.triangular import TriangularFactors
from tests.lane_programs import dense_steps, random_program, states
from tests.random_matrices import regular

PARTS = pytest.mark.parametrize("parts", [1, 2])
DOUBLE, SINGLE = (np.dtype(dtype) for dtype in (np.float64, np.float32))


def of_width(steps, width, monkeypatch):
    """Have all lanes advance by a width, whichever were the fastest."""
    monkeypatch.setattr(steps, "_cut", lambda lanes: [(width, lanes)])


def run(steps, u, count, added=None, given=()):
    """Results, and the given states with what has been stored."""
    out, given = np.full((len(u), count, u.shape[1]), np.nan), [None if a is None else a.copy() for a in given]
    steps.run(u, out, added, given)
    return out, given


def same(a, b):
    """Whether results and stored states have the same bits, those of NaN included."""
    return all(np.array_equal(x, y, equal_nan=True) for x, y in zip((a[0], *a[1]), (b[0], *b[1]), strict=True))


@PARTS
def test_programs_do_what_their_operations_say(parts):
    """With all combinations of loads, stored and added states that are given or not."""
    for seed in range(10):
        program = random_program(seed, parts=parts)
        steps = LaneSteps(program)
        for k, count in ((1, 1), (1, 5), (3, 2), (11, 1), (40, 3)):
            u, added, given = states(seed, k, count, program.size)
            for mask in range(0, 32, 1 if k == 3 else 7):
                extra = added if mask & 1 else None
                chosen = [a if mask >> i + 1 & 1 else None for i, a in enumerate(given)]
                out, found = run(steps, u, count, extra, chosen)
                expected, stored = dense_steps(program, u, count, extra, chosen)
                scale = np.abs(expected).max()
                assert np.abs(out - expected).max() <= 1e-11 * scale
                for i, a in enumerate(found):
                    if i % 2 == 0 and a is not None:
                        assert np.abs(a - stored[i]).max() <= 1e-11 * max(scale, np.abs(stored[i]).max())
                    elif a is not None:
                        assert np.array_equal(a, given[i])


@PARTS
def test_bits_do_not_depend_on_the_width(parts, monkeypatch):
    """Nor on the number of lanes, nor on the steps of one call, nor on how lanes are split."""
    for seed in range(12):
        program = random_program(seed, parts=parts)
        u, added, given = states(seed, 40, 4, program.size)
        expected = run(LaneSteps(program), u, 4, added, given)
        for width in WIDTHS[DOUBLE]:
            steps = LaneSteps(program)
            of_width(steps, width, monkeypatch)
            assert same(run(steps, u, 4, added, given), expected)
            for first, stop in ((0, 1), (3, 4), (5, 12), (7, 40), (0, 33)):
                rows = slice(first, stop)
                found = run(steps, u[rows], 4, added[rows], [a[rows] for a in given])
                assert same(found, (expected[0][rows], [a[rows] for a in expected[1]]))
            first = run(steps, u, 2, added[:, :2], [a[:, :2] for a in given])
            last = run(steps, first[0][:, 1], 2, added[:, 2:], [a[:, 2:] for a in given])
            assert np.array_equal(np.concatenate([first[0], last[0]], axis=1), expected[0])


@pytest.mark.parametrize("lanes", range(1, 41))
def test_every_number_of_lanes_is_cut_into_known_widths(lanes):
    """Lanes are covered, in their order; whatever the times of the widths."""
    program = random_program(0)
    u, _, _ = states(1, lanes, 1, program.size)
    expected = run(LaneSteps(program), u, 1)
    for seconds in ([1, 1, 1, 1], [1, 8, 16, 32], [1, 1, 10, 100], [9, 3, 3, 9], [1, 3, 5, 7]):
        steps = LaneSteps(program)
        steps._seconds.update(zip(WIDTHS[DOUBLE], map(float, seconds), strict=True))
        cut = steps._cut(lanes)
        assert sum(count for _, count in cut) == lanes
        assert all(width in WIDTHS[DOUBLE] and count > 0 for width, count in cut)
        assert same(run(steps, u, 1), expected)


LAYOUTS = {
    "reversed": lambda a: np.ascontiguousarray(a[::-1, ::-1])[::-1, ::-1],
    "steps before lanes": lambda a: np.ascontiguousarray(a.swapaxes(0, 1)).swapaxes(0, 1),
    "every third": lambda a: _within(a, np.s_[::3, ::2]),
    "part of longer states": lambda a: _within(a, np.s_[:, :, 3:-4]),
    "unknowns first": lambda a: np.asfortranarray(a),
    "every second unknown": lambda a: _within(a, np.s_[:, :, ::2]),
    "unknowns reversed": lambda a: np.ascontiguousarray(a[..., ::-1])[..., ::-1],
    "odd bytes": lambda a: _odd(a),
}


def _within(a, index):
    """A view of a larger array with the values of ``a``."""
    large = np.full([3 * size + 7 for size in a.shape], np.nan)
    view = large[index]
    view = view[tuple(slice(0, size) for size in a.shape)] if view.shape[2] != a.shape[2] + 7 else view
    view = large[index][: a.shape[0], : a.shape[1], : a.shape[2]]
    view[...] = a
    return view


def _odd(a):
    """Records of one byte and a state: strides are no multiples of eight bytes."""
    records = np.zeros(a.shape[:2], dtype=[("mark", "i1"), ("state", "f8", a.shape[2:])])
    records["state"] = a
    return records["state"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout):
    """Results and stored states are written in place, and what is read keeps its values."""
    program, change = random_program(3, parts=2), LAYOUTS[layout]
    for k, count in ((1, 1), (5, 3), (17, 2)):
        u, added, given = states(3, k, count, program.size)
        steps = LaneSteps(program)
        expected = run(steps, u, count, added, given)
        new = [change(np.full(added.shape, np.nan)), change(added), *map(change, given)]
        start = change(u[:, None])[:, 0]
        steps.run(start, new[0], new[1], new[2:])
        assert same((new[0], new[2:]), expected)
        assert np.array_equal(start, u)
        assert np.array_equal(new[1], added)


def test_broadcast_starts_and_loads():
    """One state for all lanes or steps, one number for all unknowns, of other types: only read."""
    program = random_program(4, parts=2)
    n, steps, k, count = program.size, LaneSteps(program), 9, 3
    row = np.arange(n) % 5 - 2.0
    for u, load in (
        (np.broadcast_to(row, (k, n)), np.broadcast_to(row, (k, count, n))),
        (np.broadcast_to(2.0, (k, n)), np.broadcast_to(-1.0, (k, count, n))),
        (np.broadcast_to(row.astype(np.float32), (k, n)), np.broadcast_to(row.astype(int), (k, count, n))),
        (np.broadcast_to(row.astype(">f8"), (k, n)), np.broadcast_to(row, (k, count, n))),
    ):
        found = np.empty((k, count, n))
        steps.run(u, found, load, [None, load])
        expected = run(
            steps, np.array(u, dtype=float), count, np.array(load, dtype=float), [None, np.array(load, dtype=float)]
        )
        assert np.array_equal(found, expected[0])


def test_no_lanes_and_no_steps():
    program = random_program(5)
    steps, n = LaneSteps(program), program.size
    for k, count in ((0, 3), (3, 0), (0, 0)):
        steps.run(np.zeros((k, n)), np.empty((k, count, n)), np.zeros((k, count, n)), [None, np.zeros((k, count, n))])


@pytest.mark.parametrize("wrong", ["u", "unknowns", "added", "load", "store", "read-only"])
def test_arrays_that_do_not_fit_are_refused(wrong):
    """Kernels trust their arguments: what has another shape would be read beyond its end."""
    program = random_program(6)
    n, steps = program.size, LaneSteps(program)
    u, added, given = states(6, 4, 2, n)
    out = np.empty((4, 2, n))
    if wrong == "u":
        u = u[:3]
    elif wrong == "unknowns":
        u = u[:, :-1]
    elif wrong == "added":
        added = added[:, :1]
    elif wrong == "load":
        given[1] = given[1][:, :, :-1]
    elif wrong == "store":
        given[2] = given[2][:1]
    else:
        out.flags.writeable = False
    with pytest.raises(ValueError, match=r"states have the shape|read-only"):
        steps.run(u, out, added, given)


def test_long_calls_are_cut(monkeypatch):
    """A call of C ends after some time, so that Python handles signals: same results."""
    program = random_program(7, parts=2)
    u, added, given = states(7, 40, 5, program.size)
    expected = run(LaneSteps(program), u, 5, added, given)
    for most in (1, 3, 70, 1000):
        steps = LaneSteps(program)
        calls, call = [], steps._call
        steps._cut(40)
        monkeypatch.setattr(lane_steps, "_CALL", most * steps._translation.work)
        monkeypatch.setattr(steps, "_call", lambda w, a, n: (calls.append(len(a[0]) * n), call(w, a, n)))  # noqa: B023
        assert same(run(steps, u, 5, added, given), expected)
        assert max(calls) <= max(32, most)
        assert sum(calls) == 200


# -- lanes do not see each other ---------------------------------------------------------------------------------------
@PARTS
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_lanes_that_are_not_finite_stay_alone(parts, value, monkeypatch):
    """In the start or in a load; also not those of later calls, which use the same work vectors."""
    for seed in range(12):
        program = random_program(seed, parts=parts)
        u, added, given = states(seed, 37, 2, program.size)
        for width in WIDTHS[DOUBLE]:
            steps = LaneSteps(program)
            of_width(steps, width, monkeypatch)
            clean = run(steps, u, 2, added, given)
            bad = u.copy()
            bad[[0, 5, 8, 36]] = value
            loads = [a.copy() for a in given]
            loads[1][[3, 17]] = value
            found = run(steps, bad, 2, added, loads)
            others = np.setdiff1d(np.arange(37), [0, 3, 5, 8, 17, 36])
            assert np.array_equal(found[0][others], clean[0][others])
            assert np.isfinite(clean[0]).all()
            assert not np.isfinite(found[0][[0, 5, 8, 36]]).all(axis=(1, 2)).any()
            assert same(run(steps, u, 2, added, given), clean)
            for rows in (slice(0, 1), slice(3, 6), slice(0, 17)):  # lanes that hold numbers of before are not used
                again = run(steps, u[rows], 2, added[rows], [a[rows] for a in given])
                assert np.array_equal(again[0], clean[0][rows])


def test_work_vectors_are_written_before_they_are_read(monkeypatch):
    """Their values of before a call, and those beside the lanes in use, are of no importance."""
    program = random_program(9, parts=2)
    u, added, given = states(9, 11, 2, program.size)
    for width in WIDTHS[DOUBLE]:
        steps = LaneSteps(program)
        of_width(steps, width, monkeypatch)
        expected = run(steps, u, 2, added, given)
        memory = scratch(0)
        memory[: memory.size // 8 * 8].view(float)[:] = np.nan
        assert same(run(steps, u, 2, added, given), expected)


# -- float32 -----------------------------------------------------------------------------------------------------------
@PARTS
def test_single_precision(parts, monkeypatch):
    for seed in range(8):
        program = random_program(seed, parts=parts)
        for k, count in ((1, 2), (19, 1), (37, 3)):
            u, added, given = states(seed, k, count, program.size)
            expected, stored = dense_steps(program, u, count, added, given)
            results = []
            for width in WIDTHS[SINGLE]:
                steps = LaneSteps(program, np.float32)
                of_width(steps, width, monkeypatch)
                results.append(run(steps, u, count, added, given))
            assert same(*results)
            scale = np.abs(expected).max()
            assert 0 < np.abs(results[0][0] - expected).max() <= 1e-5 * scale
            for i, a in stored.items():
                assert np.abs(results[0][1][i] - a).max() <= 1e-5 * max(scale, np.abs(a).max())


# -- products ----------------------------------------------------------------------------------------------------------
def test_products():
    """Of square and other matrices, with rows without entries; bitwise the same for any number of states."""
    rng = np.random.default_rng(0)
    for rows, columns in ((1, 1), (7, 3), (3, 17), (20, 20), (9, 0), (0, 4)):
        A = csr_matrix(rng.standard_normal((rows, columns)) * (rng.random((rows, columns)) < 0.4))
        product, states = LaneProduct(A), rng.standard_normal((40, columns))
        out = np.full((40, rows), np.nan)
        product(states, out)
        assert np.allclose(out, states @ A.toarray().T, rtol=1e-13, atol=1e-13)
        for k in range(41):
            for first in (0, 40 - k):
                part = np.full((k, rows), np.nan)
                product(states[first : first + k], part)
                assert np.array_equal(part, out[first : first + k])


def test_products_of_arrays_that_do_not_fit():
    product = LaneProduct(csr_matrix(np.ones((3, 4))))
    for given, out in (((5, 3), (5, 3)), ((5, 4), (5, 4)), ((4, 4), (5, 3)), ((5, 4), (4, 3))):
        with pytest.raises(ValueError, match="do not fit"):
            product(np.zeros(given), np.zeros(out))


def test_vectors_of_other_parts_are_not_exchanged():
    program = random_program(0, parts=2)
    with pytest.raises(ValueError, match="other parts"):
        program.exchange("v", "of a")


def test_threads_have_their_own_work_memory():
    """Calls of C let other threads run, which use other programs."""
    programs = [random_program(seed, parts=2, sizes=(300, 200), kinds=("spd",)) for seed in range(2)]
    given = [states(seed, 32, 4, program.size) for seed, program in enumerate(programs)]
    expected = [run(LaneSteps(p), u, 4, added, loads) for p, (u, added, loads) in zip(programs, given, strict=True)]
    steps = [LaneSteps(p) for p in programs]

    def work(number):
        u, added, loads = given[number]
        return all(same(run(steps[number], u, 4, added, loads), expected[number]) for _ in range(50))

    with ThreadPoolExecutor(2) as pool:
        assert all(pool.map(work, range(2)))


def test_factors_of_one_part_have_one_order():
    """A vector has one order on lanes."""
    program = random_program(0, kinds=("spd",))
    A, _ = regular("spd", 13, 5)
    other = np.roll(next(op.what.order for op in program.operations if op.kind == "solve"), 1)
    program.solve("of a", TriangularFactors(A, symmetric=True, order=other))
    with pytest.raises(ValueError, match="order"):
        LaneSteps(program)

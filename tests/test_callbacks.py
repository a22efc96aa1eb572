"""Steps written as other packages want them are refused with the right form, whatever solver calls them.

PyMGRIT's ``step`` returns the new state and XBraid's overwrites the old one; both used to leave a trajectory of zeros
behind that "converged" with residual 0. The right form is held to the exact values :math:`(1 + h)^{-n}`.
"""

import numpy as np
import pytest
from mpi4py import MPI

from pint_fem.errors import InputError
from pint_fem.mgrit import MGRIT, SolverFailure, Transfer
from pint_fem.mgrit.checks.check import check
from pint_fem.paradiag import ParaDiag
from tests.limits import time_limit

N, M = 32, 4


class Euler:
    def __init__(self, stride=1):
        self.h = stride / N

    def step(self, steps, u, out):
        out[...] = u / (1 + self.h)


class Returns(Euler):
    def step(self, steps, u, out):
        return u / (1 + self.h)


class Overwrites(Euler):
    def step(self, steps, u, out):
        u /= 1 + self.h


class OverwritesByIndex(Euler):
    def step(self, steps, u, out):
        u[...] = u / (1 + self.h)


class Rebinds(Euler):
    def step(self, steps, u, out):
        out = u / (1 + self.h)  # noqa: F841


class WritesOne(Euler):
    def step(self, steps, u, out):
        out[0] = u[0] / (1 + self.h)


class WritesAndReturns(Euler):
    def step(self, steps, u, out):
        out[...] = u / (1 + self.h)
        return out


class SweepReturns(Euler):
    def sweep(self, first, U, G):
        return np.array([U[0] / (1 + self.h) ** i for i in range(len(U))])


class SweepRebinds(Euler):
    def sweep(self, first, U, G):
        for _ in range(len(U) - 1):
            U = U / (1 + self.h)


class SweepChangesStart(Euler):
    def sweep(self, first, U, G):
        for i in range(len(U) - 1):
            U[i + 1] = U[i] = U[i] / (1 + self.h)


WRONG = {
    Returns: "step returned a ndarray.*out\\[...\\] = u",
    Overwrites: "step writes to its input.*out\\[...\\] = u",
    OverwritesByIndex: "step writes to its input.*out\\[...\\] = u",
    Rebinds: "step does not write all of its result.*out\\[...\\] = u",
    WritesAndReturns: "step returned a ndarray",
}


def start(k, first):
    U = np.zeros((k + 1, 3))
    if first:
        U[0] = 1, 2, 3
    return U


def solve(kind, comm=MPI.COMM_SELF, levels=3, **options):
    solver = MGRIT(
        [kind(M**i) for i in range(levels)], N, options=dict(coarsening=M, levels=levels, rtol=1e-12, **options),
        comm=comm,
    )  # fmt: skip
    U = start(solver.local_rows - 1, comm.rank == 0)
    return solver, solver.solve(U), U


@pytest.mark.parallel([1, 3])
@time_limit(60)
@pytest.mark.parametrize("kind", WRONG, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("options", [{}, {"levels": 1}, {"storage": "C"}, {"on_divergence": "serial"}], ids=str)
def test_a_step_of_another_package_is_refused_on_every_rank(kind, options):
    with pytest.raises(InputError, match=WRONG[kind]):
        solve(kind, MPI.COMM_WORLD, **options)


def test_a_block_that_is_written_in_part_is_refused():
    with pytest.raises(InputError, match="step does not write all"):
        solve(WritesOne)


@pytest.mark.parametrize(
    ("kind", "text"),
    [(SweepReturns, "sweep returned"), (SweepRebinds, "sweep does not write"), (SweepChangesStart, "sweep changes U")],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_a_sweep_that_does_not_write_its_states_is_refused(kind, text):
    with pytest.raises(InputError, match=text):
        solve(kind, levels=1)


@pytest.mark.parallel([1, 3])
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_the_right_form_gives_the_exact_solution(dtype):
    comm = MPI.COMM_WORLD
    solver = MGRIT([Euler(), Euler(M)], N, options=dict(coarsening=M, rtol=1e-6), comm=comm)
    level = solver.levels[0]
    U = start(level.k, comm.rank == 0).astype(dtype)
    solver.solve(U)
    exact = (1 + 1 / N) ** -np.arange(level.lo, level.hi + 1.0)[:, None] * np.array([1, 2, 3])
    assert np.abs(U - exact).max() < 1e-5


def test_a_value_that_is_not_finite_is_no_missing_result():
    class Overflows(Euler):
        def step(self, steps, u, out):
            out[...] = np.log(-u)

    with pytest.raises(SolverFailure, match="value not finite"):
        solve(Overflows)


def test_a_library_that_needs_writable_arrays_gets_them():
    class Writable(Euler):
        keeps_input = True

        def step(self, steps, u, out):
            assert u.flags.writeable
            out[...] = u / (1 + self.h)

    assert solve(Writable)[1].converged


def test_norms_and_transfers_are_held_to_their_forms():
    def run(norms=None, transfer=None):
        given = {} if norms is None else {"point_norms": norms}
        solver = MGRIT([Euler(), Euler(M)], N, options=dict(coarsening=M), transfers=[transfer], **given)
        solver.solve(start(N, True))

    def scaled(block):
        block *= 2
        return (block**2).sum(axis=1)

    with pytest.raises(InputError, match="point_norms returned None: return an array of shape"):
        run(norms=lambda block: None)
    with pytest.raises(InputError, match=r"point_norms.*read-only"):
        run(norms=scaled)
    with pytest.raises(ValueError, match="restrict returned None"):
        run(transfer=Transfer(lambda block: None, lambda block: block))
    with pytest.raises(InputError, match="prolong returned None"):
        run(transfer=Transfer(lambda block: block.copy(), lambda block: None))


@pytest.mark.parallel([1, 3])
@time_limit(60)
def test_paradiag_takes_frequencies_that_are_returned():
    comm, h = MPI.COMM_WORLD, 1 / N

    def returns(k, mu, r):
        return r / (1 - mu / (1 + h))

    def in_place(k, mu, r):
        r /= 1 - mu / (1 + h)

    def nothing(k, mu, r):
        pass

    def one_number(k, mu, r):
        return (r / (1 - mu / (1 + h)))[0]

    def run(solve):
        solver = ParaDiag(Euler(), N, solve, comm=comm)
        level = solver.levels[0]
        U = start(level.k, comm.rank == 0)
        solver.solve(U)
        return U - (1 + h) ** -np.arange(level.lo, level.hi + 1.0)[:, None] * np.array([1, 2, 3])

    assert np.abs(run(returns)).max() < 1e-7
    for wrong, text in ((in_place, "read-only"), (nothing, "returned None"), (one_number, "returned shape")):
        with pytest.raises(InputError, match=text):
            run(wrong)


def test_the_check_names_a_derivative_that_is_returned(log_lines):
    class Returned(Euler):
        def tangent(self, steps, u, du, out):
            return du / (1 + self.h)

        def adjoint(self, steps, u, lam, out):
            out[...] = lam / (1 + self.h)

    report = check([Returned(), Returned(M)], N, np.ones(3), coarsening=(M,))
    assert not report.passed
    assert any("tangent" in line and "returned a ndarray" in line for line in log_lines)

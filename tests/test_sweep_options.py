"""Options of the time-parallel solver on finite element sweeps: each way to the same solution."""

import json

import numpy as np
import pytest
from firedrake import Function, assemble, dx, inner
from firedrake.petsc import PETSc
from mpi4py import MPI

import pint_fem as pf
from pint_fem.adjoint.reduced_functional import mgrit_options
from pint_fem.all_at_once.stopping import DivergedError, SolverFailure
from pint_fem.errors import InputError
from pint_fem.kernels.arrays import put
from pint_fem.sweeps.checking import check_sweeps
from pint_fem.sweeps.krylov import AcceleratedSweep
from pint_fem.sweeps.mass_norm import MassNorm
from pint_fem.sweeps.sweeps import Sweeps
from tests.logs import logged
from tests.test_reduced_functional import functional, point_and_direction


def solved(st, **options):
    """A functional with its state and adjoint at the test's point, and the residual histories."""
    rf = functional(st, **options)
    rf(point_and_direction(rf)[0])
    rf.derivative()
    return rf


def swept(rf, **options):
    """State and adjoint of the functional's evolution with other options, cold, and the sweeps."""
    z, start = rf.array(point_and_direction(rf)[0]), rf.problem.sweeps
    options = {"coarsening": (4, 2), "levels": 3, "rtol": 1e-13} | options
    sweeps = Sweeps(rf.evolution, start.spacetime, options=options)
    U, L = sweeps.new_slab(), sweeps.new_slab()
    sweeps.state(z, U, cold=True)
    gradient = sum(m.gradient(U) for m in rf.problem.misfits)
    sweeps.adjoint(z, U, gradient, L, cold=True)
    return U, L, sweeps


@pytest.fixture(scope="module")
def problem():
    """The functional, and its trajectories by sequential stepping."""
    rf = functional(pf.SpaceTime())
    return rf, swept(rf, levels=1)[:2]


@pytest.mark.parallel([1, 3])
@pytest.mark.parametrize(
    "options",
    [
        dict(start="guess"),
        dict(start="skip"),
        dict(start="nested", nested_cycles=2),
        dict(cycle="F"),
        dict(cycle="F", f_cycles=1, check="relaxed"),
        dict(relax="F"),
        dict(relax=[1, 2]),
        dict(c_weight=[1.2, 1.0]),
        dict(coarse_solver="gathered"),
        dict(coarse_solver="relax", coarse_sweeps=3),
        dict(residual="full", time_norm="inf"),
        dict(residual="none", max_it=8),
        dict(time_norm=1, rtol_of="first"),
        {"level_1": {"relax": "F"}, "coarse": {"solver": "gathered"}},
    ],
)
def test_every_option_leads_to_the_sequential_solution(options, problem):
    """State and adjoint to 1e-9; every solve says why it stopped."""
    rf, exact = problem
    *mine, sweeps = swept(rf, **({"max_it": 40} | options))
    for a, b in zip(mine, exact, strict=True):
        assert np.abs(a - b).max(initial=0) <= 1e-9
    reasons = {result.reason for _, result in sweeps.results}
    assert reasons <= ({"its"} if options.get("residual") == "none" else {"rtol", "atol"})


@pytest.mark.slow_on_ranks
@pytest.mark.parallel([1, 3])
@pytest.mark.parametrize("linear", [True, False])
def test_krylov_acceleration(linear):
    """Gradients and Hessian actions are those of plain cycles; of a nonlinear evolution the derivatives' sweeps."""
    results = []
    for krylov in ({"ksp_type": "fgmres"}, {"ksp_type": "gcr"}, None):
        rf = functional(pf.SpaceTime(), linear=linear, steps=22 if linear else 10, n=6 if linear else 3)
        parameters = {"mgrit": {"coarsening": (4, 2), "levels": 3, "rtol": 1e-12}}
        if krylov:
            parameters["krylov"] = krylov
        misfit = pf.RunningMisfit(rf.evolution.u**2 * dx)
        rf = pf.TimeParallelReducedFunctional(
            rf.evolution, misfit, spacetime=rf.spacetime, solver_parameters=parameters
        )
        assert isinstance(rf.problem.sweeps.solvers.adjoint, AcceleratedSweep) == bool(krylov)
        m, h = point_and_direction(rf)
        J = rf(m)
        results.append((J, rf.derivative().dat.data_ro.copy(), rf.hessian(h).dat.data_ro.copy()))
    for J, g, H in results[:2]:
        assert J == pytest.approx(results[2][0], rel=1e-10)
        np.testing.assert_allclose(g, results[2][1], rtol=0, atol=1e-9 * np.abs(g).max())
        np.testing.assert_allclose(H, results[2][2], rtol=0, atol=1e-9 * np.abs(H).max())


@pytest.mark.parallel([1, 3])
def test_nested_iteration_only_where_cold():
    """A second control starts from the last trajectory; Hessian actions start cold; the residual says so."""
    rf = functional(pf.SpaceTime(), rtol=1e-6)
    m, h = point_and_direction(rf)
    rf(m)
    first = rf.problem.sweeps.results[-1][1].residuals[0]
    zero = functional(pf.SpaceTime(), rtol=1e-6, start="guess")
    zero(point_and_direction(zero)[0])
    assert first < 0.3 * zero.problem.sweeps.results[-1][1].residuals[0]
    rf(m._ad_add(h._ad_mul(1e-4)))
    assert rf.problem.sweeps.results[-1][1].residuals[0] < 0.3 * first
    for _ in range(2):  # both start cold: the same histories
        rf.hessian(h)
    kinds, histories = zip(*((kind, r.residuals) for kind, r in rf.problem.sweeps.results), strict=True)
    assert kinds[-4:] == ("tangent", "adjoint") * 2
    assert histories[-4:-2] == histories[-2:]


@pytest.mark.parallel([1, 3])
def test_residuals_in_the_inner_product_of_functions():
    """The mass matrix's norm, and its dual for adjoints; the same factor, another scale."""
    st = pf.SpaceTime()
    rf = functional(st)
    V, rng = rf.evolution.V, np.random.default_rng(MPI.COMM_WORLD.rank)
    block = rng.standard_normal((3, rf.evolution.state_size))
    primal, dual = MassNorm(V, st), MassNorm(V, st, dual=True)
    g = Function(V)
    put(g, block[1])
    assert primal(block)[1] == pytest.approx(assemble(inner(g, g) * dx), rel=1e-12)
    x, y = primal.M.createVecs()
    images = []
    for row in block:
        x.array[:] = row
        primal.M.mult(x, y)
        images.append(y.array_r.copy())
    np.testing.assert_allclose(dual(np.array(images)), primal(block), rtol=1e-10)
    rf = pf.TimeParallelReducedFunctional(
        rf.evolution,
        pf.TerminalMisfit(rf.evolution.u**2 * dx),
        spacetime=st,
        solver_parameters={"mgrit": {"rtol": 1e-8, "levels": 2, "coarsening": 4}, "norm": "L2"},
    )
    rf(point_and_direction(rf)[0])
    rf.derivative()
    (_, state), (_, adjoint) = rf.problem.sweeps.results
    assert state.converged
    assert adjoint.converged
    slab = rf.problem.sweeps.slab
    c = [i for i in range(1, slab.k + 1) if (slab.lo + i) % 4 == 0]
    squares = primal(rf.problem.U[c]) if c else np.zeros(0)
    assert state.scale == pytest.approx(np.sqrt(MPI.COMM_WORLD.allreduce(squares.sum())), rel=1e-6)
    with pytest.raises(InputError, match="norm 'H1'"):
        pf.TimeParallelReducedFunctional(
            rf.evolution, pf.TerminalMisfit(rf.evolution.u**2 * dx), spacetime=st, solver_parameters={"norm": "H1"}
        )


@pytest.mark.parallel([1, 3])
def test_trace_of_all_sweeps(tmp_path_factory):
    """One file; the states of its propagator calls add up to those counted; the sweeps run both ways."""
    comm = MPI.COMM_WORLD
    path = comm.bcast(str(tmp_path_factory.mktemp("trace") / "t.json") if comm.rank == 0 else None)
    rf = solved(pf.SpaceTime(), trace=path, rtol=1e-6)
    sweeps = rf.problem.sweeps
    sweeps.solvers.write_trace()
    comm.Barrier()
    events = json.load(open(path))["traceEvents"]
    states = sum(e["args"]["states"] for e in events if e["name"] in ("phi", "sweep"))
    solvers = {id(s): s for s in (sweeps.solvers.state, sweeps.solvers.tangent, sweeps.solvers.adjoint)}.values()
    assert states == comm.allreduce(sum(level.phi_calls for s in solvers for level in s.levels))
    assert {e["args"]["sweep"] for e in events if e["name"] == "cycle"} == {"state", "adjoint"}
    sends = [(e["pid"], e["args"]["peer"]) for e in events if e["name"] == "send"]
    receives = [(e["args"]["peer"], e["pid"]) for e in events if e["name"] == "receive posted"]
    assert sorted(sends) == sorted(receives)
    neighbours = {pair for r in range(comm.size - 1) for pair in ((r, r + 1), (r + 1, r))}
    assert neighbours <= set(sends)  # coarse levels also send past ranks without points
    assert bool(sends) == (comm.size > 1)


@pytest.mark.parallel([1, 3])
def test_stepping_instead_where_cycles_do_not_converge(log_lines):
    """A coarse midpoint rule does not damp: an error by default, the sequential solution with the option."""
    st, common = pf.SpaceTime(), dict(tableau="midpoint", coarsening=2, relax="F", levels=2, max_it=3, rtol=1e-13)
    rf = functional(st, **common)
    m = point_and_direction(rf)[0]
    with pytest.raises(DivergedError, match=r"state sweep: MGRIT (max_it|diverged|stagnated): .*serial"):
        rf(m)
    rf = functional(st, on_divergence="serial", **common)
    alone = functional(pf.SpaceTime("1x1", comm=MPI.COMM_SELF), tableau="midpoint", levels=1)
    assert rf(point_and_direction(rf)[0]) == pytest.approx(alone(point_and_direction(alone)[0]), rel=1e-13)
    assert rf.problem.sweeps.results[-1][1].reason == "serial"
    if MPI.COMM_WORLD.rank == 0:
        assert "stepping sequentially instead" in "".join(log_lines)


def test_options_from_the_database():
    """PETSc's, with those of single levels, on top of the dictionary's; Krylov's own are left to it."""
    given = {"mgrit_level_0_relax": "F", "mgrit_rtol": "1e-5", "mgrit_coarse_solver": "gathered", "mgrit_view": ""}
    database = PETSc.Options()
    for name, value in (given | {"mgrit_ksp_type": "gcr"}).items():
        database[name] = value
    try:
        options = mgrit_options({"rtol": 1e-3, "max_it": 9, "level_1": {"relax": 2}})
    finally:
        for name in [*given, "mgrit_ksp_type"]:
            database.delValue(name)
    assert (options.rtol, options.max_it, options.coarse_solver, options.view) == (1e-5, 9, "gathered", True)
    assert [options.scheme(i) for i in range(3)] == ["F", "FCFCF", "FCF"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(coarsening=[[0, 3, 8, 22]], levels=2), "equal steps"),
        (dict(storage="C"), "storage 'C' with 22 steps and coarsening 4"),
        (dict(coarse_solver="gathered", linear=False), "not linear"),
    ],
)
def test_what_sweeps_cannot_do_is_refused(options, message):
    with pytest.raises(InputError, match=message):
        functional(pf.SpaceTime("1x1", comm=MPI.COMM_SELF), **options)


def test_view_says_memory():
    rf = functional(pf.SpaceTime("1x1", comm=MPI.COMM_SELF))
    text = rf.problem.sweeps.solvers.view()
    assert f"all points {23 * 49 * 8 / 2**20:.3g} MB" in text
    assert "level 1: 5 steps, m = 2, FCF-relaxation" in text


@pytest.mark.parallel([1, 3])
def test_propagators_pass_the_check():
    """The solver's own check of user code, on all levels; a wrong adjoint fails it. On one rank, not linear."""
    linear = MPI.COMM_WORLD.size == 3
    rf = functional(pf.SpaceTime(), linear=linear, steps=6, n=2, levels=2, coarsening=2, tableau="BE")
    report = check_sweeps(rf.problem.sweeps)
    assert report.passed, report.failures
    assert any("adjoint against tangent" in line and "passed" in line for line in report.lines)
    propagator = rf.problem.sweeps.propagators[1]
    right = propagator.adjoint
    propagator.adjoint = lambda data, lam, out: right(data, 1.01 * lam, out)
    report = check_sweeps(rf.problem.sweeps)
    assert not report.passed
    assert all("level 1" in line and "adjoint" in line for line in report.failures)


def test_propagators_pass_the_check_with_paradiag():
    """Whose options have no coarsening, as it has one level."""
    rf = functional(pf.SpaceTime(), steps=6, n=2, tableau="BE", solver={"time_solver": "paradiag"})
    assert check_sweeps(rf.problem.sweeps).passed


@pytest.mark.parallel([1, 3])
def test_theory_is_printed_before_the_first_solve():
    """With a monitor; a coarse level that does not damp warns in any case."""
    for options, words in ((dict(view=True), "theory, levels 0 and 1"), (dict(tableau="midpoint"), "warning, levels")):
        rf = functional(pf.SpaceTime(), rtol=1e-2, max_it=60, dtol=1e30, on_divergence="serial", **options)
        with logged() as lines:
            rf(point_and_direction(rf)[0])
        text = "".join(lines)
        assert (words in text) == (MPI.COMM_WORLD.rank == 0)
        if "tableau" in options and MPI.COMM_WORLD.rank == 0:
            assert "SDIRK2" in text


@pytest.mark.parallel([1, 3])
def test_failing_right_hand_side_is_a_failure_everywhere():
    """NaN in the control of one rank's steps, with a solver that raises on it; afterwards all is well again."""
    st = pf.SpaceTime()
    rf = functional(st, per_step=True, rtol=1e-8)
    ev = rf.evolution
    ev.solver_parameters = {"ksp_type": "cg", "ksp_rtol": 1e-13, "pc_type": "jacobi"}
    misfit = pf.RunningMisfit(ev.u**2 * dx)
    rf = pf.TimeParallelReducedFunctional(
        ev, misfit, spacetime=st, solver_parameters={"mgrit": {"coarsening": (4, 2), "levels": 3, "rtol": 1e-8}}
    )
    z = rf.array(point_and_direction(rf)[0])
    value = rf.problem.value(z)
    bad = z.copy()
    if MPI.COMM_WORLD.rank == MPI.COMM_WORLD.size - 1:
        bad[-1] = np.nan
    with pytest.raises(SolverFailure, match="state sweep: right-hand side"):
        rf.problem.value(bad)
    assert rf.problem.value(z) == pytest.approx(value, rel=1e-7)


@pytest.mark.parallel(3)
def test_a_failed_solve_in_space_does_not_spoil_the_next():
    """Three ranks in space: after NaN in the control, values are those of a new functional."""
    rf, fresh = (functional(pf.SpaceTime("3x1"), rtol=1e-8) for _ in range(2))
    z = rf.array(point_and_direction(rf)[0])
    with pytest.raises(SolverFailure, match=r"state: level \d, steps .*not finite"):
        rf.problem.value(np.where(np.arange(len(z)) == 3, np.nan, z))
    assert rf.problem.value(z) == pytest.approx(fresh.problem.value(z), rel=1e-12)
    np.testing.assert_allclose(rf.problem.derivative(z), fresh.problem.derivative(z), rtol=1e-8, atol=1e-14)


@pytest.mark.parallel([1, 3])
def test_the_first_rank_of_all_speaks():
    """Monitor lines of state and adjoint, which runs on the reversed communicator; also with two ranks in space."""
    size = MPI.COMM_WORLD.size
    for grid in {1: ["1x1"], 3: ["1x3", "3x1"]}[size]:
        rf = functional(pf.SpaceTime(grid), rtol=1e-2, monitor=True)
        with logged() as lines:
            rf(point_and_direction(rf)[0])
            rf.derivative()
        spoken = {line.split()[0] for line in lines if "residual" in line}
        assert spoken == ({"state", "adjoint"} if MPI.COMM_WORLD.rank == 0 else set())


@pytest.mark.parallel([1, 3])
@pytest.mark.parametrize("relax", ["F", "FCF"])
def test_krylov_is_never_behind_plain_cycles(relax):
    """Heat by finite elements: FGMRES's residual after each cycle is at most that of the plain iteration."""
    histories = []
    for krylov in (None, {"ksp_type": "fgmres"}):
        rf = functional(pf.SpaceTime(), n=8, steps=32, tableau="BE")
        parameters = {"mgrit": {"levels": 2, "coarsening": 4, "relax": relax, "rtol": 1e-9, "start": "guess"}}
        rf = pf.TimeParallelReducedFunctional(
            rf.evolution,
            pf.RunningMisfit(rf.evolution.u**2 * dx),
            spacetime=rf.spacetime,
            solver_parameters=parameters | ({"krylov": krylov} if krylov else {}),
        )
        rf(point_and_direction(rf)[0])
        rf.derivative()
        histories.append([result.residuals for _, result in rf.problem.sweeps.results])
    for plain, accelerated in zip(*histories, strict=True):
        both = list(zip(plain[1:], accelerated[1:], strict=False))
        assert len(both) >= 3
        assert all(a <= p * (1 + 1e-6) + 1e-14 * plain[0] for p, a in both)

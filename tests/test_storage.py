"""Sweeps that store C-points only: the same numbers as with all points, on any grid, and what that costs."""

from functools import partial

import numpy as np
import pytest
from firedrake import Function, TestFunction, ds, dx, grad, inner, sin
from irksome import Dt
from mpi4py import MPI

import pint_fem as pf
from pint_fem.errors import InputError
from pint_fem.kernels.compressed_vectors import CompressedVectors, sample_times
from pint_fem.mgrit import SolverFailure
from pint_fem.misfits.base import Misfit
from tests.heat import heat, point_and_direction
from tests.meshes import square

M, STEPS = 4, 16


def misfits(ev, kinds):
    u, t, dt = ev.u, ev.t, ev.dt
    times = dt * np.array([1, 2.5, 7, 8.2, 11.5])  # readings at points, between them, across slabs
    made = {
        "running": lambda: pf.RunningMisfit(inner(u - sin(30 * t), u - sin(30 * t)) * dx),
        "sensors": lambda: pf.PointSensors([(0.3, 0.4), (0.7, 0.6)], times, np.ones((5, 2)), weight=3.0),
        "functionals": lambda: pf.LinearObservations([u * dx, grad(u)[0] * ds(2)], times, np.ones((5, 2))),
        "terminal": lambda: pf.TerminalMisfit((u - t) ** 2 * dx),
        "quartic": lambda: pf.RunningMisfit((u**4 + t * u**2) * dx),
    }
    return [made[kind]() for kind in kinds.split("+")]


def functional(st, storage, kinds="running+sensors", *, parameters=None, steps=STEPS, **problem):
    mesh = square(4, st.space_comm)
    ev = heat(mesh, steps=steps, **problem)
    mgrit = dict(storage=storage, coarsening=(M, 2), levels=3, rtol=1e-13)
    return pf.TimeParallelReducedFunctional(
        ev,
        misfits(ev, kinds),
        regularisation=0.1 * ev.control**2 * dx,
        spacetime=st,
        solver_parameters={"mgrit": mgrit, **(parameters or {})},
    )


def numbers(rf):
    """J, its derivatives along a direction, by tangents and by adjoints, and J'' along it."""
    z, dz = point_and_direction(rf)
    z, dz = (rf.layout.join([np.array([f.dat.data_ro for f in part.subfunctions]) if rf.evolution.per_step else
             part.dat.data_ro]) for part in (z, dz))  # fmt: skip
    p = rf.problem
    along = lambda dual: rf.layout.pairing(dual, dz)
    return np.array(
        [
            p.value(z),
            p.tangent_value(z, dz),
            along(p.derivative(z)),
            along(p.hessian_action(z, dz)),
            along(p.hessian_action(z, dz, gauss_newton=True)),
        ]
    )


def compare(st, rtol, **problem):
    a, b = (numbers(functional(st, storage, **problem)) for storage in ("all", "C"))
    np.testing.assert_allclose(b, a, rtol=rtol, atol=0)
    assert b[1] == pytest.approx(b[2], rel=1e-12)


@pytest.mark.parametrize("kinds", ["running+sensors", "functionals", "terminal", "quartic"])
@pytest.mark.parametrize("per_step", [False, True])
def test_linear(kinds, per_step):
    compare(pf.SpaceTime(), 1e-13, kinds=kinds, per_step=per_step)


@pytest.mark.parametrize(("kinds", "per_step"), [("running+sensors", True), ("quartic", False)])
def test_nonlinear(kinds, per_step):
    """To what Newton leaves of the stages, 1e-14 of a state."""
    compare(pf.SpaceTime(), 1e-11, kinds=kinds, per_step=per_step, linear=False)


@pytest.mark.parallel(3)
def test_on_time_ranks():
    compare(pf.SpaceTime(), 1e-12, per_step=True)
    compare(pf.SpaceTime(), 1e-11, linear=False)


@pytest.mark.parallel(4)
def test_on_a_grid():
    compare(pf.SpaceTime("2x2"), 1e-11)


@pytest.mark.parallel([1, 3])
@pytest.mark.parametrize(
    ("kinds", "problem"),
    [("running+sensors", {}), ("terminal", dict(per_step=True)), ("running+sensors", dict(linear=False))],
)
def test_sequential_steps_store_c_points(kinds, problem):
    """Without cycles: the numbers of sequential stepping with all states, which it does not keep."""
    runs = [
        functional(pf.SpaceTime(), storage, kinds, parameters={"time_solver": "serial"}, **problem)
        for storage in ("all", "C")
    ]
    a, b = map(numbers, runs)
    np.testing.assert_allclose(b, a, rtol=1e-11 if "linear" in problem else 1e-12, atol=0)
    solvers = runs[1].problem.sweeps.solvers
    assert solvers.is_sequential
    assert solvers.kind == "serial"
    assert solvers.propagators[0] is solvers.propagators[1]
    assert len(runs[1].problem.U) == runs[1].problem.sweeps.slab.k // M + 1
    assert runs[1].problem.sweeps.counts["cycles"] == 0
    with pytest.raises(InputError, match="storage 'C'"):
        functional(pf.SpaceTime(), "C", parameters={"time_solver": "serial"}, steps=STEPS + 1)


@pytest.mark.parallel(3)
@pytest.mark.parametrize("linear", [True, False])
def test_bits_do_not_depend_on_time_ranks(linear):
    """Slabs of whole intervals, also uneven ones. Where factors are of one step after another (nonlinear), the order of
    their pivots is that of a rank's first one: to round-off only.
    """
    runs = [functional(st, "C", linear=linear) for st in (pf.SpaceTime(), pf.SpaceTime("1x1", comm=MPI.COMM_SELF))]
    for rf in runs:
        z = np.asarray(rf.array(rf.controls[0].control))
        rf.problem.derivative(z)
    own, _ = runs[0].problem.sweeps.stored
    assert len(runs[0].problem.U) == own.stop - own.start == runs[0].problem.sweeps.slab.k // M + 1
    tolerance = 0 if linear else 1e-12
    many, one = (rf.problem for rf in runs)
    for a, b in ((many.U, one.U[own]), (many.L, one.L[own])):
        assert np.abs(a - b).max() <= tolerance * np.abs(b).max()
    assert runs[0].problem.value(z) == pytest.approx(runs[1].problem.value(z), rel=tolerance, abs=0)


def test_other_controls():
    """The initial condition besides a static one; nothing moves in time."""
    out = []
    for storage in ("all", "C"):
        mesh = square(3, MPI.COMM_SELF)
        base = heat(mesh, steps=8)
        u0 = Function(base.V).interpolate(sin(3 * base.u))
        ev = pf.Evolution(base.residual, base.u, tableau=pf.SDIRK2(), dt=base.dt, nsteps=8, t=base.t, bcs=base.bcs,
                          control=[base.control, u0], initial=u0)  # fmt: skip
        rf = pf.TimeParallelReducedFunctional(
            ev, pf.RunningMisfit(ev.u**2 * dx), spacetime=pf.SpaceTime("1x1", comm=MPI.COMM_SELF),
            solver_parameters={"mgrit": dict(storage=storage, coarsening=(4, 2), rtol=1e-13)},
        )  # fmt: skip
        z, dz = np.random.default_rng(0).standard_normal((2, rf.layout.size))
        out.append(np.concatenate([rf.problem.derivative(z), rf.problem.hessian_action(z, dz)]))
    np.testing.assert_allclose(out[1], out[0], rtol=0, atol=1e-12 * np.abs(out[0]).max())


@pytest.mark.parallel([1, 3])
@pytest.mark.parametrize("linear", [True, False])
def test_reports_see_all_points(linear):
    """States and readings are those of all points; slabs of C-points are refused where all are wanted."""
    seen = []
    for storage in ("all", "C"):
        rf = functional(pf.SpaceTime(), storage, linear=linear)
        z, sensors = np.asarray(rf.array(rf.controls[0].control)), rf.problem.misfits[1]
        rows, states, slab = [], {}, rf.problem.sweeps.slab
        for first, block in rf.problem.states(z):
            rows += range(first, first + len(block))
            states |= {slab.lo + first + i: u.copy() for i, u in enumerate(block)}
        assert rows == list(range(slab.k + 1))
        for others in rf.spacetime.time_comm.allgather(states):  # slabs of C-points are others
            states |= others
        readings = sensors.readings(rf.problem.observations(z, sensors))
        seen.append((np.array([states[n] for n in range(STEPS + 1)]), readings))
        with pytest.raises(InputError, match="a misfit of this problem"):
            rf.problem.observations(z, pf.RunningMisfit(rf.evolution.u**2 * dx))
    for a, b in zip(*seen, strict=True):
        np.testing.assert_allclose(b, a, rtol=0, atol=1e-11 * np.abs(a).max())
    for ask in (sensors.gradient, sensors.values, rf.problem.misfits[0].gradient):
        with pytest.raises(InputError, match="storage 'C'"):
            ask(rf.problem.U)


def test_values_that_fail_are_no_first_guess():
    """The next solve starts cold, as does the next step of a one-shot method."""
    rf = functional(pf.SpaceTime("1x1", comm=MPI.COMM_SELF), "C", "running")
    z, p = np.asarray(rf.array(rf.controls[0].control)), rf.problem
    (misfit,) = p.misfits
    for method, ask in (("observe", p.value), ("adjoint_source", p.derivative), ("observe", p.advance)):
        p.value(z)
        point = p.evaluations[0]
        assert not point.cold["state"]

        def fails(*args):
            raise FloatingPointError("too large")

        setattr(misfit, method, fails)
        with pytest.raises(SolverFailure, match="too large"):
            ask(1e3 * z)
        delattr(misfit, method)
        assert point.z is None
        assert point.cold == {"state": True, "adjoint": True}
        assert np.array_equal(point.U, np.broadcast_to(p.sweeps.initial, point.U.shape))


def test_initial_condition_alone():
    """No control of the steps: right-hand sides are condensed once for a gradient and once for a Hessian action."""
    base = heat(square(2, MPI.COMM_SELF), steps=8)
    u0 = Function(base.V).interpolate(sin(3 * base.u))
    residual = inner(Dt(base.u), v := TestFunction(base.V)) * dx + inner(grad(base.u), grad(v)) * dx
    ev = pf.Evolution(residual, base.u, tableau=pf.SDIRK2(), dt=base.dt, nsteps=8, control=u0, initial=u0)
    rf = pf.TimeParallelReducedFunctional(
        ev, pf.RunningMisfit(ev.u**2 * dx), spacetime=pf.SpaceTime("1x1", comm=MPI.COMM_SELF),
        solver_parameters={"mgrit": dict(storage="C", coarsening=4)},
    )  # fmt: skip
    calls, kind = [], rf.problem._trajectories
    condense = kind._condense
    kind._condense = lambda *args: calls.append(args) or condense(*args)
    z = np.asarray(rf.array(u0))
    g = rf.problem.derivative(z)
    assert len(calls) == 1
    h = rf.problem.hessian_action(z, z)
    assert len(calls) == 2
    np.testing.assert_allclose(h, g, rtol=1e-9, atol=1e-12 * np.abs(g).max())  # J is quadratic and homogeneous


def test_what_it_costs():
    """Steps of the finest level in units of all steps, besides the cycles' own: a pass over the states for a value;
    one, and two of the adjoint, for a gradient.
    """
    rf = functional(pf.SpaceTime(), "C", "running")
    sweeps, p = rf.problem.sweeps, rf.problem.sweeps.propagators[0]
    z = np.asarray(rf.array(rf.controls[0].control))
    calls = {"forward": 0, "backward": 0}

    def counted(name, method):
        def call(u, out, more=None):
            calls[name] += len(u)
            return method(u, out, more)

        return call

    p.apply, p.apply_transposed = counted("forward", p.apply), counted("backward", p.apply_transposed)
    for solver in (sweeps.solvers.state, sweeps.solvers.adjoint):
        step = solver.levels[0].propagator
        step._apply = p.apply_transposed if step.transposed else p.apply
    rf.problem.value(z)
    inside = (M - 1) * STEPS // M
    # condensed: affine, and controls
    assert calls["forward"] == sweeps.solvers.state.levels[0].phi_calls + inside + STEPS + M
    calls.update(forward=0, backward=0)
    rf.problem.derivative(z)
    assert calls["forward"] == inside
    assert calls["backward"] == sweeps.solvers.adjoint.levels[0].phi_calls + 2 * inside + 1


@pytest.mark.parallel([1, 3])
def test_refused():
    """On every rank."""
    st = pf.SpaceTime()
    for problem, message in (
        (dict(steps=18), "18 steps and coarsening 4.*give 16 or 20"),
        (dict(parameters={"krylov": {"ksp_type": "fgmres"}}), "storage"),
    ):
        with pytest.raises(InputError, match=message):
            functional(st, "C", **problem)
    if st.time_size == 3:
        with pytest.raises(InputError, match="3 time ranks for 1 groups of 4"):
            st.slab(4, group=4)

    class Whole(Misfit):
        values = directional = gradient = hessian = None

    rf = functional(st, "C")
    with pytest.raises(InputError, match="Whole requires the state at all points"):
        pf.TimeParallelReducedFunctional(
            rf.evolution, Whole(), spacetime=st,
            solver_parameters={"mgrit": dict(storage="C", coarsening=4)},
        )  # fmt: skip


EVALUATE = {
    "values": lambda problem, z: problem.value(z),
    "directional": lambda problem, z: problem.tangent_value(z, z),
    "gradient": lambda problem, z: problem.derivative(z),
    "hessian": lambda problem, z: problem.hessian_action(z, z),
}


@pytest.mark.parametrize("method", EVALUATE)
@pytest.mark.parametrize("given", ["None", "shape"])
def test_what_a_misfit_of_the_users_own_returns(method, given):
    """Without a result, or one of another shape: the method, and the shape that is required."""

    class Own(Misfit):
        values = directional = lambda self, U, *dU: np.zeros(len(U) - 1)
        gradient = hessian = lambda self, U, *dU: np.zeros_like(U)

    wrong = None if given == "None" else np.zeros(1)
    setattr(Own, method, lambda self, U, *dU: wrong)
    ev = heat(square(2, MPI.COMM_SELF), steps=4)
    rf = pf.TimeParallelReducedFunctional(ev, Own(), solver_parameters={"time_solver": "serial"})
    with pytest.raises(InputError, match=f"of a misfit returned {given}.*: return an array of shape"):
        EVALUATE[method](rf.problem, np.zeros(rf.layout.size))


def test_minimises_from_a_checkpoint(tmp_path):
    """The same iterates as with all points; a run that goes on from a file ends where one run does."""
    results = []
    for storage, stops in (("all", [2]), ("C", [2]), ("C", [1, 2])):
        for most in stops:
            rf = functional(pf.SpaceTime(), storage, "running", steps=8)
            path = tmp_path / f"{storage}{len(stops)}.h5"
            result = rf.minimize_trust_region(max_it=most, gtol_rel=1e-9, checkpoint=path)
        results.append(result)
    np.testing.assert_allclose(results[1].x, results[0].x, rtol=1e-9)
    assert np.array_equal(results[2].x, results[1].x)


@pytest.mark.parallel([1, 3])
@pytest.mark.parametrize("storage", ["all", "C"])
@pytest.mark.parametrize("method", ["observe", "adjoint_source"])
def test_failures_reach_every_rank(storage, method):
    """Of a misfit on the last rank: mistakes as they are, where bad numbers give an infinite value."""
    st = pf.SpaceTime()
    last = st.time_comm.rank == st.time_size - 1
    raised = [TypeError]

    def fails(self, *args):
        if last and raised:
            raise raised[0]("wrong")
        return getattr(pf.RunningMisfit, method)(self, *args)

    good = functional(st, storage, "running")
    Bad = type("Bad", (pf.RunningMisfit,), {method: fails})
    rf = pf.TimeParallelReducedFunctional(
        good.evolution, Bad(good.evolution.u**2 * dx), spacetime=st,
        solver_parameters={"mgrit": dict(storage=storage, coarsening=M)},
    )  # fmt: skip
    z = np.asarray(rf.array(rf.controls[0].control))
    ask = rf.problem.value if method == "observe" else rf.problem.derivative
    with pytest.raises(TypeError if last else RuntimeError, match="wrong") as caught:
        ask(z)
    assert not isinstance(caught.value, SolverFailure)
    assert last or f"rank {st.comm.size - 1}: TypeError" in str(caught.value)
    raised[0] = FloatingPointError
    with pytest.raises(SolverFailure, match="FloatingPointError: wrong"):
        ask(1.1 * z)
    raised.clear()
    assert np.isfinite(ask(1.1 * z)).all()


def test_vectors_of_few_fields_are_stored_as_coefficients():
    """Sums of two fields are computed once, others each time they are asked for; all are exact to round-off."""
    a, b, other = np.random.default_rng(2).standard_normal((3, 40))
    of = lambda t: np.cos(t) * a + 3 * np.sin(t) * b
    vectors, calls = CompressedVectors(MPI.COMM_SELF, [partial(of, t) for t in sample_times(0.0, 2.0)]), []
    for t in (0.3, 1.7, 0.3, 1.7):
        np.testing.assert_allclose(vectors.get(t, lambda t=t: calls.append(t) or of(t)), of(t), rtol=0, atol=1e-13)
    assert calls == [0.3, 1.7]
    for _ in range(2):
        assert np.array_equal(vectors.get("other", lambda: calls.append("other") or other), other)
    assert calls[2:] == ["other"] * 2

"""Several controls of every kind at once: fields, fields a step, real numbers, the initial condition, boundary values,
coefficients in the operator.
"""

from functools import cache

import firedrake as fd
import numpy as np
import pytest
from firedrake import (
    Cofunction,
    Constant,
    DirichletBC,
    Function,
    FunctionSpace,
    SpatialCoordinate,
    TestFunction,
    cos,
    dot,
    dx,
    exp,
    grad,
    inner,
    sin,
)
from firedrake import RieszMap as FiredrakeRieszMap
from irksome import Dt
from mpi4py import MPI

import pint_fem as pf
from pint_fem.adjoint.riesz import RieszMap
from pint_fem.evolution.boundary import BoundaryControls
from pint_fem.propagators import FormPropagator, LinearPropagator, StepData, TapePropagator
from tests.meshes import square
from tests.taylor import check_orders

KINDS = ("source", "strength", "amplitude", "wind", "initial", "wall", "level")
NONLINEAR = (*KINDS, "conductivity", "exchange")
# of directions, so that remainders of order 3 are above round-off and those of order 4 are far below them
LENGTH = {"source": 40, "strength": 6, "amplitude": 6, "wind": 14, "initial": 10, "wall": 2, "level": 1,
          "conductivity": 4, "exchange": 16}  # fmt: skip
GRIDS = {1: "1x1", 4: "2x2"}


def evolution(mesh, wanted=KINDS, *, linear=True, steps=10, tableau="SDIRK2", moving_wall=False):
    """Heat in a plate; each of the wanted functions is a control, the others are data."""
    V, D, R = FunctionSpace(mesh, "CG", 1), FunctionSpace(mesh, "DG", 0), FunctionSpace(mesh, "R", 0)
    x, y = SpatialCoordinate(mesh)
    u, v, t = Function(V), TestFunction(V), pf.time_function(mesh)
    f = {
        "source": Function(V, name="source").interpolate(1 + x),
        "strength": Function(D, name="strength").interpolate(y),  # a step
        "amplitude": Function(R, name="amplitude").assign(0.7),  # a step
        "wind": Function(R, name="wind").assign(0.3),
        "initial": Function(V, name="initial").interpolate(x * y),
        "wall": Function(V, name="wall").interpolate(y),
        "level": Function(R, name="level").assign(0.5),
        "conductivity": Function(V, name="conductivity").interpolate(0.1 * sin(3 * x)),
        "exchange": Function(R, name="exchange").assign(0.8),
    }
    kappa = 1 if linear else exp(f["conductivity"]) * (1 + 0.3 * u**2)
    robin = 1 if linear else f["exchange"] ** 2
    drift = f["wind"] * y if linear else f["wind"] * u.dx(0)
    load = f["source"] + f["strength"] * cos(x) + f["amplitude"] * x + drift
    # a fixed degree: UFL estimates one for each derivative, which then is not quite that of what is not polynomial
    dx, ds = fd.dx(degree=4), fd.ds(degree=4)
    F = Dt(u) * v * dx + kappa * dot(grad(u), grad(v)) * dx + robin * u * v * ds(3) - (load + sin(5 * t) * x) * v * dx
    wall = f["wall"] * cos(t) if moving_wall else f["wall"]
    bcs = [DirichletBC(V, wall + (0 if moving_wall else x), 1), DirichletBC(V, f["level"] * (1 + y), 2)]
    return pf.Evolution(
        F, u, tableau={"BE": pf.BackwardEuler, "SDIRK2": pf.SDIRK2, "midpoint": pf.ImplicitMidpoint}[tableau](),
        dt=0.02, nsteps=steps, control=[f[name] for name in wanted],
        per_step=[f[name] for name in ("strength", "amplitude") if name in wanted], t=t, bcs=bcs, initial=f["initial"],
    )  # fmt: skip


def functional(st, wanted=KINDS, *, n=3, riesz_map="L2", coarsening=3, solver=None, **options):
    mesh = square(n, st.space_comm)
    ev = evolution(mesh, wanted, **options)
    u, x = ev.u, SpatialCoordinate(mesh)[0]
    misfits = [
        pf.RunningMisfit((inner(u - x, u - x) + u**4) * dx),
        pf.TerminalMisfit(u**2 * dx),
        pf.PointSensors([[0.3, 0.3], [0.7, 0.6]], np.array([0.013, 0.053, 0.1]) * ev.nsteps / 10, np.ones((3, 2))),
    ]
    static = sum(1e-3 * c**2 * dx for c in ev.controls if c not in ev.stepwise)
    stepwise = [1e-3 * (c**2 + c**4) * dx for c in ev.stepwise]
    return pf.TimeParallelReducedFunctional(
        ev, misfits, regularisation=[*([static] if static else []), *stepwise], spacetime=st, riesz_map=riesz_map,
        solver_parameters=solver or {"mgrit": {"coarsening": (coarsening,), "rtol": 1e-13}},
    )  # fmt: skip


def point_and_direction(rf, seed=0):
    """Smooth, the same on every grid: a static control's values depend on the place, one's a step on the step too."""
    pair = []
    for phase in (0.0, 1.0 + seed):
        values = rf.function(rf.array([c.control for c in rf.controls]))
        values = values if isinstance(values, list) else [values]
        for i, (f, control) in enumerate(zip(values, rf.evolution.controls, strict=True)):
            stepwise = control in rf.evolution.stepwise
            for j, part in enumerate(f.subfunctions if stepwise else [f]):
                n = rf.layout.slab.lo + j if stepwise else 0
                if part.function_space().ufl_element().family() == "Real":
                    part.assign(np.cos(phase + i + 0.3 * n))
                else:
                    x, y = SpatialCoordinate(rf.evolution.V.mesh())
                    part.interpolate(cos(Constant(phase + i + 0.2 * n) + x - y))
        pair.append(values if len(values) > 1 else values[0])
    return pair


def check_taylor(rf, only=None):
    """Orders of the remainders along a direction of all controls or of one of them; tangent and adjoint."""
    # other seeds make terms of some kinds, or kinds of all, cancel
    m, h = point_and_direction(rf, seed=0 if only is None else 5)
    directions = h if isinstance(h, list) else [h]
    for control, part in zip(rf.evolution.controls, directions, strict=True):
        scale = 1.0 if only is None else LENGTH[only] if control.name() == only else 0.0
        for f in part.subfunctions if control in rf.evolution.stepwise else [part]:
            f.assign(scale * f)
    check_orders(rf, m, h)
    gradient = rf.derivative()
    gradient = gradient if isinstance(gradient, list) else [gradient]
    product = sum(hi._ad_dot(gi) for hi, gi in zip(directions, gradient, strict=True))
    assert abs(product - rf.tlm(h)) <= 1e-9 * abs(product)


@pytest.fixture(scope="module")
def all_controls():
    """``all_controls(linear)``: a functional of all kinds of controls on one rank, made once."""
    return cache(lambda linear: of_all_kinds(pf.SpaceTime("1x1"), linear))


def of_all_kinds(st, linear):
    rf = functional(st) if linear else functional(st, NONLINEAR, linear=False, steps=4, coarsening=2)
    kind = LinearPropagator if linear else FormPropagator
    assert all(isinstance(p, kind) for p in rf.problem.sweeps.propagators)
    return rf


@pytest.mark.parametrize("name", [*KINDS, None])
def test_orders_linear(all_controls, name):
    """Of each kind, and of all at once."""
    check_taylor(all_controls(True), name)


@pytest.mark.parametrize("name", [*NONLINEAR, None])
def test_orders_nonlinear(all_controls, name):
    """Of each kind, and of all at once."""
    check_taylor(all_controls(False), name)


@pytest.mark.parametrize("linear", [True, False])
@pytest.mark.parametrize("name", ["source", "strength", "initial"])
def test_the_only_control(name, linear):
    """A field, a field a step and the initial condition, without any other control."""
    rf = functional(pf.SpaceTime("1x1", comm=MPI.COMM_SELF), (name,), linear=linear, steps=5, n=2, tableau="BE")
    check_taylor(rf, name)


@pytest.mark.parallel(4)
@pytest.mark.parametrize("linear", [True, False])
def test_same_on_every_grid(linear):
    """J, and gradient, Hessian action, inner product and tangent in a direction of each kind of control, against one
    rank, whose remainders have their orders.
    """
    results = []
    for st in (pf.SpaceTime(GRIDS[MPI.COMM_WORLD.size]), pf.SpaceTime("1x1", comm=MPI.COMM_SELF)):
        rf = of_all_kinds(st, linear)
        m, h = point_and_direction(rf)
        z, dz, p = rf.array(m), rf.array(h), rf.problem
        found = [rf(m), p.tangent_value(z, dz)]
        g, H = p.derivative(z), p.hessian_action(z, dz)
        for control in rf.evolution.controls:
            only = np.zeros_like(dz)
            rf.layout.part(only, control)[:] = rf.layout.part(dz, control)
            found += [rf.layout.pairing(g, only), rf.layout.pairing(H, only), rf.inner.inner(z, only)]
            found.append(p.tangent_value(z, only))
        results.append(found)
    assert np.allclose(*results, rtol=1e-9)


@pytest.mark.parametrize("tableau", ["midpoint", "SDIRK2"])
def test_linear_form_and_tape_agree(tableau):
    """Where the last stage is the new state, and where it is not."""
    mesh = square(3, MPI.COMM_SELF)
    ev = evolution(mesh, tableau=tableau)
    rng, k = np.random.default_rng(0), 2
    u, du, lam = rng.standard_normal((3, k, ev.state_size))
    z, dz = rng.standard_normal((2, k, ev.control_size))
    data = StepData(ev.time(np.arange(k)), z, u)
    results = []
    for kind in (LinearPropagator, FormPropagator, TapePropagator):
        propagator, outs = kind(ev), []
        for name, arguments in (("step", (u,)), ("tangent", (du, dz)), ("adjoint", (lam,))):
            out = np.empty_like(u)
            getattr(propagator, name)(data, *arguments, out)
            outs.append(out)
        results.append([*outs, propagator.control_adjoint(data, lam), *propagator.second_order(data, du, dz, lam)])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert np.allclose(a, b, rtol=1e-9, atol=1e-10)


def test_boundary_value_that_moves_in_time():
    """Not for constant operators: the form propagator's, the same as the tape's."""
    mesh = square(2, MPI.COMM_SELF)
    ev = evolution(mesh, ("wall", "level"), moving_wall=True)
    rf = functional(pf.SpaceTime("1x1", comm=MPI.COMM_SELF), ("wall",), moving_wall=True, n=2, steps=4)
    assert isinstance(rf.problem.sweeps.propagators[0], FormPropagator)
    check_taylor(rf, "wall")
    rng = np.random.default_rng(0)
    u, lam = rng.standard_normal((2, 2, ev.state_size))
    data = StepData(ev.time(np.arange(2)), rng.standard_normal(ev.control_size), u)
    a, b = (kind(ev).control_adjoint(data, lam) for kind in (FormPropagator, TapePropagator))
    assert np.allclose(a, b, rtol=1e-10)


def test_where_conditions_overlap_the_last_one_holds():
    """Changes of boundary values against what Firedrake's conditions write to a function, one after the other."""
    mesh = square(3, MPI.COMM_SELF)
    V, R = FunctionSpace(mesh, "CG", 1), FunctionSpace(mesh, "R", 0)
    q, r, plain = Function(V, name="q"), Function(R, name="r"), Function(V)
    bcs = [DirichletBC(V, 2 * q, "on_boundary"), DirichletBC(V, 3 * r, 1), DirichletBC(V, 0, 3)]
    operator = BoundaryControls(bcs, V, (q, r), Function(V), None)
    dz, y = np.random.default_rng(4).standard_normal((2, V.dim() + 1))
    q.dat.data[:], r.dat.data[:] = dz[:-1], dz[-1]
    for bc in bcs:
        bc.apply(plain)
    np.testing.assert_allclose(operator.lift(dz), plain.dat.data_ro, rtol=1e-14)
    assert y[:-1] @ operator.lift(dz) == pytest.approx(operator.pull_back(y[:-1]) @ dz, rel=1e-12)


def test_riesz_maps():
    """Each kind is symmetric and its own inverse; a firedrake.RieszMap gives what the form does; lumping keeps the
    measure.
    """
    mesh = square(3, MPI.COMM_SELF)
    V, R = FunctionSpace(mesh, "CG", 2), FunctionSpace(mesh, "R", 0)
    rng = np.random.default_rng(0)
    for space, kinds in ((V, ("L2", "H1", "l2", "lumped", FiredrakeRieszMap(V, "H1"))), (R, ("L2", "l2"))):
        size = len(Cofunction(space.dual()).dat.data_ro.ravel())
        a, b = rng.standard_normal((2, size))
        for kind in kinds:
            riesz = RieszMap(space, kind)
            assert np.allclose(riesz.primal(riesz.dual(a)), a, rtol=1e-9, atol=1e-9)
            assert np.isclose(riesz.dual(a) @ b, riesz.dual(b) @ a)
    a = rng.standard_normal(49)
    assert np.allclose(RieszMap(V, FiredrakeRieszMap(V, "H1")).dual(a), RieszMap(V, "H1").dual(a))
    assert np.isclose(RieszMap(V, "lumped").diagonal.sum(), 1.0)
    assert (RieszMap(V, "lumped").diagonal > 0).all()
    rf = functional(pf.SpaceTime("1x1", comm=MPI.COMM_SELF), ("source", "level"), n=2, riesz_map=["H1", "l2"])
    z = rf.array(point_and_direction(rf)[0])
    assert np.isclose(rf.inner.inner(z, z), z[:9] @ RieszMap(rf.evolution.V, "H1").dual(z[:9]) + z[9] ** 2)


def test_inner_product_of_a_control_with_a_value_in_each_step():
    """The integral over time as well, and the representative of a value's dual is the value."""
    rf = functional(pf.SpaceTime("1x1", comm=MPI.COMM_SELF), ("strength",), n=2, steps=4)
    z = np.random.default_rng(3).standard_normal(rf.layout.size)
    np.testing.assert_allclose(rf.inner.primal(rf.inner.dual(z)), z, rtol=1e-12)
    integral = sum(fd.assemble(inner(f, f) * dx) for f in rf.function(z).subfunctions)
    assert rf.inner.inner(z, z) == pytest.approx(rf.evolution.dt * integral, rel=1e-12)


def test_bad_controls_are_refused():
    st = pf.SpaceTime("1x1", comm=MPI.COMM_SELF)
    mesh = square(2, st.space_comm)
    V = FunctionSpace(mesh, "CG", 1)
    u, v, q, w, u0 = Function(V), TestFunction(V), Function(V), Function(V, name="w"), Function(V)
    F = (Dt(u) - q) * v * dx
    make = lambda F=F, **options: pf.Evolution(F, u, tableau=pf.BackwardEuler(), dt=0.1, nsteps=2, **options)
    for options, message in (
        ({"control": [q, w]}, "'w' does not appear"),
        ({"control": [q, q]}, "given twice"),
        ({"control": [q, u]}, "state u is no control"),
        ({"control": [q], "per_step": [w]}, "per_step"),
        ({"control": [q, u0], "initial": u0, "per_step": [u0]}, "not the initial condition"),
        ({"control": [q], "initial": q}, "in the residual"),
        ({"control": [w], "bcs": DirichletBC(V, w**2, 1)}, "not affine"),
    ):
        with pytest.raises(pf.InputError, match=message):
            make(**options)
    ev = make((Dt(u) - q - w) * v * dx, control=[q, w], per_step=[w])
    misfit, options = pf.TerminalMisfit(u**2 * dx), {"spacetime": st, "solver_parameters": {"time_solver": "serial"}}
    with pytest.raises(pf.InputError, match="some with one value per step"):
        pf.TimeParallelReducedFunctional(ev, misfit, regularisation=q * w * dx, **options)
    with pytest.raises(pf.InputError, match="2 controls"):
        pf.TimeParallelReducedFunctional(ev, misfit, riesz_map=["L2"], **options)
    rf = pf.TimeParallelReducedFunctional(ev, misfit, **options)
    with pytest.raises(pf.InputError, match="1 controls given, the functional has 2"):
        rf(q)

"""Small misfits between large values: quadratic functionals lose nothing to cancellation, and sweeps and minimisations
end where data are fitted to round-off.
"""

import numpy as np
import pytest
import ufl
from firedrake import (
    COMM_SELF,
    Constant,
    Function,
    FunctionSpace,
    IcosahedralSphereMesh,
    SpatialCoordinate,
    TestFunction,
    VectorFunctionSpace,
    as_vector,
    assemble,
    conditional,
    cos,
    dot,
    dx,
    grad,
    inner,
    sin,
    split,
)
from irksome import Dt
from mpi4py import MPI

import pint_fem as pf
from pint_fem.adjoint.regularisation import _Functional
from pint_fem.kernels.arrays import put
from pint_fem.misfits.reference import data_expression
from pint_fem.optimize import StopReason
from tests.limits import time_limit
from tests.meshes import square
from tests.ranks import cases

STEPS, DT = 8, 1 / 16
SERIAL = {"time_solver": "serial"}
C_POINTS = {"mgrit": {"levels": 2, "coarsening": 2, "storage": "C", "rtol": 1e-12}}


def _mesh(n, comm):
    return square(n, comm)


def _heat(st, offset, data, *, slope=0.0, parameters=SERIAL, misfit=pf.RunningMisfit, shift=0.0):
    """Heat without loss from a constant, with an unknown source, and the functional; ``data(V, t)``."""
    V = FunctionSpace(_mesh(6, st.space_comm), "CG", 1)
    u, v, q, t = Function(V).assign(offset - shift), TestFunction(V), Function(V), pf.time_function(V.mesh())
    F = Dt(u) * v * dx + inner(grad(u), grad(v)) * dx - (q + slope) * v * dx
    ev = pf.Evolution(F, u, tableau=pf.BackwardEuler(), dt=DT, nsteps=STEPS, control=q, t=t)
    d = data(V, t)
    form = inner(u - d, u - d) * dx
    return pf.TimeParallelReducedFunctional(ev, misfit(form), spacetime=st, solver_parameters=parameters)


def _source(rf, size):
    x, _ = SpatialCoordinate(rf.evolution.V.mesh())
    return rf.function(rf.array(rf.controls[0].control)).interpolate(size * (1 + x))


def _states(rf, z):
    """State at the local points, each once: on time rank r the points after its first."""
    points = {}
    for first, block in rf.problem.states(rf.array(z)):
        points |= {first + i: row.copy() for i, row in enumerate(block)}
    return {rf.problem.sweeps.slab.lo + i: row for i, row in points.items() if i > 0}


KINDS = {
    "function": lambda offset, size: (
        lambda V, t: Function(V).interpolate(offset + size * sin(7 * SpatialCoordinate(V.mesh())[0]))
    ),
    "Constant": lambda offset, size: lambda V, t: Constant(offset),
    "moving": lambda offset, size: lambda V, t: offset + 0.25 * offset * t,
}


@pytest.mark.parallel([1, 3])
@pytest.mark.parametrize(
    ("kind", "grid"), cases([(kind, "1x1") for kind in KINDS], on_ranks=[("function", "3x1"), ("moving", "1x3")])
)
@time_limit(120)
def test_offsets_of_ten_million_misfits(kind, grid):
    offset, size = 65536.0, 65536e-7  # times of steps times the offset are exact
    st = pf.SpaceTime(grid)
    data = KINDS[kind](offset, size)
    for parameters in (SERIAL, C_POINTS):
        rf = _heat(st, offset, data, slope=0.25 * offset if kind == "moving" else 0.0, parameters=parameters)
        q = _source(rf, 5 * size)
        J, expected = rf(q), 0.0
        V, t = rf.evolution.V, rf.evolution.t
        e, d = Function(V), Function(V)
        for point, state in _states(rf, q).items():
            t.assign(point * DT)
            d.interpolate(data(V, t))  # differences of coefficients are exact
            with d.dat.vec_ro as vec:
                put(e, state - vec.array_r)
            expected += DT * assemble(inner(e, e) * dx)
        expected = st.time_comm.allreduce(expected)
        assert abs(J - expected) < 1e-10 * expected
    if kind != "moving":
        # the same problem with temperatures from another zero
        shifted = _heat(st, offset, lambda V, t: Function(V).interpolate(data(V, t) - offset), shift=offset)
        z = rf.array(q)
        assert abs(shifted.problem.value(z) - J) < 1e-7 * J
        g, other = (f.problem.derivative(z) for f in (rf, shifted))
        assert np.abs(g - other).max(initial=0) < 1e-7 * st.comm.allreduce(np.abs(other).max(initial=0), op=MPI.MAX)


@pytest.mark.parametrize(("offset", "size", "tolerance"), [(300, 1e-3, 1e-12), (1e5, 1e-2, 1e-10), (1e5, 1e-4, 1e-10)])
def test_temperatures_and_pressures(offset, size, tolerance):
    """Round-off of the old formula was 1.5e-5, 6.5% and all of J."""
    st = pf.SpaceTime("1x1", comm=COMM_SELF)
    rf = _heat(st, offset, KINDS["function"](offset, size), misfit=pf.TerminalMisfit)
    q = _source(rf, 5 * size)
    J, d = rf(q), KINDS["function"](offset, size)(rf.evolution.V, None)
    e = Function(rf.evolution.V)
    put(e, rf.problem.U[-1] - d.dat.data_ro)
    assert abs(J - assemble(e * e * dx)) < tolerance * J
    result = rf.minimize_trust_region(q, max_it=30)
    assert result.reason is StopReason.GRADIENT
    assert result.value < 1e-6 * J


def test_what_a_functional_compares_with():
    mesh = _mesh(2, COMM_SELF)
    x, y = SpatialCoordinate(mesh)
    V, Z = FunctionSpace(mesh, "CG", 1), VectorFunctionSpace(mesh, "CG", 1)
    u, d, w, f = Function(V), Function(V).interpolate(1 + x), Function(Z), Function(Z).interpolate(as_vector([x, 3]))
    i = ufl.Index()
    for form, function, expected in (
        ((u - d) ** 2 * dx, u, d),
        (2 * (300.5 - u) ** 2 * dx, u, Constant(300.5)),
        (inner(grad(u - d), grad(u - d)) * dx, u, d),
        ((3 * u - 3 * d) ** 2 * dx, u, d),
        ((u / 4 - 1) ** 2 * dx, u, Constant(4)),
        (conditional(x < 0.5, 1, 0) * (u - x * y) ** 2 * dx, u, x * y),
        (inner(w - f, w - f) * dx, w, f),
        (dot(f - w, f - w) * dx, w, f),
        ((w[i] - f[i]) * (w[i] - f[i]) * dx, w, f),
        ((w[1] - y) ** 2 * dx, w, as_vector([0 * y, y])),
    ):
        found = data_expression(form, function)
        assert assemble(inner(found - expected, found - expected) * dx(domain=mesh)) == pytest.approx(0, abs=1e-14)
    for form in (u**2 * dx, inner(grad(u), grad(u)) * dx, d * u * dx):
        assert data_expression(form, u) is None
    W = Z * V
    z = Function(W)
    a, p = split(z)
    found = data_expression(inner(a - f, a - f) * dx + (p - d) ** 2 * dx, z)
    found -= as_vector([f[0], f[1], d])
    assert assemble(inner(found, found) * dx(domain=mesh)) == pytest.approx(0, abs=1e-14)


def test_any_quadratic_functional_keeps_its_value():
    """Also where what it seems to compare with is no minimum, or of another space, or where there is none."""
    st = pf.SpaceTime("1x1", comm=COMM_SELF)
    mesh = _mesh(3, COMM_SELF)
    x, y = SpatialCoordinate(mesh)
    W = VectorFunctionSpace(mesh, "CG", 2) * FunctionSpace(mesh, "DG", 0)
    z, q, t = Function(W), Function(FunctionSpace(mesh, "R", 0)), pf.time_function(mesh)
    a, p = split(z)
    jump, f = (
        conditional(x < 0.4, 300.0, sin(5 * y)),
        Function(FunctionSpace(mesh, "DG", 3)).interpolate(sin(9 * x * y)),
    )
    ev = pf.Evolution(
        inner(Dt(z) + q * z, TestFunction(W)) * dx, z, tableau=pf.BackwardEuler(), dt=0.5, nsteps=2, control=q, t=t,
        initial=Function(W).assign(7.0),
    )  # fmt: skip
    U = 1 + np.random.default_rng(0).random((3, ev.state_size))
    for form in (
        (p - jump) ** 2 * dx + inner(a - as_vector([f, t]), a - as_vector([f, t])) * dx,
        (p - 3) * (p - f) * dx + p * dx,
        p**2 * dx - 2 * f * p * dx + inner(grad(a), grad(a)) * dx,
        (a[0] - t) ** 2 * ufl.ds - (p - 1) ** 2 * dx,
        inner(grad(a) - grad(as_vector([f, f])), grad(a) - grad(as_vector([f, f]))) * dx,
    ):
        misfit = pf.RunningMisfit(form)
        misfit.bind(ev.private(), st, st.slab(2))
        assert misfit.quadratic
        for value, row, time in zip(misfit.values(U), U[1:], (0.5, 1.0), strict=True):
            put(z, row)
            t.assign(time)
            assert value == pytest.approx(0.5 * assemble(form), rel=1e-12)


@pytest.mark.parametrize("measure", [dx, ufl.ds])
def test_data_that_are_not_the_same_everywhere(measure):
    """Patches where ``u`` is compared with 300 and with 400."""
    st = pf.SpaceTime("1x1", comm=COMM_SELF)
    V = FunctionSpace(_mesh(6, COMM_SELF), "CG", 1)
    x, y = SpatialCoordinate(V.mesh())
    u, q, e = Function(V), Function(V), Function(V)
    left, right, measure = conditional(x < 0.3, 1, 0), conditional(x > 0.6, y, 0), measure(degree=3)
    ev = pf.Evolution(
        inner(Dt(u) - q, TestFunction(V)) * dx, u, tableau=pf.BackwardEuler(), dt=1.0, nsteps=1, control=q
    )
    misfit = pf.TerminalMisfit((left * inner(u - 300, u - 300) + 2 * right * (u - 400) ** 2) * measure)
    misfit.bind(ev.private(), st, st.slab(1))
    u.interpolate(conditional(x < 0.45, 300, 400) + 1e-3 * cos(3 * x * y))
    expected = 0.0
    for part, data in ((left, 300), (2 * right, 400)):
        put(e, u.dat.data_ro - data)
        expected += assemble(e * e * part * measure)
    U = np.array([u.dat.data_ro, u.dat.data_ro])
    assert misfit.values(U)[0] == pytest.approx(expected, rel=1e-9)


def test_controls_near_large_values():
    mesh = _mesh(4, COMM_SELF)
    x, _ = SpatialCoordinate(mesh)
    V, R = FunctionSpace(mesh, "CG", 1), FunctionSpace(mesh, "R", 0)
    q, r, q0, e = Function(V), Function(R), Function(V).interpolate(1e5 + x), Function(V)
    form = (q - q0) ** 2 * dx + inner(grad(q - q0), grad(q - q0)) * dx + (r - Constant(2e5)) ** 2 * dx
    functional = _Functional(form, [q, r], lambda values: values)
    z = np.append(q0.dat.data_ro + 1e-2 * np.sin(np.arange(25.0)), 2e5 + 2**-6)
    put(e, z[:25] - q0.dat.data_ro)
    expected = assemble(e * e * dx + inner(grad(e), grad(e)) * dx) + 2.0**-12
    assert abs(functional.value(z) - expected) < 1e-13 * expected
    assert functional.gradient(z)[-1] == 2.0**-5
    assert abs(_Functional(q * q * dx, [q], lambda values: values).value(z[:25]) / assemble(q0 * q0 * dx) - 1) < 1e-6


def test_sensors_near_large_values():
    """At nodes readings are coefficients."""
    st = pf.SpaceTime("1x1", comm=COMM_SELF)
    offset, size = 65536.0, 2.0**-7
    V = FunctionSpace(_mesh(6, COMM_SELF), "CG", 2)
    u, v, q = Function(V).assign(offset), TestFunction(V), Function(V)
    F = Dt(u) * v * dx + inner(grad(u), grad(v)) * dx - q * v * dx
    ev = pf.Evolution(F, u, tableau=pf.BackwardEuler(), dt=DT, nsteps=STEPS, control=q)
    points = np.array([[0.21, 0.34], [0.77, 0.61]])
    sensors = pf.PointSensors(points, [DT * STEPS], [[offset - size, offset + size]])
    rf = pf.TimeParallelReducedFunctional(ev, sensors, spacetime=st, solver_parameters=SERIAL)
    J, e = rf(_source(rf, 5 * size)), Function(V)
    put(e, rf.problem.U[-1] - offset)
    expected = 0.5 * ((np.array(e.at(points)) - [-size, size]) ** 2).sum()
    assert abs(J - expected) < 1e-12 * expected
    readings = sensors.readings(rf.problem.observations(rf.array(_source(rf, 5 * size)), sensors))
    assert np.abs(readings - offset - e.at(points)).max() < 1e-10


# -- data fitted to round-off ------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def sphere():
    """Diffusion on a sphere from an unknown initial condition; the one that the data are made of."""
    mesh = IcosahedralSphereMesh(1.0, refinement_level=1, degree=1, comm=COMM_SELF)
    V = FunctionSpace(mesh, "CG", 1)
    x = SpatialCoordinate(mesh)
    mesh.init_cell_orientations(x)
    u, v, start = Function(V), TestFunction(V), Function(V, name="start")
    F = Dt(u) * v * dx + inner(grad(u), grad(v)) * dx
    ev = pf.Evolution(F, u, tableau=pf.SDIRK2(), dt=0.02, nsteps=STEPS, control=start, initial=start)
    true, d = Function(V).interpolate(1 + x[0] * x[1] + x[2]), Function(V)
    st = pf.SpaceTime("1x1", comm=COMM_SELF)

    def functional(**parameters):
        misfit = pf.TerminalMisfit((u - d) ** 2 * dx)
        return pf.TimeParallelReducedFunctional(ev, misfit, spacetime=st, solver_parameters=parameters)

    rf = functional(**SERIAL)
    rf(true)
    put(d, rf.problem.U[-1])
    return functional, true


SOLVERS = {
    "mgrit": {"mgrit": {"levels": 2, "coarsening": 2}},
    "C-points": {"mgrit": {"levels": 2, "coarsening": 2, "storage": "C"}},
    "krylov": {"mgrit": {"levels": 2, "coarsening": 2}, "krylov": {"ksp_type": "fgmres"}},
    "paradiag": {"time_solver": "paradiag"},
    "serial": SERIAL,
}


@pytest.mark.parametrize("solver", SOLVERS)
@time_limit(120)
def test_fitted_data(sphere, solver):
    functional, true = sphere
    rf = functional(**SOLVERS[solver])
    zero = Function(true.function_space())
    rf(zero)
    rf.derivative()  # a first guess of other magnitude for the adjoint that vanishes
    J, g = rf(true), rf.derivative()
    assert J < 1e-13
    assert np.abs(g.dat.data_ro).max() < 1e-7
    assert not rf.hessian(zero).dat.data_ro.any()
    assert rf.tlm(zero) == 0
    assert rf(zero) > 1
    assert not rf.problem.U.any()  # from a first guess that is not zero
    result = rf.minimize_trust_region(true, max_it=30)
    assert result.reason is StopReason.GRADIENT
    assert result.iterations <= 1

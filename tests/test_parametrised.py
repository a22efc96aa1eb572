"""Initial conditions and fields that are expressions of controls, against serial pyadjoint; real numbers in a state."""

import firedrake as fd
import numpy as np
import pytest
from firedrake import Function, FunctionSpace, TestFunction, assemble, dx, exp, grad, inner, sin, solve
from firedrake.adjoint import Control, ReducedFunctional
from irksome import Dt
from mpi4py import MPI

import pint_fem as pf
from pint_fem.errors import InputError
from pint_fem.kernels.arrays import get
from pint_fem.propagators.tape import recording
from tests.limits import time_limit
from tests.meshes import square
from tests.taylor import check_orders

N, STEP = 4, 1 / 8
GRIDS = {1: ["1x1"], 3: ["1x3", "3x1"]}


class Posed:
    """Heat with a conductivity of two real numbers, and an initial condition of a field, a number and one of them."""

    names = ("a", "b", "height", "shape")

    def __init__(self, st, *, affine=False):
        mesh = square(3, st.space_comm)
        self.st, self.V, self.affine = st, FunctionSpace(mesh, "CG", 1), affine
        R, self.x = FunctionSpace(mesh, "R", 0), fd.SpatialCoordinate(mesh)
        self.controls = [Function(R, name=name).assign(v) for name, v in (("a", 0.3), ("b", -0.2), ("height", 0.8))]
        self.controls.append(Function(self.V, name="shape").interpolate(self.x[1]))

    def conductivity(self, a, b):
        return 1.0 if self.affine else exp(a + b * self.x[0])

    def start(self, b, height, shape):
        if self.affine:
            return height * self.x[0] + 2 * shape
        return height**2 * sin(3 * self.x[0] * b) + shape * height + 0.5 * shape**2

    def misfit(self, u):
        return (u - 0.1) ** 2 * (1 if self.affine else 1 + u**2) * dx(degree=4)

    def prior(self, a, b, height, shape):
        more = 0.01 * (height - shape) ** 2 * dx
        return more if self.affine else more + 0.1 * a**2 * dx

    def functional(self, levels=1, **options):
        a, b, height, shape = self.controls
        u, v = Function(self.V), TestFunction(self.V)
        F = (Dt(u) * v + self.conductivity(a, b) * inner(grad(u), grad(v)) - v) * dx(degree=4)
        controls = self.controls[2:] if self.affine else self.controls
        ev = pf.Evolution(
            F, u, tableau=pf.BackwardEuler(), dt=STEP, nsteps=N, control=controls, initial=self.start(b, height, shape)
        )
        prior = [0.01 * (height - shape) ** 2 * dx] + ([] if self.affine else [0.1 * a**2 * dx])
        solver = {"mgrit": {"rtol": 1e-12} | ({"coarsening": (2,)} if levels > 1 else {"levels": 1})}
        return pf.TimeParallelReducedFunctional(
            ev, pf.RunningMisfit(self.misfit(u)), regularisation=prior, spacetime=self.st, solver_parameters=solver,
            **options,
        )  # fmt: skip

    def tape(self):
        controls = [Function(c.function_space()).assign(c) for c in self.controls]
        a, b, height, shape = controls
        with recording() as tape:
            old = Function(self.V).interpolate(self.start(b, height, shape))
            J = assemble(self.prior(*controls))
            for _ in range(N):
                u, v = Function(self.V), TestFunction(self.V)
                F = ((u - old) / STEP * v + self.conductivity(a, b) * inner(grad(u), grad(v)) - v) * dx(degree=4)
                solve(F == 0, u, solver_parameters={"snes_rtol": 1e-14, "snes_atol": 1e-14})
                J += STEP * assemble(self.misfit(u))
                old = u
            return ReducedFunctional(J, [Control(c) for c in controls], tape=tape)

    def point(self):
        R = self.controls[0].function_space()
        z = [Function(R).assign(v) for v in (0.5, 0.4, -0.6)] + [Function(self.V).interpolate(sin(4 * self.x[1]))]
        dz = [Function(R).assign(v) for v in (-0.7, 0.9, 0.5)] + [Function(self.V).interpolate(self.x[0] - 0.3)]
        return z, dz


@pytest.mark.parallel([1, 3])
@time_limit(120)
def test_value_and_derivatives_are_those_of_the_tape():
    """J, gradient, tangent and Hessian action where `initial=` is no affine expression, one control is in it and in the
    conductivity, and others in one of the two.
    """
    for grid in GRIDS[MPI.COMM_WORLD.size][:1]:
        posed = Posed(pf.SpaceTime(grid))
        J, theirs = posed.functional(levels=2), posed.tape()
        assert [c.control.name() for c in J.controls] == list(posed.names)
        z, dz = posed.point()
        for point in (z, [Function(c.function_space()).assign(0.5 * c) for c in z]):
            assert J(point) == pytest.approx(theirs(point), rel=1e-9)
            for mine, other in zip(J.derivative(), theirs.derivative(), strict=True):
                np.testing.assert_allclose(get(mine), get(other), rtol=1e-7, atol=1e-9)
            slope = sum(float(get(g) @ get(d)) for g, d in zip(J.derivative(), dz, strict=True))
            assert J.tlm(dz) == pytest.approx(posed.st.space_comm.allreduce(slope), rel=1e-9)
            products, ends = J.hessian(dz), []
            for step in (1e-4, -1e-4):  # pyadjoint has no Hessian of such an interpolation
                theirs([c.copy(deepcopy=True).assign(c + step * d) for c, d in zip(point, dz, strict=True)])
                ends.append([get(g) for g in theirs.derivative()])
            for mine, plus, minus in zip(products, *ends, strict=True):
                np.testing.assert_allclose(get(mine), (plus - minus) / 2e-4, rtol=1e-5, atol=1e-6)
    check_orders(J, z, dz)


@pytest.mark.parallel([1, 3])
@time_limit(120)
def test_minimum_of_an_affine_parametrisation():
    """Quadratic: the trust region takes one Newton step to where the tape's gradient vanishes; the state begins with
    the expression of what was found; sums, bounds and new data work as for other functionals.
    """
    for grid in GRIDS[MPI.COMM_WORLD.size][-1:]:
        posed = Posed(pf.SpaceTime(grid), affine=True)
        J = posed.functional()
        assert J.problem.is_quadratic
        result = J.minimize_trust_region(gtol_rel=1e-9, preconditioner="limited-memory")
        assert result.converged
        height, shape = J.function(result.x)
        theirs = posed.tape()
        assert theirs([*posed.controls[:2], height, shape]) == pytest.approx(result.value, rel=1e-9)
        slopes = [np.abs(get(g)).max(initial=0) for g in theirs.derivative()[2:]]
        assert posed.st.comm.allreduce(max(slopes), op=MPI.MAX) < 1e-8
        start = Function(posed.V).interpolate(posed.start(None, height, shape))
        np.testing.assert_allclose(get(J.state(times=0.0)), get(start), atol=1e-12)
        assert (2 * J)([height, shape]) == pytest.approx(2 * result.value, rel=1e-9)
        assert J.minimize_trust_region(bounds=([0.9, None], None), gtol_rel=1e-8).value > result.value
        assert float(J.controls[0].control) == pytest.approx(0.9)
        inexact = J.minimize_trust_region(gtol_rel=1e-9, inexact=True, preconditioner="limited-memory")
        assert inexact.value == pytest.approx(result.value, rel=1e-9)


@time_limit(60)
def test_expressions_without_controls_and_what_is_refused():
    """Data only are interpolated; the state itself, another shape and a control with a value a step are refused."""
    posed = Posed(pf.SpaceTime(), affine=True)
    u, v, q = Function(posed.V), TestFunction(posed.V), Function(posed.V, name="q")
    F = (Dt(u) * v + inner(grad(u), grad(v)) - q * v) * dx
    make = lambda **options: pf.Evolution(F, u, tableau=pf.BackwardEuler(), dt=STEP, nsteps=N, **options)
    serial = {"time_solver": "serial"} if MPI.COMM_WORLD.size == 1 else {"mgrit": {"coarsening": (2,)}}
    J = lambda ev: pf.TimeParallelReducedFunctional(
        ev, pf.TerminalMisfit(u**2 * dx), spacetime=posed.st, solver_parameters=serial
    )
    given = J(make(control=q, initial=1 + posed.x[0]))
    as_function = J(make(control=q, initial=Function(posed.V).interpolate(1 + posed.x[0])))
    assert given(q) == as_function(q)
    with pytest.raises(InputError, match="contains the state u"):
        make(control=q, initial=2 * u)
    with pytest.raises(InputError, match="cannot be interpolated"):
        make(control=q, initial=fd.as_vector([q, q]))
    with pytest.raises(InputError, match="a value in each step"):
        make(control=q, per_step=True, initial=q**2)
    with pytest.raises(InputError, match="does not appear"):
        make(control=[q, posed.controls[0]], initial=q**2)


@time_limit(60)
def test_data_in_the_expression_are_read_again_when_asked():
    """An expression with data: a change is ignored, with a warning, until update_data."""
    posed = Posed(pf.SpaceTime("1x1"), affine=True)
    u, v, height = Function(posed.V), TestFunction(posed.V), posed.controls[2]
    background = Function(posed.V, name="background").assign(1.0)
    F = (Dt(u) * v + inner(grad(u), grad(v))) * dx
    ev = pf.Evolution(F, u, tableau=pf.BackwardEuler(), dt=STEP, nsteps=N, control=height, initial=height * background)
    J = pf.TimeParallelReducedFunctional(
        ev, pf.TerminalMisfit(u**2 * dx), regularisation=background * height**2 * dx, spacetime=posed.st,
        solver_parameters={"time_solver": "serial"},
    )  # fmt: skip
    z = Function(height.function_space()).assign(3.0)  # a constant stays as it is: J = 2 * 9
    assert J(z) == pytest.approx(18.0)
    background.assign(2.0)
    with pytest.warns(UserWarning, match="background"):
        assert J(Function(z).assign(1.0)) == pytest.approx(2.0)
    assert J.update_data()
    assert J(z) == pytest.approx(36.0 + 18.0)
    assert float(J.derivative().dat.data_ro[0]) == pytest.approx(2 * (36.0 + 18.0) / 3)


@time_limit(60)
def test_a_real_number_in_the_state_is_refused_by_name():
    """As a part of a mixed state and alone: there is no matrix of it."""
    posed = Posed(pf.SpaceTime())
    R = posed.controls[0].function_space()
    w, (v, r) = Function(posed.V * R), fd.TestFunctions(posed.V * R)
    u, s = fd.split(w)
    mixed = (Dt(u) * v + inner(grad(u), grad(v)) - s * v + (Dt(s) + s - u) * r) * dx
    alone, test = Function(R), TestFunction(R)
    for F, state in ((mixed, w), ((Dt(alone) + alone) * test * dx, alone)):
        with pytest.raises(InputError, match=r"the state has a real number in it \(space R\)"):
            pf.Evolution(F, state, tableau=pf.BackwardEuler(), dt=STEP, nsteps=N)


def means(V, t, controls, initial, **options):
    """``Dt(u) = q - t`` without diffusion, ``q`` the last control, by backward Euler from t0 in 4 steps of 1/8."""
    u, v = Function(V, name="u"), TestFunction(V)
    F = (Dt(u) - controls[-1] + t) * v * dx
    return pf.Evolution(
        F, u, tableau=pf.BackwardEuler(), dt=STEP, nsteps=N, control=controls, t=t, initial=initial, **options
    )


@time_limit(60)
def test_the_time_in_an_initial_expression_is_the_initial_time():
    """With a control in it and without: ``(a + t)^2`` at ``t0 = 1`` is ``(a + 1)^2``, whatever the time function is and
    however often steps have moved it; ``dJ/da = 2 (a + 1) mean``. ``u_N = u_0 + 4/8 q - (9/8 + ... + 12/8)/8``.
    """
    for grid in GRIDS[MPI.COMM_WORLD.size]:
        posed = Posed(pf.SpaceTime(grid))
        a, q, t = posed.controls[0], Function(posed.V, name="q"), pf.time_function(posed.V.mesh(), 7.0)
        options = {"spacetime": posed.st, "solver_parameters": {"mgrit": {"levels": 1}}}
        R = a.function_space()
        moved = 0.5 * 2.0 - (9 + 10 + 11 + 12) / 8 / 8
        for controls in ([a, q], [q]):
            initial = (a + t) ** 2 if a in controls else (3 + t) ** 2
            ev = means(posed.V, t, controls, initial, t0=1.0)
            J = pf.TimeParallelReducedFunctional(ev, pf.TerminalMisfit(ev.u * dx), **options)
            for number in (3.0, 1.0, 3.0) if a in controls else (3.0, 3.0):
                z = [Function(R).assign(number), Function(posed.V).assign(2.0)][-len(controls) :]
                assert float(J(z)) == pytest.approx((number + 1) ** 2 + moved, rel=1e-10)
                slope = J.derivative()
                if a in controls:
                    np.testing.assert_allclose(get(slope[0]), 2 * (number + 1), rtol=1e-10)
            np.testing.assert_allclose(get(J.state(times=1.0)), (number + 1) ** 2, rtol=1e-12)


@pytest.mark.parallel([1, 3])
@time_limit(60)
def test_data_of_an_expression_without_controls_are_read_as_all_data():
    """Those of ``initial=c*d + t`` when the functional is made, not when the evolution was posed, and again when asked,
    with a warning before: ``u_N = c d - (1/8 + ... + 4/8)/8``.
    """
    for grid in GRIDS[MPI.COMM_WORLD.size]:
        posed = Posed(pf.SpaceTime(grid))
        q, t = Function(posed.V, name="q"), pf.time_function(posed.V.mesh(), 7.0)
        c, d = fd.Constant(1.0, name="factor"), Function(posed.V, name="start").assign(1.0)
        ev = means(posed.V, t, [q], c * d + t)
        c.assign(2.0)
        options = {"spacetime": posed.st, "solver_parameters": {"mgrit": {"levels": 1}}}
        # quadratic: the initial state may be what the misfit is expanded about
        J = pf.TimeParallelReducedFunctional(ev, pf.TerminalMisfit(ev.u**2 * dx), **options)
        moved = -(1 + 2 + 3 + 4) / 8 / 8
        assert float(J(q)) == pytest.approx((2 + moved) ** 2, rel=1e-10)
        d.assign(1.5)
        if posed.st.is_root:
            with pytest.warns(UserWarning, match="'start'"):
                assert float(J(q)) == pytest.approx((2 + moved) ** 2, rel=1e-10)
        else:
            J(q)
        assert J.update_data() == ["the value of the function 'start'"]
        assert float(J(q)) == pytest.approx((3 + moved) ** 2, rel=1e-10)
        np.testing.assert_allclose(get(J.state(times=0.0)), 3.0, rtol=1e-12)
        c.assign(4.0)
        assert J.update_data() == ["the value of the constant 'factor'"]
        assert float(J(q)) == pytest.approx((6 + moved) ** 2, rel=1e-10)


@time_limit(60)
def test_data_of_a_regularisation_of_controls_in_the_initial_expression_only():
    """They are read with all other data: ``(a - d)^2`` with ``a = 1`` is 1/4 at ``d = 1/2`` and 1 at ``d = 2``."""
    for grid in GRIDS[MPI.COMM_WORLD.size]:
        posed = Posed(pf.SpaceTime(grid))
        space = fd.FunctionSpace(posed.V.mesh(), "R", 0)
        a, d = Function(space, name="a").assign(1.0), Function(space, name="aim").assign(0.5)
        q, t = Function(posed.V, name="q"), pf.time_function(posed.V.mesh())
        ev = means(posed.V, t, [a, q], a * fd.Constant(0.0))
        options = {"spacetime": posed.st, "solver_parameters": {"mgrit": {"levels": 1}}}
        misfit = pf.TerminalMisfit(ev.u**2 * dx)
        J = pf.TimeParallelReducedFunctional(ev, misfit, regularisation=(a - d) ** 2 * dx, **options)
        end = float(J([a, q])) - 0.25
        assert end == pytest.approx((-(1 + 2 + 3 + 4) / 8 / 8) ** 2, rel=1e-10)
        d.assign(2.0)
        assert J.update_data() == ["the value of the function 'aim'"]
        assert float(J([a, q])) == pytest.approx(1 + end, rel=1e-10)


@time_limit(60)
def test_a_misfit_of_a_control_of_the_initial_expression_is_refused():
    """Though the sweeps know nothing of that control."""
    posed = Posed(pf.SpaceTime())
    a, q, t = posed.controls[0], Function(posed.V, name="q"), pf.time_function(posed.V.mesh())
    ev = means(posed.V, t, [a, q], a * posed.x[0])
    for misfit in (pf.TerminalMisfit((ev.u - a) ** 2 * dx), pf.RunningMisfit(a * ev.u * dx)):
        with pytest.raises(InputError, match="contains a control"):
            pf.TimeParallelReducedFunctional(ev, misfit, spacetime=posed.st, solver_parameters={"mgrit": {"levels": 1}})


@time_limit(60)
def test_data_in_the_expression_are_read_again_by_a_multiple():
    """``J = 3 mean(a d)``: its derivative by ``a`` is ``3 d`` for old and new data; its description has the factor."""
    posed = Posed(pf.SpaceTime("1x1"))
    a, q, t = posed.controls[2], Function(posed.V, name="q"), pf.time_function(posed.V.mesh())
    d = Function(posed.V, name="height").assign(2.0)
    ev = means(posed.V, t, [a, q], a * d)
    J = 3 * pf.TimeParallelReducedFunctional(
        ev, pf.TerminalMisfit(ev.u * dx), spacetime=posed.st, solver_parameters={"mgrit": {"levels": 1}}
    )
    values = [Function(a.function_space()).assign(1.0), q]
    for height in (2.0, 5.0):
        d.assign(height)
        J.update_data()
        J(values)
        assert float(J.derivative()[0].dat.data_ro[0]) == pytest.approx(3 * height, rel=1e-12)
    assert repr(J).startswith("ControlFunctional(3 * (BackwardEuler, 4 steps of")
    assert "TerminalMisfit, serial); controls" in repr(J)
    assert repr(J).endswith("'q'; grid 1x1)")

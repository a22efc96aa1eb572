"""Total variation against UFL's own derivatives, exact solutions of Rudin-Osher-Fatemi problems and duality."""

import numpy as np
import pytest
from firedrake import (
    Constant,
    DirichletBC,
    Function,
    FunctionSpace,
    SpatialCoordinate,
    TestFunction,
    TrialFunction,
    UnitIntervalMesh,
    UnitSquareMesh,
    VectorFunctionSpace,
    as_vector,
    assemble,
    conditional,
    cos,
    derivative,
    dS,
    dx,
    exp,
    grad,
    inner,
    jump,
    lt,
    sin,
    sqrt,
)
from irksome import Dt
from mpi4py import MPI

import pint_fem as pf
from pint_fem.adjoint.minimisation.objective import Objective
from pint_fem.adjoint.total_variation.preconditioner import VariationPreconditioner
from pint_fem.adjoint.total_variation.primal_dual import PrimalDualModel, longest_steps
from pint_fem.errors import InputError, InputTypeError
from pint_fem.kernels.arrays import get
from tests.taylor import check_orders

SERIAL = {"time_solver": "serial"}


def space_on(st, family="CG", degree=1, *, cells=16, dim=2, quadrilateral=False):
    """A space on the unit interval or square."""
    if dim == 1:
        return FunctionSpace(st.mesh(UnitIntervalMesh, cells), family, degree)
    mesh = st.mesh(UnitSquareMesh, cells, cells, quadrilateral=quadrilateral)
    return FunctionSpace(mesh, family, degree)


def identity(V, control, d, regularisation, st, **options):
    """``1/2 |q - d|^2`` and a regularisation: an evolution that stands still, with its initial condition as control."""
    u, v = Function(V), TestFunction(V)
    still = pf.Evolution(
        inner(Dt(u), v) * dx, u, tableau=pf.BackwardEuler(), dt=1.0, nsteps=1, control=control, initial=control
    )
    misfit = pf.TerminalMisfit(0.5 * inner(u - d, u - d) * dx)
    return pf.TimeParallelReducedFunctional(
        still, misfit, regularisation=regularisation, spacetime=st, solver_parameters=SERIAL, **options
    )


def last(x):
    """The last coordinate."""
    return x[len(x) - 1]


def block(V):
    """One in a square (an interval), zero outside."""
    x = SpatialCoordinate(V.mesh())
    inside = 1.0
    for i in range(V.mesh().geometric_dimension):
        inside = inside * conditional(lt(abs(x[i] - 0.5), 0.26), 1.0, 0.0)
    return Function(V).interpolate(inside)


def noisy_block(V):
    """A block with noise that does not depend on the partition."""
    x, d = SpatialCoordinate(V.mesh()), block(V)
    waves = sum(sin(k * 37 * x[0] + k * k) * cos(k * 23 * last(x)) for k in (1, 2, 3))
    return d.assign(d + Function(V).interpolate(0.06 * waves))


def denoising(st, smoothing, *, model="primal-dual", weight=0.02, family="CG", degree=1, cells=16, dim=2):
    """A noisy block and its total variation."""
    V = space_on(st, family, degree, cells=cells, dim=dim)
    q, d = Function(V, name="q"), noisy_block(V)
    variation = pf.TotalVariation(q, weight=weight, smoothing=smoothing, model=model)
    return identity(V, q, d, variation, st), d


def conduction(st, regularisation, *, cells=10, steps=3, family="CG", degree=1, solver=None, riesz_map="L2"):
    """Log-conductivity of a square with a block, from the temperatures that two heating experiments give everywhere."""
    mesh = st.mesh(UnitSquareMesh, cells, cells)
    V, Q = FunctionSpace(mesh, "CG", 1), FunctionSpace(mesh, family, degree)
    q, truth = Function(Q, name="q"), block(Q)
    evolutions, misfits = [], []
    for side in (1, 3):
        u, v = Function(V), TestFunction(V)
        F = Dt(u) * v * dx + exp(q) * inner(grad(u), grad(v)) * dx
        bcs = [DirichletBC(V, 1.0, side), DirichletBC(V, 0.0, side + 1)]
        ev = pf.Evolution(F, u, tableau=pf.BackwardEuler(), dt=0.03, nsteps=steps, control=q, bcs=bcs)
        simulated = pf.TimeParallelReducedFunctional(
            ev, pf.TerminalMisfit(u**2 * dx), spacetime=st, solver_parameters=SERIAL
        )
        x, y = SpatialCoordinate(mesh)
        data = simulated.state(truth, times=[0.03 * steps])[0]
        data = Function(V).interpolate(data + 2e-3 * sin(40 * x) * cos(55 * y))
        evolutions.append(ev)
        misfits.append(pf.TerminalMisfit(1e4 * (u - data) ** 2 * dx))
    if solver is not None:
        evolutions, misfits = evolutions[0], misfits[0]
    J = pf.TimeParallelReducedFunctional(
        evolutions, misfits, regularisation=regularisation(q), spacetime=st, solver_parameters=solver or SERIAL,
        riesz_map=riesz_map,
    )  # fmt: skip
    return J, truth


def products(result):
    """Hessian actions of a run."""
    return sum(record.cg_iterations for record in result.history)


# -- the functional ----------------------------------------------------------------------------------------------------
CASES = {
    "P1": dict(),
    "P2": dict(degree=2),
    "Q1": dict(quadrilateral=True),
    "interval": dict(dim=1),
    "DG0": dict(family="DG", degree=0),
    "DQ0": dict(family="DG", degree=0, quadrilateral=True),
}


@pytest.mark.parallel([1, 2])
@pytest.mark.parametrize("case", CASES)
def test_value_and_derivatives_are_those_of_the_form(case):
    st = pf.SpaceTime(time=1)
    V = space_on(st, cells=4, **CASES[case])
    q, dq, x = Function(V, name="q"), Function(V), SpatialCoordinate(V.mesh())
    variation = pf.TotalVariation(q, weight=0.7, smoothing=1e-2)
    J = identity(V, q, Function(V), variation, st)
    q.interpolate(sin(3 * x[0]) * (1 + last(x) ** 2))
    dq.interpolate(cos(5 * x[0] + last(x)))
    size = (jump if "family" in CASES[case] else grad)(q)
    measure = (dS if "family" in CASES[case] else dx)(domain=V.mesh(), degree=variation.degree)
    form = 0.7 * sqrt(inner(size, size) + 1e-2) * measure
    own, z, dz = J.problem.regularisation, J.array(q), J.array(dq)
    assert own.value(z) == pytest.approx(assemble(form), rel=1e-12)
    assert assemble(variation) == pytest.approx(assemble(form), rel=1e-12)
    gradient = derivative(form, q, TestFunction(V))
    expected = get(assemble(gradient))
    np.testing.assert_allclose(own.gradient(z), expected, atol=1e-12)
    expected = get(assemble(derivative(gradient, q, dq)))
    np.testing.assert_allclose(own.hessian(z, dz), expected, atol=1e-12 * max(1, np.abs(expected).max(initial=0)))


def test_the_vectorial_variation_couples_components():
    """Of a vector, and of two fields, against the derivatives of the form."""
    st = pf.SpaceTime(comm=MPI.COMM_SELF)
    mesh = UnitSquareMesh(3, 3, comm=st.space_comm)
    V, W, (x, y) = FunctionSpace(mesh, "CG", 1), VectorFunctionSpace(mesh, "CG", 1), SpatialCoordinate(mesh)
    q = Function(W).interpolate(as_vector([x**2 + sin(3 * y), cos(2 * x * y)]))
    dq = Function(W).interpolate(as_vector([y, sin(5 * x)]))
    J = identity(W, q, Function(W), pf.TotalVariation(q, weight=0.3, smoothing=0.1), st)
    own, z, dz = J.problem.regularisation, J.array(q), J.array(dq)
    form = 0.3 * sqrt(inner(grad(q), grad(q)) + 0.1) * dx(degree=0)
    gradient = derivative(form, q, TestFunction(W))
    assert own.value(z) == pytest.approx(assemble(form), rel=1e-12)
    np.testing.assert_allclose(own.gradient(z), get(assemble(gradient)), atol=1e-13)
    second = get(assemble(derivative(gradient, q, dq)))
    np.testing.assert_allclose(own.hessian(z, dz), second, atol=1e-13)

    u, v = Function(V), TestFunction(V)
    p, r = Function(V, name="p"), Function(V, name="r")
    ev = pf.Evolution((Dt(u) - p) * v * dx, u, tableau=pf.BackwardEuler(), dt=1.0, nsteps=1, control=[p, r], initial=r)
    variation = pf.TotalVariation([p, r], weight=0.3, smoothing=0.1)
    J = pf.TimeParallelReducedFunctional(
        ev, pf.TerminalMisfit(u**2 * dx), regularisation=variation, spacetime=st, solver_parameters=SERIAL
    )
    of = lambda f: J.array([Function(V).interpolate(f[i]) for i in range(2)])
    own, z, dz = J.problem.regularisation, of(q), of(dq)
    assert own.value(z) == pytest.approx(assemble(form), rel=1e-12)
    np.testing.assert_allclose(np.ravel(J.layout.parts(own.hessian(z, dz)), order="F"), second, atol=1e-13)


def test_taylor_orders_with_an_evolution_and_a_multiple():
    """The derivatives are those of the functional, whatever the minimiser's model is."""
    st = pf.SpaceTime(comm=MPI.COMM_SELF)
    J, truth = conduction(st, lambda q: [pf.TotalVariation(q, weight=0.3, smoothing=1e-2), 1e-3 * q**2 * dx], cells=5)
    x, y = SpatialCoordinate(truth.function_space().mesh())
    q, dq = (Function(truth.function_space()).interpolate(f) for f in (x * y + sin(3 * x), cos(4 * x + y)))
    check_orders(2 * J, q, dq)


@pytest.mark.parallel([1, 2])
def test_one_value_per_step_is_summed_with_the_time_step():
    st = pf.SpaceTime(space=1)
    V = space_on(st, cells=4)
    u, v, q, (x, _) = Function(V), TestFunction(V), Function(V, name="q"), SpatialCoordinate(V.mesh())
    ev = pf.Evolution(
        (Dt(u) * v - q * v) * dx, u, tableau=pf.BackwardEuler(), dt=0.25, nsteps=4, control=q, per_step=True
    )
    variation = pf.TotalVariation(q, weight=0.05, smoothing=1e-4)
    d = Function(V).interpolate(conditional(lt(x, 0.5), 1.0, 0.0))
    J = pf.TimeParallelReducedFunctional(
        ev, pf.RunningMisfit((u - d) ** 2 * dx), regularisation=variation, spacetime=st, solver_parameters=SERIAL
    )
    rows = J.function(J.array(J.controls[0].control))
    for i, part in enumerate(rows.subfunctions, start=J.layout.slab.lo):
        part.interpolate(Constant(i + 1) * x)
    size = sum(0.25 * 0.05 * np.sqrt((i + 1) ** 2 + 1e-4) for i in range(4))
    assert J.problem.regularisation.value(J.array(rows)) == pytest.approx(size, rel=1e-12)
    result = J.minimize_trust_region(gtol_rel=1e-8, max_it=30)
    assert result.converged
    reference = J.minimize_trust_region(start=rows, preconditioner="none", gtol_rel=1e-8, cg_max_it=400, max_it=60)
    assert reference.value == pytest.approx(result.value, rel=1e-9)


# -- the primal-dual operator ------------------------------------------------------------------------------------------
def model_at(J, points):
    """The model after it has moved along some controls."""
    model = PrimalDualModel(J.problem)
    for q in points:
        model.move_to(J.array(q))
    return model


def dense(apply, n):
    return np.array([apply(e) for e in np.eye(n)]).T


@pytest.mark.parametrize("case", ["P1", "P2", "DG0"])
def test_the_operator_is_semidefinite_and_where_the_dual_is_that_of_the_field_the_second_derivative(case):
    st = pf.SpaceTime(comm=MPI.COMM_SELF)
    V = space_on(st, cells=3, **CASES[case])
    q, x = Function(V, name="q"), SpatialCoordinate(V.mesh())
    J = identity(V, q, Function(V), pf.TotalVariation(q, weight=0.7, smoothing=1e-3), st)
    q.interpolate(sin(3 * x[0]) * (1 + x[1] ** 2))
    model, own, z = model_at(J, [q]), J.problem.regularisation, J.array(q)
    (dual,), rng = model.duals, np.random.default_rng(0)
    second = dense(lambda v: own.hessian(z, v), len(z))
    for kind in ("zero", "unit", "field"):
        if kind == "unit":
            w = rng.standard_normal(dual.w.shape)
            dual.w = w / np.linalg.norm(w, axis=-1, keepdims=True)
        elif kind == "field":
            G = dual.variation.gradients(z)
            dual.w = (G / np.sqrt(np.sum(G**2, axis=1, keepdims=True) + 1e-3))[None]
        H = dense(lambda v: model.add(own.hessian(z, v), v), len(z))
        scale = np.abs(H).max()
        np.testing.assert_allclose(H, H.T, atol=1e-13 * scale)
        assert np.linalg.eigvalsh(H).min() >= -1e-13 * scale
        (matrix,) = model.matrices(q)
        np.testing.assert_allclose(matrix.convert("dense").getDenseArray(), H, atol=1e-13 * scale)
    np.testing.assert_allclose(H, second, atol=1e-13 * scale)
    # lagged diffusivity, by a form
    a, v = TrialFunction(V), TestFunction(V)
    of, measure = (jump, dS) if case == "DG0" else (grad, dx)
    form = 0.7 * inner(of(a), of(v)) / sqrt(inner(of(q), of(q)) + 1e-3) * measure(degree=J.regularisation[0].degree)
    dual.w[:] = 0
    lagged = dense(lambda v: model.add(own.hessian(z, v), v), len(z))
    np.testing.assert_allclose(lagged, assemble(form).petscmat.convert("dense").getDenseArray(), atol=1e-12 * scale)


def test_the_dual_is_updated_by_newtons_method():
    """Elimination of the dual from the linearised pair of equations, by dense algebra at one point."""
    st = pf.SpaceTime(comm=MPI.COMM_SELF)
    V = space_on(st, cells=1)
    q, (x, y) = Function(V, name="q"), SpatialCoordinate(V.mesh())
    J = identity(V, q, Function(V), pf.TotalVariation(q, weight=1.0, smoothing=0.5), st)
    first, second = (Function(V).interpolate(f) for f in (x + 0.2 * y, 0.9 * x + 0.0 * y))
    model = model_at(J, [first])
    (dual,) = model.duals
    dual.w[:] = w = np.array([0.3, -0.1])
    G, dG = np.array([1, 0.2]), np.array([-0.1, -0.2])
    N = np.sqrt(G @ G + 0.5)
    dw = np.linalg.solve(N * np.eye(2), dG - w * (G @ dG) / N - (N * w - G))
    model.move_to(J.array(second))
    np.testing.assert_allclose(dual.w, np.broadcast_to(w + dw, dual.w.shape), rtol=1e-12)
    kept = dual.w.copy()
    model.move_to(J.array(second))  # the same iterate once more
    np.testing.assert_array_equal(dual.w, kept)


def test_steps_of_the_dual_end_within_the_unit_ball():
    rng = np.random.default_rng(0)
    w, dw = (rng.standard_normal((500, 2)) for _ in range(2))
    w *= rng.uniform(0, 0.999, (500, 1)) / np.linalg.norm(w, axis=1, keepdims=True)
    dw *= 10 ** rng.uniform(-6, 6, (500, 1))
    s = longest_steps(w, dw)
    ends = np.linalg.norm(w + s * dw, axis=1)
    assert (ends < 1).all()
    shortened = s[:, 0] < 1
    assert 100 < shortened.sum() < 400
    beyond = np.linalg.norm(w + s / 0.99 * dw, axis=1)
    np.testing.assert_allclose(beyond[shortened], 1, rtol=1e-9)
    assert (longest_steps(w, 0 * dw) == 1).all()


@pytest.mark.parallel([1, 2])
def test_the_dual_is_feasible_at_all_iterates_and_the_duality_gap_closes():
    """Of 1/2 |q - d|^2 + a TV(q), jumps over facets: weak duality with the dual of the run, by the form's matrices."""
    st, a, smoothing = pf.SpaceTime(time=1), 0.02, 1e-10
    J, d = denoising(st, smoothing, weight=a, family="DG", degree=0, cells=8)
    objective, norms, gaps = Objective(J.problem, J.inner), [], []
    V = d.function_space()
    area = assemble(TestFunction(V) * dx).dat.data_ro
    q = Function(V)

    def watch(x, record):
        objective.prepare(x)
        (dual,) = objective.model.duals
        norms.append(np.linalg.norm(dual.w, axis=-1).max(initial=0.0))
        pulled = Function(V)
        pulled.dat.data[:] = dual.variation.pulled_back(dual.w[0]) / area  # a div'w
        q.dat.data[:] = x
        primal = assemble(0.5 * (q - d) ** 2 * dx) + a * assemble(abs(jump(q)) * dS)
        gaps.append(primal - assemble((d * pulled - 0.5 * pulled**2) * dx))

    result = pf.minimize_trust_region(
        objective, J.array(Function(V)), cg_rtol=1e-2, callback=watch,
        preconditioner=VariationPreconditioner(objective, J.inner),
    )  # fmt: skip
    assert result.converged
    assert 0.5 < max(norms) < 1
    assert min(gaps) > 0
    assert gaps[-1] < 1e-6 < 1e-2 < gaps[0]


@pytest.mark.parametrize(("family", "degree", "tolerance"), [("DG", 0, 2e-4), ("CG", 1, 1 / 64)])
def test_a_step_loses_contrast_by_the_weight_over_the_length(family, degree, tolerance):
    """The minimiser of 1/2 |q - d|^2 + a TV(q) for a step of height 1 at x = 1/4: 4 a on the left, 1 - 4 a/3 on the
    right, up to a part of a cell where the step takes a cell.
    """
    st, a = pf.SpaceTime(comm=MPI.COMM_SELF), 0.05
    V = space_on(st, family, degree, cells=64, dim=1)
    q, (x,) = Function(V, name="q"), SpatialCoordinate(V.mesh())
    d, exact = (
        Function(V).interpolate(conditional(lt(x, 0.25), left, right))
        for left, right in ((0.0, 1.0), (4 * a, 1 - 4 * a / 3))
    )
    J = identity(V, q, d, pf.TotalVariation(q, weight=a, smoothing=1e-10), st)
    result = J.minimize_trust_region(gtol_rel=1e-8, max_it=60)
    assert result.converged
    assert assemble(abs(result.control - exact) * dx) < tolerance
    ends = get(result.control)[[0, -1]] if family == "DG" else np.array(result.control.at([[0.1], [0.7]]))
    np.testing.assert_allclose(np.sort(ends), [4 * a, 1 - 4 * a / 3], atol=tolerance)


# -- iterations --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("smoothing", [1e-2, 1e-4, 1e-6])
@pytest.mark.parametrize("family", ["CG", "DG"])
def test_denoising_takes_fewer_iterations_than_newtons_method(family, smoothing):
    st, degree = pf.SpaceTime(comm=MPI.COMM_SELF), int(family == "CG")
    J, _ = denoising(st, smoothing, family=family, degree=degree)
    result = J.minimize_trust_region(max_it=20)
    assert result.converged
    if (family, smoothing) != ("DG", 1e-2):  # jumps of which the root of the smoothing is a tenth
        newton, _ = denoising(st, smoothing, model="newton", family=family, degree=degree)
        other = newton.minimize_trust_region(max_it=3 * result.iterations, cg_rtol=1e-2, cg_max_it=1000)
        assert not other.converged


@pytest.mark.parametrize("smoothing", [1e-2, 1e-4, 1e-6])
def test_conductivity_takes_fewer_iterations_than_newtons_method(smoothing):
    st = pf.SpaceTime(comm=MPI.COMM_SELF)
    variation = lambda model: lambda q: pf.TotalVariation(q, weight=0.05, smoothing=smoothing, model=model)
    J, _ = conduction(st, variation("primal-dual"))
    result = J.minimize_trust_region(gtol_rel=1e-5, max_it=25)
    assert result.converged
    newton, _ = conduction(st, variation("newton"))
    other = newton.minimize_trust_region(gtol_rel=1e-5, max_it=2 * result.iterations)
    assert not other.converged
    assert other.value > result.value


def test_the_preconditioner_saves_most_products():
    st = pf.SpaceTime(comm=MPI.COMM_SELF)
    J, truth = conduction(st, lambda q: pf.TotalVariation(q, weight=0.05, smoothing=1e-4))
    options = dict(start=Function(truth.function_space()), gtol_rel=1e-5, max_it=25, cg_rtol=1e-2, cg_max_it=400)
    with_it, without = (J.minimize_trust_region(preconditioner=p, **options) for p in ("regularisation", "none"))
    assert with_it.converged
    assert with_it.value == pytest.approx(without.value, rel=1e-5)
    assert products(with_it) < 0.6 * products(without)


def test_lagged_diffusivity_converges_to_the_same_minimiser():
    st = pf.SpaceTime(comm=MPI.COMM_SELF)
    results = []
    for model in ("primal-dual", "lagged-diffusivity"):
        J, _ = denoising(st, 1e-2, model=model)
        results.append(J.minimize_trust_region(gtol_rel=1e-5, max_it=80))
        assert results[-1].converged
    assert results[1].value == pytest.approx(results[0].value, rel=1e-9)
    assert results[1].iterations > 2 * results[0].iterations


# -- with the other options --------------------------------------------------------------------------------------------
def test_bounds():
    """Against scipy's L-BFGS-B, which uses the gradient alone."""
    J, _ = denoising(pf.SpaceTime(comm=MPI.COMM_SELF), 1e-2, cells=8)
    result = J.minimize_trust_region(bounds=(0.1, 0.7), gtol_rel=1e-8, max_it=40)
    assert result.converged
    x = get(result.control)
    assert x.min() == 0.1
    assert x.max() == 0.7
    other = J.minimize_scipy(method="L-BFGS-B", bounds=(0.1, 0.7), options={"maxiter": 2000, "ftol": 0, "gtol": 1e-9})
    assert result.value <= other.fun * (1 + 1e-8)
    assert np.abs(get(other.control) - x).max() < 1e-3


def test_bounds_of_a_log_conductivity_with_small_smoothing():
    st = pf.SpaceTime(comm=MPI.COMM_SELF)
    J, truth = conduction(st, lambda q: pf.TotalVariation(q, weight=0.05, smoothing=1e-6))
    free = J.minimize_trust_region(gtol_rel=1e-5, max_it=40)
    result = J.minimize_trust_region(bounds=(0, 1), gtol_rel=1e-5, max_it=40)
    assert result.converged
    assert 0 <= get(result.control).min()
    assert get(result.control).max() <= 1
    assert result.value >= free.value
    error = lambda q: assemble(abs(q - truth) * dx)
    assert error(result.control) <= error(free.control) + 1e-6


def test_constraints_of_the_mean():
    J, d = denoising(pf.SpaceTime(comm=MPI.COMM_SELF), 1e-4, cells=8)
    (q,), mean = J.evolution.controls, 0.9 * assemble(d * dx)
    result = J.minimize_trust_region(constraints=[(q * dx, mean)], max_it=40)
    assert result.converged
    assert assemble(result.control * dx) == pytest.approx(mean, rel=1e-9)


def test_bounds_with_a_constraint():
    J, d = denoising(pf.SpaceTime(comm=MPI.COMM_SELF), 1e-4, cells=8)
    (q,), mean = J.evolution.controls, 0.9 * assemble(d * dx)
    result = J.minimize_trust_region(constraints=[(q * dx, mean)], bounds=(0, 1), max_it=100)
    assert result.converged
    assert assemble(result.control * dx) == pytest.approx(mean, rel=1e-5)
    assert 0 <= get(result.control).min()


def test_inexact_sweeps():
    mgrit = {"mgrit": {"levels": 2, "coarsening": 2, "rtol": 1e-9}}
    make = lambda solver: conduction(
        pf.SpaceTime(comm=MPI.COMM_SELF), lambda q: pf.TotalVariation(q, weight=0.05, smoothing=1e-4), steps=4,
        cells=6, solver=solver,
    )[0]  # fmt: skip
    inexact = make(mgrit).minimize_trust_region(inexact=True, gtol_rel=1e-5, max_it=30)
    exact = make(SERIAL).minimize_trust_region(gtol_rel=1e-5, max_it=30)
    assert inexact.converged
    assert inexact.value == pytest.approx(exact.value, rel=1e-6)


def test_a_run_continues_from_a_file_to_the_same_minimiser(tmp_path):
    file = tmp_path / "run.h5"
    whole = denoising(pf.SpaceTime(comm=MPI.COMM_SELF), 1e-4, cells=8)[0].minimize_trust_region(gtol_rel=1e-8)
    J, _ = denoising(pf.SpaceTime(comm=MPI.COMM_SELF), 1e-4, cells=8)
    assert not J.minimize_trust_region(gtol_rel=1e-8, max_it=3, checkpoint=file).converged
    J, _ = denoising(pf.SpaceTime(comm=MPI.COMM_SELF), 1e-4, cells=8)
    continued = J.minimize_trust_region(gtol_rel=1e-8, checkpoint=file)
    assert continued.converged
    assert continued.iterations > 3
    assert continued.value == pytest.approx(whole.value, rel=1e-12)


def test_sums_and_multiples_have_the_operator_with_their_weight():
    st = pf.SpaceTime(comm=MPI.COMM_SELF)
    J, d = denoising(st, 1e-3, cells=3)
    V, z = d.function_space(), J.array(d)
    other = identity(V, J.evolution.controls[0], d, 1e-2 * J.evolution.controls[0] ** 2 * dx, st)
    dz = J.array(Function(V).interpolate(SpatialCoordinate(V.mesh())[0]))
    extra = lambda functional: model_at(functional, [d]).add(np.zeros_like(z), dz)
    assert np.abs(extra(J)).max() > 1e-3
    np.testing.assert_allclose(extra(3 * J + other), 3 * extra(J), rtol=1e-12)
    for without in (other, other - J):
        assert not PrimalDualModel(without.problem).duals
    twice = 2 * J.regularisation[0]
    assert isinstance(twice, pf.TotalVariation)
    assert twice.weight == 2 * J.regularisation[0].weight
    assert not isinstance(-1 * twice, pf.TotalVariation)
    assert assemble(-twice) == pytest.approx(-assemble(twice))
    assert sum([twice]) is twice


def test_on_the_map_of_a_source_and_by_sweeps():
    st = pf.SpaceTime(comm=MPI.COMM_SELF)
    V = space_on(st, cells=6)
    u, v, q = Function(V), TestFunction(V), Function(V, name="q")
    ev = pf.Evolution(
        (Dt(u) * v + inner(grad(u), grad(v)) - 10 * q * v) * dx, u, tableau=pf.BackwardEuler(), dt=0.05, nsteps=4,
        control=q, bcs=DirichletBC(V, 0, "on_boundary"),
    )  # fmt: skip
    points = [[(i + 0.5) / 4, (j + 0.5) / 4] for i in range(4) for j in range(4)]
    readings = np.fromfunction(lambda n, s: 0.1 * (n + 1) * (s % 4 // 2), (2, 16))
    J = pf.TimeParallelReducedFunctional(
        ev, pf.PointSensors(points, [0.1, 0.2], readings, weight=100), spacetime=st, solver_parameters=SERIAL,
        regularisation=[pf.TotalVariation(q, weight=1e-2, smoothing=1e-4), 1e-6 * q**2 * dx],
    )  # fmt: skip
    by_map, by_sweeps = (J.minimize(method=m, gtol_rel=1e-6, max_it=40) for m in ("map", "trust-region"))
    assert by_map.converged
    assert by_sweeps.converged
    assert by_map.value == pytest.approx(by_sweeps.value, rel=1e-8)


# -- on several ranks --------------------------------------------------------------------------------------------------
@pytest.mark.parallel([1, 2])
@pytest.mark.parametrize("grid", ["time", "space"])
def test_the_result_does_not_depend_on_the_ranks(grid):
    st = pf.SpaceTime(**({"space": 1} if grid == "time" else {"time": 1}))
    alone = pf.SpaceTime(comm=MPI.COMM_SELF)
    results = []
    for where in (st, alone):
        J, _ = conduction(where, lambda q: pf.TotalVariation(q, weight=0.05, smoothing=1e-4), cells=6, steps=4)
        results.append(J.minimize_trust_region(gtol_rel=1e-7, max_it=40))
        assert results[-1].converged
    assert results[0].value == pytest.approx(results[1].value, rel=1e-9)
    if grid == "time":
        assert results[0].iterations == results[1].iterations
        # both stop at a gradient of 1e-7, which round-off decides the last digits of
        np.testing.assert_allclose(results[0].x, results[1].x, rtol=0, atol=1e-6)


# -- refusals ----------------------------------------------------------------------------------------------------------
@pytest.mark.parallel([1, 2])
def test_wrong_input_is_refused():
    st = pf.SpaceTime(time=1)
    V = space_on(st, cells=3)
    mesh = V.mesh()
    q, other = Function(V, name="q"), Function(V, name="other")
    number = Function(FunctionSpace(mesh, "R", 0), name="k")
    cells, rough = Function(FunctionSpace(mesh, "DG", 0)), Function(FunctionSpace(mesh, "DG", 1), name="rough")
    good = dict(weight=1.0, smoothing=1e-3)
    for arguments, words in (
        (dict(weight=-1.0), "weight = -1.0"),
        (dict(weight=0.0), "weight"),
        (dict(smoothing=0.0), "smoothing = 0.0"),
        (dict(smoothing=float("nan")), "smoothing"),
        (dict(model="quasi-newton"), "'primal-dual', 'lagged-diffusivity', 'newton'"),
    ):
        with pytest.raises(InputError, match=words):
            pf.TotalVariation(q, **(good | arguments))
    for control, words in (
        (number, "'k' is a real number"),
        (rough, "'DG' 0"),
        ([q, cells], "give a TotalVariation of each"),
        ([], "give a control"),
    ):
        with pytest.raises(InputError, match=words):
            pf.TotalVariation(control, **good)
    for wrong in (lambda: pf.TotalVariation(exp(q), **good), lambda: pf.TotalVariation(q, weight="1", smoothing=1.0)):
        with pytest.raises(InputTypeError, match="TotalVariation"):
            wrong()
    variation = pf.TotalVariation(q, **good)
    for sum_ in (lambda: variation + q * dx, lambda: q * dx + variation):
        with pytest.raises(InputTypeError, match="give a list"):
            sum_()
    with pytest.raises(InputError, match="give a functional of the control"):
        identity(V, q, other, pf.TotalVariation(other, **good), st)
    with pytest.raises(InputError, match="'other', which is no control"):
        identity(V, q, other, pf.TotalVariation([q, other], **good), st)
    J = identity(V, q, other, variation, st)
    with pytest.raises(InputError, match="not quadratic in control 'q'"):
        J.minimize_one_shot(preconditioner="regularisation")
    with pytest.raises(InputError, match="'none'"):
        J.minimize_trust_region(preconditioner="tv")

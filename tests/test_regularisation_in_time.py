"""Functionals of a control's rate of change against serial pyadjoint, dense matrices and Taylor's theorem."""

import numpy as np
import pytest
from firedrake import (
    COMM_SELF,
    Constant,
    DirichletBC,
    Function,
    FunctionSpace,
    LinearVariationalProblem,
    LinearVariationalSolver,
    SpatialCoordinate,
    TestFunction,
    TrialFunction,
    UnitIntervalMesh,
    assemble,
    derivative,
    dx,
    grad,
    inner,
)
from firedrake.adjoint import Control, ReducedFunctional
from irksome import Dt
from mpi4py import MPI

import pint_fem as pf
from pint_fem.adjoint.regularisation_in_time.differences import StepDifferences
from pint_fem.adjoint.regularisation_in_time.inner_product import InnerInTime
from pint_fem.errors import InputError, InputTypeError
from pint_fem.propagators.tape import recording
from tests.meshes import square
from tests.step_controls import vectors
from tests.taylor import check_orders

STEPS, DT = 7, 0.02


def relative(a, b):
    return np.linalg.norm(a - b) / np.linalg.norm(b)


def functional(st, regularisation, *, steps=STEPS, nonlinear=False, per_step=True, amplitude=False, **options):
    """Temperature of a bar that a source with one value per step heats."""
    mesh = st.mesh(UnitIntervalMesh, 6)
    V, Q, R = FunctionSpace(mesh, "CG", 1), FunctionSpace(mesh, "DG", 0), FunctionSpace(mesh, "R", 0)
    (x,) = SpatialCoordinate(mesh)
    u, v, q, a, t = Function(V), TestFunction(V), Function(Q, name="q"), Function(R, name="a"), pf.time_function(mesh)
    source = q + a * x if amplitude else q
    form = Dt(u) * v * dx + inner(grad(u), grad(v)) * dx + (u**3 * v * dx if nonlinear else 0) - 20 * source * v * dx
    controls = [q, a] if amplitude else q
    ev = pf.Evolution(form, u, tableau=pf.BackwardEuler(), dt=DT, nsteps=steps, control=controls, per_step=per_step,
                      t=t, bcs=DirichletBC(V, 0, 1))  # fmt: skip
    forms = regularisation(q, a, u, t)
    return pf.TimeParallelReducedFunctional(
        ev, pf.RunningMisfit((u - x) ** 2 * dx), regularisation=forms, spacetime=st,
        solver_parameters={"time_solver": "serial"}, **options,
    )  # fmt: skip


def rate_and_value(q, a, u, t):
    """Both kinds, the rate compared with a given one."""
    (x,) = SpatialCoordinate(q.function_space().mesh())
    return [0.05 * q**2 * dx, pf.RateOfChange(1e-2 * (q - 3 * x) ** 2 * dx)]


def from_one_rank(J, rows):
    """The own part of values of all steps ``(steps, n)``."""
    return rows[J.layout.slab.lo : J.layout.slab.hi].ravel()


def all_steps(J, vector):
    """All steps' rows of a vector of one control, ``(steps, n)``."""
    own = J.layout.part(vector, J.evolution.controls[0])
    return np.concatenate(J.spacetime.time_comm.allgather(own))


def test_value_and_derivatives_are_those_of_a_serial_tape():
    """A plain loop over the steps with a list of controls, differentiated by pyadjoint."""
    st = pf.SpaceTime("1x1", comm=COMM_SELF)
    mesh = square(4, st.space_comm)
    V, Q = FunctionSpace(mesh, "CG", 1), FunctionSpace(mesh, "DG", 0)
    x, y = SpatialCoordinate(mesh)
    u, v, w, q = Function(V), TestFunction(V), TrialFunction(V), Function(Q)
    bcs = DirichletBC(V, 0, 1)
    running, rate = lambda u: (u - x * y) ** 2 * dx, lambda r: 1e-3 * (r - x) ** 2 * dx
    ev = pf.Evolution(Dt(u) * v * dx + inner(grad(u), grad(v)) * dx - q * v * dx, u, tableau=pf.BackwardEuler(), dt=DT,
                      nsteps=STEPS, control=q, per_step=True, bcs=bcs)  # fmt: skip
    ours = pf.TimeParallelReducedFunctional(
        ev, pf.RunningMisfit(running(u)), regularisation=[1e-2 * q**2 * dx, pf.RateOfChange(rate(q))], spacetime=st,
        solver_parameters={"time_solver": "serial"},
    )  # fmt: skip
    controls = [Function(Q) for _ in range(STEPS)]
    with recording() as tape:
        U, W, qn, J, before = Function(V), Function(V), Function(Q), 0.0, None
        problem = LinearVariationalProblem(
            w * v * dx + DT * inner(grad(w), grad(v)) * dx, W * v * dx + DT * qn * v * dx, U, bcs=bcs,
            constant_jacobian=True,
        )  # fmt: skip
        solver = LinearVariationalSolver(problem)
        for control in controls:
            qn.assign(control)
            solver.solve()
            W.assign(U)
            J += assemble(DT * running(W)) + assemble(DT * 1e-2 * control**2 * dx)
            if before is not None:
                J += assemble(DT * rate((control - before) / DT))
            before = control
    theirs = ReducedFunctional(J, [Control(control) for control in controls], tape=tape)
    rng = np.random.default_rng(1)
    z, dz = rng.standard_normal((2, STEPS, Q.dim()))
    lists = []
    for values in (z, dz):
        lists.append([Function(Q) for _ in range(STEPS)])
        for f, row in zip(lists[-1], values, strict=True):
            f.dat.data_wo[:] = row
    rows = lambda functions: np.array([f.dat.data_ro for f in functions])
    value = float(theirs(lists[0]))
    gradient, action = rows(theirs.derivative()), rows(theirs.hessian(lists[1]))
    problem = ours.problem
    assert abs(problem.value(z.ravel()) - value) <= 1e-12 * value
    assert problem.parts["regularisation"] > 0.1 * value  # it is among the parts, and matters
    assert relative(problem.derivative(z.ravel()), gradient.ravel()) < 1e-11
    assert relative(problem.hessian_action(z.ravel(), dz.ravel()), action.ravel()) < 1e-11


def dense(J, forms, z):
    """Value, gradient and second derivative of both kinds by dense matrices, from forms in the control."""
    q, (plain, rate) = J.evolution.controls[0], forms
    matrix = lambda form: assemble(derivative(derivative(form, q), q), mat_type="aij").M.handle[:, :]
    zero = Function(q.function_space())
    at_zero = lambda form: assemble(derivative(form, q)).dat.data_ro.copy()
    q.assign(zero)
    A, B, b, c = matrix(plain), matrix(rate), at_zero(rate), float(assemble(rate))
    n = J.evolution.nsteps
    D = (np.eye(n, k=1) - np.eye(n))[:-1] / DT
    rates = D @ z
    value = DT * (0.5 * np.einsum("ij,jk,ik", z, A, z) + 0.5 * np.einsum("ij,jk,ik", rates, B, rates))
    value += DT * ((rates @ b).sum() + (n - 1) * c)
    gradient = DT * (z @ A + D.T @ (rates @ B + b))
    return value, gradient, DT * (np.kron(np.eye(n), A) + np.kron(D.T @ D, B))


@pytest.mark.parallel([1, 2, 3])
def test_it_is_that_of_dense_matrices_on_any_number_of_ranks():
    """Three ranks have 3, 2 and 2 steps."""
    st = pf.SpaceTime(space=1)
    J = functional(st, rate_and_value)
    rng = np.random.default_rng(2)
    z, dz = rng.standard_normal((2, STEPS, J.evolution.controls[0].function_space().dim()))
    value, gradient, matrix = dense(J, rate_and_value(J.evolution.controls[0], None, None, None), z)
    R = J.problem.regularisation
    own, along = from_one_rank(J, z), from_one_rank(J, dz)
    assert abs(R.value(own) - value) <= 1e-13 * value
    assert relative(all_steps(J, R.gradient(own)), gradient) < 1e-13
    assert relative(all_steps(J, R.hessian(own, along)).ravel(), matrix @ dz.ravel()) < 1e-13
    alone = functional(pf.SpaceTime("1x1", comm=COMM_SELF), rate_and_value).problem.regularisation
    assert R.value(own) == alone.value(z.ravel())  # bitwise
    assert np.array_equal(all_steps(J, R.gradient(own)).ravel(), alone.gradient(z.ravel()))
    assert np.array_equal(all_steps(J, R.hessian(own, along)).ravel(), alone.hessian(z.ravel(), dz.ravel()))


@pytest.mark.parallel([1, 2, 3])
@pytest.mark.parametrize("steps", [3, 4])
def test_the_transpose_of_differences_is_their_adjoint(steps):
    """One step per rank, too: the last of three ranks has no difference then."""
    st = pf.SpaceTime(space=1)
    slab, comm = st.slab(steps), st.time_comm
    D, rng = StepDifferences(st, slab, 0.5), np.random.default_rng(3)
    z, w = rng.standard_normal((steps, 2)), rng.standard_normal((steps - 1, 2))
    rates = np.concatenate(comm.allgather(D(z[slab.lo : slab.hi])))
    assert np.array_equal(rates, np.diff(z, axis=0) / 0.5)
    back = np.concatenate(comm.allgather(D.transposed(w[slab.lo : min(slab.hi, steps - 1)])))
    assert back.shape == z.shape
    assert abs((rates * w).sum() - (z * back).sum()) <= 1e-14 * np.abs(z * back).sum()


@pytest.mark.parallel(2)
def test_it_is_the_same_on_ranks_in_space():
    """Two ranks share each control, of which a real number is on the first one."""
    forms = lambda q, a, u, t: [pf.RateOfChange((2 * q**2 + (q - a) ** 2) * dx), 0.1 * a**2 * dx]
    J = functional(pf.SpaceTime(time=1), forms, amplitude=True, per_step=True)
    alone = functional(pf.SpaceTime("1x1", comm=COMM_SELF), forms, amplitude=True, per_step=True)
    x = SpatialCoordinate(J.evolution.V.mesh())[0], SpatialCoordinate(alone.evolution.V.mesh())[0]
    results = []
    for functional_, y in zip((J, alone), x, strict=True):
        given = functional_.function(np.zeros(functional_.layout.size))
        for n, (f, g) in enumerate(zip(*(c.subfunctions for c in given), strict=True)):
            f.interpolate(y * Constant(n**2) + Constant(np.cos(n)))
            g.assign(np.sin(n))
        z = functional_.array(given)
        R = functional_.problem.regularisation
        results.append((R.value(z), functional_.layout.pairing(R.gradient(z), z),
                        functional_.layout.pairing(R.hessian(z, z), z)))  # fmt: skip
    assert np.allclose(*results, rtol=1e-12, atol=0)
    assert alone.problem.regularisation.coupled == [("q", "a")]


def test_taylor():
    st = pf.SpaceTime("1x1", comm=COMM_SELF)
    J = functional(st, rate_and_value, nonlinear=True)
    z, dz = (J.function(v) for v in vectors(J, 2))
    check_orders(J, z, J.function(30 * J.array(dz)))


@pytest.mark.parallel([1, 2])
def test_a_large_weight_leaves_the_best_static_control():
    forms = lambda q, a, u, t: pf.RateOfChange(1e6 * q**2 * dx)
    J = functional(pf.SpaceTime(space=1), forms, steps=4)
    result = J.minimize_trust_region(gtol_rel=1e-9, cg_max_it=200)
    rows = all_steps(J, result.x)
    assert np.abs(np.diff(rows, axis=0)).max() <= 1e-4 * np.abs(rows).max()
    static = functional(pf.SpaceTime("1x1", comm=COMM_SELF), lambda q, a, u, t: None, steps=4, per_step=False)
    best = static.minimize_trust_region(gtol_rel=1e-9, cg_max_it=200)
    assert abs(result.value - best.value) <= 1e-4 * best.value


def varying(q, a, u, t):
    """Functionals of the values and of the rates with weights that vary differently over the bar."""
    (x,) = SpatialCoordinate(q.function_space().mesh())
    return [1e-3 * 10 ** (2 * x) * q**2 * dx(degree=4), pf.RateOfChange(1e-5 * (1 + x) * q**2 * dx(degree=4))]


@pytest.mark.parallel([1, 2, 3])
def test_the_inner_product_in_time_is_that_of_dense_matrices():
    """The map of a dual vector is the solution with the dense second derivative of the functionals."""
    J = functional(pf.SpaceTime(space=1), varying)
    q, problem = J.evolution.controls[0], J.problem
    product = InnerInTime(J.layout, [problem.regularisation_hessian(q)], {q: problem.rate_hessian(q)})
    y = np.random.default_rng(4).standard_normal((STEPS, q.function_space().dim()))
    own = from_one_rank(J, y)
    x = product.primal(own)
    alone = functional(pf.SpaceTime("1x1", comm=COMM_SELF), varying)
    R = alone.problem.regularisation
    matrix = np.array([R.hessian(np.zeros(y.size), e) for e in np.eye(y.size)])
    assert relative(all_steps(J, x).ravel(), np.linalg.solve(matrix, y.ravel())) < 1e-10
    assert relative(all_steps(J, product.dual(own)).ravel(), matrix @ y.ravel()) < 1e-12
    assert product.weights is None
    plain = functional(pf.SpaceTime("1x1", comm=COMM_SELF), varying)
    q1 = plain.evolution.controls[0]
    same = InnerInTime(plain.layout, [plain.problem.regularisation_hessian(q1)], {q1: plain.problem.rate_hessian(q1)})
    assert np.array_equal(all_steps(J, x).ravel(), same.primal(y.ravel()))  # bitwise


@pytest.mark.parallel([1, 2])
@pytest.mark.parametrize("kind", ["regularisation", "low-rank"])
def test_preconditioners_invert_it(kind):
    runs = []
    for preconditioner in (None, kind):
        J = functional(pf.SpaceTime(space=1), varying)
        runs.append(J.minimize_trust_region(gtol_rel=1e-9, preconditioner=preconditioner, cg_max_it=300))
    assert all(run.converged for run in runs)
    assert relative(all_steps(J, runs[1].x), all_steps(J, runs[0].x)) < 1e-5
    plain, steps = (sum(record.cg_iterations for record in run.history) for run in runs)
    assert steps < plain
    assert steps <= 10 or kind == "regularisation"


def test_rates_alone_are_singular_and_shifted():
    J = functional(pf.SpaceTime("1x1", comm=COMM_SELF), lambda q, a, u, t: pf.RateOfChange(1e-4 * q**2 * dx))
    P = pf.LowRankPreconditioner()
    result = J.minimize_trust_region(gtol_rel=1e-8, preconditioner=P)
    assert result.converged
    assert P.shift > 0
    n = J.layout.size
    H = np.array([J.problem.hessian_action(np.zeros(n), e) for e in np.eye(n)])
    assert relative(result.x, np.linalg.solve(H, -J.problem.derivative(np.zeros(n)))) < 1e-4
    with pytest.raises(InputError, match="'regularisation': the regularisation"):
        J.minimize_trust_region(preconditioner="regularisation")


def test_bilinear_forms_for_solvers():
    """The second derivatives of both kinds by a control, each by itself."""
    J = functional(pf.SpaceTime("1x1", comm=COMM_SELF), rate_and_value)
    q = J.evolution.controls[0]
    a, b = TrialFunction(q.function_space()), TestFunction(q.function_space())
    dense_of = lambda form: assemble(form, mat_type="aij").M.handle[:, :]
    R = J.problem.regularisation
    assert np.allclose(dense_of(R.second_derivative_of_rates(q)), dense_of(2e-2 * a * b * dx), rtol=1e-14)
    assert np.allclose(dense_of(R.second_derivative(q)), dense_of(0.1 * a * b * dx), rtol=1e-14)
    assert R.of_rates == ["q"]
    twice = (J + 2 * J).problem
    assert np.allclose(dense_of(twice.rate_hessian(q)), dense_of(6e-2 * a * b * dx), rtol=1e-14)
    assert np.allclose(dense_of(twice.regularisation_hessian(q)), dense_of(0.3 * a * b * dx), rtol=1e-14)
    plain = functional(pf.SpaceTime("1x1", comm=COMM_SELF), lambda q, a, u, t: q**2 * dx)
    assert plain.problem.rate_hessian(plain.evolution.controls[0]) is None


def test_one_step_has_no_rate():
    J = functional(pf.SpaceTime("1x1", comm=COMM_SELF), lambda q, a, u, t: pf.RateOfChange(q**2 * dx), steps=1)
    z = vectors(J, 1)[0]
    R = J.problem.regularisation
    assert R.value(z) == 0
    assert not R.gradient(z).any()
    assert not R.hessian(z, z).any()


@pytest.mark.parallel([1, 2])
def test_new_data_are_read():
    """The rate with which a control's is compared is a constant of the user."""
    st, rate = pf.SpaceTime(space=1), {}

    def forms(q, a, u, t):
        rate["r"] = Function(q.function_space(), name="rate").assign(1.0)
        return [pf.RateOfChange((q - rate["r"]) ** 2 * dx)]

    J = functional(st, forms)
    z = vectors(J, 1)[0]
    J.problem.value(z)
    rate["r"].assign(-2.0)
    assert J.update_data() == ["the value of the function 'rate'"]
    rows = all_steps(J, z)
    expected = DT * ((np.diff(rows, axis=0) / DT + 2) ** 2).sum() / rows.shape[1]
    assert abs(J.problem.regularisation.value(z) - expected) <= 1e-13 * expected


def test_arithmetic_of_the_functional():
    V = FunctionSpace(UnitIntervalMesh(2, comm=COMM_SELF), "DG", 0)
    q = Function(V).assign(2.0)
    S = pf.RateOfChange(q**2 * dx)
    for made, factor in ((3 * S, 3), (S * 3, 3), (-S, -1), (S + S, 2), (sum([S, S]), 2), (S - 2 * S, -1)):
        assert isinstance(made, pf.RateOfChange)
        assert abs(assemble(made) - 4 * factor) < 1e-14
    for wrong in (lambda: S + q**2 * dx, lambda: q**2 * dx + S, lambda: q**2 * dx - S):
        with pytest.raises(InputTypeError, match="give a list"):
            wrong()
    with pytest.raises(InputTypeError, match="a Function is refused"):
        pf.RateOfChange(q)
    with pytest.raises(InputError, match="of the first rate alone"):
        pf.RateOfChange(S)
    with pytest.raises(InputError, match="test or trial functions"):
        pf.RateOfChange(q * TestFunction(V) * dx)


REFUSED = {
    "static": (dict(per_step=False), lambda q, a, u, t: q**2, "'q', which is static"),
    "not quadratic": ({}, lambda q, a, u, t: q**4, "not quadratic"),
    "state": ({}, lambda q, a, u, t: (q - u) ** 2, "contains the state u"),
    "time": ({}, lambda q, a, u, t: (q - t) ** 2, "contains the time function t"),
    "no control": ({}, lambda q, a, u, t: a**2, "give a functional of the control"),
}


@pytest.mark.parallel([1, 2])
@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_rate_is_refused_on_all_ranks(case):
    options, integrand, words = REFUSED[case]
    with pytest.raises(InputError, match=words):
        functional(pf.SpaceTime(space=1), lambda q, a, u, t: pf.RateOfChange(integrand(q, a, u, t) * dx), **options)


@pytest.mark.parallel(2)
def test_ranks_with_another_functional_are_named():
    wrap = pf.RateOfChange if MPI.COMM_WORLD.rank else (lambda form: form)
    with pytest.raises(InputError, match="regularisation"):
        functional(pf.SpaceTime(space=1), lambda q, a, u, t: wrap(q**2 * dx))


def test_it_is_no_prior():
    J = functional(pf.SpaceTime("1x1", comm=COMM_SELF), rate_and_value)
    with pytest.raises(InputError, match="rate of change of 'q', which couples steps"):
        J.problem.regularisation_hessians()


def test_the_kkt_system_has_it():
    J = functional(pf.SpaceTime("1x1", comm=COMM_SELF), varying)
    result = J.minimize(method="kkt", gtol_rel=1e-9)
    reduced = functional(pf.SpaceTime("1x1", comm=COMM_SELF), varying).minimize_trust_region(gtol_rel=1e-11)
    assert result.converged
    assert result.choice.startswith("kkt")
    assert np.linalg.norm(result.x - reduced.x) < 1e-7 * np.linalg.norm(reduced.x)

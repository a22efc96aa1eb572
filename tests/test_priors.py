"""Gaussian priors of all kinds of controls against dense numpy algebra, and the law of their samples."""

from functools import cache

import firedrake as fd
import numpy as np
import pytest
from firedrake import (
    COMM_SELF,
    COMM_WORLD,
    Constant,
    Function,
    FunctionSpace,
    PointEvaluator,
    SpatialCoordinate,
    TestFunction,
    TrialFunction,
    as_vector,
    assemble,
    curl,
    div,
    dot,
    ds,
    dx,
    grad,
    inner,
)
from firedrake.adjoint.covariance_operator import AutoregressiveCovariance
from firedrake.petsc import PETSc
from irksome import Dt
from pyadjoint.tape import get_working_tape

import pint_fem as pf
from pint_fem.adjoint.riesz import ControlInner
from pint_fem.errors import InputError
from pint_fem.evolution.control_layout import ControlLayout
from pint_fem.inverse.laws.covariance_fields import BilaplacianPrior, OperatorField, gaussian_field
from pint_fem.inverse.laws.gaussian_fields import DiagonalField, FormField, GaussianField
from pint_fem.inverse.laws.priors import FieldPrior, ScaledPrior, make_prior
from pint_fem.kernels.block_operator import ManySolves
from pint_fem.kernels.lanczos import NotPositive, inverse_root
from tests.meshes import square

ELEMENTS = {"CG1": ("CG", 1), "CG2": ("CG", 2), "DG0": ("DG", 0), "RT": ("RT", 1), "N1curl": ("N1curl", 1),
            "R": ("R", 0)}  # fmt: skip
KINDS = ("CG1", "DG0 per step", "CG2", "R", "RT", "N1curl", "R per step", "CG1 per step", "initial")
DT, STEPS = 0.1, 5


def layout(st, kinds=KINDS, n=2):
    """Controls of some kinds in the load of a heat equation."""
    mesh = square(n, st.space_comm)
    V = FunctionSpace(mesh, "CG", 1)
    u, v = Function(V), TestFunction(V)
    controls = {k: Function(FunctionSpace(mesh, *ELEMENTS[k.split()[0]]), name=k) for k in kinds if k != "initial"}
    load = sum((dot(q, as_vector((1, 2))) if q.ufl_shape else q) for q in controls.values())
    extra = {"initial": Function(V, name="initial")} if "initial" in kinds else {}
    ev = pf.Evolution(
        Dt(u) * v * dx + dot(grad(u), grad(v)) * dx - load * v * dx, u, tableau=pf.BackwardEuler(), dt=DT,
        nsteps=STEPS, control=[(controls | extra)[k] for k in kinds],
        per_step=[c for k, c in controls.items() if "per step" in k], **extra,
    )  # fmt: skip
    return ControlLayout(ev, st, st.slab(STEPS))


def form(space):
    """A symmetric positive definite bilinear form with a coefficient that varies."""
    a, b = TrialFunction(space), TestFunction(space)
    name, x = space.ufl_element().family(), SpatialCoordinate(space.mesh())[0]
    mass = (2 + x) * inner(a, b) * dx
    if name in ("Real", "Discontinuous Lagrange"):
        return mass
    if name == "Raviart-Thomas":
        return mass + 0.1 * div(a) * div(b) * dx
    if name.startswith("Nedelec"):
        return mass + 0.1 * curl(a) * curl(b) * dx
    return mass + 0.1 * inner(grad(a), grad(b)) * dx


def forms(lay):
    return [form(c.function_space()) for c in lay.evolution.controls]


def dense(bilinear):
    """The matrix of a bilinear form on one rank."""
    space = bilinear.arguments()[0].function_space()
    if space.ufl_element().family() == "Real":
        one = Function(space).assign(1.0)
        return np.array([[assemble(bilinear(one, one))]])
    return assemble(bilinear, mat_type="aij").petscmat[:, :]


def rows_of(lay, count, seed=0):
    """Vectors that are the same on every process grid with one rank in space."""
    out = np.empty((count, lay.size))
    for i, c in enumerate(lay.evolution.controls):
        target = lay.part(out, c)
        stepwise = c in lay.evolution.stepwise
        for j, n in enumerate(range(lay.slab.lo, lay.slab.hi) if stepwise else [0]):
            values = np.random.default_rng([seed, i, n]).standard_normal((count, target.shape[-1]))
            (target[:, j] if stepwise else target)[...] = values
    return out


@cache
def alone():
    return pf.SpaceTime("1x1", comm=COMM_SELF)


def in_time():
    return pf.SpaceTime((1, COMM_WORLD.size))


def check_law(samples, Q, total=None):
    """Whether samples ``(count, n)`` have mean zero and the covariance ``Q^{-1}``: ``L^T x`` is white noise."""
    count, n = samples.shape
    white = samples @ np.linalg.cholesky(Q)
    np.testing.assert_allclose(white.T @ white / count, np.eye(n), atol=6 * np.sqrt(2 / count))
    np.testing.assert_allclose(white.mean(axis=0), 0, atol=5 / np.sqrt(count))
    assert abs((white**2).sum() - count * n) < 4 * np.sqrt(2 * count * n)


# -- laws of one field -------------------------------------------------------------------------------------------------
def space_of(element, n=2):
    return FunctionSpace(square(n, alone().space_comm), *ELEMENTS[element])


@pytest.mark.parametrize("element", ELEMENTS)
@pytest.mark.parametrize("by", ["kernels", "PETSc"])
def test_a_form_is_the_precision(element, by):
    if by == "PETSc":
        set_option()
    space = space_of(element)
    field, Q = gaussian_field(space, form(space), "q"), dense(form(space))
    eye, C = np.eye(space.dim()), np.linalg.inv(Q)
    if isinstance(field, FormField):
        assert field.solves.has_root == (by == "kernels")
    np.testing.assert_allclose(field.covariance(eye), C, rtol=1e-10, atol=1e-11 * abs(C).max())
    np.testing.assert_allclose(field.precision(eye), Q, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(field.variance(), C.diagonal(), rtol=1e-10)
    if field.log_det_precision is not None:
        assert field.log_det_precision == pytest.approx(np.linalg.slogdet(Q)[1], rel=1e-11)
    assert (field.log_det_precision is None) == (by == "PETSc" and element != "R")
    samples = field.samples([(3, 1), (3, 2)], 2000 if by == "kernels" else 400)
    check_law(samples.reshape(-1, space.dim()), Q)
    check_law((samples[:, 0] + samples[:, 1]) / np.sqrt(2), Q)  # of independent ones
    few = field.samples([(3, 2)], 5)[:, 0]
    np.testing.assert_allclose(few, samples[:5, 1], rtol=0, atol=0 if by == "kernels" else 1e-9)


def set_option():
    """An option of PETSc's, with which factors are PETSc's."""
    PETSc.Options("pint_prior_")["ksp_max_it"] = 900


@pytest.fixture(autouse=True)
def without_options():
    yield
    PETSc.Options("pint_prior_").delValue("ksp_max_it")


def test_variances_are_estimated_with_the_stated_error(monkeypatch):
    space = space_of("CG1", 6)
    field = gaussian_field(space, form(space), "q")
    exact = np.linalg.inv(dense(form(space))).diagonal()
    error = field.variance(samples=800) / exact - 1
    assert 0.5 < np.sqrt((error**2).mean()) / np.sqrt(2 / 800) < 1.5
    monkeypatch.setattr(GaussianField, "largest_exact", 48)  # of 49 unknowns
    error = field.variance() / exact - 1
    assert 0.5 < np.sqrt((error**2).mean()) / np.sqrt(2 / 2000) < 1.5
    # in blocks, whose noise differs
    monkeypatch.setattr("pint_fem.inverse.laws.gaussian_fields._BLOCK", 49 * 100)
    blocks = field.variance(samples=800) / exact - 1
    assert 0.5 < np.sqrt((blocks**2).mean()) / np.sqrt(2 / 800) < 1.5
    assert 49 * [0] != (blocks - error).tolist()


def test_exact_variances_do_not_depend_on_blocks(monkeypatch):
    space = space_of("CG1", 6)
    whole = gaussian_field(space, form(space), "q").variance()
    monkeypatch.setattr("pint_fem.inverse.laws.gaussian_fields._BLOCK", 49 * 10)
    np.testing.assert_array_equal(gaussian_field(space, form(space), "q").variance(), whole)


@pytest.mark.parametrize("case", ["numbers", "robin", "robin by a number", "expressions", "form", "real"])
def test_a_bilaplacian_prior_is_two_solves(case):
    space = space_of({"form": "RT", "real": "R"}.get(case, "CG1"))
    a, b = TrialFunction(space), TestFunction(space)
    x = SpatialCoordinate(space.mesh())[0]
    A = 0.2 * inner(grad(a), grad(b)) * dx + 3 * inner(a, b) * dx
    prior = BilaplacianPrior(0.2, 3)
    if case == "robin":
        prior, A = BilaplacianPrior(0.2, 3, robin=True), A + np.sqrt(0.6) / 1.42 * inner(a, b) * ds
    elif case == "robin by a number":
        prior, A = BilaplacianPrior(0.2, 3, robin=2), A + 2 * inner(a, b) * ds
    elif case == "expressions":
        gamma, delta = 1 + x, Constant(2.0)
        prior, A = (
            BilaplacianPrior(gamma, delta, robin=False),
            gamma * inner(grad(a), grad(b)) * dx + delta * a * b * dx,
        )
    elif case == "form":
        prior, A = BilaplacianPrior(form=form(space)), form(space)
    elif case == "real":
        A = 3 * a * b * dx
    A, M = dense(A), dense(inner(a, b) * dx)
    Q = A @ np.linalg.solve(M, A)
    field, eye = gaussian_field(space, prior, "q"), np.eye(space.dim())
    np.testing.assert_allclose(field.precision(eye), Q, rtol=1e-10, atol=1e-11 * abs(Q).max())
    np.testing.assert_allclose(field.covariance(eye) @ Q, eye, atol=1e-9)
    np.testing.assert_allclose(field.variance(), np.linalg.inv(Q).diagonal(), rtol=1e-9)
    assert field.log_det_precision == pytest.approx(np.linalg.slogdet(Q)[1], rel=1e-11)
    check_law(field.samples([(0, 0)], 4000)[:, 0], Q)


def test_the_variance_of_a_bilaplacian_prior_inside_is_that_of_the_plane():
    space = space_of("CG1", 40)
    gamma, delta = 0.02, 20.0  # correlation length 0.09
    variance = Function(space)
    variance.dat.data[:] = gaussian_field(space, BilaplacianPrior(gamma, delta), "q").variance()
    assert PointEvaluator(space.mesh(), [[0.5, 0.5]]).evaluate(variance)[0] == pytest.approx(
        1 / (4 * np.pi * gamma * delta), rel=0.03
    )


@pytest.mark.parametrize("order", [0, 4])
def test_a_covariance_operator_of_firedrake_is_used_as_it_is(order):
    space = space_of("CG1")
    V, W = TrialFunction(space), TestFunction(space)
    B = AutoregressiveCovariance(space, L=0.4, sigma=1.5, m=order, seed=8)
    field, eye = gaussian_field(space, B, "q"), np.eye(space.dim())
    M = dense(inner(V, W) * dx)
    if order:
        K = dense(inner(V, W) * dx + B.kappa * inner(grad(V), grad(W)) * dx)
        C = float(B._weight) ** 2 * np.linalg.matrix_power(np.linalg.solve(K, M), order) @ np.linalg.inv(M)
    else:
        C = 1.5**2 * np.linalg.inv(M)
    blocks = len(get_working_tape()._blocks)
    np.testing.assert_allclose(field.covariance(eye), C, rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(field.precision(eye) @ C, eye, atol=1e-6)
    np.testing.assert_allclose(field.variance(), C.diagonal(), rtol=1e-8)
    samples = field.samples([(4, 0)], 200)[:, 0]
    check_law(samples, np.linalg.inv((C + C.T) / 2))
    np.testing.assert_allclose(field.samples([(4, 1), (4, 0)], 3)[:, 1], samples[:3], rtol=0, atol=1e-13)
    assert not np.array_equal(field.samples([(4, 1)], 3)[:, 0], samples[:3])
    assert len(get_working_tape()._blocks) == blocks  # nothing was recorded


# -- priors of several controls ----------------------------------------------------------------------------------------
@pytest.mark.parallel([1, 2, 3])
def test_products_variances_and_determinant_are_those_of_dense_matrices():
    lay = layout(in_time())
    prior, rows = make_prior(forms(lay), lay), rows_of(lay, 4)
    covariance, precision, variance = prior.covariance(rows), prior.precision(rows), prior.variance()
    log_det = 0.0
    for c in lay.evolution.controls:
        stepwise = c in lay.evolution.stepwise
        Q = dense(form(c.function_space())) * (DT if stepwise else 1)
        C = np.linalg.inv(Q)
        np.testing.assert_allclose(lay.part(covariance, c), lay.part(rows, c) @ C, rtol=1e-9, atol=1e-10)
        np.testing.assert_allclose(lay.part(precision, c), lay.part(rows, c) @ Q, rtol=1e-10, atol=1e-13)
        target = lay.part(variance, c)
        np.testing.assert_allclose(target, np.broadcast_to(C.diagonal(), target.shape), rtol=1e-10)
        log_det += np.linalg.slogdet(Q)[1] * (STEPS if stepwise else 1)
    assert prior.log_det_precision() == pytest.approx(log_det, rel=1e-11)
    np.testing.assert_array_equal(prior.covariance(rows[2]), covariance[2])
    np.testing.assert_array_equal(prior.precision(rows[2]), precision[2])
    np.testing.assert_array_equal(prior.mean, np.zeros(lay.size))
    assert prior.covariance(rows[:0]).shape == (0, lay.size)


@pytest.mark.parallel([1, 2, 3])
def test_results_are_bitwise_the_same_for_every_number_of_ranks_in_time():
    lay, whole = layout(in_time()), layout(alone())
    ours, theirs = make_prior(forms(lay), lay), make_prior(forms(whole), whole)
    rows, all_rows = rows_of(lay, 3), rows_of(whole, 3)
    pairs = [
        (ours.covariance(rows), theirs.covariance(all_rows)),
        (ours.precision(rows), theirs.precision(all_rows)),
        (ours.sample(3, 5), theirs.sample(3, 5)),
        (ours.variance()[None], theirs.variance()[None]),
        (ours.variance(samples=30)[None], theirs.variance(samples=30)[None]),
    ]
    for mine, all_steps in pairs:
        for c, d in zip(lay.evolution.controls, whole.evolution.controls, strict=True):
            expected = whole.part(all_steps, d)
            if c in lay.evolution.stepwise:
                expected = expected[:, lay.slab.lo : lay.slab.hi]
            np.testing.assert_array_equal(lay.part(mine, c), expected)


def test_samples_of_all_controls_and_steps_are_independent():
    lay = layout(alone(), ("CG1", "DG0 per step", "R", "R per step"))
    prior = make_prior(forms(lay), lay)
    samples = prior.sample(20_000, 1)
    np.testing.assert_array_equal(prior.sample(4, 1), samples[:4])
    Q = prior.precision(np.eye(lay.size))
    check_law(samples, Q)
    assert not np.array_equal(prior.sample(4, 2), samples[:4])


@pytest.mark.parallel([1, 2])
def test_the_prior_of_a_regularisation_is_its_second_derivative_with_its_minimiser_as_mean():
    lay = layout(in_time())
    ev, x = lay.evolution, SpatialCoordinate(lay.evolution.V.mesh())[0]
    static = sum(0.5 * (inner(c, c) + 0.1 * inner(grad(c), grad(c))) * dx for c in ev.controls
                 if c not in ev.stepwise and c.function_space().ufl_element().family() != "Real")  # fmt: skip
    others = [(c - 2 - x) ** 2 * dx for c in ev.controls if c in ev.stepwise or c.name() == "R"]
    rf = pf.TimeParallelReducedFunctional(
        ev, [pf.RunningMisfit(ev.u**2 * dx)], regularisation=[static, *others], spacetime=lay.spacetime,
        solver_parameters={"mgrit": {"levels": 1}},
    )  # fmt: skip
    regularisation = rf.problem.regularisation
    found = rf.problem.regularisation_hessians()
    gradient = regularisation.gradient(np.zeros(lay.size))
    prior = make_prior(None, rf.layout, regularisation_forms=found, regularisation_gradient=gradient)
    z = rows_of(lay, 1)[0]
    np.testing.assert_allclose(prior.precision(z), regularisation.hessian(z, z), rtol=1e-11, atol=1e-13)
    np.testing.assert_allclose(regularisation.gradient(prior.mean), 0, atol=1e-12)
    assert abs(prior.mean).max() > 2
    given = make_prior(None, rf.layout, regularisation_forms=found, regularisation_gradient=gradient, mean=z)
    np.testing.assert_array_equal(given.mean, z)
    # of some controls the regularisation's, of others one that is given
    mixed = make_prior([None, BilaplacianPrior(form=form(ev.controls[1].function_space())), *[None] * 7], rf.layout,
                       regularisation_forms=found, regularisation_gradient=gradient)  # fmt: skip
    np.testing.assert_array_equal(rf.layout.part(mixed.precision(z), ev.controls[0]),
                                  rf.layout.part(prior.precision(z), ev.controls[0]))  # fmt: skip
    assert not np.allclose(rf.layout.part(mixed.precision(z), ev.controls[1]),
                           rf.layout.part(prior.precision(z), ev.controls[1]))  # fmt: skip
    np.testing.assert_array_equal(mixed.mean, 0)


def test_a_regularisation_that_couples_controls_or_is_not_quadratic_is_no_prior():
    lay = layout(alone(), ("CG1", "R"))
    q, r = lay.evolution.controls
    make = lambda R: pf.TimeParallelReducedFunctional(
        lay.evolution, [pf.RunningMisfit(lay.evolution.u**2 * dx)], regularisation=R, spacetime=alone(),
        solver_parameters={"mgrit": {"levels": 1}},
    )  # fmt: skip
    with pytest.raises(InputError, match=r"couples the controls 'CG1', 'R'.*give prior= with a bilinear form for each"):
        make((q - r) ** 2 * dx).problem.regularisation_hessians()
    for R in ([q**4 * dx + r**2 * dx], [q**2 * dx]):
        found = make(R).problem.regularisation_hessians()
        assert None in found
        with pytest.raises(InputError, match=r"no constant second derivative by the control .*or give prior="):
            make_prior(None, lay, regularisation_forms=found)
    with pytest.raises(InputError, match="no constant second derivative by the control 'CG1'"):
        make_prior(None, lay)


@pytest.mark.parallel([1, 2])
@pytest.mark.parametrize("kind", ["L2", "H1", "l2", "lumped", "firedrake"])
def test_the_riesz_map_is_a_prior(kind):
    kinds = ("CG1", "DG0 per step", "R", "R per step")
    slow = kind == "firedrake"  # one vector after another
    lay = layout(in_time(), kinds[:1] if slow else kinds)
    given = kind
    if slow:
        given = [fd.RieszMap(c.function_space(), "L2", constant_jacobian=True) for c in lay.evolution.controls]
    inner_product = ControlInner(lay, given)
    prior, rows = make_prior("riesz_map", lay, inner=inner_product), rows_of(lay, 3)
    for row, covariance, precision in zip(rows, prior.covariance(rows), prior.precision(rows), strict=True):
        np.testing.assert_allclose(covariance, inner_product.primal(row), rtol=1e-8, atol=1e-8)
        np.testing.assert_allclose(precision, inner_product.dual(row), rtol=1e-10, atol=1e-12)
    samples = prior.sample(20 if slow else 1000, 2)
    for c in lay.evolution.controls:
        space, weight = c.function_space(), DT if c in lay.evolution.stepwise else 1
        riesz = inner_product.maps[c]
        Q = weight * np.array([riesz.dual(e) for e in np.eye(space.dim())])
        drawn = lay.part(samples, c)
        check_law(drawn[:, 0] if weight == DT else drawn, Q)
        target = lay.part(prior.variance(), c)
        np.testing.assert_allclose(target, np.broadcast_to(np.linalg.inv(Q).diagonal(), target.shape), rtol=1e-8)


@pytest.mark.parallel([1, 2])
def test_a_multiple_of_the_precision():
    lay = layout(in_time(), ("CG1", "DG0 per step", "R"))
    prior, rows = make_prior(forms(lay), lay, mean=rows_of(lay, 1, 7)[0]), rows_of(lay, 2)
    scaled = prior.scaled(4.0)
    assert isinstance(scaled, ScaledPrior)
    np.testing.assert_allclose(scaled.covariance(rows), prior.covariance(rows) / 4, rtol=1e-14)
    np.testing.assert_allclose(scaled.precision(rows), prior.precision(rows) * 4, rtol=1e-14)
    np.testing.assert_allclose(scaled.sample(2, 0), prior.sample(2, 0) / 2, rtol=1e-14)
    np.testing.assert_allclose(scaled.variance(), prior.variance() / 4, rtol=1e-14)
    np.testing.assert_array_equal(scaled.mean, prior.mean)
    unknowns = 9 + STEPS * 8 + 1
    assert scaled.log_det_precision() == pytest.approx(prior.log_det_precision() + unknowns * np.log(4), rel=1e-13)
    for alpha in (0, -1.0, np.nan, np.inf, True, "one"):
        with pytest.raises(InputError, match="weight of the prior alpha"):
            prior.scaled(alpha)


def test_determinants_that_are_not_cheap():
    lay = layout(alone(), ("CG1", "R"))
    B = AutoregressiveCovariance(lay.evolution.controls[0].function_space(), L=0.4, m=4)
    prior = make_prior([B, form(lay.evolution.controls[1].function_space())], lay)
    assert prior.log_det_precision() is None
    assert prior.scaled(2.0).log_det_precision() is None


def test_a_prior_is_returned_as_it_is_or_with_another_mean():
    lay, other = layout(alone(), ("CG1", "R")), layout(alone(), ("CG1", "R"))
    prior = make_prior(forms(lay), lay)
    assert make_prior(prior, lay) is prior
    mean = np.arange(lay.size, dtype=float)
    moved = make_prior(prior, lay, mean=mean)
    np.testing.assert_array_equal(moved.mean, mean)
    assert not np.shares_memory(moved.mean, mean)
    assert not prior.mean.any()
    with pytest.raises(InputError, match="the Prior is one of other controls"):
        make_prior(prior, other)


@pytest.mark.parallel([1, 2])
def test_a_mean_that_does_not_fit_is_refused_on_every_rank():
    lay = layout(in_time(), ("CG1", "DG0 per step"))
    last = COMM_WORLD.rank == COMM_WORLD.size - 1
    good = np.ones(lay.size)
    bad = {"NaN": np.where(np.arange(lay.size) == 3, np.nan, 1.0), "shape": np.ones(lay.size + 1), "numbers": "zero"}
    for message, mean in bad.items():
        with pytest.raises(InputError, match=message):
            make_prior(forms(lay), lay, mean=mean if last else good)
    np.testing.assert_array_equal(make_prior(forms(lay), lay, mean=good).mean, good)


# -- several ranks in space --------------------------------------------------------------------------------------------
@pytest.mark.parallel(2)
@pytest.mark.parametrize("by", ["kernels", "PETSc"])
def test_two_ranks_in_space(by):
    st = pf.SpaceTime("2x1")
    kinds = ("CG1", "DG0 per step", "R", "R per step", "RT")
    whole = layout(alone(), kinds, n=4)
    expected = make_prior(forms(whole), whole)
    if by == "PETSc":
        set_option()
    lay = layout(st, kinds, n=4)
    prior = make_prior(forms(lay), lay)
    a, b = np.random.default_rng(st.space_comm.rank).standard_normal((2, 3, lay.size))
    np.testing.assert_allclose(prior.precision(prior.covariance(a)), a, rtol=1e-8, atol=1e-9)
    pairs = zip(a, b, prior.covariance(a), prior.covariance(b), strict=True)
    for x, y, Cx, Cy in pairs:
        assert lay.pairing(x, Cy) == pytest.approx(lay.pairing(y, Cx), rel=1e-9)
        assert lay.pairing(x, Cx) > 0
    for c, d in zip(lay.evolution.controls, whole.evolution.controls, strict=True):
        both = [lay.part(prior.variance(), c), whole.part(expected.variance(), d)]
        mine = np.concatenate(st.space_comm.allgather(both[0].ravel()))
        np.testing.assert_allclose(np.sort(mine), np.sort(both[1].ravel()), rtol=1e-9)
    if by == "kernels":
        assert prior.log_det_precision() == pytest.approx(expected.log_det_precision(), rel=1e-11)
    count = 400 if by == "kernels" else 60
    samples = prior.sample(count, 3)
    total = int(st.space_comm.allreduce(lay.size))
    squares = [lay.pairing(Qx, x) for Qx, x in zip(prior.precision(samples), samples, strict=True)]
    assert abs(np.sum(squares) - count * total) < 4 * np.sqrt(2 * count * total)
    assert np.var(squares) == pytest.approx(2 * total, rel=6 * np.sqrt(2 / count))
    direction = prior.precision(samples[0])  # the variance along a direction
    along = [lay.pairing(direction, x) for x in samples[1:]]
    assert np.mean(np.square(along)) == pytest.approx(squares[0], rel=6 * np.sqrt(2 / count))
    np.testing.assert_array_equal(prior.sample(2, 3), samples[:2] if by == "kernels" else prior.sample(2, 3))


@pytest.mark.parallel(2)
def test_the_own_part_of_exact_variances_and_operators_on_two_ranks_in_space():
    st = pf.SpaceTime("2x1")
    space = FunctionSpace(square(4, st.space_comm), "CG", 1)
    for prior, count in ((BilaplacianPrior(0.2, 3), 800), (AutoregressiveCovariance(space, L=0.4, m=4), 60)):
        field = gaussian_field(space, prior, "q")
        samples = field.samples([(1, 0)], count)[:, 0]
        error = np.concatenate(st.space_comm.allgather((samples**2).mean(axis=0) / field.variance() - 1))
        assert 0.5 < np.sqrt((error**2).mean()) / np.sqrt(2 / count) < 1.6
        rows = np.random.default_rng(st.space_comm.rank).standard_normal((2, field.size))
        np.testing.assert_allclose(field.precision(field.covariance(rows)), rows, atol=1e-5)
        # The same draws whatever their number; a product with two columns may be rounded otherwise than one with many.
        np.testing.assert_allclose(field.samples([(1, 0)], 2)[:, 0], samples[:2], rtol=0, atol=1e-13)


@pytest.mark.parallel(4)
def test_the_static_part_is_the_same_on_all_ranks_in_time_with_two_in_space():
    st = pf.SpaceTime("2x2")
    lay = layout(st, ("CG1", "DG0 per step", "R"), n=4)
    rf_prior = make_prior(forms(lay), lay)
    rows = np.random.default_rng([st.space_comm.rank]).standard_normal((2, lay.size + 100))[:, : lay.size]
    lay_static = slice(lay.static_size)
    for out in (rf_prior.covariance(rows), rf_prior.sample(2, 0), rf_prior.variance()[None]):
        mine = out[:, lay_static].tobytes()
        assert len(set(st.time_comm.allgather(mine))) == 1


# -- what is refused ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("by", ["kernels", "PETSc"])
def test_forms_that_are_no_precision(by):
    if by == "PETSc":
        set_option()
    space, constants = space_of("CG1", 8), space_of("R")
    a, b = TrialFunction(space), TestFunction(space)
    mass, stiffness = a * b * dx, dot(grad(a), grad(b)) * dx
    remedy = r"prior of 'q': .*add a multiple of the mass, such as 1e-2\*inner\(a, b\)\*dx"
    for wrong in (stiffness, stiffness - 1e-3 * mass, stiffness - 300 * mass, -mass, mass - mass):
        with pytest.raises(InputError, match=remedy):
            gaussian_field(space, wrong, "q")
    gaussian_field(space, stiffness + 1e-8 * mass, "q")  # nearly singular, and a precision
    with pytest.raises(InputError, match="not symmetric"):
        gaussian_field(space, mass + a.dx(0) * b * dx, "q")
    with pytest.raises(InputError, match="infinite or NaN"):
        gaussian_field(space, Constant(np.nan) * mass, "q")
    with pytest.raises(InputError, match=remedy):
        gaussian_field(constants, -TrialFunction(constants) * TestFunction(constants) * dx, "q")


def test_priors_that_do_not_fit_a_control():
    space, other = space_of("CG1"), space_of("CG2")
    mixed = space * other
    linear = TestFunction(space) * dx
    for wrong in (form(other), linear, inner(TrialFunction(mixed), TestFunction(mixed)) * dx):
        with pytest.raises(InputError, match=r"prior of 'q': the form has .*give a bilinear form on the control's own"):
            gaussian_field(space, wrong, "q")
    with pytest.raises(InputError, match="the covariance operator is on"):
        OperatorField(space, AutoregressiveCovariance(other, L=0.3, m=4), "q")
    with pytest.raises(InputError, match="the law is on another function space"):
        gaussian_field(space, gaussian_field(other, form(other), "p"), "q")
    with pytest.raises(InputError, match="give a bilinear form, a BilaplacianPrior"):
        gaussian_field(space, 3.0, "q")
    with pytest.raises(InputError, match="a precision of a coefficient is not positive"):
        DiagonalField(space, np.zeros(9), "q")
    field = gaussian_field(space, form(space), "q")
    assert gaussian_field(space, field, "q") is field


def test_arguments_of_a_bilaplacian_prior():
    for given in ({}, {"gamma": 1}, {"gamma": -1, "delta": 1}, {"gamma": 1, "delta": True}, {"gamma": 1, "delta": "1"},
                  {"gamma": 1, "delta": 1, "robin": -1}, {"gamma": 1, "delta": np.inf}):  # fmt: skip
        with pytest.raises(InputError, match="give a positive number"):
            BilaplacianPrior(**given)
    for given in ({"form": 1}, {"form": form(space_of("CG1")), "delta": 1}):
        with pytest.raises(InputError, match="give gamma and delta, or a bilinear form="):
            BilaplacianPrior(**given)
    for element in ("RT", "DG0", "N1curl"):
        with pytest.raises(InputError, match="have no gradient in L2: give form="):
            BilaplacianPrior(1, 1).on(space_of(element), "q")


def test_what_make_prior_refuses():
    lay = layout(alone(), ("CG1", "R"))
    for given, message in (
        ("l2", "prior 'l2': the only name is 'riesz_map'"),
        ("riesz_map", "where there is a Riesz map"),
        (1.0, "prior: 1.0: give a bilinear form"),
        (forms(lay)[:1], "a list of 1 for 2 controls"),
        (forms(lay)[0], "prior of 'R': the form has 2 arguments or is on another space"),
    ):
        with pytest.raises(InputError, match=message):
            make_prior(given, lay)
    prior = make_prior(forms(lay), lay)
    assert isinstance(prior, FieldPrior)
    for count, seed in ((1.5, 0), (-1, 0), (1, None), (1, -3)):
        with pytest.raises(InputError, match="give a whole number of at least 0"):
            prior.sample(count, seed)
    for samples in (0, 1.5, "many"):
        with pytest.raises(InputError, match="give a whole number of at least 1, or None"):
            prior.variance(samples)


# -- kernels -----------------------------------------------------------------------------------------------------------
def dots(a, b):
    return (a * b).sum(axis=1)


def test_products_with_an_inverse_root():
    rng = np.random.default_rng(0)
    Z = np.linalg.qr(rng.standard_normal((40, 40)))[0]
    values = np.geomspace(1e-4, 1e3, 40)
    A, root = (Z * values) @ Z.T, (Z / np.sqrt(values)) @ Z.T
    rows = np.concatenate([rng.standard_normal((3, 40)), np.zeros((1, 40)), Z[:, :2].T])
    found = inverse_root(lambda v: v @ A, rows, dots)
    np.testing.assert_allclose(found, rows @ root, rtol=1e-7, atol=1e-7 * abs(root).max())
    with pytest.raises(NotPositive):
        inverse_root(lambda v: v @ (A - np.eye(40)), rows, dots)


def test_an_inverse_root_that_does_not_converge(monkeypatch):
    monkeypatch.setattr("pint_fem.kernels.lanczos.ROOT_STEPS", 20)
    values = np.geomspace(1e-8, 1, 400)
    with pytest.raises(ArithmeticError, match="not converged in 20 steps"):
        inverse_root(lambda v: v * values, np.ones((1, 400)), dots)


def test_solves_for_many_right_hand_sides_do_not_depend_on_their_number(monkeypatch):
    space = space_of("CG1", 6)
    field = gaussian_field(space, form(space), "q")
    rows = np.random.default_rng(0).standard_normal((37, 49))
    solves = field.solves
    assert isinstance(solves, ManySolves)
    assert sum(solves.nbytes.values()) > 0
    for apply in (solves, solves.root):
        whole = apply(rows)
        np.testing.assert_array_equal(apply(rows[5:7]), whole[5:7])
        np.testing.assert_array_equal(apply(rows[::-1])[::-1], whole)
    monkeypatch.setattr(ManySolves, "_COPIED", 49 * 4)
    np.testing.assert_array_equal(solves.root(rows), whole)

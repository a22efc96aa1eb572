"""Optimal control problems with a KKT system that several test files share."""

import numpy as np
from firedrake import (
    DirichletBC,
    Function,
    FunctionSpace,
    SpatialCoordinate,
    TestFunction,
    TestFunctions,
    TrialFunction,
    as_vector,
    cos,
    ds,
    dx,
    grad,
    inner,
    pi,
    rot,
    split,
)
from irksome import Dt

import pint_fem as pf
from pint_fem.kkt.circulant import CirculantKKT
from pint_fem.kkt.control_weights import ControlWeights
from pint_fem.kkt.coupled.problem import coupled_systems
from pint_fem.kkt.model import ControlModel
from pint_fem.kkt.operator import KKTOperator
from pint_fem.kkt.transform import SkewCirculant
from tests.heat import TABLEAUX
from tests.meshes import square

__all__ = ["cavity", "circulant", "convection", "model_of", "operator_of", "tracking"]

WEIGHTS = (1e-3, 1e-2, 1.0)


def convection(
    st, *, tableau="SDIRK2", steps=8, n=5, heated_wall=False, static=False, tracked=1.0, misfit=pf.RunningMisfit
):
    """Convection of heat with a source that is a field and one that is a number in each step, tracked in H1.

    ``heated_wall``: a third control on the boundary; ``static``: controls without a value in each step; ``tracked``
    and ``misfit``: weight and class of the misfit at all steps.
    """
    mesh = square(n, st.space_comm)
    V, D, R = (FunctionSpace(mesh, *given) for given in (("CG", 1), ("DG", 0), ("R", 0)))
    u, v, f, a, w = Function(V), TestFunction(V), Function(D), Function(R), Function(V)
    x, y = SpatialCoordinate(V.mesh())
    form = Dt(u) * v * dx + inner(0.1 * grad(u) + as_vector([u, -0.3 * u]), grad(v)) * dx
    form -= (f + a * x * y) * v * dx
    u.interpolate(x * (1 - y))
    controls = [f, a, *([w] if heated_wall else [])]
    bcs = [DirichletBC(V, w if heated_wall else 1 + x, 1)]
    ev = pf.Evolution(
        form, u, tableau=TABLEAUX[tableau](), dt=0.1, nsteps=steps, control=controls, per_step=not static, bcs=bcs
    )
    e = u - x * y
    misfits = [pf.TerminalMisfit(e**2 * dx)]
    if tracked:
        misfits.append(misfit(tracked * (inner(e, e) + 0.1 * inner(grad(e), grad(e))) * dx))
    sizes = [0.5 * weight * c**2 * dx for weight, c in zip(WEIGHTS, controls, strict=False)]
    return pf.TimeParallelReducedFunctional(
        ev, misfits, regularisation=sizes, spacetime=st, solver_parameters={"time_solver": "serial"}
    )


def cavity(st, *, steps=8, n=4):
    """A cavity whose magnetic field is eliminated, with a current in each step that is to keep it without fields."""
    mesh = square(n, st.space_comm)
    W = FunctionSpace(mesh, "N1curl", 1)
    V = W * FunctionSpace(mesh, "DG", 0)
    u, J, (v, w) = Function(V), Function(W), TestFunctions(V)
    e, b = split(u)
    x, y = SpatialCoordinate(mesh)
    form = inner(Dt(e), v) * dx - b * rot(v) * dx - inner(J, v) * dx + Dt(b) * w * dx + rot(e) * w * dx
    u.subfunctions[1].interpolate(cos(pi * x) * cos(2 * pi * y))
    wall = DirichletBC(V.sub(0), as_vector([0, 0]), "on_boundary")
    ev = pf.Evolution(
        form, u, tableau=pf.ImplicitMidpoint(), dt=0.1, nsteps=steps, control=J, per_step=True, bcs=wall, eliminate=1
    )
    energy, size = 0.5 * (inner(e, e) + b**2) * dx, 0.5 * WEIGHTS[0] * inner(J, J) * dx
    return pf.TimeParallelReducedFunctional(
        ev, pf.RunningMisfit(energy), regularisation=size, spacetime=st, solver_parameters={"time_solver": "serial"}
    )


def regularisation(problem):
    """The weights of the controls, by the forms of their regularisation."""
    forms = []
    for weight, control in zip(WEIGHTS, problem.sweeps.evolution.parameters, strict=False):
        space = control.function_space()
        forms.append(weight * inner(TrialFunction(space), TestFunction(space)) * dx)
    return ControlWeights(problem.sweeps.evolution, forms)


def model_of(problem):
    """The model of a problem whose controls have values in each step."""
    return ControlModel(problem.sweeps, problem.misfits, regularisation(problem))


def circulant(problem, **given):
    """The circulant system with coupled systems of the frequencies."""
    model = model_of(problem)
    bounds = model.slab.bounds
    transform = SkewCirculant(model.nsteps, model.size, comm=problem.spacetime.time_comm, bounds=bounds)
    return CirculantKKT(model, coupled_systems(model), transform, **given)


def operator_of(problem, z=None):
    """The KKT operator at a control."""
    z = np.zeros(problem.layout.size) if z is None else z
    U = problem.sweeps.new_slab()
    found = [misfit.second_derivative() for misfit in problem.misfits]

    def source(dU, dz):
        rows = np.zeros(dU.shape)
        for matrix, weights in found:
            x, y = matrix.createVecs()
            for row, du, weight in zip(rows, dU, weights, strict=True):
                x.array[:] = du
                matrix.mult(x, y)
                row += weight * y.array_r
        return rows, None

    layout, weights, evolution = problem.layout, regularisation(problem), problem.sweeps.evolution

    def control_hessian(z):
        if evolution.per_step:
            return layout.gradient(weights.multiply(layout.steps(z)), np.zeros(evolution.state_size))
        return weights.multiply(z[None])[0] / evolution.dt

    return KKTOperator(problem.sweeps, layout, z, U, source, control_hessian)


def tracking(
    st, case="field", *, n=4, steps=8, tableau="SDIRK2", weight=1e-4, terminal=False, degree=1, solver="serial",
    rate=0.0, bound=None,
):
    """A state that is to follow a target, at all steps.

    ``case``: ``"field"`` and ``"walls"``, heat with a source that is a field, or with the heat that flows in at each
    of four walls; ``"wave"``, a membrane with a force; ``"convection"``, heat that is transported.
    """
    mesh = square(n, st.space_comm)
    V, t = FunctionSpace(mesh, "CG", degree), pf.time_function(mesh)
    x, y = SpatialCoordinate(mesh)
    target = x * (1 - x) * (y + cos(3 * t))
    if case == "wave":
        W = V * V
        u, q = Function(W), Function(V, name="q")
        (p, s), (v, w) = split(u), TestFunctions(W)
        form = inner(Dt(p) - s, v) * dx + (Dt(s) - q) * w * dx + inner(grad(p), grad(w)) * dx
        bcs, controls, observed = [DirichletBC(W.sub(i), 0, "on_boundary") for i in (0, 1)], [q], p
    else:
        u, v, q = Function(V), TestFunction(V), Function(V, name="q")
        form, bcs, controls, observed = Dt(u) * v * dx + inner(grad(u), grad(v)) * dx, [], [q], u
        if case == "walls":
            R = FunctionSpace(mesh, "R", 0)
            controls = [Function(R, name=f"wall {i}") for i in (1, 2, 3, 4)]
            form -= sum(c * v * ds(i + 1) for i, c in enumerate(controls))
        else:
            form -= q * v * dx
            bcs = [DirichletBC(V, 0, "on_boundary")]
        if case == "convection":
            form += inner(as_vector([3, y]), grad(u)) * v * dx
    ev = pf.Evolution(
        form, u, tableau=TABLEAUX[tableau](), dt=1 / steps, nsteps=steps, control=controls, per_step=True, t=t, bcs=bcs
    )
    misfits = [pf.RunningMisfit(0.5 * (observed - target) ** 2 * dx)]
    if terminal:
        misfits.append(pf.TerminalMisfit(0.3 * (observed - target) ** 2 * dx))
    if bound is not None:
        misfits.append(pf.StateBounds(u, upper=bound, gamma=1e2))
    sizes = [0.5 * weight * c**2 * dx for c in controls]
    if rate:
        sizes.append(pf.RateOfChange(0.5 * rate * controls[0] ** 2 * dx))
    return pf.TimeParallelReducedFunctional(
        ev, misfits, regularisation=sizes, spacetime=st,
        solver_parameters={"time_solver": solver, **({"paradiag": {"rtol": 1e-13}} if solver == "paradiag" else {})},
    )  # fmt: skip

"""Evaluations depend on the control alone, whatever was evaluated before: wild, failing, repeated and zero controls.

Values are compared with a loop of plain Firedrake, derivatives with differences of that loop and with a functional that
has been asked for nothing else.
"""

from functools import cache, partial

import numpy as np
import pytest
from firedrake import (
    DirichletBC,
    Function,
    FunctionSpace,
    NonlinearVariationalProblem,
    NonlinearVariationalSolver,
    SpatialCoordinate,
    TestFunction,
    assemble,
    conditional,
    dx,
    exp,
    grad,
    inner,
    sin,
)
from firedrake.exceptions import ConvergenceError
from firedrake.petsc import PETSc
from irksome import Dt
from mpi4py import MPI

import pint_fem as pf
from pint_fem.errors import SolverFailure
from pint_fem.kernels.arrays import get, put
from pint_fem.propagators import FormPropagator, TapePropagator, make_propagator
from tests.limits import time_limit
from tests.meshes import square
from tests.ranks import cases

STEPS = 8
PLAIN = {"snes_rtol": 1e-11, "snes_stol": 1e-9, "snes_max_it": 50, "ksp_type": "preonly", "pc_type": "lu"}
GRIDS = ["1x3", "3x1"] if MPI.COMM_WORLD.size == 3 else ["1x1"]
CONTROLS = {
    "zero": lambda x, y: 0 * x,
    "smooth": lambda x, y: 0.5 * sin(3 * x) * y,
    "near": lambda x, y: 0.5 * sin(3 * x) * y + 0.01 * x,
    "low": lambda x, y: -3 + x,
    "high": lambda x, y: 10 + 0 * x,
    "half": lambda x, y: conditional(x > 0.6, 40, 0.2) * (1 + 0 * y),
    "failing": lambda x, y: 800 + 0 * x,
}
SANE = ("zero", "smooth", "near", "low")


def space(st, n=4):
    return FunctionSpace(square(n, st.space_comm), "CG", 1)


def diffusion(kind, rate, u, q, v):
    """With a conductivity that depends on the temperature, sought by its logarithm; or linear, with a source sought."""
    if kind == "linear":
        return (rate * v + inner(grad(u), grad(v)) - 10 * q * v) * dx(degree=4)
    return (rate * v + exp(q) * (1e-2 + u**2) * inner(grad(u), grad(v)) - v) * dx(degree=4)


class Posed:
    """A problem on a grid: new functionals of it, and what plain Firedrake makes of a control."""

    def __init__(self, kind, st, real=False):
        self.kind, self.st, self.V = kind, st, space(st)
        self.Q = FunctionSpace(self.V.mesh(), "R", 0) if real else self.V
        self.bcs = DirichletBC(self.V, 0, "on_boundary")
        # plain Firedrake: backward Euler in a loop
        self.q, self.u, self.U, v = Function(self.Q), Function(self.V), Function(self.V), TestFunction(self.V)
        F = diffusion(kind, (self.U - self.u) * STEPS, self.U, self.q, v)
        problem = NonlinearVariationalProblem(F, self.U, bcs=self.bcs)
        self.loop = NonlinearVariationalSolver(problem, solver_parameters=PLAIN)

    def functional(self, solver="serial", propagator=make_propagator, **mgrit):
        u, v, q = Function(self.V), TestFunction(self.V), Function(self.Q)
        F = diffusion(self.kind, Dt(u), u, q, v)
        ev = pf.Evolution(
            F, u, tableau=pf.BackwardEuler(), dt=1 / STEPS, nsteps=STEPS, control=q, bcs=self.bcs,
        )  # fmt: skip
        return pf.TimeParallelReducedFunctional(
            ev,
            pf.RunningMisfit((u - 0.05) ** 2 * dx),
            spacetime=self.st,
            solver_parameters={"time_solver": solver, "mgrit": {"rtol": 1e-12, **mgrit}},
            propagator=propagator,
        )

    def control(self, name):
        return get(Function(self.V).interpolate(CONTROLS[name](*SpatialCoordinate(self.V.mesh()))))

    def plain(self, z) -> float:
        """``J`` by plain Firedrake; ``inf`` where it fails."""
        put(self.q, z)
        self.u.zero()
        self.U.zero()
        J = 0.0
        for _ in range(STEPS):
            try:
                self.loop.solve()
            except (ConvergenceError, PETSc.Error):
                return np.inf
            self.u.assign(self.U)
            J += assemble((self.u - 0.05) ** 2 * dx) / STEPS
        return float(J)


@cache
def posed(kind, grid, real=False) -> Posed:
    return Posed(kind, pf.SpaceTime(grid), real)


OPERATIONS = ("value", "derivative", "hessian_action")


def evaluate(rf, operation, z, dz):
    """An operation of a functional; ``None`` where it fails, on all ranks."""
    try:
        return np.atleast_1d(getattr(rf.problem, operation)(z, *((dz,) if operation == "hessian_action" else ())))
    except SolverFailure:
        return None


@cache
def fresh(kind, grid):
    """For each control what functionals give that were asked for nothing before, in sequence."""
    p, out = posed(kind, grid), {}
    for name in CONTROLS:
        z, dz = p.control(name), p.control("smooth") + 0.1
        rf = p.functional()
        last = evaluate(rf, "hessian_action", z, dz)
        first = evaluate(rf, "derivative", z, dz)
        out[name] = dict(zip(OPERATIONS, (evaluate(rf, "value", z, dz), first, last), strict=True))
    return out


CASES = [  # and the number of operations: as many as are quick
    ("nonlinear", "serial", make_propagator, {}, 40),
    ("nonlinear", "mgrit", make_propagator, {"coarsening": (2,)}, 16),
    ("nonlinear", "mgrit", make_propagator, {"coarsening": (2,), "storage": "C"}, 12),
    ("nonlinear", "mgrit", partial(FormPropagator, factor_memory=0), {"coarsening": (4,), "relax": "FCF"}, 20),
    ("nonlinear", "paradiag", make_propagator, {}, 10),
    ("nonlinear", "serial", TapePropagator, {}, 5),
    ("nonlinear", "mgrit", TapePropagator, {"coarsening": (4,), "storage": "C", "rtol": 1e-10}, 4),
    ("linear", "serial", make_propagator, {}, 40),
    ("linear", "mgrit", make_propagator, {"coarsening": (2,)}, 40),
    ("linear", "mgrit", make_propagator, {"coarsening": (4,), "storage": "C"}, 40),
    ("linear", "paradiag", make_propagator, {}, 40),
    ("linear", "mgrit", FormPropagator, {"coarsening": (4,)}, 40),
]


@pytest.mark.slow_on_ranks
@pytest.mark.parallel([1, 3])
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("kind", ["nonlinear", "linear"])
@time_limit(120)
def test_fresh_functionals_are_right(kind, grid):
    """What the random sequences are compared with: plain Firedrake's values, and differences of these."""
    p, reference = posed(kind, grid), fresh(kind, grid)
    for name in CONTROLS:
        z, found = p.control(name), reference[name]["value"]
        J = p.plain(z)
        assert found is None or found[0] == pytest.approx(J, rel=1e-8), name
        assert found is not None or not np.isfinite(J), name
    z, dz, h = p.control("smooth"), p.control("smooth") + 0.1, 0.02
    values = [p.plain(z + k * h * dz) for k in (-3, -2, -1, 0, 1, 2, 3)]
    first = np.dot(values, [-1 / 60, 3 / 20, -3 / 4, 0, 3 / 4, -3 / 20, 1 / 60]) / h
    second = np.dot(values, [1 / 90, -3 / 20, 3 / 2, -49 / 18, 3 / 2, -3 / 20, 1 / 90]) / h**2
    along = lambda g: p.st.space_comm.allreduce(float(np.vdot(g, dz)))
    assert along(reference["smooth"]["derivative"]) == pytest.approx(first, rel=1e-8)
    assert along(reference["smooth"]["hessian_action"]) == pytest.approx(second, rel=1e-6)


@pytest.mark.parallel([1, 3])
@pytest.mark.parametrize("case", cases(range(len(CASES)), on_ranks=[2, 3, 9, 10]))
@time_limit(180)
def test_random_sequences(case):
    """Any operations at any controls in any order give what a fresh functional gives."""
    kind, solver, propagator, mgrit, count = CASES[case]
    grid = GRIDS[case % len(GRIDS)]
    p, reference, rng = posed(kind, grid), fresh(kind, grid), np.random.default_rng([2026, case])
    rf, dz = p.functional(solver, propagator, **mgrit), p.control("smooth") + 0.1
    right = 0
    quick = 2 if propagator is TapePropagator and mgrit else 3  # second derivatives by tapes of steps are slow
    for name in rng.choice(list(CONTROLS), count // p.st.comm.size):
        operation = rng.choice(OPERATIONS[:quick])
        found, wanted = evaluate(rf, operation, p.control(name), dz), reference[name][operation]
        if found is None:
            assert name not in SANE, f"{operation} at {name} fails"
            continue
        assert wanted is not None, f"{operation} at {name} does not fail"
        assert np.abs(found - wanted).max() <= 1e-8 * max(np.abs(wanted).max(), 1e-6), f"{operation} at {name}"
        right += 1
    assert right


@pytest.mark.parallel([1, 3])
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("solver", cases(["serial", "mgrit"], on_ranks=["mgrit"]))
@time_limit(60)
def test_a_wild_control_leaves_nothing_behind(solver, grid):
    """A real number in the exponent: J at 0 is what it was, after controls with all but infinite conductivities."""
    p = posed("nonlinear", grid, real=True)
    own, rf = len(get(p.q)), p.functional(solver, **({"coarsening": (4,)} if solver == "mgrit" else {}))
    for value in (0, 10, 0, 40, 0, -5, 0):
        z = np.full(own, float(value))
        assert rf.problem.value(z) == pytest.approx(p.plain(z), rel=1e-8), value


@pytest.mark.slow_on_ranks
@pytest.mark.parallel([1, 3])
@pytest.mark.parametrize("solver", cases(["serial", "mgrit"], on_ranks=["mgrit"]))
@time_limit(120)
def test_twelve_searches(solver):
    """Log-conductivities sought from wild fields: each run's last J is plain Firedrake's, or the run fails."""
    p, ended = posed("nonlinear", GRIDS[-1]), 0
    starts = range(0, 12, p.st.comm.size)
    for start in starts:
        z = np.random.default_rng(start).standard_normal(25)[: len(get(p.q))] * 2.0 ** (start % 4)
        z = p.st.time_comm.bcast(z)
        rf = p.functional(solver, **({"coarsening": (4,), "rtol": 1e-10} if solver == "mgrit" else {}))
        try:
            result = rf.minimize_trust_region(rf.function(z), max_it=4)
        except SolverFailure:
            continue
        ended += 1
        assert rf.problem.value(result.x) == pytest.approx(p.plain(result.x), rel=1e-8), start
    assert ended >= (len(starts) if solver == "serial" else 2)

"""Programs of steps: on lanes as by PETSc's solvers and by dense algebra, and their transposes as adjoints."""

import numpy as np
import pytest
from firedrake import (
    COMM_WORLD,
    DirichletBC,
    Function,
    FunctionSpace,
    MixedVectorSpaceBasis,
    TestFunction,
    TestFunctions,
    VectorFunctionSpace,
    VectorSpaceBasis,
    assemble,
    div,
    dx,
    grad,
    inner,
    split,
)
from firedrake.petsc import PETSc
from irksome import Dt
from irksome.tableaux.ButcherTableaux import ButcherTableau

import pint_fem as pf
from pint_fem.evolution.tableaux import DIRK, Repeated
from pint_fem.kernels.direct import direct_solver
from pint_fem.kernels.factor import Factor
from pint_fem.kernels.lanes.lane_steps import LaneSteps
from pint_fem.kernels.lanes.program import STATE, StepProgram
from pint_fem.kernels.lanes.structures import scratch
from pint_fem.kernels.replication import Replication, whole_matrix
from pint_fem.kernels.steps import PetscSteps, execution
from pint_fem.propagators import LinearPropagator
from pint_fem.propagators.elimination import EliminatedRecursion
from pint_fem.propagators.leapfrog import LeapfrogPropagator
from pint_fem.propagators.recursion import MatrixRecursion
from tests.limits import time_limit
from tests.meshes import square
from tests.ranks import cases


def tableau(A, b=None):
    """A tableau, stiffly accurate by default."""
    A = np.array(A, dtype=float)
    return ButcherTableau(A, A[-1] if b is None else np.array(b), None, A.sum(axis=1), 1, None, None)


TABLEAUX = {
    "BE": pf.BackwardEuler,
    "SDIRK2": pf.SDIRK2,
    "midpoint": pf.ImplicitMidpoint,
    "3 stages": lambda: tableau([[0.4, 0, 0], [0.2, 0.4, 0], [0.3, 0.3, 0.4]]),
    "3 stages, b not the last row": lambda: tableau([[0.4, 0, 0], [0.2, 0.4, 0], [0.0, 0.3, 0.4]], [0.2, 0.3, 0.5]),
    "unequal diagonal": lambda: tableau([[0.3, 0], [0.5, 0.5]]),
    "unequal diagonal, b not the last row": lambda: tableau([[0.3, 0], [-0.2, 0.7]], [0.6, 0.4]),
    "first stage not used by the second": lambda: tableau([[0.3, 0, 0], [0, 0.3, 0], [0.4, 0.2, 0.4]]),
    "two steps of SDIRK2": lambda: Repeated(pf.SDIRK2(), 2),
    "two steps of midpoint": lambda: Repeated(pf.ImplicitMidpoint(), 2),
    "three steps of BE": lambda: Repeated(pf.BackwardEuler(), 3),
    "BE after SDIRK2": lambda: tableau(
        np.block([[pf.SDIRK2().A / 2, np.zeros((2, 1))], [pf.SDIRK2().b[None] / 2, np.array([[0.5]])]])
    ),
}


def heat(method, *, advection=0.0, walls=False, solver=None):
    """Heat, with advection a nonsymmetric system, with walls rows of a condition."""
    V = FunctionSpace(square(5, COMM_WORLD), "CG", 1)
    u, v, q = Function(V), TestFunction(V), Function(V)
    F = Dt(u) * v * dx + 0.3 * inner(grad(u), grad(v)) * dx - q * v * dx
    if advection:
        F += advection * u.dx(0) * v * dx
    bcs = [DirichletBC(V, 1.0, 1)] if walls else []
    return pf.Evolution(F, u, tableau=method(), dt=0.1, nsteps=4, control=q, bcs=bcs, solver_parameters=solver)


def stokes(method, *, solver=None):
    """Enclosed flow: the pressure is determined up to a constant."""
    mesh = square(3, COMM_WORLD)
    V = VectorFunctionSpace(mesh, "CG", 2) * FunctionSpace(mesh, "CG", 1)
    s, f = Function(V), Function(V.sub(0))
    (u, p), (w, q) = split(s), TestFunctions(V)
    F = inner(Dt(u) - f, w) * dx + 0.1 * inner(grad(u), grad(w)) * dx - p * div(w) * dx - q * div(u) * dx
    constant = MixedVectorSpaceBasis(V, [V.sub(0), VectorSpaceBasis(constant=True, comm=COMM_WORLD)])
    bcs = [DirichletBC(V.sub(0), (0.0, 0.0), "on_boundary")]
    return pf.Evolution(
        F, s, tableau=method(), dt=0.1, nsteps=4, control=f, bcs=bcs, nullspace=constant, solver_parameters=solver
    )


def fields(method, *, damping=0.0, walls=False, solver=None):
    """Transverse electric waves, of which a step eliminates the magnetic field."""
    mesh = square(4, COMM_WORLD)
    N = FunctionSpace(mesh, "N1curl", 1)
    V = N * FunctionSpace(mesh, "DG", 0)
    s, J = Function(V), Function(N)
    (E, B), (w, q) = split(s), TestFunctions(V)
    rot = lambda f: f[1].dx(0) - f[0].dx(1)
    F = inner(Dt(E) - J, w) * dx + Dt(B) * q * dx - B * rot(w) * dx + rot(E) * q * dx
    if damping:
        F += damping * inner(E, w) * dx
    bcs = [DirichletBC(V.sub(0), (0.0, 0.0), (1, 2))] if walls else []
    given = {"control": J, "bcs": bcs, "eliminate": 1, "solver_parameters": solver}
    return pf.Evolution(F, s, tableau=method(), dt=0.05, nsteps=4, **given)


PROBLEMS = {
    **{f"heat, {name}": (heat, name, {}) for name in TABLEAUX},
    "walls, SDIRK2": (heat, "SDIRK2", {"walls": True}),
    "walls, midpoint": (heat, "midpoint", {"walls": True}),
    "walls, 3 stages, b not the last row": (heat, "3 stages, b not the last row", {"walls": True}),
    "advection, walls, SDIRK2": (heat, "SDIRK2", {"advection": 1.0, "walls": True}),
    "advection, unequal diagonal, b not the last row": (
        heat,
        "unequal diagonal, b not the last row",
        {"advection": 1.0},
    ),
    "nullspace, SDIRK2": (stokes, "SDIRK2", {}),
    "nullspace, BE": (stokes, "BE", {}),
    "fields, midpoint": (fields, "midpoint", {}),
    "fields, SDIRK2": (fields, "SDIRK2", {}),
    "fields, two steps of SDIRK2": (fields, "two steps of SDIRK2", {}),
    "fields, unequal diagonal": (fields, "unequal diagonal", {}),
    "fields, walls and damping": (fields, "SDIRK2", {"walls": True, "damping": 0.7}),
    "leapfrog": (fields, "midpoint", {}),
    "leapfrog, walls and damping": (fields, "midpoint", {"walls": True, "damping": 0.7}),
}
ON_RANKS = ("walls", "advection", "nullspace", "fields, m", "fields, w", "leapfrog", "heat, BE", "heat, 3 stages, b")


def propagator(name, *, petsc=False):
    """The propagator of a problem, with factors for lanes or with PETSc's."""
    make, method, given = PROBLEMS[name]
    kind = LeapfrogPropagator if name.startswith("leapfrog") else LinearPropagator
    solver = direct_solver(COMM_WORLD, 1) if petsc else None
    return kind(make(TABLEAUX[method], solver=solver, **given))


def programs(made, *, drop):
    """Programs of the step and its transpose."""
    given = made.dirk, made.steps_of_stage, made.bc_rows, drop
    if isinstance(made, LeapfrogPropagator):
        recursion = made._recursion()
    elif made.fields is not None:
        recursion = EliminatedRecursion(made.fields, made.factors, *given)
    else:
        recursion = MatrixRecursion(made.M, made.MT, made.factors, *given)
    return recursion.forward(), recursion.backward()


def random_states(seed, comm, *shape):
    """Own values of random states, which do not depend on the number of ranks."""
    own = Replication(shape[-1], comm)
    return np.ascontiguousarray(np.random.default_rng(seed).standard_normal((*shape[:-1], own.total))[..., own.own])


def apply(program, comm, u, steps, added=None, states=(), *, petsc=False):
    """Results and given states after some steps."""
    execute = PetscSteps(program, comm) if petsc else execution(program, comm)
    assert petsc or not isinstance(execute, PetscSteps)
    out, states = np.empty((len(u), steps, u.shape[1])), [a.copy() for a in states]
    execute.run(u, out, added, states)
    return out, states


def relative(a, b, comm):
    """The largest difference relative to the largest entry, over all ranks."""
    largest = lambda x: max(comm.allgather(np.abs(x).max(initial=0.0)))
    return largest(a - b) / largest(b)


@pytest.mark.parallel([1, 2, 3])
@pytest.mark.parametrize("drop", [True, False], ids=["dropped", "kept"])
@pytest.mark.parametrize("name", cases(PROBLEMS, on_ranks=[name for name in PROBLEMS if name.startswith(ON_RANKS)]))
@time_limit(120)
def test_lanes_agree_with_petsc_and_transposes_are_adjoint(name, drop):
    comm = COMM_WORLD
    on_lanes, by_petsc = propagator(name), propagator(name, petsc=True)
    assert all(f.triangular is not None for f in on_lanes.factors.values())
    assert all(f.triangular is None for f in by_petsc.factors.values())
    n, k, steps = on_lanes.evolution.state_size, 5, 3
    forward, backward = programs(on_lanes, drop=drop)
    forward_by_petsc, backward_by_petsc = programs(by_petsc, drop=drop)
    count = forward.stored
    u, lam, added = (random_states(seed, comm, k, steps, n) for seed in range(3))
    loads = [random_states(10 + i, comm, k, steps, n) for i in range(count)]
    if drop:
        for load in loads:
            load[..., on_lanes.bc_rows] = 0.0
    found, _ = apply(forward, comm, u[:, 0], steps, added, loads)
    expected, _ = apply(forward_by_petsc, comm, u[:, 0], steps, added, loads, petsc=True)
    assert relative(found, expected, comm) < 1e-11
    nothing = [np.full_like(load, np.nan) for load in loads]
    turned, stages = apply(backward, comm, lam[:, 0], steps, added, nothing)
    turned_by_petsc, stages_by_petsc = apply(backward_by_petsc, comm, lam[:, 0], steps, added, nothing, petsc=True)
    assert relative(turned, turned_by_petsc, comm) < 1e-11
    for a, b in zip(stages, stages_by_petsc, strict=True):
        assert relative(a, b, comm) < 1e-11
    # one step: lam . Phi(u, b) = Phi^T lam . u + sum of s_i . b_i
    step, _ = apply(forward, comm, u[:, 0], 1, None, [load[:, :1] for load in loads])
    transposed, stages = apply(backward, comm, lam[:, 0], 1, None, [a[:, :1] for a in nothing])
    dot = lambda a, b: comm.allreduce(np.sum(a * b))
    left = dot(lam[:, 0], step[:, 0])
    right = dot(transposed[:, 0], u[:, 0]) + sum(dot(s, b[:, :1]) for s, b in zip(stages, loads, strict=True))
    size = np.sqrt(dot(lam[:, 0], lam[:, 0]) * dot(step, step))
    assert abs(left - right) < 1e-12 * size


@pytest.mark.parametrize("name", [name for name in PROBLEMS if name.startswith("heat")])
def test_steps_are_those_of_the_tableau(name):
    """All stages of ``M k_i + K (u_0 + dt sum a_ij k_j) = f_i`` as one dense system, and one step after another."""
    made = propagator(name)
    M, K = (
        whole_matrix(assemble(form, mat_type="aij").petscmat).toarray() for form in made.evolution.linear_operators()
    )
    A, b, dt, n = np.array(made.dirk.A), np.array(made.dirk.b), made.dt, len(M)
    stages = len(b)
    system = np.kron(np.eye(stages), M) + dt * np.kron(A, K)
    u, added = random_states(0, COMM_WORLD, 9, n), random_states(1, COMM_WORLD, 9, 4, n)
    loads = [random_states(2 + i, COMM_WORLD, 9, 4, n) for i in range(stages)]
    found, _ = apply(programs(made, drop=True)[0], COMM_WORLD, u, 4, added, loads)
    for lane, state in enumerate(u):
        for step in range(4):
            f = [load[lane, step] / h - K @ state for load, h in zip(loads, made.steps_of_stage, strict=True)]
            rates = np.linalg.solve(system, np.concatenate(f)).reshape(stages, n)
            state = state + dt * b @ rates + added[lane, step]
            assert np.abs(found[lane, step] - state).max() < 1e-11 * np.abs(state).max()


@pytest.mark.parametrize("name", PROBLEMS)
def test_programs_write_before_they_read(name):
    """Work vectors hold numbers of earlier calls and of other lanes: NaN in them has no effect."""
    made = propagator(name)
    n = made.evolution.state_size
    u = random_states(0, COMM_WORLD, 5, n)
    for program in programs(made, drop=True):
        execute = execution(program, COMM_WORLD)
        assert isinstance(execute, LaneSteps)
        results = []
        for k in (5, 1):
            out = np.empty((k, 2, n))
            execute.run(u[:k], out)
            scratch(0).view(float)[:] = np.nan
            again = np.empty((k, 2, n))
            execute.run(u[:k], again)
            assert np.array_equal(out, again)
            results.append(out)
        assert np.array_equal(results[0][:1], results[1])
        assert np.isfinite(results[0]).all()
        by_petsc = PetscSteps(program, COMM_WORLD)
        for vector in by_petsc.vectors.values():
            vector[:] = np.nan
        out = np.empty((1, 2, n))
        by_petsc.run(u[:1], out)
        assert relative(out, results[1], COMM_WORLD) < 1e-11


@pytest.mark.parallel([1, 2, 3])
@time_limit(60)
def test_copies_on_several_ranks_are_made_for_some_states_at_a_time(monkeypatch):
    """The same bits, as one call after another continues where the last one ended; and for one state, which all ranks
    step, as among many, which are divided among the ranks.
    """
    made, comm = propagator("walls, SDIRK2"), COMM_WORLD
    n, results = made.evolution.state_size, []
    u, added = random_states(0, comm, 40, n), random_states(1, comm, 40, 5, n)
    loads = [random_states(2 + i, comm, 40, 5, n) for i in range(2)]
    for program in programs(made, drop=True):
        for most in (4e6, 3000, 1):
            monkeypatch.setattr("pint_fem.kernels.steps._COPIED", most)
            results.append(apply(program, comm, u, 5, added, loads))
        for other in results[-2:]:
            assert all(
                np.array_equal(a, b)
                for a, b in zip([other[0], *other[1]], [results[-3][0], *results[-3][1]], strict=True)
            )
        for lanes in (1, 2):
            few = apply(program, comm, u[:lanes], 5, added[:lanes], [load[:lanes] for load in loads])
            for a, b in zip([few[0], *few[1]], [results[-1][0], *results[-1][1]], strict=True):
                assert np.array_equal(a, b[:lanes])


@pytest.mark.parallel(2)
@time_limit(60)
def test_steps_by_petsc_where_parts_have_other_sizes_on_each_rank():
    """Two parts that are as large as each other on one rank and not on the next one: each has its own vectors."""
    comm = COMM_WORLD
    sizes = {"a": (3, 4)[comm.rank], "b": (3, 2)[comm.rank]}
    total = {"a": 7, "b": 5}
    rng, matrices = np.random.default_rng(0), {}
    for row in "ab":
        for column in "ab":
            dense = rng.standard_normal((total[row], total[column])) + 9 * np.eye(total[row], total[column])
            A = PETSc.Mat().createDense(((sizes[row], None), (sizes[column], None)), comm=comm)
            A.setUp()
            first, stop = A.getOwnershipRange()
            for i in range(first, stop):
                A.setValues(i, range(total[column]), dense[i])
            A.assemble()
            matrices[row, column] = A.convert("aij"), dense
    n = sum(sizes.values())
    program = StepProgram({"a": slice(0, sizes["a"]), "b": slice(sizes["a"], n)}, n)
    r = program.vector("r", ["b"])
    program.multiply(r, matrices["b", "a"][0], STATE, x_part="a")
    program.multiply(r, matrices["b", "b"][0], STATE, 0.5, add=True, x_part="b")
    program.solve(r, Factor(matrices["b", "b"][0], direct_solver(comm, 1), symmetric=False))
    program.multiply(STATE, matrices["a", "b"][0], r, part="a")
    program.copy(STATE, r, part="b")
    own = {name: Replication(sizes[name], comm) for name in "ab"}
    a, b = (np.random.default_rng(i).standard_normal(total[name]) for i, name in enumerate("ab"))
    u = np.concatenate([a[own["a"].own], b[own["b"].own]])[None]
    out, _ = apply(program, comm, u, 1, petsc=True)
    b = np.linalg.solve(matrices["b", "b"][1], matrices["b", "a"][1] @ a + 0.5 * matrices["b", "b"][1] @ b)
    expected = np.concatenate([(matrices["a", "b"][1] @ b)[own["a"].own], b[own["b"].own]])
    assert np.allclose(out[0, 0], expected, rtol=1e-12)


def test_methods_that_are_sequences_of_shorter_ones():
    """Restarts are where a stage begins at the one before it with nothing else of earlier ones."""
    restarts = {name: DIRK(make()).restarts for name, make in TABLEAUX.items()}
    assert restarts["two steps of SDIRK2"] == [0, 2, 4]
    assert restarts["three steps of BE"] == [0, 1, 2, 3]
    assert restarts["BE after SDIRK2"] == [0, 2, 3]
    for name in ("SDIRK2", "unequal diagonal"):
        assert restarts[name] == [0, 2]
    for name in ("3 stages", "first stage not used by the second"):
        assert restarts[name] == [0, 3]

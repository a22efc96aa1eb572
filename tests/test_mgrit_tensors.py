"""MGRIT on torch tensors: types, devices, messages through copies on the host, and how often values are read.

Tensors on the ``meta`` device have no values: an operation that reads one raises. The tests of the core that run on
numpy arrays and on tensors are beside them (the fixture ``array_kind``).
"""

import itertools

import numpy as np
import pytest
from mpi4py import MPI

pytest.importorskip("torch")

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pint_fem.all_at_once import messages
from pint_fem.all_at_once.levels import inject
from pint_fem.errors import InputError, SolverFailure
from pint_fem.mgrit import MGRIT, Transfer, check
from pint_fem.mgrit.transposed_cycles import TransposedAdjoint
from pint_fem.paradiag import ParaDiag

COMM = MPI.COMM_WORLD
N, M, WIDTH = 24, 4, 3


class Layers:
    """``u + h tanh(w_n u)``, elementwise, with weights of each step and a coarse step ``stride`` times as long."""

    def __init__(self, weight, stride=1):
        self.weight, self.stride = weight, stride

    def step(self, steps, u, out):
        m = self.stride
        w = self.weight[steps.start * m : steps.stop * m : steps.step * m]
        out[...] = u + 0.05 * m * torch.tanh(w.reshape(-1, *[1] * (u.ndim - 2), WIDTH) * u)


class Swept(Layers):
    """With steps one after another."""

    def sweep(self, first, U, G):
        for i in range(len(U) - 1):
            self.step(range(first + i, first + i + 1), U[i : i + 1], U[i + 1 : i + 2])
            if G is not None:
                U[i + 1] += G[i]


class Advancing(Layers):
    """With several steps from many states."""

    def advance(self, first, m, u, out, G):
        for j in range(out.shape[1]):
            self.step(range(first + j, first + j + len(u) * m, m), out[:, j - 1] if j else u, out[:, j])
            if G is not None:
                out[:, j] += G[:, j]


class Blocked(Layers):
    """In groups of three intervals."""

    block = 3


class Guessing(Layers):
    """Takes one step towards the result from its guess."""

    uses_guess = True

    def step(self, steps, u, out):
        guess = out.clone()
        super().step(steps, u, out)
        out += 0.1 * (guess - out)


def weights(dtype=torch.float64, device="cpu"):
    w = torch.rand(N, WIDTH, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return w.to(dtype=dtype, device=device)


def levels(kind=Layers, *, strides=(1, M), **where):
    w = weights(**where)
    return [kind(w, stride) for stride in strides]


def start(shape=(WIDTH,), dtype=torch.float64, rows=N + 1):
    U = torch.zeros(rows, *shape, dtype=dtype)
    U[0] = torch.linspace(-1, 1, WIDTH, dtype=torch.float64).to(dtype)
    return U


def loop(dtype=torch.float64):
    """The layers one after another, in plain torch."""
    U, w = start(dtype=dtype), weights(dtype)
    for n in range(N):
        U[n + 1] = U[n] + 0.05 * torch.tanh(w[n] * U[n])
    return U


def own(solver, U):
    """The rows of this rank."""
    level = solver.levels[0]
    return U[level.lo : level.hi + 1].clone()


# -- types -------------------------------------------------------------------------------------------------------------
@pytest.mark.parallel([1, 2, 3])
@pytest.mark.parametrize("coarse_solver", ["sequential", "gathered"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-5), (torch.bfloat16, 0.05)]
)
def test_solution_is_that_of_a_plain_loop(dtype, tolerance, coarse_solver):
    """Exact after as many cycles as there are coarse steps, to the round-off of the type."""
    options = dict(coarsening=M, relax="F", rtol=0, max_it=N // M, coarse_solver=coarse_solver)
    solver = MGRIT(levels(dtype=dtype), N, options=options, comm=COMM)
    U = own(solver, start(dtype=dtype))
    result = solver.solve(U)
    assert U.dtype == dtype
    assert (U - own(solver, loop(dtype))).abs().max() <= tolerance
    assert result.residuals[-1] <= 10 * tolerance


def test_norms_are_accumulated_in_double_precision():
    """Of 2e5 entries of 0.1 in single precision, and of bfloat16: the sum of the squares of the stored numbers."""
    n = 200_000

    class Constant:
        def step(self, steps, u, out):
            out[...] = u + 0.1

    for dtype in (torch.float32, torch.bfloat16):
        U = torch.zeros(9, n, dtype=dtype)
        solver = MGRIT([Constant(), Constant()], 8, options=dict(coarsening=4, relax="F", rtol=0, max_it=1))
        result = solver.solve(U, cycles=0)
        stored = U[3].double()  # the step behind it leads to a C-point
        residual = (stored.to(dtype) + 0.1).double() - U[4].double()
        assert result.residuals[0] == pytest.approx(
            np.sqrt(2) * float(residual.norm()), rel=1e-2 if dtype != torch.float32 else 1e-6
        )


# -- messages ----------------------------------------------------------------------------------------------------------
@pytest.mark.parallel([2, 3])
@pytest.mark.parametrize("options", [{}, dict(coarse_solver="gathered"), dict(storage="C"), dict(start="nested")])
def test_messages_through_copies_on_the_host(options, monkeypatch):
    """The same bits as from the tensors' memory, as for a device whose memory the MPI library does not read."""
    found, G = [], 0.1 * torch.sin(torch.arange(N * WIDTH, dtype=torch.float64)).reshape(N, WIDTH)
    for staged in (False, True):
        if staged:
            monkeypatch.setattr(messages, "_buffer", lambda row: None)
        solver = MGRIT(levels(strides=(1, M, 2 * M)), N, options=dict(coarsening=(M, 2), **options), comm=COMM)
        level = solver.levels[0]
        U = torch.zeros(solver.local_rows, WIDTH, dtype=torch.float64)
        U[0] = 1 if level.lo == 0 else np.nan
        result = solver.solve(U, G[level.lo : level.hi].clone())
        found.append((U, result.residuals, [part.clone() for part in inject(solver.levels, U)] if not options else []))
    (U, residuals, parts), (V, others, staged_parts) = found
    assert torch.equal(U, V)
    assert residuals == others
    assert all(map(torch.equal, parts, staged_parts))


def test_device_memory_is_used_where_the_library_reports_it(monkeypatch):
    """The environment variable comes before the library's own report."""
    for given, expected in (("1", True), ("0", False)):
        messages.reads_device_memory.cache_clear()
        monkeypatch.setenv("PINT_FEM_DEVICE_MPI", given)
        assert messages.reads_device_memory() == expected
    messages.reads_device_memory.cache_clear()
    monkeypatch.delenv("PINT_FEM_DEVICE_MPI")
    assert messages.reads_device_memory() in (False, True)


# -- devices -----------------------------------------------------------------------------------------------------------
OPTIONS = [
    *itertools.starmap(
        lambda cycle, relax: dict(cycle=cycle, relax=relax), itertools.product("VF", ("F", "FCF", ("FCF", "F")))
    ),
    dict(c_weight=0.8),
    dict(start="nested"),
    dict(start="skip"),
    dict(storage="C"),
    dict(storage="C", start="nested"),
    dict(coarse_solver="gathered"),
    dict(coarse_solver="relax", coarsening=(4, 2, 2)),
    dict(coarsening=((0, 3, 4, 9, 15, 24), 2)),
    dict(check="cycle"),
]


SOME = [dict(), dict(storage="C"), dict(coarse_solver="relax", coarsening=(4, 2, 2))]
named = lambda value: value.__name__ if isinstance(value, type) else str(value)
MOST = [(Layers, options) for options in OPTIONS]
MOST += itertools.product([Swept, Advancing, Blocked, Guessing], SOME)


@pytest.mark.parametrize(("kind", "options"), [*MOST, (Layers, dict(max_it=9))], ids=named)
def test_no_value_is_read_in_a_fixed_number_of_cycles(kind, options):
    """On the ``meta`` device, where each would raise; a right-hand side, a batch and transfers too."""
    options = dict(coarsening=(M, 2), residual="none", max_it=1) | options
    R = torch.ones(2, WIDTH, dtype=torch.float64, device="meta")
    maps = Transfer(lambda block: block + 0, lambda block: 1.0 * block)
    rows = N + 1 if options.get("storage") != "C" else N // M + 1
    for transfers, batch in ((None, False), ([(R.new_ones(WIDTH, WIDTH),) * 2, maps], True)):
        U = torch.empty(rows, *[2] * batch, WIDTH, dtype=torch.float64, device="meta")
        G = None if transfers is None else U.new_empty(N, *U.shape[1:])
        steps = levels(kind, strides=(1, M, 2 * M), device="meta")
        solver = MGRIT(steps, N, options=options, transfers=transfers, linear=True)
        result = solver.solve(U, G, batch=batch)
        assert (result.converged, result.reason, result.cycles) == (True, "its", options["max_it"])
        assert solver.levels[0].phi_calls > 0


def test_a_value_that_is_read_raises_on_the_meta_device():
    """What the test above rests on."""

    class Reading(Layers):
        def step(self, steps, u, out):
            super().step(steps, u, out)
            if float(u[0, 0]) > 0:
                out += 1

    solver = MGRIT(levels(Reading, device="meta"), N, options=dict(coarsening=M, residual="none", max_it=1))
    with pytest.raises(RuntimeError, match="meta"):
        solver.solve(torch.empty(N + 1, WIDTH, dtype=torch.float64, device="meta"))


class Reads(TorchDispatchMode):
    """Counts what makes the host wait for a device: values as numbers and as numpy arrays."""

    WAITING = ("_local_scalar_dense", "nonzero", "equal", "unique", "masked_select", "is_nonzero")

    def __init__(self, monkeypatch):
        super().__init__()
        self.count = 0
        for name in ("numpy", "tolist", "__array__"):
            self._counted(monkeypatch, name, getattr(torch.Tensor, name))

    def _counted(self, monkeypatch, name, method):
        def call(*args, **kwargs):
            self.count += 1
            return method(*args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, call)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket._qualified_op_name.split("::")[-1] in self.WAITING
        return func(*args, **(kwargs or {}))


def reads(monkeypatch, kind=Layers, *, solves=1, **how):
    """Reads of a solve, and its cycles."""
    options = dict(coarsening=(M, 2), rtol=0, max_it=3) | how.pop("options", {})
    solver = MGRIT(levels(kind, strides=(1, M, 2 * M)), N, options=options)
    rows = solver.local_rows
    with monkeypatch.context() as patch:
        counting = Reads(patch)
        with counting:
            for _ in range(solves):
                result = solver.solve(start(rows=rows), **how)
    return counting.count, result.cycles


@pytest.mark.parametrize(
    ("kind", "options"),
    [*MOST[: len(OPTIONS)], *itertools.product([Swept, Advancing, Blocked], SOME[:1]), (Layers, dict(residual="full"))],
    ids=named,
)
def test_one_read_for_a_norm(kind, options, monkeypatch):
    """The residual's norm, the trajectory's and all checks of blocks come in one copy in each cycle, and one more says
    whether all points are finite. A fixed number of cycles has one for its norms; without a norm there is none.
    """
    counted, cycles = reads(monkeypatch, kind, options=options)
    assert counted == cycles + 2
    if options.get("residual") != "full":
        assert reads(monkeypatch, kind, options=options, cycles=5) == (2, 5)
        assert reads(monkeypatch, kind, options=options | dict(residual="none")) == (1, 3)


def test_failures_are_exchanged_with_one_more_read_in_twice_as_many_cycles(monkeypatch):
    """Behind 8, 16 and 32 cycles."""
    for cycles, more in ((7, 0), (9, 1), (17, 2), (33, 3)):
        assert reads(monkeypatch, cycles=cycles)[0] == 2 + more


def test_a_step_that_reads_is_counted(monkeypatch):
    """The counts can be wrong: a step that reads a number adds one for each call."""

    class Reading(Layers):
        def step(self, steps, u, out):
            super().step(steps, u, out)
            assert u[0, 0].item() < 10

    counted, _ = reads(monkeypatch, Reading, options=dict(residual="none"))
    assert counted > 10


# -- what is refused ---------------------------------------------------------------------------------------------------
def refused(match, U=None, G=None, *, kind=Layers, options=(), transfers=None, error=InputError, **how):
    solver = MGRIT(levels(kind), N, options=dict(coarsening=M, **dict(options)), transfers=transfers)
    with pytest.raises(error, match=match):
        solver.solve(start() if U is None else U, G, **how)


def test_tensors_that_do_not_fit_are_refused():
    """By name, before work starts."""
    refused("U of type torch.int64: give torch.float64", start().long())
    refused("U of type torch.float16", start().half())
    refused("requires a gradient.*U.detach", start().requires_grad_())
    refused("requires a gradient", None, torch.zeros(N, WIDTH, dtype=torch.float64, requires_grad=True))
    refused(r"right-hand sides are \['cpu torch.float32'\]", None, torch.zeros(N, WIDTH))
    refused("right-hand sides are .*numpy array float64", None, np.zeros((N, WIDTH)))
    refused("right-hand sides are .*meta", None, torch.zeros(N, WIDTH, dtype=torch.float64, device="meta"))
    refused("states in U are not contiguous", torch.zeros(N + 1, 2 * WIDTH, dtype=torch.float64)[:, ::2])
    refused("rows of U are the same memory", torch.zeros(1, WIDTH, dtype=torch.float64).expand(N + 1, WIDTH))
    refused("layout torch.sparse", start().to_sparse())
    refused("meta device and has no values: give residual='none'", start().to("meta"))
    refused("U of type float64, G of torch.float64", np.zeros((N + 1, WIDTH)), start()[1:])
    refused(r"U \(3, 3\) and G None", start()[:3])


@pytest.mark.parallel([2, 3])
def test_arrays_of_different_kinds_on_the_ranks_are_refused():
    """A numpy array on one rank, a tensor on the others."""
    solver = MGRIT(levels(), N, options=dict(coarsening=M), comm=COMM)
    U = own(solver, start())
    with pytest.raises(InputError, match="states of different types on the ranks"):
        solver.solve(U.numpy() if COMM.rank == 1 else U)


def test_paradiag_refuses_tensors():
    """Its transforms and solves are those of numpy."""
    solver = ParaDiag(Layers(weights()), N, lambda *args: None, options=dict(alpha=1e-4))
    with pytest.raises(InputError, match=r"U is a torch tensor: paradiag takes numpy arrays, such as U.numpy"):
        solver.solve(start())


def test_steps_that_do_not_write_as_they_must_are_refused():
    """Their input is as writable as their result, so that a change is found by the tensors' versions."""

    class Returns(Layers):
        def step(self, steps, u, out):
            return u + 1

    class Overwrites(Layers):
        def step(self, steps, u, out):
            out[...] = u.mul_(0.5)

    class Forgets(Layers):
        def step(self, steps, u, out):
            out[:, :-1] = u[:, :-1]

    class ChangesFirst(Swept):
        def sweep(self, first, U, G):
            super().sweep(first, U, G)
            U[0] += 1

    refused("step returned a Tensor, which would be lost", kind=Returns)
    refused("step writes to its input, which has to stay as it is", kind=Overwrites)
    refused("level 0, steps .*step does not write all of its result", kind=Forgets)
    refused("level 1, steps .*sweep changes U", kind=ChangesFirst)
    for dtype in (torch.float32, torch.bfloat16):
        solver = MGRIT(levels(Forgets, dtype=dtype), N, options=dict(coarsening=M))
        with pytest.raises(InputError, match="does not write all"):
            solver.solve(start(dtype=dtype))


def test_transfers_return_new_tensors():
    """Not numpy arrays, none of another device, and not their input changed."""
    same = lambda block: block.clone()
    refused("restrict returned a ndarray", transfers=[(lambda block: block.numpy(), same)])
    refused("restrict returned a Tensor on meta", transfers=[(lambda block: block.to("meta"), same)])
    refused("restrict writes to its input", transfers=[(lambda block: block.mul_(2), same)])
    refused("prolong returned shape", transfers=[(same, lambda block: block[:, :2])])


# -- what steps and transfers get --------------------------------------------------------------------------------------
def test_steps_of_parameters_leave_no_graph():
    """A solve in place has no derivative: parameters that require one do not make the trajectory require it."""
    solver = MGRIT(
        [Layers(w.requires_grad_(), s) for w, s in ((weights(), 1), (weights(), M))], N, options=dict(coarsening=M)
    )
    U = start()
    assert solver.solve(U).converged
    assert not U.requires_grad
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_matrices_between_levels(dtype):
    """Tensors, numpy arrays and scipy's sparse matrices are the same transfers."""
    sparse = pytest.importorskip("scipy.sparse")
    P = np.array([[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]])

    class Coarse(Layers):
        def step(self, steps, u, out):
            out[...] = (1 + 0.05 * M * 0.5) * u

    found = []
    for make in (lambda A: torch.tensor(A), np.array, sparse.csr_matrix, sparse.coo_matrix):
        solver = MGRIT(
            [Layers(weights(dtype)), Coarse(None)],
            N,
            options=dict(coarsening=M, rtol=0, max_it=3),
            transfers=[(make(P.T / 2), make(P))],
        )
        U = start(dtype=dtype)
        found.append((solver.solve(U).residuals, U))
    for residuals, U in found[1:]:
        assert residuals == pytest.approx(found[0][0], rel=1e-4 if dtype == torch.float32 else 1e-12)
        torch.testing.assert_close(U, found[0][1])

    class Other:
        def __init__(self, *shape):
            self.shape = shape

        @property
        def T(self):
            return Other(*self.shape[::-1])

    refused("transfer's matrix is a Other: for tensors give a tensor", transfers=[(Other(2, 3), Other(3, 2))])


@pytest.mark.parallel([1, 2, 3])
def test_values_that_are_not_finite_are_named(monkeypatch):
    """The step and the level, on every rank; a guess as well."""

    class Fails(Layers):
        bad = None

        def step(self, steps, u, out):
            super().step(steps, u, out)
            for place, n in enumerate(steps):
                if n == self.bad:
                    out[place] = torch.nan

    for level, bad in ((0, 13), (0, 15), (1, 4)):
        made = levels(Fails)
        made[level].bad = bad
        solver = MGRIT(made, N, options=dict(coarsening=M), comm=COMM)
        for how in ({}, dict(cycles=3)):
            with pytest.raises(SolverFailure, match=f"level {level}, steps {bad}: value not finite"):
                solver.solve(own(solver, start()), **how)
        made[level].bad = None
        assert solver.solve(own(solver, start())).converged


def test_norms_of_layers_take_tensors():
    """The rows at the ends of intervals say whether all values are finite."""
    from pint_fem.resnet.parallel.solvers import _Norms

    norms, block = _Norms(), torch.zeros(5, 2, WIDTH)
    norms.ends = np.array([1, 4])
    assert torch.isfinite(norms.finite(block)).all()
    block[4, 1, 2] = torch.nan
    assert torch.isfinite(norms.finite(block)).tolist() == [True, True, True, True, False]
    assert norms.finite(block.to("meta")).shape == (5,)


def test_numbers_as_states_are_checked_as_they_were():
    """The checks of a call are decided later, when the numbers may have been replaced."""

    class Fails:
        calls = 0

        def step(self, steps, u, out):
            out[...] = u / 2
            self.calls += 1
            if self.calls == 1:
                out[0] = torch.inf

    solver = MGRIT([Fails(), Fails()], N, options=dict(coarsening=M))
    with pytest.raises(SolverFailure, match="level 0, steps 0: value not finite"):
        solver.solve(torch.ones(N + 1))


def test_transposed_cycles_and_the_check_take_tensors():
    """Adjoints by transposed cycles are those of numpy arrays; the check calls propagators of tensors."""

    class Scaling:
        def __init__(self, factor):
            self.factor = factor

        def step(self, steps, u, out):
            out[...] = self.factor * u

        tangent = lambda self, steps, u, du, out: self.step(steps, du, out)
        adjoint = lambda self, steps, u, lam, out: self.step(steps, lam, out)

    options = dict(coarsening=(M,), rtol=0.0, max_it=2, check="cycle")
    gradient = np.random.default_rng(0).standard_normal((N + 1, WIDTH))
    found = []
    for make in (np.array, torch.tensor):
        backward = MGRIT([Scaling(0.9), Scaling(0.6)], N, options=options, linear=True)
        sweep = TransposedAdjoint(backward, N, is_last=True, options=backward.options, bounds=[0, N], linear=True)
        for _ in range(2):
            sweep.solver.solve(*sweep.arrays(make(gradient)), cycles=2, start=sweep.start)
        found.append(sweep.collect())
    np.testing.assert_allclose(found[1].numpy(), found[0], rtol=1e-14)

    assert check([Scaling(0.9), Scaling(0.6)], N, torch.ones(WIDTH, dtype=torch.float64), coarsening=M).passed
    report = check(levels(), N, start()[0], coarsening=M)
    assert report.passed
    with pytest.raises(InputError, match=r"check: state is a tensor of torch.float32.*\.double"):
        check(levels(), N, torch.ones(WIDTH))

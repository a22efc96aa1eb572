"""Kernels on lanes beside PETSc's solves, and beside what the machine can do: ``python -m tests.benchmarks.lanes``.

Solves with the matrix ``M + h K`` of an implicit step: of blocks of W states, transposes in and out included, over
CHOLMOD's block of 8 through PETSc (``MatMatSolve`` on a dense matrix, one column a state); of one state over PETSc's
single solve. Then each kernel by itself, with the operations and bytes of a state, beside a loop of fused
multiply-adds in registers and a sum over as many bytes as the kernel reads, compiled in the same way. What makes up a
ratio is timed in turn, by the processor's time of this one process; medians. ``--quick`` has the small problem only.
``docs/theory/lanes.md`` explains the table.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from firedrake import (
    COMM_SELF,
    Constant,
    DirichletBC,
    FunctionSpace,
    TestFunction,
    TrialFunction,
    UnitCubeMesh,
    UnitSquareMesh,
    assemble,
    curl,
    dx,
    grad,
    inner,
)
from firedrake.petsc import PETSc
from scipy.sparse import csr_matrix

from pint_fem.kernels.lanes.compiled import address, aligned, library
from pint_fem.kernels.lanes.lane_steps import LaneSteps
from pint_fem.kernels.lanes.program import STATE, StepProgram
from pint_fem.kernels.lanes.triangular import TriangularFactors
from pint_fem.paradiag.circulant import shifts
from pint_fem.paradiag.options import ParaDiagOptions
from pint_fem.sweeps.frequencies.systems import frequency_systems
from problems.heat_square import square
from tests.benchmarks.rows import Row, table, timed

__all__ = ["CASES", "Kernel", "block_rows", "lane_rows", "main", "roofline"]

WIDTHS = (8, 16, 32)
BLOCK = 8
"""States of PETSc's block."""
MANY = 8
"""Successive solves, products or steps, by whose time the time of one is determined."""
STEP = 4e-4
"""``h``."""


@dataclass(frozen=True)
class Case:
    """A matrix, and the least ratios that are required of blocks and of one state."""

    name: str
    space: Callable[[], FunctionSpace]
    block: float
    single: float | None = None


def _square(cells: int, family: str, degree: int) -> Callable[[], FunctionSpace]:
    return lambda: FunctionSpace(UnitSquareMesh(cells, cells, comm=COMM_SELF), family, degree)


CASES = (
    Case("P1, 64 x 64", _square(64, "CG", 1), 6, 1.8),
    Case("P1, 128 x 128", _square(128, "CG", 1), 4, 1.8),
    Case("P2, 64 x 64", _square(64, "CG", 2), 4, 1.8),
    Case("N1curl, 57 x 57", _square(57, "N1curl", 1), 4, 1.8),
    Case("P1, 24 x 24 x 24", lambda: FunctionSpace(UnitCubeMesh(24, 24, 24, comm=COMM_SELF), "CG", 1), 4),
)


class System:
    """The matrix of a step with PETSc's factor and ours.

    Parameters
    ----------
    V
        The space; all boundary values are zero.
    """

    def __init__(self, V: FunctionSpace):
        u, v = TrialFunction(V), TestFunction(V)
        d = curl if V.ufl_element().family() == "Nedelec 1st kind H(curl)" else grad
        bcs = DirichletBC(V, 0, "on_boundary")
        self.mass = _csr(assemble(inner(u, v) * dx, mat_type="aij").petscmat)
        form = inner(u, v) * dx + Constant(STEP) * inner(d(u), d(v)) * dx
        self.matrix = assemble(form, bcs=bcs, mat_type="aij").petscmat
        self.n = V.dim()
        self.factors = TriangularFactors(_csr(self.matrix), symmetric=True)
        self.ksp = PETSc.KSP().create(COMM_SELF)
        self.ksp.setOperators(self.matrix)
        self.ksp.setType(PETSc.KSP.Type.PREONLY)
        pc = self.ksp.getPC()
        pc.setType(PETSc.PC.Type.CHOLESKY)
        pc.setFactorSolverType("cholmod")
        self.ksp.setUp()
        self.block = pc.getFactorMatrix()
        self.states = np.random.default_rng(0).standard_normal((max(WIDTHS), self.n))

    def petsc_block(self) -> Callable[[], None]:
        """One call of ``matSolve`` for eight states."""
        B, X = (PETSc.Mat().createDense((self.n, BLOCK), comm=COMM_SELF) for _ in range(2))
        for A in (B, X):
            A.setUp()
        B.getDenseArray()[...] = self.states[:BLOCK].T
        B.assemble()
        X.assemble()
        self.solutions = X
        return lambda: self.block.matSolve(B, X)

    def petsc_single(self) -> Callable[[], None]:
        """PETSc's solve of one state."""
        x, b = self.matrix.createVecs()
        b.array[:] = self.states[0]
        return lambda: self.ksp.solve(b, x)

    def lanes(self, width: int, *, solves: int = 1, products: int = 0, steps: int = 1) -> Callable[[], None]:
        """Steps of ``width`` states: some solves, or products with the mass matrix, transposes in and out included;
        several steps with a right-hand side.
        """
        program = StepProgram({"whole": slice(0, self.n)}, self.n)
        for _ in range(solves):
            program.solve(STATE, self.factors)
        y = program.vector("y") if products else None
        for _ in range(products):
            program.multiply(y, self.mass, STATE)
        made = LaneSteps(program)
        made._cuts[width] = [(width, width)]
        out, u = np.empty((width, steps, self.n)), self.states[:width]
        added = np.zeros(out.shape) if steps > 1 else None
        self.results = out
        return lambda: made.run(u, out, added)


def _csr(matrix: PETSc.Mat) -> csr_matrix:
    indptr, indices, values = matrix.getValuesCSR()
    return csr_matrix((values, indices, indptr), matrix.getSize())


def _repeated(action: Callable[[], None], times: int) -> Callable[[], None]:
    def run():
        for _ in range(times):
            action()

    return run


def _seconds(actions: list[Callable[[], None]], repeats: int) -> list[float]:
    """Median seconds of each action; short ones are repeated within a measurement."""
    first = timed(*actions, repeats=2)
    times = [max(1, min(int(2e-3 / max(s, 1e-7)), 1000)) for s in first]
    repeated = [_repeated(a, n) for a, n in zip(actions, times, strict=True)]
    found = timed(*repeated, repeats=repeats, clock=time.process_time)
    return [s / n for s, n in zip(found, times, strict=True)]


def block_rows(case: Case, system: System, repeats: int) -> list[Row]:
    """Solves of blocks and of one state over PETSc's."""
    singles = (system.petsc_single(), system.lanes(1))
    actions = [system.petsc_block(), *(system.lanes(w) for w in WIDTHS)]
    for action in actions:
        action()
    error = np.abs(system.results[:BLOCK, 0] - system.solutions.getDenseArray().T).max()
    error /= np.abs(system.results[:BLOCK]).max()
    block, *ours, theirs, own = _seconds([*actions, *singles], repeats)
    block, each = block / BLOCK, [s / w for s, w in zip(ours, WIDTHS, strict=True)]
    best = int(np.argmin(each))
    say = lambda s, t, what, target, note="": Row("k", what, 1e3 * s, 1e3 * t, t / s, target, False, note)
    size = f"{system.n} unknowns, {system.factors.left.entries} entries of the factor"
    rows = [
        say(s, block, f"{case.name}: PETSc's CHOLMOD, 8 states / {w} lanes", None)
        for s, w in zip(each, WIDTHS, strict=True)
    ]
    what = f"{case.name}: PETSc's CHOLMOD, 8 states / lanes, the best width"
    rows.append(say(each[best], block, what, case.block, f"{WIDTHS[best]} lanes; {size}; differs by {error:.0e}"))
    what = f"{case.name}: PETSc's CHOLMOD, one state / one state"
    return [*rows, say(own, theirs, what, case.single)]


# -- roofline ----------------------------------------------------------------------------------------------------------
_PEAKS = """
typedef double Vector __attribute__((vector_size(64), aligned(8), may_alias));

double fused(long count) {
    Vector sum[16], a = {0}, b = {0};
    for (int i = 0; i < 8; i++) a[i] = 0.999999, b[i] = 1e-9 * i;
    for (int i = 0; i < 16; i++) sum[i] = b * i;
    for (long k = 0; k < count; k++)
        for (int i = 0; i < 16; i++) sum[i] = sum[i] * a + b;
    for (int i = 1; i < 16; i++) sum[0] += sum[i];
    return sum[0][0] + sum[0][5];
}

double stream(const double *x, long count, long times) {
    Vector sum[8] = {0};
    while (times--)
        for (long k = 0; k + 64 <= count; k += 64)
            for (int i = 0; i < 8; i++) sum[i] += *(const Vector *)(x + k + 8 * i);
    for (int i = 1; i < 8; i++) sum[0] += sum[i];
    return sum[0][0] + sum[0][3];
}
"""


class Peaks:
    """What the machine does at most on one core: fused multiply-adds in registers, and reading."""

    def __init__(self) -> None:
        self._library = library(_PEAKS)
        self._library.fused.restype = self._library.stream.restype = ctypes.c_double
        self._arrays: dict[int, np.ndarray] = {}

    def fused(self) -> tuple[Callable[[], None], float]:
        """A loop, and its operations."""
        count = 20000
        return lambda: self._library.fused(ctypes.c_long(count)), count * 16 * 8 * 2.0

    def stream(self, nbytes: float) -> tuple[Callable[[], None], float]:
        """Sums over an array of so many bytes, again and again where it is short, and the bytes that are read."""
        x = aligned(max(64, int(nbytes) // 512 * 64))
        x[:] = 1.0
        times = max(1, 2**24 // x.nbytes)
        run = lambda: self._library.stream(address(x), ctypes.c_long(len(x)), ctypes.c_long(times))
        return run, float(x.nbytes * times)


@dataclass
class Kernel:
    """A kernel of one width beside the machine's peaks.

    Attributes
    ----------
    name, lanes : str, int
    microseconds, operations, nbytes : float
        For one state: time, floating point operations, and bytes that are read and written: those of matrices and
        factors divided by the lanes, and those of the states' vectors.
    gflops, gbytes : float
        Operations and bytes per second, in 1e9.
    of_peak, of_stream : float
        The former relative to the loop in registers, the latter relative to the sum over as many bytes as the matrix or
        factor has.
    """

    name: str
    lanes: int
    microseconds: float
    operations: float
    nbytes: float
    gflops: float
    gbytes: float
    of_peak: float
    of_stream: float


def roofline(system: System, peaks: Peaks, repeats: int) -> list[Kernel]:
    """Each kernel of a system by itself."""
    lower, n = system.factors.left, system.n
    rows, entries, nnz = float(lower.row_ptr[-1]), float(lower.entries), float(system.mass.nnz)
    factor_bytes = 8.0 * entries + 4.0 * rows
    kernels = {
        # forward and backward: both read the factor; rows below a panel are read and written, and then read
        "triangular solves": (4 * entries + n, 2 * factor_bytes, 8 * (3 * rows + 4 * n), "solves"),
        "product": (2 * nnz, 12 * nnz, 8 * (nnz + n), "products"),
        "transposes in and out": (n, 0.0, 8 * 4 * n, "steps"),
    }
    fused, flops = peaks.fused()
    out = []
    for name, (operations, shared, own, kind) in kernels.items():
        stream, streamed = peaks.stream(shared / 2 if kind == "solves" else shared or 8 * n * max(WIDTHS))
        actions = []
        for w in (1, *WIDTHS):
            for count in (1, 1 + MANY):
                actions.append(system.lanes(w, **{"solves": 0, kind: count}))
        *found, peak, read = _seconds([*actions, fused, stream], repeats)
        for place, w in enumerate((1, *WIDTHS)):
            with_one, with_many = found[2 * place : 2 * place + 2]
            seconds = (with_many - with_one) / MANY / w
            nbytes = shared / w + own
            rates = operations / seconds, nbytes / seconds
            relative = rates[0] / (flops / peak), shared / w / seconds / (streamed / read)
            out.append(Kernel(name, w, 1e6 * seconds, operations, nbytes, rates[0] / 1e9, rates[1] / 1e9, *relative))
    return out


def frequency_kernels(peaks: Peaks, repeats: int, steps: int = 64) -> list[Kernel]:
    """Solves of ParaDiag's frequencies on lanes, each with a factor of its own (heat, P1, 64 x 64, backward Euler)."""
    rf = square(steps)
    systems = frequency_systems(rf.problem.sweeps.propagators[0], ParaDiagOptions(), {})
    if not systems.has_lanes:
        return []
    mu, size, out = shifts(steps, 1e-4), rf.evolution.state_size, []
    some = range(len(mu) // 16 * 16)
    fused, flops = peaks.fused()
    for name, dtype in (("single", np.complex64), ("double", np.complex128)):
        r = np.random.default_rng(1).standard_normal((len(some), 1, size)).astype(dtype)
        systems.release()
        systems.solve_all(some, mu, r)
        nbytes = systems.bytes / systems.kept
        entries = nbytes / np.dtype(dtype).itemsize
        stream, streamed = peaks.stream(nbytes * len(some))
        solve, peak, read = _seconds([lambda r=r: systems.solve_all(some, mu, r), fused, stream], repeats)
        seconds = solve / len(some)
        operations = 2 * 8 * entries  # forward and backward, a complex multiplication and addition for each entry
        rates = operations / seconds, 2 * nbytes / seconds
        peak_flops = flops / peak * (2 if dtype == np.complex64 else 1)
        out.append(
            Kernel(f"frequency, {name} precision", 16 if dtype == np.complex64 else 8, 1e6 * seconds, operations,
                   2 * nbytes, rates[0] / 1e9, rates[1] / 1e9, rates[0] / peak_flops, rates[1] / (streamed / read))
        )  # fmt: skip
    return out


def lane_rows(repeats: int, quick: bool = False, say: Callable[[str], None] = print) -> list[Row]:
    """Ratios of all cases, or of the smallest."""
    out = []
    for case in CASES[: 1 if quick else None]:
        say(f"lanes: {case.name}")
        out += block_rows(case, System(case.space()), repeats)
    return out


def show(kernels: list[Kernel]) -> None:
    """Print the table of ``docs/benchmarks/lanes.md``."""
    print("| kernel | lanes | us a state | operations | bytes | GFlop/s | GB/s | of peak | of stream |")
    print("|---|---|---|---|---|---|---|---|---|")
    for k in kernels:
        streamed = f"{k.of_stream:.0%}" if k.of_stream else ""
        print(
            f"| {k.name} | {k.lanes} | {k.microseconds:.3g} | {k.operations:.3g} | {k.nbytes:.3g} | {k.gflops:.3g} | "
            f"{k.gbytes:.3g} | {k.of_peak:.0%} | {streamed} |"
        )


def main(argv: list[str] | None = None) -> int:
    """Measure and print; JSON with ``--out``."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.lanes", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    from rich.console import Console

    rows, kernels, peaks = lane_rows(args.repeats, args.quick), {}, Peaks()
    Console(width=150).print(table(rows))
    for case in CASES[: 1 if args.quick else None]:
        kernels[case.name] = roofline(System(case.space()), peaks, args.repeats)
    kernels["ParaDiag's frequencies, P1, 64 x 64"] = frequency_kernels(peaks, args.repeats)
    for name, found in kernels.items():
        print(f"\n{name}\n")
        show(found)
    if args.out:
        data = {name: [asdict(k) for k in found] for name, found in kernels.items()}
        args.out.write_text(json.dumps({"rows": [asdict(r) for r in rows], "kernels": data}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())

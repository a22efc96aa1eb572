"""Traces of real solves beside the model's: ``mpiexec -n 8 python -m tests.scaling_traces``."""

import collections

import numpy as np
from mpi4py import MPI

from pint_fem.all_at_once.trace import Trace
from pint_fem.kernels.lanes.structures import kernels
from pint_fem.mgrit import MGRIT, split_steps
from pint_fem.paradiag import ParaDiag
from pint_fem.scaling.costs import Calibration, Kernel
from pint_fem.scaling.model import Model, Solve
from pint_fem.scaling.network import Network

FREE = Network(0.0, 1e30, "free")


def calibration(step=1.0, lanes=False, norm=0.0, **more):
    """Of ``step`` seconds a state."""
    work = {"step": [Kernel.constant(step, lanes)], "adjoint": [Kernel.constant(2 * step, lanes)]}
    return Calibration("test", "none", 100, 64, {1: work}, norm=norm, network=FREE, **more)


FAST = Network(1e-6, 1e10, "for tests")
MENU = [{"levels": 2, "coarsening": [16], "relax": "FCF"}, {"levels": 3, "coarsening": [8, 4], "relax": "F"}]


def planned_calibration(**changes) -> Calibration:
    """256 steps; lanes half as dear as single steps; cycles as if counted."""
    kernel = Kernel((1, 8, 16), (1e-2, 4e-2, 8e-2), lanes=True)
    one = {"step": [kernel], "adjoint": [kernel]}
    two = {kind: [k.scaled(0.6) for k in levels] for kind, levels in one.items()}
    cycles = [{"options": o, "rtol": 1e-6, "state": n, "adjoint": n} for o, n in zip(MENU, (2, 3), strict=True)]
    c = Calibration("test", "none", 10000, 256, {1: one, 2: two}, network=FAST, cycles=cycles, space_iterations=5.0)
    return c.with_changes(**changes)


class Halve:
    """``u -> u/2``."""

    lanes = False

    def step(self, steps, u, out):
        """Step."""
        out[...] = u / 2


class HalveLanes(Halve):
    """With the methods of kernels on lanes."""

    lanes = True

    def sweep(self, first, U, G):
        """Sweep."""
        self.advance(first, 0, U[:1], U[None, 1:], None if G is None else G[None])

    def advance(self, first, stride, u, out, G):
        """Steps one after another from each state."""
        for j in range(out.shape[1]):
            out[:, j] = (out[:, j - 1] if j else u) / 2
            if G is not None:
                out[:, j] += G[:, j]


CONFIGS = [
    ({"levels": 3, "coarsening": (4, 2), "relax": "FCF"}, "nested"),
    ({"levels": 2, "coarsening": 3, "relax": "F", "cycle": "F"}, "skip"),
    ({"levels": 4, "coarsening": (3, 2, 2), "relax": ("FCF", "F"), "coarse_solver": "gathered"}, "nested"),
    ({"levels": 3, "coarsening": (2, 2), "coarse_solver": "relax", "cycle": "F"}, "guess"),
    ({"levels": 2, "coarsening": 5, "relax": "F", "coarse_steps": 2}, "nested"),
    ({"levels": 1}, "guess"),
]


def events(trace):
    """What happened on a rank: kinds of work by level with states, messages by level, peer and bytes, as counts."""
    out = collections.Counter()
    for event in trace:
        what = {k: v for k, v in event["args"].items() if k in ("states", "peer", "bytes", "first", "sent")}
        if event["cat"] in ("work", "message"):
            out[event["cat"], event["name"], event["tid"], tuple(sorted(what.items()))] += 1
    return out


def real_and_predicted(config, kind):
    """Events of this rank in a real state and adjoint solve on all ranks, and in the model."""
    comm, nsteps = MPI.COMM_WORLD, 50
    options, start = config
    options = {**options, "residual": "C", "check": "cycle", "rtol": 0.0, "atol": 0.0}
    backward = comm.Split(0, -comm.rank)
    trace = Trace(comm)
    for side, name in ((comm, "state"), (backward, "adjoint")):
        bounds = split_steps(nsteps, comm.size)
        if name == "adjoint":
            bounds = [nsteps - b for b in reversed(bounds)]
        given = {k: v for k, v in options.items() if k != "coarse_steps"}  # the same calls, of other propagators
        solver = MGRIT([kind() for _ in range(options["levels"])], nsteps, options=given, comm=side, bounds=bounds,
                       linear=True, name=name, trace=trace)  # fmt: skip
        k = solver.levels[0].k
        U = np.zeros((k + 1, 100))
        U[0] = 1
        given = [np.zeros((level.k, 100)) for level in solver.levels[1:]] if name == "state" else None
        accuracy = {} if options["levels"] == 1 else {"cycles": 2}
        solver.solve(U, np.ones((k, 100)), start=start, coarse_rhs=given if start != "guess" else None, **accuracy)
    c = calibration(1.0, kind.lanes)
    said = Model(c, options, (1, comm.size), nsteps=nsteps).run(
        Solve("state", start, 2), Solve("adjoint", start, 2), trace=True
    )
    return events(trace.events), events(said.traces[comm.rank])


PARADIAG = {"solve": 4.0, "solve transposed": 5.0, "factor": 7.0, "factor bytes": 1e3, "fft": 0.5, "ifft": 0.25,
            "few fft": 0.5, "few ifft": 0.25, "fft steps": 50, "fft columns": 100, "pack": 1e-3}  # fmt: skip
#: Where finite elements have frequencies on lanes.
FREQUENCY_LANES = {} if kernels() is None else {"single": 0.5}


def paradiag_real_and_predicted(kind):
    """The same of ParaDiag: a cold state solve, an adjoint one, and a warm one."""
    comm, nsteps, size = MPI.COMM_WORLD, 50, 100
    trace, solved = Trace(comm), []
    options = {"alpha": 1e-3, "rtol": 0.0, "atol": 0.0}

    def solve(k, mu, r):
        solved.append(k)
        return r / (1 - mu / 2)

    for side, name in ((comm, "state"), (comm.Split(0, -comm.rank), "adjoint")):
        bounds = split_steps(nsteps, comm.size)
        if name == "adjoint":
            bounds = [nsteps - b for b in reversed(bounds)]
        solver = ParaDiag(kind(), nsteps, solve, options=options, comm=side, bounds=bounds, name=name, trace=trace,
                          backwards=name == "adjoint")  # fmt: skip
        k = solver.levels[0].k
        U = np.zeros((k + 1, size))
        U[0] = 1
        solver.solve(U, np.ones((k, size)), start="nested", cycles=2, coarse_rhs=[] if name == "state" else None)
        if name == "adjoint":
            solver.solve(U, np.ones((k, size)), start="guess", cycles=1)
    c = calibration(1.0, kind.lanes, paradiag=PARADIAG)
    model = Model(c, {"time_solver": "paradiag", "alpha": 1e-3}, (1, comm.size), nsteps=nsteps)
    said = model.run(
        Solve("state", "nested", 2), Solve("adjoint", "nested", 2), Solve("adjoint", "guess", 1), trace=True
    )
    assert comm.allreduce(len(solved)) == said.counts["frequency solve", 0] == said.counts["factor", 0] * 5
    return events(trace.events), events(said.traces[comm.rank])


if __name__ == "__main__":
    pairs = [real_and_predicted(config, kind) for config in CONFIGS for kind in (Halve, HalveLanes)]
    pairs += [paradiag_real_and_predicted(kind) for kind in (Halve, HalveLanes)]
    alike = MPI.COMM_WORLD.allreduce(all(real == said for real, said in pairs), op=MPI.LAND)
    if MPI.COMM_WORLD.rank == 0:
        print(len(pairs), "alike" if alike else "different")

"""A training step on one GPU: all intervals of a level in one batched call, beside loops from layer to layer.

``python -m tests.benchmarks.gpu_layers [--out FILE.json]`` measures networks of 1,024 and 4,096 blocks of width 8 to 64
(:mod:`problems.block_networks`) in float32 on one process. A step is forward, backward and update (SGD). Baselines are
the forms of :mod:`problems.serial_networks`: the eager loop, the stacked loop and ``torch.compile`` of chunks, and the
last two captured in a CUDA graph, which is replayed as one launch. Gradients of a cold step are compared with the eager
loop's, relative in the Euclidean norm over all layers: of the baselines, of :class:`~pint_fem.resnet.LayerParallel`
with fixed iterations (the printed error) and, in the first case of each kind, up to its tolerance.

The run ends within ``--budget`` seconds, by a timer that interrupts whatever takes longer (a compilation, for
instance): cases that are left are named. Without a GPU it prints that it was skipped. ``--device cpu --tiny`` runs
everything but the CUDA graphs with a few small blocks.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch
from mpi4py import MPI
from torch import nn

from problems.block_networks import KINDS, BlockProblem, block_problem
from problems.layers import Training
from problems.serial_networks import agreement, fastest, forms, gradients

__all__ = ["CASES", "TINY", "CapturedTraining", "Case", "Result", "main", "measure"]

BUDGET = 230.0
"""Seconds of a whole run."""
CHUNK = 8
"""Layers of a compiled call: launches are captured anyway, and compilation takes a second per layer and direction."""
LIMITS = {"fixed": 0.2, "exact": 1e-3}
"""Largest relative errors of gradients in float32."""


@dataclass(frozen=True)
class Case:
    """A network and the options of MGRIT that are tried for it."""

    kind: str
    depth: int
    width: int
    batch: int = 32
    size: int = 8
    options: tuple[dict, ...] = ()
    iterations: tuple[int, int] = (2, 1)

    def __str__(self) -> str:
        return f"{self.kind}, {self.depth} layers of width {self.width}"


def _options(depth: int) -> tuple[dict, ...]:
    """Two levels with the fewest successive calls, and three."""
    m = {1024: 32, 4096: 64}[depth]
    three = {1024: [16, 8], 4096: [16, 16]}[depth]
    return {"levels": 2, "coarsening": m, "relax": "F"}, {"levels": 3, "coarsening": three, "relax": "F"}


CASES = tuple(
    Case(kind, depth, width, size=64 if kind == "transformer" else 8, options=_options(depth))
    for depth, width in ((1024, 8), (1024, 64), (4096, 8), (4096, 64))
    for kind in ("conv", "transformer", "dense")
)
TINY = tuple(
    Case(kind, 16, 8, batch=4, size=4, options=({"levels": 2, "coarsening": 4, "relax": "F"},)) for kind in KINDS
)


class OutOfTime(BaseException):
    """The budget is spent; no :class:`Exception`, so that nothing takes it for a failure of its own."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise :class:`OutOfTime` in this block after so many seconds."""

    def stop(*_: object) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class CapturedTraining:
    """Training steps that are captured in a CUDA graph once and replayed as one launch.

    Parameters
    ----------
    training
        Training whose ``step`` reads and writes the same memory each time. It takes some steps before the capture.
    """

    def __init__(self, training: Training):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                training.step()
        torch.cuda.current_stream().wait_stream(side)
        training.optimizer.zero_grad(set_to_none=True)
        self.training, self.graph = training, torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            training.step()

    def step(self) -> None:
        """Forward, backward and update."""
        self.graph.replay()

    def difference(self, exact: Training) -> float:
        """Relative difference of the gradients of a replay to those of ``exact``, for equal parameters."""
        mine, other = (list(t.net.parameters()) for t in (self.training, exact))
        with torch.no_grad():
            for a, b in zip(mine, other, strict=True):
                b.copy_(a)
        exact.gradients()
        self.step()
        return agreement([p.grad for p in mine], [p.grad for p in other])


@dataclass
class Result:
    """What was measured of a case.

    Attributes
    ----------
    case : str
    serial, parallel : dict
        Least seconds of a training step by form, and by options of MGRIT.
    errors : dict
        Relative errors of gradients by form and options.
    notes : list of str
        What failed or was left out.
    """

    case: str
    serial: dict[str, float] = field(default_factory=dict)
    parallel: dict[str, float] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def ratio(self) -> float | None:
        """Fastest serial form over the fastest options, or ``None``."""
        if not self.serial or not self.parallel:
            return None
        return min(self.serial.values()) / min(self.parallel.values())

    def lines(self) -> list[str]:
        """For printing."""
        shown = lambda seconds: ", ".join(f"{name} {1e3 * s:.1f}" for name, s in seconds.items())
        ratio = "" if self.ratio is None else f"{self.ratio:.2f} = fastest serial / layer-parallel; "
        out = [f"{self.case}: {ratio}ms serial: {shown(self.serial)}; layer-parallel: {shown(self.parallel)}"]
        out.append("  gradient errors: " + ", ".join(f"{name} {error:.1e}" for name, error in self.errors.items()))
        return out + [f"  {note}" for note in self.notes]


def _parallel(problem: BlockProblem, case: Case, options: dict, iterations: tuple) -> nn.Module:
    from pint_fem.resnet import Grid, LayerParallel

    return LayerParallel(
        problem.blocks,
        opening=problem.opening,
        closing=problem.closing,
        h=problem.h,
        grid=Grid(comm=MPI.COMM_SELF),
        forward_iterations=iterations[0],
        backward_iterations=iterations[1],
        mgrit=options,
    )


def _layer_gradients(net: nn.Module) -> list[torch.Tensor]:
    """Gradients of all layers by name, stacked."""
    names = [name for name, _ in net.layers[0].named_parameters()]
    return [torch.stack([layer.get_parameter(name).grad for layer in net.layers]) for name in names]


def _name(options: dict, iterations: tuple) -> str:
    m = options["coarsening"]
    return f"m = {m if isinstance(m, int) else ','.join(map(str, m))}, {iterations[0]} + {iterations[1]}"


def _least(step: Callable[[], None], synchronise: Callable[[], None], repeats: int, deadline: float) -> float:
    """Least seconds of a step after one that warms up; at least one is timed."""
    step()
    out = float("inf")
    for number in range(repeats):
        synchronise()
        start = time.perf_counter()
        if number and start > deadline:
            break
        step()
        synchronise()
        out = min(out, time.perf_counter() - start)
    return out


def measure(
    case: Case,
    *,
    device: str,
    repeats: int,
    deadline: float,
    exact: bool,
    backend: str = "inductor",
    into: Result | None = None,
) -> Result:
    """Measure the forms and the layer-parallel steps of one case.

    Parameters
    ----------
    case
        What is measured.
    device
        Of torch; on ``"cuda"`` loops are captured too.
    repeats
        Of each step.
    deadline
        Value of ``time.perf_counter()`` from which on what is left is skipped.
    exact
        Whether gradients up to the tolerance are compared too.
    backend
        Of ``torch.compile``.
    into
        Filled step by step, so that a caller that interrupts has what was measured.

    Raises
    ------
    ArithmeticError
        On gradients whose errors exceed :data:`LIMITS`.
    """
    out = Result(str(case)) if into is None else into
    cuda = torch.device(device).type == "cuda"
    synchronise = torch.cuda.synchronize if cuda else lambda: None
    problem = block_problem(case.kind, case.depth, case.width, batch=case.batch, size=case.size, device=device)
    training = lambda net: Training(net, problem.x, problem.y)
    baseline = training(problem.serial())
    baseline.gradients()
    wanted = _layer_gradients(baseline.net)
    plans = [(options, case.iterations, "fixed") for options in case.options]
    if exact:
        plans.append((case.options[0], (None, None), "exact"))
    for options, iterations, kind in plans:
        ours = training(_parallel(problem, case, options, iterations))
        ours.gradients()
        name = _name(options, iterations) if kind == "fixed" else "to the tolerance"
        out.errors[name] = error = agreement(_layer_gradients(ours.net), wanted)
        if not error <= LIMITS[kind]:
            raise ArithmeticError(f"{case}, {name}: gradient error {error:.1e} (at most {LIMITS[kind]:g})")
        if kind == "fixed":
            out.parallel[name] = _least(ours.step, synchronise, repeats, deadline)
    del ours
    compiler = partial(torch.compile, backend=backend)
    for form, network in forms(baseline.net, chunk=CHUNK, compiler=compiler).items():
        if time.perf_counter() > deadline:
            out.notes.append(f"{form} loop: no time left")
            continue
        try:
            found = fastest({form: network}, training, repeats=0, synchronise=synchronise)
        except Exception as error:
            if form != "compiled":
                raise
            out.notes.append(f"compiled loop: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}")
            continue
        step, ends = found.trainings[form], gradients(network)[: len(wanted)]
        out.errors[form] = error = agreement(ends, wanted)
        if not error <= LIMITS["exact"]:
            raise ArithmeticError(f"{case}, {form}: gradient error {error:.1e} (at most {LIMITS['exact']:g})")
        out.serial[form] = _least(step.step, synchronise, repeats, deadline)
        if cuda and form != "eager" and time.perf_counter() < deadline:
            captured = CapturedTraining(step)
            out.serial[f"{form}, CUDA graph"] = _least(captured.step, synchronise, repeats, deadline)
            reference = training(forms(baseline.net, ["stacked"])["stacked"])
            out.errors[f"{form}, CUDA graph"] = error = captured.difference(reference)
            if not error <= LIMITS["exact"]:
                raise ArithmeticError(f"{case}, {form} in a CUDA graph: gradient error {error:.1e}")
            del captured
    return out


def run(cases: tuple[Case, ...], say: Callable[[str], None], *, device: str, budget: float, **how) -> list[Result]:
    """Measure cases within ``budget`` seconds; those that are left are named."""
    start, out, checked = time.perf_counter(), [], set()
    try:
        with time_limit(budget):
            for i, case in enumerate(cases):
                left = budget - (time.perf_counter() - start)
                deadline = time.perf_counter() + 2 * left / (len(cases) - i + 1)
                out.append(Result(str(case)))
                try:
                    measure(case, device=device, deadline=deadline, exact=case.kind not in checked, into=out[-1], **how)
                except torch.OutOfMemoryError:
                    out[-1].notes.append("out of the device's memory")
                checked.add(case.kind)
                for line in out[-1].lines():
                    say(line)
    except OutOfTime:
        out[-1].notes.append(f"stopped by the budget of {budget:g} s")
        for line in out[-1].lines():
            say(line)
        for case in cases[len(out) :]:
            say(f"{case}: not measured, the budget of {budget:g} s is spent")
    return out


def main(argv: list[str] | None = None) -> int:
    """Measure, print, write JSON; 0 where there is no GPU."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.gpu_layers", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", help="of torch (cuda)")
    parser.add_argument("--tiny", action="store_true", help="a few small blocks, for a test of this program")
    parser.add_argument("--kinds", default=",".join(KINDS), help=f"of networks ({','.join(KINDS)})")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--budget", type=float, default=BUDGET, help=f"seconds of the whole run ({BUDGET:g})")
    parser.add_argument("--backend", default="inductor", help="of torch.compile (inductor)")
    parser.add_argument("--out", type=Path, help="JSON file")
    args = parser.parse_args(argv)
    say = partial(print, flush=True)
    if torch.device(args.device).type == "cuda" and not torch.cuda.is_available():
        say("skipped: there is no GPU (torch.cuda.is_available() is False); --device cpu --tiny tests the program")
        return 0
    cases = tuple(case for case in (TINY if args.tiny else CASES) if case.kind in args.kinds.split(","))
    name = torch.cuda.get_device_name() if torch.device(args.device).type == "cuda" else "CPU"
    say(f"{name}, torch {torch.__version__}, float32, batch {cases[0].batch}; least of {args.repeats} steps")
    start = time.perf_counter()
    how = dict(repeats=args.repeats, backend=args.backend)
    results = run(cases, say, device=args.device, budget=args.budget, **how)
    say(f"{time.perf_counter() - start:.0f} s")
    if args.out:
        found = [{**asdict(r), "ratio": r.ratio} for r in results]
        args.out.write_text(json.dumps({"device": name, "torch": torch.__version__, "results": found}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())

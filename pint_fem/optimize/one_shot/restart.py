"""The state of a simultaneous optimisation between two iterations, written to a checkpoint and read from it.

The iterates of the solvers belong to the problem: a checkpoint made for it saves and restores them.
"""

from __future__ import annotations

import numpy as np

from pint_fem.optimize.lbfgs import SecantPair
from pint_fem.optimize.one_shot.inexact_evaluations import DesignEvaluation
from pint_fem.optimize.one_shot.iteration import Run
from pint_fem.optimize.one_shot.records import DesignUpdate, OneShotRecord
from pint_fem.optimize.protocol import Checkpoint
from pint_fem.optimize.records import StopReason
from pint_fem.optimize.restart import load, read, read_history, write, write_history

__all__ = ["restore", "save"]

_KIND = "one-shot 1"

_NUMBERS = ("first_norm", "theta", "residual", "slope", "tau", "mark", "smallest")
_COUNTS = ("count", "measure", "since_mark", "rejections", "idle")


def save(checkpoint: Checkpoint, run: Run, history: list[OneShotRecord]) -> None:
    """Save the state of a run."""
    solvers, problem, vectors = run.solvers, run.solvers.problem, {"x": run.x, "s": run.s}
    if run.z is not run.x:
        vectors["z"] = run.z
    evaluations: dict[str, list] = {}
    named = {"base": run.base, "exact": run.exact}
    named |= {f"held_{i}": found for i, found in enumerate(r for r in solvers.references if r.x is run.z)}
    for name, found in named.items():
        if found is not None:
            numbers = (found.value, found.norm, found.residual, found.error, found.value_error)
            evaluations[name], vectors[name] = [write(v) for v in numbers], found.g
    pairs = run.B.pairs
    for i, pair in enumerate(pairs):
        vectors[f"pair_{i}_s"], vectors[f"pair_{i}_y"] = pair.s, pair.y
    scalars = {
        "kind": _KIND,
        "numbers": {name: write(getattr(run, name)) for name in _NUMBERS},
        "counts": {name: int(getattr(run, name)) for name in _COUNTS},
        "reason": None if run.reason is None else run.reason.value,
        "readings": evaluations,
        "factors": [[write(v) for v in pair] for pair in solvers.factors],
        "measured": solvers.measured,
        "gamma": write(run.B.gamma),
        "pairs": [[write(v) for v in (pair.noise, pair.sy, pair.ss, pair.yy)] for pair in pairs],
        "calls": [problem.advance_calls, problem.value_calls, problem.gradient_calls],
        "history": write_history(history),
    }
    checkpoint.save(scalars, vectors)


def restore(checkpoint: Checkpoint, run: Run) -> list[OneShotRecord] | None:
    """Set the run to the last saved state; its history, or None if there is none.

    Raises
    ------
    ValueError
        On every process, if the checkpoint is not that of a one-shot run in this space.
    """
    solvers, problem = run.solvers, run.solvers.problem
    loaded = load(checkpoint, _KIND, run.x, problem)
    if loaded is None:
        return None
    scalars, vectors = loaded
    run.x, run.s = vectors["x"], vectors["s"]
    run.z = vectors.get("z", run.x)

    def evaluation(name: str, x: np.ndarray) -> DesignEvaluation | None:
        if name not in scalars["readings"]:
            return None
        value, norm, residual, error, value_error = (read(v) for v in scalars["readings"][name])
        return DesignEvaluation(x, value, vectors[name], norm, residual, error, value_error)

    run.base, run.exact = evaluation("base", run.x), evaluation("exact", run.x)
    for name, value in scalars["numbers"].items():
        setattr(run, name, read(value))
    for name, value in scalars["counts"].items():
        setattr(run, name, value)
    pairs = enumerate(scalars["pairs"])
    run.B.restore(
        [SecantPair(vectors[f"pair_{i}_s"], vectors[f"pair_{i}_y"], *(read(v) for v in pair)) for i, pair in pairs],
        read(scalars["gamma"]),
    )
    references = []
    while (found := evaluation(f"held_{len(references)}", run.z)) is not None:
        references.append(found)
    factors = [tuple(read(v) for v in pair) for pair in scalars["factors"]]
    solvers.restore(references, factors, scalars.get("measured", 0))
    problem.advance_calls, problem.value_calls, problem.gradient_calls = scalars["calls"]
    run.resume(None if scalars["reason"] is None else StopReason(scalars["reason"]))
    return read_history(scalars["history"], OneShotRecord, update=DesignUpdate)

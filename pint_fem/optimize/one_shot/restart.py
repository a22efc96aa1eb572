"""A simultaneous optimisation between two iterations, on its way to a checkpoint and back.

The iterates of the solvers are the problem's to keep: a checkpoint that knows it saves and restores them.
"""

from __future__ import annotations

import numpy as np

from pint_fem.optimize.lbfgs import SecantPair
from pint_fem.optimize.one_shot.iteration import Run
from pint_fem.optimize.one_shot.records import DesignUpdate, OneShotRecord
from pint_fem.optimize.one_shot.running_solvers import Reading
from pint_fem.optimize.protocol import Checkpoint
from pint_fem.optimize.records import StopReason
from pint_fem.optimize.restart import load, read, read_history, write, write_history

__all__ = ["restore", "save"]

_KIND = "one-shot 1"

_NUMBERS = ("first_norm", "theta", "residual", "slope", "tau", "mark", "smallest")
_COUNTS = ("count", "measure", "since_mark", "rejections", "idle")


def save(checkpoint: Checkpoint, run: Run, history: list[OneShotRecord]) -> None:
    """Hand a run to the checkpoint."""
    solvers, vectors = run.solvers, {"x": run.x, "s": run.s}
    if run.z is not run.x:
        vectors["z"] = run.z
    readings: dict[str, list] = {}

    def keep(name: str, reading: Reading | None) -> None:
        if reading is not None:
            numbers = (reading.value, reading.norm, reading.residual, reading.error, reading.value_error)
            readings[name], vectors[name] = [write(v) for v in numbers], reading.g

    keep("base", run.base)
    keep("exact", run.exact)
    held = [r for r in solvers.held if r.x is run.z]
    for i, reading in enumerate(held):
        keep(f"held_{i}", reading)
    pairs = run.B.pairs
    for i, pair in enumerate(pairs):
        vectors[f"pair_{i}_s"], vectors[f"pair_{i}_y"] = pair.s, pair.y
    scalars = {
        "kind": _KIND,
        "numbers": {name: write(getattr(run, name)) for name in _NUMBERS},
        "counts": {name: int(getattr(run, name)) for name in _COUNTS},
        "reason": None if run.reason is None else run.reason.value,
        "readings": readings,
        "factors": [[write(v) for v in pair] for pair in solvers.factors],
        "measured": solvers.measured,
        "gamma": write(run.B.gamma),
        "pairs": [[write(v) for v in (pair.noise, pair.sy, pair.ss, pair.yy)] for pair in pairs],
        "calls": [solvers.advances, solvers.exact.values, solvers.exact.gradients],
        "history": write_history(history),
    }
    checkpoint.save(scalars, vectors)


def restore(checkpoint: Checkpoint, run: Run) -> list[OneShotRecord] | None:
    """Put the run where it was; its history, or None if there is none.

    Raises
    ------
    ValueError
        On every process, if the checkpoint is not that of a one-shot run in this space.
    """
    loaded = load(checkpoint, _KIND, run.x, run.solvers.exact.problem)
    if loaded is None:
        return None
    scalars, vectors = loaded
    run.x, run.s = vectors["x"], vectors["s"]
    run.z = vectors.get("z", run.x)

    def kept(name: str, x: np.ndarray) -> Reading | None:
        if name not in scalars["readings"]:
            return None
        value, norm, residual, error, value_error = (read(v) for v in scalars["readings"][name])
        return Reading(x, value, vectors[name], norm, residual, error, value_error)

    run.base, run.exact = kept("base", run.x), kept("exact", run.x)
    for name, value in scalars["numbers"].items():
        setattr(run, name, read(value))
    for name, value in scalars["counts"].items():
        setattr(run, name, value)
    pairs = enumerate(scalars["pairs"])
    run.B.restore(
        [SecantPair(vectors[f"pair_{i}_s"], vectors[f"pair_{i}_y"], *(read(v) for v in pair)) for i, pair in pairs],
        read(scalars["gamma"]),
    )
    solvers, held = run.solvers, []
    while (reading := kept(f"held_{len(held)}", run.z)) is not None:
        held.append(reading)
    factors = [tuple(read(v) for v in pair) for pair in scalars["factors"]]
    solvers.restore(held, factors, scalars.get("measured", 0))
    solvers.advances, solvers.exact.values, solvers.exact.gradients = scalars["calls"]
    run.resume(None if scalars["reason"] is None else StopReason(scalars["reason"]))
    return read_history(scalars["history"], OneShotRecord, update=DesignUpdate)

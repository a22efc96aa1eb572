"""The state of a minimisation between two iterations, and its way to a checkpoint and back.

Numbers that JSON does not know (infinities and nan) are written as text; all others come back to the last bit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields

import numpy as np

from pint_fem.optimize.evaluator import Estimate, Evaluator, ExactOracle, Gradient, Point
from pint_fem.optimize.protocol import Checkpoint
from pint_fem.optimize.records import IterationRecord, StopReason
from pint_fem.optimize.steihaug import CGStop

__all__ = ["State", "restore", "save"]

_KIND = "trust region 1"


@dataclass
class State:
    """All that the next iteration depends on, except for the conjugate gradient path, which follows from it.

    Attributes
    ----------
    point : Point
        The iterate.
    first_norm : float
        Norm of the gradient at the first guess.
    forcing : float
        The CG forcing term of this iterate.
    radius : float or None
        Of the next step; None before the first.
    history : list of IterationRecord
    pairs : list of pairs of ndarray
        What the preconditioner was last updated with.
    reason : StopReason or None
        Why the run cannot go on, if so.
    """

    point: Point
    first_norm: float
    forcing: float
    radius: float | None = None
    history: list[IterationRecord] = field(default_factory=list)
    pairs: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)
    reason: StopReason | None = None


def _write(number: float | None) -> float | str | None:
    if number is None:
        return None
    return float(number) if math.isfinite(number) else repr(float(number))


def _read(number: float | str | None) -> float | None:
    return None if number is None else float(number)


def save(checkpoint: Checkpoint, state: State, evaluator: Evaluator, oracle: ExactOracle) -> None:
    """Hand a state to the checkpoint."""
    point = state.point
    names = [f.name for f in fields(IterationRecord)]
    columns = {name: [getattr(record, name) for record in state.history] for name in names}
    history = {
        name: [_write(v) if isinstance(v, float) else getattr(v, "value", v) for v in column]
        for name, column in columns.items()
    }
    scalars = {
        "kind": _KIND,
        "value": [_write(v) for v in (point.value.value, point.value.asked, point.value.error)],
        "gradient": [_write(v) for v in (point.gradient.norm, point.gradient.asked, point.gradient.error)],
        "first_norm": _write(state.first_norm),
        "forcing": _write(state.forcing),
        "radius": _write(state.radius),
        "reason": None if state.reason is None else state.reason.value,
        "calls": [evaluator.values, evaluator.gradients, evaluator.hessians],
        "oracle": {name: _write(v) for name, v in oracle.memory().items()},
        "pairs": len(state.pairs),
        "history": history,
    }
    vectors = {"x": point.x, "gradient": point.gradient.vector}
    for i, (direction, product) in enumerate(state.pairs):
        vectors[f"direction_{i}"], vectors[f"product_{i}"] = direction, product
    checkpoint.save(scalars, vectors)


def restore(checkpoint: Checkpoint, x0: np.ndarray, evaluator: Evaluator, oracle: ExactOracle) -> State | None:
    """The last state of the checkpoint, if it has any; counts and what the oracle learned go where they belong.

    Raises
    ------
    ValueError
        On every process, if the state is not that of a trust-region run in the space of `x0` with as much control of
        the accuracy.
    """
    loaded = checkpoint.load()
    if loaded is None:
        return None
    scalars, vectors = loaded
    if scalars.get("kind") != _KIND:
        raise ValueError(f"the checkpoint holds a run of kind {scalars.get('kind')!r}: give one of {_KIND!r}")
    if set(scalars["oracle"]) != set(oracle.memory()):
        raise ValueError(
            f"the checkpoint holds a run {'with' if scalars['oracle'] else 'without'} inexact=InexactOptions(...): "
            "continue it likewise"
        )
    misfit = [np.shape(v) for v in vectors.values() if np.shape(v) != x0.shape]
    if evaluator.inner(*2 * (np.full_like(x0, bool(misfit)),)) > 0:
        given = f"vectors of shape {misfit[0]}" if misfit else "vectors of another shape on another process"
        raise ValueError(f"the checkpoint holds {given}, x0 has shape {x0.shape}: give the space and processes it had")
    vectors = {name: np.array(v, dtype=np.float64) for name, v in vectors.items()}
    value, gradient = ([_read(v) for v in scalars[name]] for name in ("value", "gradient"))
    history = scalars["history"]
    kinds = {f.name: f.type for f in fields(IterationRecord)}
    columns = {
        name: [CGStop(v) if name == "cg_stop" else _read(v) if kinds[name] == "float" else v for v in column]
        for name, column in history.items()
    }
    evaluator.values, evaluator.gradients, evaluator.hessians = scalars["calls"]
    oracle.recall({name: _read(v) for name, v in scalars["oracle"].items()})
    return State(
        Point(vectors["x"], Estimate(*value), Gradient(vectors["gradient"], *gradient)),
        _read(scalars["first_norm"]),
        _read(scalars["forcing"]),
        _read(scalars["radius"]),
        [IterationRecord(**dict(zip(columns, row, strict=True))) for row in zip(*columns.values(), strict=True)],
        [(vectors[f"direction_{i}"], vectors[f"product_{i}"]) for i in range(scalars["pairs"])],
        None if scalars["reason"] is None else StopReason(scalars["reason"]),
    )

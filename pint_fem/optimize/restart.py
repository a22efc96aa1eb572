"""The state of a trust-region run between two iterations, its way to a checkpoint and back, and what other runs share.

Numbers that JSON does not know (infinities and nan) are written as text; all others come back to the last bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from enum import Enum

import numpy as np

from pint_fem.optimize.evaluator import Estimate, Evaluator, ExactOracle, Gradient, Point
from pint_fem.optimize.protocol import Checkpoint, Problem
from pint_fem.optimize.ranks import holds_anywhere
from pint_fem.optimize.records import IterationRecord, StopReason, TrustRegionResult
from pint_fem.optimize.trust_region.steihaug import CGStop

__all__ = ["State", "load", "read", "read_history", "restore", "save", "write", "write_history"]

Inner = Callable[[np.ndarray, np.ndarray], float]

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

    def result(self, evaluator: Evaluator, reason: StopReason) -> TrustRegionResult:
        """What a run that ends here returns."""
        value, gradient = self.point.value, self.point.gradient
        return TrustRegionResult(
            self.point.x,
            value.value,
            gradient.norm,
            len(self.history) - 1,
            reason is StopReason.GRADIENT,
            reason,
            self.history,
            evaluator.values,
            evaluator.gradients,
            evaluator.hessians,
            value.error,
            gradient.error,
        )


def write(number: float | None) -> float | str | None:
    """A number as JSON takes it."""
    if number is None:
        return None
    return float(number) if math.isfinite(number) else repr(float(number))


def read(number: float | str | None) -> float | None:
    """What `write` was given."""
    return None if number is None else float(number)


def write_history(history: list) -> dict[str, list]:
    """Records of one dataclass as a column for each field; enumerations by their values."""
    names = [f.name for f in fields(history[0])] if history else []
    columns = {name: [getattr(record, name) for record in history] for name in names}
    return {
        name: [write(v) if isinstance(v, float) else getattr(v, "value", v) for v in column]
        for name, column in columns.items()
    }


def read_history(columns: dict[str, list], record: type, **enumerations: type[Enum]) -> list:
    """The records again; `enumerations` are the types of the fields that have one."""
    kinds = {f.name: f.type for f in fields(record)}
    convert = {name: enumerations.get(name, read if kinds[name] == "float" else lambda v: v) for name in columns}
    rows = zip(*([convert[name](v) for v in column] for name, column in columns.items()), strict=True)
    return [record(**dict(zip(columns, row, strict=True))) for row in rows]


def load(
    checkpoint: Checkpoint, kind: str, x0: np.ndarray, problem: Problem
) -> tuple[dict, dict[str, np.ndarray]] | None:
    """The last state of a run of this kind in the space of `x0`; None if there is none.

    The checkpoint is the minimiser's, which answers alike on all processes (:mod:`pint_fem.optimize.ranks`).

    Raises
    ------
    ValueError
        On every process, if it is of another kind or space.
    """
    loaded = checkpoint.load()
    if loaded is None:
        return None
    scalars, vectors = loaded
    if scalars.get("kind") != kind:
        raise ValueError(f"the checkpoint holds a run of kind {scalars.get('kind')!r}: give one of {kind!r}")
    misfit = [np.shape(v) for v in vectors.values() if np.shape(v) != x0.shape]
    if holds_anywhere(problem, x0, bool(misfit)):
        given = f"vectors of shape {misfit[0]}" if misfit else "vectors of another shape on another process"
        raise ValueError(f"the checkpoint holds {given}, x0 has shape {x0.shape}: give the space and processes it had")
    return scalars, vectors


def save(checkpoint: Checkpoint, state: State, evaluator: Evaluator, oracle: ExactOracle, kind: str = _KIND) -> None:
    """Hand a state of a run of this kind to the checkpoint."""
    point = state.point
    scalars = {
        "kind": kind,
        "value": [write(v) for v in (point.value.value, point.value.asked, point.value.error)],
        "gradient": [write(v) for v in (point.gradient.norm, point.gradient.asked, point.gradient.error)],
        "first_norm": write(state.first_norm),
        "forcing": write(state.forcing),
        "radius": write(state.radius),
        "reason": None if state.reason is None else state.reason.value,
        "calls": [evaluator.values, evaluator.gradients, evaluator.hessians],
        "oracle": {name: write(v) for name, v in oracle.memory().items()},
        "pairs": len(state.pairs),
        "history": write_history(state.history),
    }
    vectors = {"x": point.x, "gradient": point.gradient.vector}
    for i, (direction, product) in enumerate(state.pairs):
        vectors[f"direction_{i}"], vectors[f"product_{i}"] = direction, product
    checkpoint.save(scalars, vectors)


def restore(
    checkpoint: Checkpoint, x0: np.ndarray, evaluator: Evaluator, oracle: ExactOracle, kind: str = _KIND
) -> State | None:
    """The last state of the checkpoint, if it has any; counts and what the oracle learned go where they belong.

    Raises
    ------
    ValueError
        On every process, if the state is not that of a run of this kind in the space of `x0` with as much control of
        the accuracy.
    """
    loaded = load(checkpoint, kind, x0, evaluator.problem)
    if loaded is None:
        return None
    scalars, vectors = loaded
    if set(scalars["oracle"]) != set(oracle.memory()):
        raise ValueError(
            f"the checkpoint holds a run {'with' if scalars['oracle'] else 'without'} inexact=InexactOptions(...): "
            "continue it likewise"
        )
    value, gradient = ([read(v) for v in scalars[name]] for name in ("value", "gradient"))
    evaluator.values, evaluator.gradients, evaluator.hessians = scalars["calls"]
    oracle.recall({name: read(v) for name, v in scalars["oracle"].items()})
    return State(
        Point(vectors["x"], Estimate(*value), Gradient(vectors["gradient"], *gradient)),
        read(scalars["first_norm"]),
        read(scalars["forcing"]),
        read(scalars["radius"]),
        read_history(scalars["history"], IterationRecord, cg_stop=CGStop),
        [(vectors[f"direction_{i}"], vectors[f"product_{i}"]) for i in range(scalars["pairs"])],
        None if scalars["reason"] is None else StopReason(scalars["reason"]),
    )

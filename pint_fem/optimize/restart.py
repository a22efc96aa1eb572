"""The state of a run between two iterations, written to a checkpoint and read from it.

Numbers that JSON does not represent (infinities and nan) are written as text; all numbers are read back bitwise
identical.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from enum import Enum

import numpy as np

from pint_fem.optimize.guarded_problem import GuardedProblem
from pint_fem.optimize.oracle import Estimate, ExactOracle, Gradient, Iterate
from pint_fem.optimize.protocol import Checkpoint
from pint_fem.optimize.records import CGStop, IterationRecord, StopReason, TrustRegionResult

__all__ = ["RunState", "load", "read", "read_history", "restore", "save", "write", "write_history"]

_COLUMNS = {"value_asked": "value_tolerance", "gradient_asked": "gradient_tolerance"}
"""Columns of the history whose names in a checkpoint are not those of the fields."""


@dataclass
class RunState:
    """All that the next iteration depends on, except for the conjugate gradient path, which follows from it.

    Attributes
    ----------
    iterate : Iterate
        The iterate with J and its gradient.
    first_norm : float
        Norm of the gradient at the first guess.
    forcing : float
        The CG forcing term of this iterate.
    radius : float or None
        Radius of the next step; None before the first.
    history : list of IterationRecord
        The records so far.
    pairs : list of pairs of ndarray
        The pairs with which the preconditioner was last updated.
    reason : StopReason or None
        Why the run cannot go on, if so.
    further : dict of ndarray
        Further vectors that the next iteration depends on, by name.
    """

    iterate: Iterate
    first_norm: float
    forcing: float
    radius: float | None = None
    history: list[IterationRecord] = field(default_factory=list)
    pairs: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)
    reason: StopReason | None = None
    further: dict[str, np.ndarray] = field(default_factory=dict)

    def result(self, problem: GuardedProblem, reason: StopReason) -> TrustRegionResult:
        """The result of a run that ends in this state."""
        value, gradient = self.iterate.value, self.iterate.gradient
        return TrustRegionResult(
            self.iterate.x,
            value.value,
            gradient.norm,
            len(self.history) - 1,
            reason is StopReason.GRADIENT,
            reason,
            self.history,
            problem.value_calls,
            problem.gradient_calls,
            problem.hessian_calls,
            value.error,
            gradient.error,
        )


def write(number: float | None) -> float | str | None:
    """A number as JSON represents it."""
    if number is None:
        return None
    return float(number) if math.isfinite(number) else repr(float(number))


def read(number: float | str | None) -> float | None:
    """The number that :func:`write` has written."""
    return None if number is None else float(number)


def write_history(history: list) -> dict[str, list]:
    """Records of one dataclass as a column for each field; enumerations by their values."""
    written = {field: column for column, field in _COLUMNS.items()}
    names = [f.name for f in fields(history[0])] if history else []
    columns = {name: [getattr(record, name) for record in history] for name in names}
    return {
        written.get(name, name): [write(v) if isinstance(v, float) else getattr(v, "value", v) for v in column]
        for name, column in columns.items()
    }


def read_history(columns: dict[str, list], record: type, **enumerations: type[Enum]) -> list:
    """The records that :func:`write_history` has written; `enumerations` are the types of the fields that have one."""
    columns = {_COLUMNS.get(name, name): column for name, column in columns.items()}
    kinds = {f.name: f.type for f in fields(record)}
    convert = {name: enumerations.get(name, read if kinds[name] == "float" else lambda v: v) for name in columns}
    rows = zip(*([convert[name](v) for v in column] for name, column in columns.items()), strict=True)
    return [record(**dict(zip(columns, row, strict=True))) for row in rows]


def load(
    checkpoint: Checkpoint, kind: str, x0: np.ndarray, problem: GuardedProblem
) -> tuple[dict, dict[str, np.ndarray]] | None:
    """The last state of a run of this kind in the space of `x0`; None if there is none.

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
    if problem.holds_anywhere(x0, bool(misfit)):
        given = f"vectors of shape {misfit[0]}" if misfit else "vectors of another shape on another process"
        raise ValueError(f"the checkpoint holds {given}, x0 has shape {x0.shape}: give the space and processes it had")
    return scalars, vectors


def save(checkpoint: Checkpoint, state: RunState, oracle: ExactOracle, kind: str) -> None:
    """Save the state of a run of this kind."""
    iterate, problem = state.iterate, oracle.problem
    scalars = {
        "kind": kind,
        "value": [write(v) for v in (iterate.value.value, iterate.value.tolerance, iterate.value.error)],
        "gradient": [write(v) for v in (iterate.gradient.norm, iterate.gradient.tolerance, iterate.gradient.error)],
        "first_norm": write(state.first_norm),
        "forcing": write(state.forcing),
        "radius": write(state.radius),
        "reason": None if state.reason is None else state.reason.value,
        "calls": [problem.value_calls, problem.gradient_calls, problem.hessian_calls],
        "oracle": {name: write(v) for name, v in oracle.state().items()},
        "pairs": len(state.pairs),
        "history": write_history(state.history),
    }
    vectors = {"x": iterate.x, "gradient": iterate.gradient.vector} | state.further
    for i, (direction, product) in enumerate(state.pairs):
        vectors[f"direction_{i}"], vectors[f"product_{i}"] = direction, product
    checkpoint.save(scalars, vectors)


def restore(
    checkpoint: Checkpoint,
    x0: np.ndarray,
    oracle: ExactOracle,
    kind: str,
    record: type[IterationRecord] = IterationRecord,
) -> RunState | None:
    """The last state of the checkpoint, if it has any, with a history of records of the given class; the counts of
    calls and the state of the oracle are set.

    Raises
    ------
    ValueError
        On every process, if the state is not that of a run of this kind in the space of `x0` with as much control of
        the accuracy.
    """
    problem = oracle.problem
    loaded = load(checkpoint, kind, x0, problem)
    if loaded is None:
        return None
    scalars, vectors = loaded
    if set(scalars["oracle"]) != set(oracle.state()):
        raise ValueError(
            f"the checkpoint holds a run {'with' if scalars['oracle'] else 'without'} inexact=InexactOptions(...): "
            "continue it likewise"
        )
    value, gradient = ([read(v) for v in scalars[name]] for name in ("value", "gradient"))
    problem.value_calls, problem.gradient_calls, problem.hessian_calls = scalars["calls"]
    oracle.restore({name: read(v) for name, v in scalars["oracle"].items()})
    pairs = [(vectors.pop(f"direction_{i}"), vectors.pop(f"product_{i}")) for i in range(scalars["pairs"])]
    x, g = vectors.pop("x"), vectors.pop("gradient")
    return RunState(
        Iterate(x, Estimate(*value), Gradient(g, *gradient)),
        read(scalars["first_norm"]),
        read(scalars["forcing"]),
        read(scalars["radius"]),
        read_history(scalars["history"], record, cg_stop=CGStop),
        pairs,
        None if scalars["reason"] is None else StopReason(scalars["reason"]),
        vectors,
    )

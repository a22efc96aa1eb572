"""Which ranks and levels a network's training step is fastest on, and its strong scaling against serial torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from pint_fem.scaling.network import Network
from pint_fem.scaling.planner import describe
from tests.benchmarks.scaling.layer_model import predict_training
from tests.benchmarks.scaling.records import Record
from tests.benchmarks.scaling.tables import powers

__all__ = ["Candidate", "TrainingCurve", "crossover", "plan_training", "strong_training"]

MANY = 1024
"""Ranks beyond which a configuration takes up to a minute."""


@dataclass
class Candidate:
    """A way to take a training step.

    Attributes
    ----------
    ranks : int
        That share the layers.
    options : dict
        Of MGRIT.
    iterations : tuple of int
        Forward and backward.
    seconds, speedup, efficiency : float
        Predicted: a training step; serial torch (measured) over it; work over ranks times seconds.
    error : float
        Of the gradient, relative, in a cold step; counted by a real run.
    """

    ranks: int
    options: dict
    iterations: tuple[int, int]
    seconds: float
    speedup: float
    efficiency: float
    error: float


def _candidate(c: Record, entry: Mapping, ranks: int, network: Network | None) -> Candidate:
    its = tuple(entry["iterations"])
    said = predict_training(c, entry["options"], ranks, iterations=its, network=network)
    efficiency = sum(said.work) / (ranks * said.seconds)
    speedup = c.baseline["step"] / said.seconds
    return Candidate(ranks, dict(entry["options"]), its, said.seconds, speedup, efficiency, entry["error"])


def plan_training(
    c: Record, ranks: int, *, network: Network | None = None, progress: Callable[[str], None] = lambda text: None
) -> list[Candidate]:
    """Every configuration whose gradient error was counted, on the number of ranks that suits it best: powers of two up
    to ``ranks``; from fast to slow.
    """
    out = []
    for entry in c.gradient_errors:
        progress(describe(entry["options"]))
        found = [_candidate(c, entry, p, network) for p in powers(min(ranks, c.nsteps))]
        out.append(min(found, key=lambda x: x.seconds))
    return sorted(out, key=lambda x: x.seconds)


@dataclass
class TrainingCurve:
    """The fastest configuration on each number of ranks."""

    best: list[Candidate]

    def first(self, speedup: float) -> Candidate | None:
        """The one with the fewest ranks that is so much faster than serial torch."""
        return next((x for x in self.best if x.speedup >= speedup), None)


def strong_training(
    c: Record,
    ranks: Sequence[int],
    *,
    network: Network | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> TrainingCurve:
    """On all numbers of ranks up to that of the layers; on more than :data:`MANY` only the two configurations that were
    the fastest before are looked at.
    """
    entries, best = list(c.gradient_errors), []
    for p in sorted(p for p in ranks if p <= c.nsteps):
        progress(f"{p} ranks")
        found = [(_candidate(c, entry, p, network), entry) for entry in entries]
        found.sort(key=lambda pair: pair[0].seconds)
        best.append(found[0][0])
        if 2 * p > MANY:
            entries = [entry for _, entry in found[:2]]
    return TrainingCurve(best)


def crossover(c: Record, curve: TrainingCurve, *, network: Network | None = None) -> Candidate | None:
    """The configuration on the fewest ranks that is faster than serial torch, of all numbers of ranks between the last
    one of a curve that is not and the first one that is; ``None`` where none is.
    """
    first = curve.first(1.0)
    if first is None:
        return None
    slower = max((x.ranks for x in curve.best if x.ranks < first.ranks), default=first.ranks - 1)
    for p in range(slower + 1, first.ranks):
        found = min((_candidate(c, entry, p, network) for entry in c.gradient_errors), key=lambda x: x.seconds)
        if found.speedup >= 1:
            return found
    return first

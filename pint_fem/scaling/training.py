"""Which ranks and levels a network's training step is fastest on, and its strong scaling against serial torch."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from pint_fem.scaling.costs import Calibration
from pint_fem.scaling.layers import predict_training
from pint_fem.scaling.network import Network
from pint_fem.scaling.planner import describe

__all__ = ["Candidate", "TrainingCurve", "plan_training", "strong_training"]


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

    @property
    def arguments(self) -> str:
        """Command-line arguments of the demos."""
        o = self.options
        return (
            f"--grid 1x{self.ranks} --levels {o['levels']} --coarsening {','.join(map(str, o['coarsening']))} "
            f"--relax {o['relax']} --forward-iterations {self.iterations[0]} "
            f"--backward-iterations {self.iterations[1]}"
        )


def _candidate(c: Calibration, entry: Mapping, ranks: int, network: Network | None) -> Candidate:
    its = tuple(entry["iterations"])
    said = predict_training(c, entry["options"], ranks, iterations=its, network=network)
    efficiency = sum(said.busy) / (ranks * said.seconds)
    speedup = c.opponent["step"] / said.seconds
    return Candidate(ranks, dict(entry["options"]), its, said.seconds, speedup, efficiency, entry["gradient error"])


def _powers(largest: int) -> list[int]:
    out = [1]
    while 2 * out[-1] <= largest:
        out.append(2 * out[-1])
    return out


def plan_training(
    c: Calibration, ranks: int, *, network: Network | None = None, progress: Callable[[str], None] = lambda text: None
) -> list[Candidate]:
    """Every configuration whose gradient error was counted, on the number of ranks that suits it best: powers of two up
    to ``ranks``; from fast to slow.
    """
    out = []
    for entry in c.cycles:
        progress(describe(entry["options"]))
        found = [_candidate(c, entry, p, network) for p in _powers(min(ranks, c.nsteps))]
        out.append(min(found, key=lambda x: x.seconds))
    return sorted(out, key=lambda x: x.seconds)


@dataclass
class TrainingCurve:
    """The fastest configuration on each number of ranks, and others by name."""

    best: list[Candidate]
    each: dict[str, list[Candidate]] = field(default_factory=dict)

    def first(self, speedup: float) -> Candidate | None:
        """The one with the fewest ranks that is so much faster than serial torch."""
        return next((x for x in self.best if x.speedup >= speedup), None)


def strong_training(
    c: Calibration,
    ranks: Sequence[int],
    *,
    network: Network | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> TrainingCurve:
    """All configurations on all numbers of ranks up to that of the layers."""
    each: dict[str, list[Candidate]] = {}
    counts = [p for p in ranks if p <= c.nsteps]
    for entry in c.cycles:
        name = json.dumps(entry["options"]) + json.dumps(entry["iterations"])
        for p in counts:
            progress(f"{describe(entry['options'])}, {p} ranks")
            each.setdefault(name, []).append(_candidate(c, entry, p, network))
    best = [min((found[i] for found in each.values()), key=lambda x: x.seconds) for i in range(len(counts))]
    return TrainingCurve(best, each)

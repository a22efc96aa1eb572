"""Tables and a plot of training steps of a network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from pint_fem.scaling.network import Network
from pint_fem.scaling.planner import describe
from tests.benchmarks.scaling.records import Record
from tests.benchmarks.scaling.strong import Curve
from tests.benchmarks.scaling.tables import powers, table
from tests.benchmarks.scaling.training import crossover, strong_training

__all__ = ["training"]


def training(
    c: Record, out: Path, say: Callable[[str], None], largest: int, network: Network | None
) -> tuple[dict, str]:
    """Write a network's section; its data, and the line for the end."""
    from tests.benchmarks.scaling.pictures import loglog

    serial = c.baseline["step"]
    say(f"\n{c.problem}: {c.nsteps} layers, a state of {c.unknowns} values, one training step")
    say(f"  network {network or c.network}")
    for note in c.notes:
        say(f"  calibration: {note}")
    say(f"  serial torch: {serial:.4g} s (measured); seconds and speed-ups of the table are predicted")
    say("  gradient errors: cold, relative, counted by real runs")
    curve = strong_training(c, powers(largest), network=network)
    rows = [
        [str(x.ranks), f"{describe(x.options)}: {x.iterations[0]}+{x.iterations[1]}", f"{x.seconds:.4g}",
         f"{x.speedup:.3g}", f"{x.error:.1e}", f"{x.efficiency:.0%}"]
        for x in curve.best
    ]  # fmt: skip
    table(say, ["ranks", "levels: iterations", "seconds", "over serial torch", "gradient error", "busy"], rows)
    ranks = [x.ranks for x in curve.best]
    lines = [
        Curve("MGRIT, the fastest", ranks, {"training step": [x.seconds for x in curve.best]}),
        Curve("serial torch (measured)", ranks, {"training step": [serial] * len(ranks)}),
    ]
    loglog(out / f"strong_{c.problem}.png", {"training step": lines}, f"{c.problem}: predicted strong scaling")
    best, ten = max(curve.best, key=lambda x: x.speedup), curve.first(10)
    pays = crossover(c, curve, network=network)
    first = f"faster from {pays.ranks} ranks on, " if pays else "never faster, "
    first += f"over 10 from {ten.ranks} ranks on ({ten.speedup:.3g}), " if ten else "never over 10, "
    claim = (
        f"{c.problem}, one training step of {c.nsteps} layers, {best.iterations[0]} + {best.iterations[1]} iterations: "
        f"{first}at best {best.speedup:.3g} at {best.ranks} ranks over serial torch, gradient error {best.error:.1e}. "
        f"Measured: serial torch on {c.baseline.get('threads', 1)} threads (its fastest form), kernels, what surrounds "
        f"the sweeps, gradient error; network: {network or c.network}. Predicted: ours."
    )
    found = {"best": [asdict(x) for x in curve.best], "crossover": pays and pays.ranks, "serial torch": serial}
    return found, claim

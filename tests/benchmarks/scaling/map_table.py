"""Whole inversions by the map from controls to readings, beside sequential stepping: predicted speed-ups."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict

from pint_fem.scaling.network import Network
from pint_fem.scaling.planner import describe, plan_map
from tests.benchmarks.scaling.inversions import inversion_seconds, serial_inversion
from tests.benchmarks.scaling.records import Record
from tests.benchmarks.scaling.tables import table

__all__ = ["RANKS", "map_table", "sequential_seconds"]

RANKS = (1, 2, 16, 64, 256, 1024)
"""Numbers of ranks of the table."""


def sequential_seconds(record: Record, *, network: Network | None = None) -> float | None:
    """Predicted seconds on one core of the trust-region inversion of the same readings by sequential stepping, with the
    solves that a real run counted; ``None`` where none was.
    """
    counted: Mapping | None = record.with_sensors or serial_inversion(record)
    return None if counted is None else inversion_seconds(record, counted, (1, 1), network=network)


def map_table(record: Record, say, largest: int, network: Network | None) -> tuple[list[dict], str]:
    """Print the table of a problem; returns its rows, and a line for the summary."""
    costs, sequential = record.linear_inverse, sequential_seconds(record, network=network)
    rows, out = [], []
    for ranks in (p for p in RANKS if p <= largest):
        found = plan_map(record, ranks, network=network)
        division, how = found.division, "sequential" if found.division.each == 1 else describe(found.options)
        out.append({"ranks": ranks, "seconds": found.seconds, "deviation": found.with_deviation, **asdict(found)})
        gains = [out[0]["seconds"] / found.seconds, (sequential or 0.0) / found.seconds]
        shares = sorted(found.parts, key=lambda part: -found.parts[part])
        largest_part = next(part for part in shares if part != "deviation")
        rows.append([
            str(ranks), f"{found.seconds:.3g}", f"{found.with_deviation:.3g}", *(f"{gain:.3g}" for gain in gains),
            f"{division.groups}x{division.each}x{division.space}", str(division.ranks), how,
            f"{largest_part} {found.parts[largest_part] / found.seconds:.0%}",
        ])  # fmt: skip
    say(
        f"  map from controls to readings, {costs['sensors']:.0f} sensors with {costs['readings']:.0f} readings, "
        f"{costs['columns']:.0f} controls: the whole inversion, PREDICTED"
        + (
            ""
            if not record.with_sensors
            else " (sensors in the place of the misfit that observes the state everywhere)"
        )
    )
    head = ["ranks", "seconds", "with deviation", "over 1 rank", "over sequential", "groups x time x space", "used"]
    table(say, [*head, "sweeps", "most time"], rows)
    if sequential is not None:
        say(f"  sequential trust-region inversion of the same readings on one core: {sequential:.4g} s, predicted")
    best = min(out, key=lambda row: row["seconds"])
    gain, at = out[0]["seconds"] / best["seconds"], best["ranks"]
    claim = f"{record.problem}, whole inversion by the map: {gain:.3g} at {at} ranks over the map on one core"
    if sequential is not None:
        gain, alone = sequential / best["seconds"], sequential / out[0]["seconds"]
        claim += f", {gain:.3g} ({alone:.3g} at 1) over sequential stepping"
    return out, f"{claim}. Measured: kernels, dense algebra, prior (calibration). Predicted: all times."

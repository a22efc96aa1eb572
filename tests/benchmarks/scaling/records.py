"""Calibrations, with what real runs have measured and counted for the benchmarks: one JSON file for each problem."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pint_fem.files import as_input_error, write_whole
from pint_fem.scaling.costs import BUNDLED, Calibration, bundled

__all__ = ["FOLDER", "Record", "load", "names", "save"]

FOLDER = Path(__file__).parent / "calibrations"
OWN = ("inversions", "baseline", "gradient_errors")


@dataclass(frozen=True)
class Record(Calibration):
    """A calibration and more.

    Parameters
    ----------
    inversions
        Whole inversions, each counted in a real run with one solver: see
        :func:`~tests.benchmarks.scaling.inversions.count_inversion`.
    baseline
        Seconds per time step of serial pyadjoint: ``value``, ``gradient``, ``hessian``, and with ``fixed`` behind the
        name what does not depend on the steps. Of a network: a ``"step"`` of serial torch, and its ``"threads"``.
    gradient_errors
        Of a network: ``options``, ``iterations`` and the relative ``error`` of the gradient of a cold training step.
    """

    inversions: Sequence[Mapping] = ()
    baseline: Mapping[str, float] = field(default_factory=dict)
    gradient_errors: Sequence[Mapping] = ()


def names(kind: str | None = None) -> list[str]:
    """Names of all records, or of those of a kind."""
    found = sorted(path.stem for path in FOLDER.glob("*.json"))
    return found if kind is None else [name for name in found if load(name).kind == kind]


def load(name: str) -> Record:
    """A record by name; the calibration that comes with the package is read from there."""
    parts = [FOLDER / f"{name}.json", *([BUNDLED / f"{name}.json"] if name in bundled() else [])]
    data: dict = {}
    for path in parts:
        data |= json.loads(path.read_text(encoding="utf-8"))
    return Record.from_json(json.dumps(data))


def save(record: Record) -> Path:
    """Write a record; of the calibration that comes with the package only what is not in it."""
    path, data = FOLDER / f"{record.problem}.json", json.loads(record.to_json())
    keep = OWN if record.problem in bundled() else data
    lines = (f" {json.dumps(name)}: {json.dumps(data[name])}" for name in keep if name not in OWN or data[name])
    with as_input_error(f"{path} cannot be written"):
        write_whole(path, ("{\n" + ",\n".join(lines) + "\n}\n").encode())
    return path

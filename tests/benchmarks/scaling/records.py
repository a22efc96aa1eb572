"""Calibrations, and beside each of them what real runs have measured and counted for the benchmarks."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

from pint_fem.files import as_input_error, write_whole
from pint_fem.scaling import costs

__all__ = ["CALIBRATIONS", "COUNTED", "Record", "load", "names", "save"]

CALIBRATIONS, COUNTED = (Path(__file__).parent / name for name in ("calibrations", "counted"))
OWN = ("inversions", "baseline", "gradient_errors", "with_sensors")


@dataclass(frozen=True)
class Record(costs.Calibration):
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
    with_sensors
        An inversion by sequential stepping with sensors in the place of a misfit that observes the state everywhere, as
        one of ``inversions``; empty where the problem has sensors.
    """

    inversions: Sequence[Mapping] = ()
    baseline: Mapping[str, float] = field(default_factory=dict)
    gradient_errors: Sequence[Mapping] = ()
    with_sensors: Mapping = field(default_factory=dict)


def names(kind: str | None = None) -> list[str]:
    """Names of all records, or of those of a kind."""
    found = sorted(path.stem for path in COUNTED.glob("*.json"))
    return found if kind is None else [name for name in found if load(name).kind == kind]


def load(name: str) -> Record:
    """A record by name; the calibration may be one that comes with the package."""
    path = CALIBRATIONS / f"{name}.json"
    calibration = costs.load(path if path.is_file() else name)
    return Record(**vars(calibration), **json.loads((COUNTED / f"{name}.json").read_text(encoding="utf-8")))


def save(record: Record) -> Path:
    """Write what is counted, and the calibration where it does not come with the package."""
    counted = {name: getattr(record, name) for name in OWN if getattr(record, name)}
    lines = (f" {json.dumps(name)}: {json.dumps(value)}" for name, value in counted.items())
    texts = {COUNTED / f"{record.problem}.json": "{\n" + ",\n".join(lines) + "\n}\n"}
    if record.problem not in costs.bundled():
        plain = {f.name: getattr(record, f.name) for f in fields(costs.Calibration)}
        texts[CALIBRATIONS / f"{record.problem}.json"] = costs.Calibration(**plain).to_json()
    for path, text in texts.items():
        with as_input_error(f"{path} cannot be written"):
            write_whole(path, text.encode())
    return COUNTED / f"{record.problem}.json"

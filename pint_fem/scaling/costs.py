"""Measured costs of a problem's arithmetic, and how they are kept: a calibration is one JSON file.

The keys of ``work`` are kinds of work, ``"step"``, ``"adjoint"`` (blocks of states), ``"sweep"`` and ``"adjoint
sweep"`` (one state after another), each with a table for each level, the last going on to coarser ones.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from pint_fem.errors import InputError
from pint_fem.scaling.network import Network

__all__ = ["BUNDLED", "Calibration", "Kernel", "bundled", "load"]

BUNDLED = Path(__file__).parent / "calibrations"


@dataclass(frozen=True)
class Kernel:
    """Seconds of one propagator call as a function of the number of states.

    Parameters
    ----------
    sizes, seconds
        Measured: states of a call, increasing, and its time. Linear in between, from the last two on beyond.
    width
        Blocks of the propagator: with the first state in lane ``lane`` a call is cut at multiples of ``width``, and
        each piece costs what one of its size does (see :mod:`pint_fem.kernels.blocks`). 0: a call is one piece.
    """

    sizes: tuple[int, ...]
    seconds: tuple[float, ...]
    width: int = 0
    _known: dict = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self):
        if len(self.sizes) != len(self.seconds) or not self.sizes or sorted(set(self.sizes)) != list(self.sizes):
            raise InputError(
                f"kernel sizes {self.sizes} and seconds {self.seconds}: give increasing sizes, a time each"
            )
        if min(self.seconds) < 0:
            raise InputError(f"kernel seconds {self.seconds}: give no negative time")

    @classmethod
    def constant(cls, seconds: float, width: int = 0) -> Kernel:
        """``seconds`` a state (a block, with ``width``), whatever the call."""
        return cls((1, width), (seconds, seconds), width) if width > 1 else cls((1, 2), (seconds, 2 * seconds))

    def scaled(self, factor: float, more: float = 0.0) -> Kernel:
        """With times multiplied, and ``more`` seconds added, once a block (a state, without ``width``)."""
        parts = [n / self.width if self.width and n > self.width else 1 if self.width else n for n in self.sizes]
        return Kernel(
            self.sizes, tuple(factor * s + more * p for s, p in zip(self.seconds, parts, strict=True)), self.width
        )

    def _piece(self, count: int) -> float:
        sizes, seconds = self.sizes, self.seconds
        if count <= sizes[0] or len(sizes) == 1:
            return seconds[0] if count == sizes[0] or self.width else seconds[0] * count / sizes[0]
        i = min(max(bisect_left(sizes, count), 1), len(sizes) - 1)
        slope = (seconds[i] - seconds[i - 1]) / (sizes[i] - sizes[i - 1])
        return seconds[i] + slope * (count - sizes[i])

    def _call(self, count: int, lane: int) -> float:
        width = self.width
        if not width:
            return self._piece(count)
        first = min(width - lane, count)
        full, rest = divmod(count - first, width)
        block = self._piece(width)
        again = (
            (self._piece(self.sizes[-1]) - block) / (self.sizes[-1] / width - 1) if self.sizes[-1] > width else block
        )
        call = max(block - again, 0.0)  # what a call costs beside its blocks
        return self._piece(first) + full * again + (max(self._piece(rest) - call, 0.0) if rest else 0.0)

    def __call__(self, count: int, lane: int = 0) -> float:
        """Seconds of a call with ``count`` states, the first in lane ``lane`` (modulo ``width``)."""
        key = count, lane % self.width if self.width else 0
        if key not in self._known:
            self._known[key] = self._call(*key)
        return self._known[key]


@dataclass(frozen=True)
class Calibration:
    """What one problem's work costs.

    Parameters
    ----------
    problem, machine
        Names, for reports.
    unknowns, nsteps
        Of a state, over all space ranks; fine time steps of the problem (the model takes any other number, too).
    work
        By space ranks (measured ones), kind and level: kernels.
    norm
        Seconds of a state's norm, on one space rank.
    bookkeeping
        By sweep (``"state"``, ``"adjoint"``): seconds a state stepped that a solve takes beside kernels and norms:
        copies, sums, interpreter. Of layers, whose kernels are short, also those a ``"call"`` of relaxation.
    extras
        Seconds of what surrounds the sweeps, by name: once (``"forcing"``), or a step (``"misfit value"`` ...).
    control_bytes, sensor_bytes
        Of the control's values; of what a misfit hands its right neighbour.
    space_iterations
        Krylov iterations a stage on two space ranks; 0 for a direct solve.
    stages
        Of a step.
    paradiag
        Of ParaDiag on one space rank, empty where it was not measured: seconds of a frequency's ``"solve"`` and
        ``"solve transposed"``, of making a ``"factor"`` (a frequency and stage) and its ``"factor bytes"``, of an
        unknown's ``"fft"`` and ``"ifft"`` over ``"fft steps"`` among ``"fft columns"`` unknowns (with ``few`` before
        it: among 32), of a byte's ``"pack"``; and bookkeeping by sweep.
    overlap
        Layers of cells that a space rank's subdomain has beside its own.
    busy
        Time of a kernel with as many processes at work as the key says, relative to one alone.
    network
        Measured on this machine.
    cycles
        Cycles of solves, measured: dictionaries with ``kind``, ``start``, ``options``, ``rtol``, ``cycles``, ``steps``.
    inversions
        Whole inversions, counted by real runs with a solver each: see
        :func:`~pint_fem.scaling.counting.count_inversion`.
    opponent
        Seconds a time step of serial pyadjoint: ``value``, ``gradient``, ``hessian``, and with ``fixed`` behind it what
        does not depend on the steps.
    notes
        How things were measured.
    kind
        ``"evolution"``, or ``"layers"`` of a network: ``nsteps`` layers, ``unknowns`` values of a batch's state,
        ``control_bytes`` of a layer's parameters, ``cycles`` with gradient errors, the opponent is a serial ``"step"``.
    """

    problem: str
    machine: str
    unknowns: int
    nsteps: int
    work: Mapping[int, Mapping[str, Sequence[Kernel]]]
    norm: float = 0.0
    bookkeeping: Mapping[str, float] = field(default_factory=dict)
    extras: Mapping[str, float] = field(default_factory=dict)
    control_bytes: float = 8.0
    sensor_bytes: float = 0.0
    space_iterations: float = 0.0
    stages: int = 1
    paradiag: Mapping[str, float] = field(default_factory=dict)
    overlap: int = 3
    busy: Mapping[int, float] = field(default_factory=lambda: {1: 1.0})
    network: Network = Network(1e-6, 1e10, "assumed")  # noqa: RUF009
    cycles: Sequence[Mapping] = ()
    inversions: Sequence[Mapping] = ()
    opponent: Mapping[str, float] = field(default_factory=dict)
    notes: Sequence[str] = ()
    kind: str = "evolution"

    @property
    def state_bytes(self) -> float:
        """Of a state, over all space ranks."""
        return 8.0 * self.unknowns

    @property
    def width(self) -> int:
        """States of a block."""
        return self.work[1]["step"][0].width

    def busy_with(self, ranks: int) -> float:
        """Time of a kernel with so many processes at work, or the largest measured number, relative to one alone."""
        return self.busy[max(n for n in self.busy if n <= ranks)]

    def may_split(self, ranks: int) -> bool:
        """Whether the model may speak of so many space ranks: only where two were measured, as another solver than on
        one rank is used there.
        """
        return ranks == 1 or max(self.work) > 1

    def with_changes(self, **changes) -> Calibration:
        """A copy with other values."""
        return replace(self, **changes)

    def to_json(self) -> str:
        """As text."""
        table = lambda k: {"sizes": k.sizes, "seconds": k.seconds, "width": k.width}
        out = {n: v for n, v in self.__dict__.items() if n not in ("work", "network")}
        out["work"] = {
            space: {kind: [table(k) for k in levels] for kind, levels in kinds.items()}
            for space, kinds in self.work.items()
        }
        out["network"] = asdict(self.network)
        return json.dumps(out, indent=1, default=float) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Calibration:
        """From text.

        Raises
        ------
        InputError
            If it is no calibration.
        """
        try:
            data = json.loads(text)
            kernel = lambda t: Kernel(tuple(t["sizes"]), tuple(t["seconds"]), t["width"])
            data["work"] = {
                int(space): {kind: [kernel(t) for t in levels] for kind, levels in kinds.items()}
                for space, kinds in data["work"].items()
            }
            data["network"] = Network(**data["network"])
            data["busy"] = {int(n): f for n, f in data["busy"].items()}
            return cls(**data)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(
                f"not a calibration ({type(error).__name__}: {error}): "
                "write one by python -m pint_fem.scaling calibrate"
            ) from error


def bundled(kind: str | None = None) -> list[str]:
    """Names of the calibrations that come with the package, or of those of a kind."""
    names = sorted(path.stem for path in BUNDLED.glob("*.json"))
    return names if kind is None else [name for name in names if load(name).kind == kind]


def load(name: str | Path) -> Calibration:
    """A bundled calibration by name, or one from a file.

    Raises
    ------
    InputError
        If there is none.
    """
    path = BUNDLED / f"{name}.json"
    if not path.is_file():
        path = Path(name)
    try:
        return Calibration.from_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"no calibration {str(name)!r} ({error.strerror}): known are {', '.join(bundled())}, or give a file"
        ) from None

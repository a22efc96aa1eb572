"""Measured costs of a problem's arithmetic: a calibration, kept as one JSON file.

A calibration has tables of seconds for each kind of kernel: ``"step"`` and ``"adjoint"``, by the number of states that
take a step in one call. Each kind has one table per level; the last one holds for all coarser levels.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from pint_fem.errors import InputError
from pint_fem.kernels.lanes.widths import cut
from pint_fem.scaling.network import Network

__all__ = ["BUNDLED", "Calibration", "Kernel", "bundled", "load"]

BUNDLED = Path(__file__).parent / "calibrations"
"""Folder of the calibrations that come with the package."""


@dataclass(frozen=True)
class Kernel:
    """Seconds of one call of a propagator as a function of the number of states.

    Parameters
    ----------
    sizes, seconds : tuple
        Measured numbers of states per call, increasing, and the seconds of a call.
    lanes : bool
        Whether the sizes are widths of kernels on lanes (:mod:`pint_fem.kernels.lanes`): states are divided among calls
        of these, of the least time in all. Else the seconds are linear between the sizes, and beyond from the last two.

    Raises
    ------
    InputError
        If sizes do not increase, do not match the seconds, or a time is negative.
    """

    sizes: tuple[int, ...]
    seconds: tuple[float, ...]
    lanes: bool = False
    _cache: dict = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        if len(self.sizes) != len(self.seconds) or not self.sizes or sorted(set(self.sizes)) != list(self.sizes):
            raise InputError(
                f"kernel sizes {self.sizes} and seconds {self.seconds}: give increasing sizes, a time each"
            )
        if min(self.seconds) < 0:
            raise InputError(f"kernel seconds {self.seconds}: give no negative time")

    @classmethod
    def constant(cls, seconds: float, lanes: bool = False) -> Kernel:
        """A kernel that takes ``seconds`` per state."""
        return cls((1,), (seconds,), lanes)

    def scaled(self, factor: float, per_state: float = 0.0, per_call: float = 0.0) -> Kernel:
        """The kernel with times multiplied, and seconds added per state and per call (per call of each width)."""
        seconds = tuple(factor * s + per_state * n + per_call for n, s in zip(self.sizes, self.seconds, strict=True))
        return Kernel(self.sizes, seconds, self.lanes)

    def _call(self, count: int) -> float:
        sizes, seconds = self.sizes, self.seconds
        if self.lanes:
            by_width = dict(zip(sizes, seconds, strict=True))
            return sum(-(-n // width) * by_width[width] for width, n in cut(count, by_width))
        if count <= sizes[0] or len(sizes) == 1:
            return seconds[0] * count / sizes[0]
        i = min(max(bisect_left(sizes, count), 1), len(sizes) - 1)
        slope = (seconds[i] - seconds[i - 1]) / (sizes[i] - sizes[i - 1])
        return seconds[i] + slope * (count - sizes[i])

    def __call__(self, count: int) -> float:
        """Seconds of a call with ``count`` states."""
        if count not in self._cache:
            self._cache[count] = self._call(count)
        return self._cache[count]


@dataclass(frozen=True)
class Calibration:
    """Costs of one problem's arithmetic, in seconds.

    Parameters
    ----------
    problem, machine, kind : str
        Names, for reports; ``"evolution"``, or ``"layers"`` for a network: ``nsteps`` layers, ``unknowns`` values of a
        batch's state, and ``control_bytes`` of the parameters of a layer.
    unknowns, nsteps : int
        Size of a state over all space ranks; fine time steps of the problem (the model takes any other number, too).
    kernels, norm : mapping, float
        Tables by the number of space ranks (measured ones), kind and level; seconds of a state's norm on one of them.
    overhead : mapping
        Seconds per state stepped that a ``"state"`` or ``"adjoint"`` sweep takes beside kernels and norms (copies,
        sums, interpreter). For layers, whose kernels are short, also those of a ``"call"`` of relaxation.
    extras : mapping
        Seconds of the work around the sweeps, by name: per call (``"forcing"``), or per step (``"misfit value"``).
    control_bytes, sensor_bytes : float
        Bytes of the control's values, and of the observations that a misfit passes to the next rank.
    space_iterations, stages, overlap : float, int, int
        Krylov iterations per stage on two space ranks, 0 for a direct solve; stages of a step; layers of cells that the
        subdomain of a space rank shares with its neighbours.
    space_solver, dimension, space : str, int, mapping
        The solver in space that was measured on several ranks, one of those of :mod:`pint_fem.scaling.space`; empty: by
        ``space_iterations``. Dimension of the mesh. Sizes of the solver, where they were found: ``"factor entries"`` of
        a stage's factor on one rank, ``"interface"`` unknowns on the largest measured number of space ranks,
        ``"levels"`` of multigrid.
    paradiag : mapping
        Costs of ParaDiag on one space rank, empty where they were not measured: seconds of a frequency's ``"solve"``
        and ``"solve transposed"``, of a ``"factor"`` (per frequency and stage) and its ``"factor bytes"``, of an
        unknown's ``"fft"`` and ``"ifft"`` over ``"fft steps"`` steps among ``"fft columns"`` unknowns (with ``few``
        in front: among 32), of packing a byte (``"pack"``); and the overhead of sweeps. Where frequencies are solved
        on lanes: ``"single"``, the seconds of solves in single precision relative to double precision.
    slowdown, network : mapping, Network
        Seconds of a kernel with a number of processes at work (the key), relative to one process alone; the measured
        network.
    linear_inverse : mapping
        Costs of an inversion by the map from controls to readings, empty where there is none: those of
        :func:`~pint_fem.scaling.inverse_costs.inverse_costs`.
    cycles, notes : sequences of mappings and of str
        Cycles of cold solves, counted in real runs: ``options``, ``rtol``, and the cycles of ``state`` and ``adjoint``,
        and for the smallest ``rtol`` those of the adjoint of one reading, ``impulse``, where they were counted;
        how the numbers were measured.
    """

    problem: str
    machine: str
    unknowns: int
    nsteps: int
    kernels: Mapping[int, Mapping[str, Sequence[Kernel]]]
    norm: float = 0.0
    overhead: Mapping[str, float] = field(default_factory=dict)
    extras: Mapping[str, float] = field(default_factory=dict)
    control_bytes: float = 8.0
    sensor_bytes: float = 0.0
    space_iterations: float = 0.0
    stages: int = 1
    space_solver: str = ""
    dimension: int = 2
    space: Mapping[str, float] = field(default_factory=dict)
    paradiag: Mapping[str, float] = field(default_factory=dict)
    overlap: int = 3
    linear_inverse: Mapping[str, float] = field(default_factory=dict)
    slowdown: Mapping[int, float] = field(default_factory=lambda: {1: 1.0})
    network: Network = Network(1e-6, 1e10, "assumed")  # noqa: RUF009
    cycles: Sequence[Mapping] = ()
    notes: Sequence[str] = ()
    kind: str = "evolution"

    @property
    def state_bytes(self) -> float:
        """Bytes of a state over all space ranks."""
        return 8.0 * self.unknowns

    def slowdown_with(self, ranks: int) -> float:
        """Seconds of a kernel relative to one process alone, with the largest measured number of processes up to
        ``ranks`` at work.
        """
        return self.slowdown[max(n for n in self.slowdown if n <= ranks)]

    def has_space_ranks(self, ranks: int) -> bool:
        """Whether the model covers a number of space ranks: more than one only where kernels on two were measured, as
        the solvers there differ from those on one.
        """
        return ranks == 1 or max(self.kernels) > 1

    def with_changes(self, **changes: Any) -> Calibration:
        """A copy with other values of the given fields."""
        return replace(self, **changes)

    def to_json(self) -> str:
        """The calibration as text, one field per line."""
        table = lambda k: {"sizes": k.sizes, "seconds": k.seconds, "lanes": k.lanes}
        data = {f.name: getattr(self, f.name) for f in fields(self)}
        data["kernels"] = {
            space: {kind: [table(k) for k in levels] for kind, levels in kinds.items()}
            for space, kinds in self.kernels.items()
        }
        data["network"] = asdict(self.network)
        lines = (f" {json.dumps(name)}: {json.dumps(value, default=float)}" for name, value in data.items())
        return "{\n" + ",\n".join(lines) + "\n}\n"

    @classmethod
    def from_json(cls, text: str) -> Calibration:
        """Read a calibration from text; fields that this class does not have are left out.

        Raises
        ------
        InputError
            If the text is no calibration.
        """
        try:
            given = json.loads(text)
            data = {f.name: given[f.name] for f in fields(cls) if f.name in given}
            kernel = lambda t: Kernel(tuple(t["sizes"]), tuple(t["seconds"]), t["lanes"])
            data["kernels"] = {
                int(space): {kind: [kernel(t) for t in levels] for kind, levels in kinds.items()}
                for space, kinds in data["kernels"].items()
            }
            data["network"] = Network(**data["network"])
            data["slowdown"] = {int(n): f for n, f in data["slowdown"].items()}
            return cls(**data)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(
                f"not a calibration ({type(error).__name__}: {error}): write one by pint-fem scaling calibrate"
            ) from error


def bundled() -> list[str]:
    """Names of the calibrations that come with the package."""
    return sorted(path.stem for path in BUNDLED.glob("*.json"))


def load(name: str | Path) -> Calibration:
    """Read a calibration by the name of one that comes with the package, or from a file.

    Raises
    ------
    InputError
        If there is no such calibration or file, or it is no calibration.
    """
    path = BUNDLED / f"{name}.json"
    if not path.is_file():
        path = Path(name)
    try:
        return Calibration.from_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"no calibration {str(name)!r} ({getattr(error, 'strerror', error)}): give {', '.join(bundled())}, or a "
            "file that pint-fem scaling calibrate has written"
        ) from None

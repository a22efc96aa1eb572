"""The MGRIT solvers of a network's sweeps, made from the kinds of steps that a kind of layers has."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import numpy as np

from pint_fem.all_at_once.arrays import Array, copied, is_tensor, kind_of, sums_of_rows
from pint_fem.all_at_once.grids import Bounds, split_steps
from pint_fem.all_at_once.norms import euclidean
from pint_fem.all_at_once.stopping import SolveResult
from pint_fem.all_at_once.trace import Trace
from pint_fem.errors import InputError
from pint_fem.mgrit.options import MGRITOptions
from pint_fem.mgrit.solver import MGRIT
from pint_fem.resnet.grid import Grid
from pint_fem.resnet.row_exchange import RowExchange

__all__ = ["SweepSolvers", "own_numbers"]


class _Norms:
    """Squared norms of states.

    Attributes
    ----------
    ends : ndarray
        Rows of the finest level at the ends of intervals: the points before C-points, and the last one.
    """

    def __init__(self) -> None:
        self.ends = np.zeros(0, int)

    def __call__(self, block: Array) -> Array:
        return euclidean(block)

    def finite(self, block: Array) -> Array:
        """A number that is not finite at ends of intervals that are not finite, which any value that is not finite
        reaches.
        """
        if is_tensor(block):
            out, ends = block.new_zeros(len(block)), kind_of(block).row_index(self.ends)
            out[ends] = sums_of_rows(block[ends])
            return out
        out = np.zeros(len(block))
        ends = block[self.ends]
        out[self.ends] = np.where(np.isfinite(ends).reshape(len(ends), -1).all(axis=1), 0.0, np.nan)
        return out


class SweepSolvers:
    """Solvers of the sweeps through ``N`` layers on one process grid.

    Parameters
    ----------
    nlayers
        Number ``N`` of the layers.
    grid
        The process grid.
    options
        MGRIT options: ``levels``, ``coarsening`` (factors), ``relax``, ``cycle``, ``rtol``, ``max_it`` ...
    steps
        Propagator of each sweep ``"forward"``, ``"backward"`` and perhaps ``"tangent"``: a function of the distance in
        layers of a level's points.

    Attributes
    ----------
    bounds : tuple of int
        Numbers of the ranks' first layers, and ``N``; the own ``k`` layers are ``lo .. hi - 1``.
    strides : list of int
        Distance in layers of neighbouring points of each level.
    solvers : dict
        MGRIT solvers of the sweeps.

    Raises
    ------
    InputError
        On every rank, on more layer ranks than layers, or options that do not apply to layers.
    """

    needs_residuals = True
    """Whether the evaluation of residuals also writes what a backward sweep needs."""

    def __init__(
        self,
        nlayers: int,
        grid: Grid,
        *,
        options: MGRITOptions | Mapping | None,
        steps: Mapping[str, Callable[[int], Any]],
    ):
        self.nlayers, self.grid = nlayers, grid
        self._has_tolerance = isinstance(options, MGRITOptions) or "rtol" in (options or {})
        if nlayers < grid.layer_size:
            raise InputError(f"{grid.layer_size} layer ranks for {nlayers} layers: use at most one rank per layer")
        try:
            if not isinstance(options, MGRITOptions) and not {"levels", "coarsening"} & set(options or {}):
                few = nlayers < 2 * np.ravel(MGRITOptions().coarsening)[0]  # for the default
                options = {**(options or {}), **({"levels": 1} if few else {})}
            options = MGRITOptions.make(options)
            factors = options.factors(nlayers)
        except ValueError as error:
            raise InputError(f"mgrit options: {error}") from None
        for name, only in (("coarse_solver", "sequential"), ("storage", "all"), ("trace", "")):
            if getattr(options, name) != only:
                raise InputError(f"mgrit {name} = {getattr(options, name)!r}: layers support {only!r} only")
        if options.residual == "none" and self.needs_residuals:
            raise InputError("mgrit residual 'none': layers support 'C' and 'full'; residuals cost nothing")
        if not all(isinstance(m, int) for m in factors):
            raise InputError("mgrit coarsening by lists of points: give factors for layers")
        self.options = MGRITOptions.make(options, levels=len(factors) + 1, check="cycle")
        self.bounds, reversed_bounds = _shares(nlayers, grid.layer_size)
        own = own_numbers(nlayers, grid)
        self.lo, self.hi = own.start, own.stop
        self.k = self.hi - self.lo
        self.strides = [1]
        for m in factors:
            self.strides.append(self.strides[-1] * m)
        common = dict(is_root=grid.is_root)
        forward = dict(comm=grid.layer_comm, bounds=self.bounds, **common)
        backward = dict(comm=grid.reversed_layer_comm, bounds=reversed_bounds, **common)
        kinds = [("forward", forward, False), ("backward", backward, True), ("tangent", forward, True)]
        self.solvers: dict[str, MGRIT] = {}
        self._serial_solvers: dict[str, MGRIT] = {}
        for name, where, linear in kinds:
            if name not in steps:
                continue
            propagators, one = [steps[name](stride) for stride in self.strides], dict(levels=1, monitor=False)
            where |= dict(name=name, linear=linear, point_norms=_Norms())
            self.solvers[name] = MGRIT(propagators, nlayers, options=self.options, **where)
            self._serial_solvers[name] = MGRIT(propagators[:1], nlayers, options=one, **where)
            fine = self.solvers[name].levels[0]
            where["point_norms"].ends = np.append(np.arange(fine.k + 1)[self._c_rows(name)] - 1, fine.k)

    def set_trace(self, trace: Trace) -> None:
        """Let all solvers of the sweeps write to a trace."""
        for solver in (*self.solvers.values(), *self._serial_solvers.values()):
            for part in (solver, *solver.levels):
                part.trace = trace

    def exchanges_of_layers(self, *, needed: bool) -> list[RowExchange | None]:
        """For each level the exchange of layers at its points that another rank has; ``None`` where there are none, or
        none are ``needed``.
        """
        levels = zip(self.solvers["forward"].levels, self.strides, strict=True)
        rows = [_layers_of_others(level.bounds, self.bounds, s) if needed else None for level, s in levels]
        comm = self.grid.layer_comm
        return [None if each is None else RowExchange(comm, self.bounds, each) for each in rows]

    # -- sweeps --------------------------------------------------------------------------------------------------------
    def _solve(
        self,
        name: str,
        U: Array,
        G: Array | None = None,
        *,
        cycles: int | None = None,
        serial: bool = False,
        warm=None,
        rtol: float | None = None,
    ) -> SolveResult:
        """Solve for ``U`` by MGRIT cycles, from the C-points ``warm`` if they are given, or by sequential steps;
        ``rtol`` replaces the tolerance of the options, of sweeps up to a tolerance; that is 1e-12 for values of type
        float64 and 1e-6 for others, unless it was given.
        """
        if warm is not None and warm.shape[1:] != U.shape[1:]:
            warm = None  # the batch had another size
        if warm is not None:
            U[self._c_rows(name)] = warm
        if serial or len(self.strides) == 1:
            return self._serial_solvers[name].solve(U, G)
        if rtol is None and not self._has_tolerance:
            rtol = 1e-12 if str(U.dtype).endswith("float64") else 1e-6
        start, rtol = "skip" if warm is None else "guess", rtol if cycles is None else None
        return self.solvers[name].solve(U, G, start=start, cycles=cycles, rtol=rtol)

    def _c_rows(self, name: str) -> slice:
        """Rows of the own C-points of the finest level of a sweep."""
        level = self.solvers[name].levels[0]
        if level.m is None:
            return slice(0, 0)
        return slice((level.lo // level.m + 1) * level.m - level.lo, level.k + 1, level.m)

    def c_points(self, name: str, array: Array) -> Array:
        """A copy of the own C-points of a sweep's result, from which another one can start."""
        return copied(array[self._c_rows(name)])


def own_numbers(nlayers: int, grid: Grid) -> range:
    """Numbers of the layers of this rank."""
    bounds, rank = _shares(nlayers, grid.layer_size)[0], grid.layer_comm.rank
    return range(bounds[rank], bounds[rank + 1])


# cached: simulated ranks in one process share what does not depend on the rank
@lru_cache(maxsize=16)
def _shares(nlayers: int, ranks: int) -> tuple[Bounds, Bounds]:
    """Bounds of the ranks' layers in their own and in the reversed order."""
    bounds = Bounds(split_steps(nlayers, ranks))
    return bounds, Bounds(nlayers - b for b in reversed(bounds))


@lru_cache(maxsize=64)
def _layers_of_others(level: Bounds, bounds: Bounds, stride: int) -> list[list[int]] | None:
    """Layers at a level's points that each rank needs and does not own; ``None`` where there are none."""
    needed = [
        [a * stride] if b > a and a * stride < lo else []
        for a, b, lo in zip(level[:-1], level[1:], bounds[:-1], strict=True)
    ]
    return needed if any(needed) else None

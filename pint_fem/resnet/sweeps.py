r"""Forward, backward and tangent propagation through all layers, each solved by MGRIT over the ranks of ``layer_comm``.

The forward sweep gives :math:`u_0, \dots, u_N`, the backward one :math:`\lambda_n = \Phi_{n,u}^T \lambda_{n+1} + g_n`
from :math:`\lambda_N = \partial \ell / \partial u_N`, and then, all layers at once and once only, the gradients

.. math:: \frac{\partial \ell}{\partial \theta_n} = h\, \Big(\frac{\partial (L_n u_n + b_n)}{\partial \theta_n}\Big)^T
          (\sigma'(z_n)\, \lambda_{n+1}) .

A cold sweep begins with the coarse network (its layers step through the coarsest level), a warm one with the C-points
of an earlier sweep. Residuals are looked at in the first half of a cycle, where that costs nothing, so sweeps of a
fixed number of cycles know them too (Günther, Ruthotto, Schroder, Cyr, Gauger, arXiv:1812.04352).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import torch

from pint_fem.all_at_once.grids import Bounds, split_steps
from pint_fem.all_at_once.norms import euclidean
from pint_fem.all_at_once.stopping import SolveResult
from pint_fem.all_at_once.trace import Trace
from pint_fem.errors import InputError
from pint_fem.mgrit.options import MGRITOptions
from pint_fem.mgrit.solver import MGRIT
from pint_fem.resnet.activations import Activation
from pint_fem.resnet.grid import Grid
from pint_fem.resnet.layers import Layer
from pint_fem.resnet.propagators import AdjointStep, ForwardStep, TangentStep
from pint_fem.resnet.row_exchange import RowExchange

__all__ = ["LayerSweeps", "Trajectory"]

# layers of a call where it is for all of them: what passes from one call to the next stays in the cache
_TOGETHER = 32


@dataclass(eq=False)
class Trajectory:
    r"""A solved forward sweep. Trajectories are equal where they are the same object.

    Attributes
    ----------
    U : ndarray, (k + 1, *state)
        Points of the own layers; row 0 is the point before them.
    slopes : Tensor, (k, *state)
        :math:`\sigma'` of the own layers.
    kept : Tensor or None, (k, *state)
        What they, and curvatures, follow from, where it is asked for.
    theta : list of Tensor
        Parameters it was solved with.
    result : SolveResult
    """

    U: np.ndarray
    slopes: torch.Tensor
    kept: torch.Tensor | None = None
    theta: list[torch.Tensor] = field(default_factory=list)
    result: SolveResult | None = None

    def take_slopes(self, act: Activation) -> None:
        """Of what they follow from, which is in their place unless it is kept."""
        source = self.slopes if self.kept is None else self.kept
        for i in range(0, len(source), _TOGETHER):
            rows = slice(i, i + _TOGETHER)
            act.write_slope(source[rows], self.slopes[rows])


class _Norms:
    """Squared norms of states."""

    def __init__(self):
        #: Rows of the finest level from which no step goes on: the points before C-points, and the last one.
        self.ends: np.ndarray | None = None

    def __call__(self, block: np.ndarray) -> np.ndarray:
        return euclidean(block)

    def finite(self, block: np.ndarray) -> np.ndarray:
        """NaN where a trajectory is not finite at the end of an interval, where what happened before arrives."""
        out = np.zeros(len(block))
        ends = block[self.ends]
        out[self.ends] = np.where(np.isfinite(ends).reshape(len(ends), -1).all(axis=1), 0.0, np.nan)
        return out


class LayerSweeps:
    """Sweeps through the layers of one network on one process grid.

    Parameters
    ----------
    layer
        The kind of layers.
    nlayers
        Their number ``N``.
    h
        Step of a layer.
    grid
        Who has which.
    options
        MGRIT options: ``levels``, ``coarsening`` (factors), ``relax``, ``cycle``, ``rtol``, ``max_it`` ...
    printer
        For monitor lines.

    Raises
    ------
    InputError
        On every rank, on more layer ranks than layers, or options that layers cannot serve.
    """

    #: What takes the steps of each sweep on a level.
    steps: Mapping[str, type] = {"forward": ForwardStep, "backward": AdjointStep, "tangent": TangentStep}

    def __init__(
        self,
        layer: Layer,
        nlayers: int,
        h: float,
        grid: Grid,
        *,
        options: MGRITOptions | Mapping | None = None,
        printer=print,
    ):
        self.layer, self.nlayers, self.h, self.grid = layer, nlayers, h, grid
        if nlayers < grid.layer_size:
            raise InputError(f"{grid.layer_size} layer ranks for {nlayers} layers: use at most one rank a layer")
        try:
            options = MGRITOptions.make(options)
            factors = options.factors(nlayers)
        except ValueError as error:
            raise InputError(f"mgrit options: {error}") from None
        for name, only in (("coarse_solver", "sequential"), ("storage", "all"), ("trace", "")):
            if getattr(options, name) != only:
                raise InputError(f"mgrit {name} = {getattr(options, name)!r}: layers know {only!r} only")
        if options.residual == "none":
            raise InputError("mgrit residual 'none': layers know 'C' and 'full'; a look at the residual costs nothing")
        if not all(isinstance(m, int) for m in factors):
            raise InputError("mgrit coarsening by lists of points: give factors for layers")
        self.options = MGRITOptions.make(options, levels=len(factors) + 1, check="cycle")
        self.bounds, reversed_bounds = _shares(nlayers, grid.layer_size)
        rank = grid.layer_comm.rank
        self.lo, self.hi = self.bounds[rank], self.bounds[rank + 1]
        self.k = self.hi - self.lo
        self.strides = [1]
        for m in factors:
            self.strides.append(self.strides[-1] * m)
        common = dict(printer=printer, is_root=grid.is_root)
        forward = dict(comm=grid.layer_comm, bounds=self.bounds, **common)
        backward = dict(comm=grid.reversed_layer_comm, bounds=reversed_bounds, **common)
        kinds = [("forward", forward, False), ("backward", backward, True), ("tangent", forward, True)]
        #: The solvers, each with one that steps from layer to layer beside it.
        self.solvers: dict[str, MGRIT] = {}
        self._serial: dict[str, MGRIT] = {}
        for name, where, linear in kinds:
            kind = self.steps[name]
            steps, one = [kind(layer, s * h) for s in self.strides], dict(levels=1, monitor=False)
            where |= dict(name=name, linear=linear, point_norms=_Norms())
            self.solvers[name] = MGRIT(steps, nlayers, options=self.options, **where)
            self._serial[name] = MGRIT(steps[:1], nlayers, options=one, **where)
            for level in self.solvers[name].levels:
                level.propagator.lo = level.lo
            fine = self.solvers[name].levels[0]
            where["point_norms"].ends = np.append(np.arange(fine.k + 1)[self._c_rows(fine)] - 1, fine.k)
            if name == "backward":
                fine.propagator.backwards = True
        self._exchanges = [self._exchange(level) for level in range(len(self.strides))]
        self._pool: list[Trajectory] = []
        self._L: np.ndarray | None = None

    def set_trace(self, trace: Trace) -> None:
        """Let all solvers of the sweeps write to a trace."""
        for solver in (*self.solvers.values(), *self._serial.values()):
            for part in (solver, *solver.levels):
                part.trace = trace

    # -- parameters of the levels --------------------------------------------------------------------------------------
    def _exchange(self, index: int) -> RowExchange | None:
        """The plan for layers at a level's points that another rank owns; ``None`` where nobody needs any."""
        level = self.solvers["forward"].levels[index]
        wanted = _foreign(level.bounds, self.bounds, self.strides[index])
        return None if wanted is None else RowExchange(self.grid.layer_comm, self.bounds, wanted)

    def _level_theta(self, index: int, theta: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Parameters of a level's own steps: a view of the own layers, with a foreign one before it if need be."""
        stride, level, exchange = self.strides[index], self.solvers["forward"].levels[index], self._exchanges[index]
        foreign = [p[:0] for p in theta] if exchange is None else exchange(theta)
        start = (level.lo + len(foreign[0])) * stride - self.lo
        count = level.k - len(foreign[0])
        own = [p[start : start + count * stride : stride] if count > 0 else p[:0] for p in theta]
        if not len(foreign[0]):
            return own
        return [torch.cat([f, p]) for f, p in zip(foreign, own, strict=True)]

    def _bind_forward(self, name: str, theta: Sequence[torch.Tensor], slopes: torch.Tensor | None = None) -> None:
        for index, level in enumerate(self.solvers[name].levels):
            level.propagator.theta = self._level_theta(index, theta)
            if slopes is not None:
                level.propagator.slopes = self._level_slopes(index, level, slopes)

    def _level_slopes(self, index: int, level, slopes: torch.Tensor) -> torch.Tensor:
        """Slopes at a level's points; that of a foreign one is fetched."""
        exchange, stride = self._exchanges[index], self.strides[index]
        if index == 0:
            return slopes
        foreign = slopes[:0] if exchange is None else exchange([slopes])[0]
        start = (level.lo + len(foreign)) * stride - self.lo
        own = slopes[start::stride][: max(level.k - len(foreign), 0)] if start < self.k else slopes[:0]
        return torch.cat([foreign, own]) if len(foreign) else own

    def _bind_backward(self, theta: Sequence[torch.Tensor], slopes: torch.Tensor) -> None:
        for stride, level in zip(self.strides, self.solvers["backward"].levels, strict=True):
            if level.index == 0:
                level.propagator.theta, level.propagator.slopes = theta, slopes
                continue
            # the reversed step ``i`` of the level is that of layer ``N - (i + 1) stride``
            last = self.nlayers - (level.lo + 1) * stride - self.lo
            rows = slice(last - (level.k - 1) * stride, last + 1, stride) if level.k else slice(0, 0)
            level.propagator.theta = [p[rows].flip(0) for p in theta]
            level.propagator.slopes = slopes[rows].flip(0)

    # -- sweeps --------------------------------------------------------------------------------------------------------
    def _solve(self, name: str, U, G, *, cycles: int | None, serial: bool, start: str, rtol: float | None):
        if serial or len(self.strides) == 1:
            return self._serial[name].solve(U, G)
        return self.solvers[name].solve(U, G, start=start, cycles=cycles, rtol=None if cycles is not None else rtol)

    @staticmethod
    def _c_rows(level) -> slice:
        """Rows of the own C-points of the finest level."""
        if level.m is None:
            return slice(0, 0)
        return slice((level.lo // level.m + 1) * level.m - level.lo, level.k + 1, level.m)

    def trajectory(self, shape: Sequence[int], dtype, *, keep: bool = False) -> Trajectory:
        """Room for a forward sweep: one that nobody holds any more, or a new one; ``keep``: also for curvatures."""
        shape = (self.k + 1, *shape)
        room = lambda: torch.from_numpy(np.zeros((self.k, *shape[1:]), dtype))
        if keep:
            return Trajectory(np.zeros(shape, dtype), room(), room())
        for t in self._pool:
            if t.U.shape == shape and t.U.dtype == dtype:
                self._pool.remove(t)
                return t
        self._pool.clear()
        return Trajectory(np.zeros(shape, dtype), room())

    def give_back(self, trajectory: Trajectory) -> None:
        """Its memory may be used again."""
        if len(self._pool) < 2:
            self._pool.append(Trajectory(trajectory.U, trajectory.slopes))

    def forward(
        self,
        theta: Sequence[torch.Tensor],
        u0: np.ndarray | None,
        trajectory: Trajectory,
        *,
        cycles: int | None = None,
        serial: bool = False,
        warm: np.ndarray | None = None,
        rtol: float | None = None,
        slopes: bool = True,
    ) -> SolveResult:
        """Propagate a batch.

        Parameters
        ----------
        theta
            Parameters of the own layers.
        u0
            The opening layer's state, on the first rank.
        trajectory
            Where it goes.
        cycles
            So many cycles; ``None``: to ``rtol``.
        serial
            Step from layer to layer.
        warm
            C-points to start from; default: the coarse network's.
        slopes
            Whether a backward sweep is to follow.
        """
        theta = [p.detach() for p in theta]
        self._bind_forward("forward", theta)
        fine = self.solvers["forward"].levels[0]
        if slopes:
            fine.propagator.slopes, fine.propagator.kept = trajectory.slopes, trajectory.kept
        # to a tolerance, any relaxation may be the last; a slope that takes one pass is as cheap as what it is of
        later = slopes and cycles is None and not serial and len(self.strides) > 1
        later = fine.propagator.later = later and self.layer.activation.slope_out is None
        U = trajectory.U
        if self.grid.is_first:
            U[0] = u0
        if warm is not None:
            U[self._c_rows(fine)] = warm
        start = "skip" if warm is None else "guess"
        try:
            with torch.no_grad():
                result = self._solve("forward", U, None, cycles=cycles, serial=serial, start=start, rtol=rtol)
                if later:
                    trajectory.take_slopes(self.layer.activation)
        finally:
            fine.propagator.slopes = fine.propagator.kept = None
        trajectory.theta, trajectory.result = theta, result
        return result

    def backward(
        self,
        trajectory: Trajectory,
        last: np.ndarray | None,
        *,
        cycles: int | None = None,
        serial: bool = False,
        warm: np.ndarray | None = None,
        rtol: float | None = None,
    ) -> tuple[SolveResult, np.ndarray, list[torch.Tensor]]:
        """Propagate back, and the gradients.

        Parameters
        ----------
        last
            Derivative with respect to the last state, on the last rank.

        Returns
        -------
        result
        first
            Derivative with respect to the point before the own layers: the opening layer's, on the first rank.
        gradients
            Of the own layers' parameters.
        """
        with torch.no_grad():
            result, L = self.adjoint(trajectory, last, None, cycles=cycles, serial=serial, warm=warm, rtol=rtol)
            U, slopes, lam = torch.from_numpy(trajectory.U), trajectory.slopes, torch.from_numpy(L[::-1])[1:]
            parts = []
            for i in range(0, self.k, _TOGETHER):
                rows = slice(i, min(i + _TOGETHER, self.k))
                parts.append(self.layer.gradients(slopes[rows] * lam[rows], U[rows]))
            gradients = [torch.cat(part).mul_(self.h) for part in zip(*parts, strict=True)]
        return result, L[-1], gradients

    def adjoint(
        self, trajectory, last, G, *, cycles=None, serial=False, warm=None, rtol=None
    ) -> tuple[SolveResult, np.ndarray]:
        """The backward sweep alone; its array, from the last point to the first, is used again by the next one. It
        runs backwards through memory, so that ``L[::-1]`` is an array like all others.
        """
        self._bind_backward(trajectory.theta, trajectory.slopes)
        L = self._L
        if L is None or L.shape != trajectory.U.shape or L.dtype != trajectory.U.dtype:
            L = self._L = np.zeros_like(trajectory.U)[::-1]
        if self.grid.is_last:
            L[0] = last
        if warm is not None:
            L[self._c_rows(self.solvers["backward"].levels[0])] = warm
        start = "skip" if warm is None else "guess"
        result = self._solve("backward", L, G, cycles=cycles, serial=serial, start=start, rtol=rtol)
        return result, L

    def tangent(self, trajectory, first, G: np.ndarray, *, serial=False, rtol=None) -> np.ndarray:
        """The tangent sweep from ``first`` with the right-hand side ``G`` of the own layers."""
        self._bind_forward("tangent", trajectory.theta, trajectory.slopes)
        V = np.zeros_like(trajectory.U)
        if self.grid.is_first:
            V[0] = first
        self._solve("tangent", V, G, cycles=None, serial=serial, start="skip", rtol=rtol)
        return V

    def c_points(self, name: str, array: np.ndarray) -> np.ndarray:
        """A copy of the own C-points of a sweep, to start another one from."""
        return array[self._c_rows(self.solvers[name].levels[0])].copy()


# ranks that live in one process share what does not depend on the rank
@lru_cache(maxsize=16)
def _shares(nlayers: int, ranks: int) -> tuple[Bounds, Bounds]:
    """Bounds of the ranks' layers, and of the reversed ones."""
    bounds = Bounds(split_steps(nlayers, ranks))
    return bounds, Bounds(nlayers - b for b in reversed(bounds))


@lru_cache(maxsize=64)
def _foreign(level: Bounds, bounds: Bounds, stride: int) -> list[list[int]] | None:
    """The layers at a level's points that each rank wants and does not own; ``None`` where there are none."""
    wanted = [
        [a * stride] if b > a and a * stride < lo else []
        for a, b, lo in zip(level[:-1], level[1:], bounds[:-1], strict=True)
    ]
    return wanted if any(wanted) else None

r"""Forward, backward and tangent propagation through all layers, each one MGRIT solve.

The forward sweep yields :math:`u_0, \dots, u_N`, the backward one :math:`\lambda_n = \Phi_{n,u}^T \lambda_{n+1} + g_n`
from :math:`\lambda_N = \partial \ell / \partial u_N`, and then, all layers at once and once only, the gradients

.. math:: \frac{\partial \ell}{\partial \theta_n} = h\, \Big(\frac{\partial (L_n u_n + b_n)}{\partial \theta_n}\Big)^T
          (\sigma'(z_n)\, \lambda_{n+1}) .

A cold sweep starts from the trajectory of the coarse network (the layers of the coarsest level), a warm one from the
C-points of an earlier sweep (Günther, Ruthotto, Schroder, Cyr, Gauger, arXiv:1812.04352). Residuals are a by-product of
the first half of a cycle, so sweeps of a fixed number of cycles report them, too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import DTypeLike

from pint_fem.all_at_once.stopping import SolveResult
from pint_fem.mgrit.options import MGRITOptions
from pint_fem.resnet.activation_kinds import Activation
from pint_fem.resnet.grid import Grid
from pint_fem.resnet.layers import Layer
from pint_fem.resnet.parallel.interval_means import coarse_means
from pint_fem.resnet.parallel.solvers import SweepSolvers
from pint_fem.resnet.propagators import AdjointStep, ForwardStep, TangentStep

__all__ = ["LayerSweeps", "Trajectory"]

_CHUNK = 32  # layers of a call where it could be for all of them: intermediate results stay in the processor's cache


@dataclass(eq=False)
class Trajectory:
    r"""Result of a forward sweep; compared by identity.

    Attributes
    ----------
    U : ndarray, (k + 1, *state)
        Points of the own layers; row 0 is the point before them.
    slopes : Tensor, (k, *state)
        :math:`\sigma'(z_n)` of the own layers.
    records : Tensor or None, (k, *state)
        What slopes and curvatures are evaluated from, if curvatures are needed.
    theta : list of Tensor
        Parameters of the own layers in this sweep.
    result : SolveResult
    """

    U: np.ndarray
    slopes: torch.Tensor
    records: torch.Tensor | None = None
    theta: list[torch.Tensor] = field(default_factory=list)
    result: SolveResult | None = None

    def evaluate_slopes(self, act: Activation, own: Sequence[torch.Tensor]) -> None:
        """Evaluate the slopes from the records, which are in their place unless ``records`` has them."""
        source = self.slopes if self.records is None else self.records
        for i in range(0, len(source), _CHUNK):
            rows = slice(i, i + _CHUNK)
            act.write_slope(source[rows], self.slopes[rows], [p[rows] for p in own])


class LayerSweeps(SweepSolvers):
    """Sweeps through the layers of one network on one process grid.

    Parameters
    ----------
    layer, nlayers, h
        Kind, number ``N`` and step size of the layers.
    grid
        The process grid.
    options
        MGRIT options: ``levels``, ``coarsening`` (factors), ``relax``, ``cycle``, ``rtol``, ``max_it`` ...
    coarse_layers
        ``"mean"``: a layer of a coarse level has the mean parameters, and in linear sweeps the mean slopes, of the
        layers of its interval; ``"first"``: it is the first of them.

    Attributes
    ----------
    bounds : tuple of int
        Numbers of the ranks' first layers, and ``N``; the own ``k`` layers are ``lo .. hi - 1``.
    strides : list of int
        Distance in layers of neighbouring points of each level.
    solvers : dict
        MGRIT solvers of the sweeps ``"forward"``, ``"backward"`` and ``"tangent"``.
    exchanges : list of RowExchange or None
        Of each level: fetches layers at its points that another rank owns.

    Raises
    ------
    InputError
        On every rank, on more layer ranks than layers, or options that do not apply to layers.
    """

    steps: Mapping[str, type] = {"forward": ForwardStep, "backward": AdjointStep, "tangent": TangentStep}
    """Propagators of each sweep, made for every level from the kind of layers and the step size."""

    def __init__(
        self,
        layer: Layer,
        nlayers: int,
        h: float,
        grid: Grid,
        *,
        options: MGRITOptions | Mapping | None = None,
        coarse_layers: str = "mean",
    ):
        self.layer, self.h = layer, h
        kinds = {name: partial(self._step, kind) for name, kind in self.steps.items()}
        super().__init__(nlayers, grid, options=options, steps=kinds)
        for solver in self.solvers.values():
            for level in solver.levels:
                level.propagator.lo = level.lo
        self.solvers["backward"].levels[0].propagator.backwards = True
        self.means = coarse_means(self, grid) if coarse_layers == "mean" else None
        self.exchanges = self.exchanges_of_layers(needed=self.means is None)
        self._pool: list[Trajectory] = []
        self._L: np.ndarray | None = None

    def _step(self, kind: type, stride: int) -> Any:
        """A propagator of a level."""
        return kind(self.layer, stride * self.h)

    # -- parameters of the levels --------------------------------------------------------------------------------------
    def _level_rows(self, index: int, arrays: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Rows of stacked arrays at a level's own steps: a view, or a copy with a foreign layer's row before it."""
        stride, level, exchange = self.strides[index], self.solvers["forward"].levels[index], self.exchanges[index]
        foreign = [a[:0] for a in arrays] if exchange is None else exchange(arrays)
        start = (level.lo + len(foreign[0])) * stride - self.lo
        count = level.k - len(foreign[0])
        own = [a[start : start + count * stride : stride] if count > 0 else a[:0] for a in arrays]
        if not len(foreign[0]):
            return own
        return [torch.cat([f, p]) for f, p in zip(foreign, own, strict=True)]

    def _bind_forward(self, name: str, theta: Sequence[torch.Tensor], slopes: torch.Tensor | None = None) -> None:
        """Set the parameters, and slopes if they are given, of all levels of the forward or tangent sweep."""
        for index, level in enumerate(self.solvers[name].levels):
            if index and self.means is not None:
                given = theta if slopes is None else [*theta, slopes]
                means = self.means["forward"][index - 1](given)
                level.propagator.theta = means[: len(theta)]
                if slopes is not None:
                    level.propagator.slopes = means[-1]
                continue
            level.propagator.theta = self._level_rows(index, theta)
            if slopes is not None:
                (level.propagator.slopes,) = self._level_rows(index, [slopes])

    def _bind_backward(self, theta: Sequence[torch.Tensor], slopes: torch.Tensor) -> None:
        """Set the parameters and slopes of all levels of the backward sweep."""
        for stride, level in zip(self.strides, self.solvers["backward"].levels, strict=True):
            if level.index == 0:
                level.propagator.theta, level.propagator.slopes = theta, slopes
                continue
            if self.means is not None:
                *means, level.propagator.slopes = self.means["backward"][level.index - 1]([*theta, slopes])
                level.propagator.theta = means
                continue
            # the reversed step ``i`` of the level is that of layer ``N - (i + 1) stride``
            last = self.nlayers - (level.lo + 1) * stride - self.lo
            rows = slice(last - (level.k - 1) * stride, last + 1, stride) if level.k else slice(0, 0)
            level.propagator.theta = [p[rows].flip(0) for p in theta]
            level.propagator.slopes = slopes[rows].flip(0)

    # -- sweeps --------------------------------------------------------------------------------------------------------
    def trajectory(self, shape: Sequence[int], dtype: DTypeLike, *, curvatures: bool = False) -> Trajectory:
        """Arrays for a forward sweep of states of a shape and type; with records if ``curvatures`` are needed."""
        shape = (self.k + 1, *shape)
        layers = lambda: torch.from_numpy(np.zeros((self.k, *shape[1:]), dtype))
        if curvatures:
            return Trajectory(np.zeros(shape, dtype), layers(), layers())
        for t in self._pool:
            if t.U.shape == shape and t.U.dtype == dtype:
                self._pool.remove(t)
                return t
        self._pool.clear()
        return Trajectory(np.zeros(shape, dtype), layers())

    def recycle(self, trajectory: Trajectory) -> None:
        """Return the arrays of a trajectory that is not used any more to the pool."""
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
        slopes: bool = True,
    ) -> SolveResult:
        """Propagate a batch through all layers (collective over ``layer_comm``).

        Parameters
        ----------
        theta, u0
            Stacked parameters of the own layers, and the first state on the first rank.
        trajectory
            Arrays of the result, overwritten.
        cycles, serial
            Number of cycles, ``None``: up to the tolerance; or sequential steps instead.
        warm
            Own C-points to start from; default: those of the coarse network.
        slopes
            Whether a backward sweep is to follow.

        Raises
        ------
        SolverFailure
            On every rank, where values are not finite.
        """
        theta = [p.detach() for p in theta]
        self._bind_forward("forward", theta)
        fine = self.solvers["forward"].levels[0]
        if slopes:
            fine.propagator.slopes, fine.propagator.records = trajectory.slopes, trajectory.records
        # up to a tolerance any relaxation may be the last; slopes written in one pass cost as little as the records
        defers = slopes and cycles is None and not serial and len(self.strides) > 1
        defers = fine.propagator.defers_slopes = defers and self.layer.activation.slope_out is None
        U = trajectory.U
        if self.grid.is_first:
            U[0] = u0
        try:
            with torch.no_grad():
                result = self._solve("forward", U, cycles=cycles, serial=serial, warm=warm)
                if defers:
                    trajectory.evaluate_slopes(self.layer.activation, self.layer.of_activation(theta))
        finally:
            fine.propagator.slopes = fine.propagator.records = None
        trajectory.theta, trajectory.result = theta, result
        return result

    def backward(
        self, trajectory: Trajectory, last: np.ndarray | None, **how: Any
    ) -> tuple[SolveResult, np.ndarray, list[torch.Tensor]]:
        """Derivatives of a loss with respect to the first state and all parameters (collective over ``layer_comm``).

        Parameters
        ----------
        trajectory, last
            Result of the forward sweep, and the derivative with respect to the last state on the last rank.
        **how
            ``cycles``, ``serial`` and ``warm`` as for :meth:`forward`.

        Returns
        -------
        result : SolveResult
        L : ndarray, (k + 1, *state)
            Derivatives with respect to the points, from the last to the first: ``L[-1]`` belongs to the point before
            the own layers, which is the first state on the first rank. Overwritten by the next sweep.
        gradients : list of Tensor
            Derivatives with respect to the stacked parameters of the own layers.
        """
        with torch.no_grad():
            result, L = self.adjoint(trajectory, last, None, **how)
            U, slopes, lam = torch.from_numpy(trajectory.U), trajectory.slopes, torch.from_numpy(L[::-1])[1:]
            parts = []
            for i in range(0, self.k, _CHUNK):
                rows = slice(i, min(i + _CHUNK, self.k))
                own = self.layer.activation_gradients([p[rows] for p in trajectory.theta], lam[rows], U[rows])
                parts.append([*self.layer.gradients(slopes[rows] * lam[rows], U[rows]), *own])
            gradients = [torch.cat(part).mul_(self.h) for part in zip(*parts, strict=True)]
        return result, L, gradients

    def adjoint(
        self, trajectory: Trajectory, last: np.ndarray | None, G: np.ndarray | None, **how: Any
    ) -> tuple[SolveResult, np.ndarray]:
        """The backward sweep alone; arguments as for :meth:`backward`, and a right-hand side from the last layer on.

        Returns
        -------
        result : SolveResult
        L : ndarray, (k + 1, *state)
            Adjoints from the last point to the first, overwritten by the next sweep; ``L[::-1]`` is C-contiguous.
        """
        self._bind_backward(trajectory.theta, trajectory.slopes)
        L = self._L
        if L is None or L.shape != trajectory.U.shape or L.dtype != trajectory.U.dtype:
            L = self._L = np.zeros_like(trajectory.U)[::-1]
        if self.grid.is_last:
            L[0] = last
        return self._solve("backward", L, G, **how), L

    def tangent(self, trajectory: Trajectory, first: np.ndarray | None, G: np.ndarray) -> np.ndarray:
        """Tangents ``(k + 1, *state)`` along a trajectory (collective over ``layer_comm``).

        They start from ``first`` on the first rank, with a right-hand side ``G`` of the own layers.
        """
        self._bind_forward("tangent", trajectory.theta, trajectory.slopes)
        V = np.zeros_like(trajectory.U)
        if self.grid.is_first:
            V[0] = first
        self._solve("tangent", V, G)
        return V

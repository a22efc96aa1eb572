"""The residual layers between two ends of a network: two MGRIT sweeps as one function that autograd differentiates."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from mpi4py import MPI

from pint_fem.all_at_once.stopping import SolveResult
from pint_fem.collective import collectively, mark_shared
from pint_fem.errors import InputError, SolverFailure
from pint_fem.resnet.grid import Grid
from pint_fem.resnet.iterations import Adaptive, Iterations

if TYPE_CHECKING:
    from pint_fem.resnet.parallel.passes import Pass

__all__ = ["Propagation", "Stage", "are_finite", "means_over_groups"]

Tensor = torch.Tensor


class Stage(ABC):
    """The layers that one MGRIT hierarchy propagates through.

    A subclass has the layers and the solvers of its sweeps. Copies and pickles are without solvers, warm starts and
    results; the solvers are made again where they are needed.

    Parameters
    ----------
    grid
        Process grid of the network.
    forward_iterations, backward_iterations, adaptive, evaluation
        As for the networks.
    name
        For messages.

    Attributes
    ----------
    forward_sweeps, backward_sweeps : Iterations
    results : dict
        The last ``"forward"`` and ``"backward"`` :class:`~pint_fem.mgrit.SolveResult`.
    warm_starts : dict
        C-points of the last sweeps by kind of sweep and name of the batch.
    """

    def __init__(
        self,
        grid: Grid,
        *,
        forward_iterations: int | None,
        backward_iterations: int | None,
        adaptive: Adaptive | None,
        evaluation: str,
        name: str = "the layers",
    ):
        if evaluation not in ("exact", "same"):
            raise InputError(f"evaluation {evaluation!r}: give 'exact' or 'same'")
        self.grid, self.evaluation, self.name = grid, evaluation, name
        self.forward_sweeps = Iterations(forward_iterations, adaptive)
        self.backward_sweeps = Iterations(backward_iterations, adaptive)
        self.results: dict[str, SolveResult] = {}
        self.warm_starts: dict[tuple[str, Hashable], Any] = {}
        self._sweeps: Any = None

    def __getstate__(self) -> dict:
        """All but what communicates or belongs to a batch."""
        return {**self.__dict__, "_sweeps": None, "results": {}, "warm_starts": {}}

    @abstractmethod
    def make_sweeps(self) -> Any:
        """The solvers of the sweeps of these layers, without communication."""

    @property
    def sweeps(self) -> Any:
        """The solvers of the sweeps."""
        if self._sweeps is None:
            self._sweeps = self.make_sweeps()
        return self._sweeps

    @abstractmethod
    def parameters(self) -> list[Tensor]:
        """Parameters of the own layers, with respect to which :meth:`backward` differentiates."""

    @abstractmethod
    def new_trajectory(self, now: Pass, shape: Sequence[int], dtype: torch.dtype) -> Any:
        """What a forward sweep fills, with the states in ``U``, for states of a shape and type."""

    @abstractmethod
    def run_forward(
        self, trajectory: Any, first: Tensor | None, theta: Sequence[Tensor], trains: bool, **how: Any
    ) -> SolveResult:
        """The forward sweep (collective), ``how``: ``cycles``, ``serial`` and ``warm``."""

    @abstractmethod
    def run_backward(
        self, trajectory: Any, last: Tensor | None, **how: Any
    ) -> tuple[SolveResult, Any, Tensor | None, list[Tensor | None], list[Tensor | None]]:
        """The backward sweep (collective): result, its array, and the derivatives with respect to the first state, the
        own parameters and the extra inputs.
        """

    @abstractmethod
    def last_state(self, trajectory: Any) -> Tensor:
        """A copy of the last own state."""

    def release(self, trajectory: Any) -> None:
        """Called with a trajectory that is not used any more; does nothing here."""
        return

    # -- how a sweep runs ----------------------------------------------------------------------------------------------
    def _cycles(self, kind: str, trains: bool) -> tuple[Iterations, int | None, bool]:
        """Iterations of a kind of sweep, number of cycles of the next one, and whether it is sequential."""
        its = self.forward_sweeps if kind == "forward" else self.backward_sweeps
        if not trains and self.evaluation == "exact":
            return its, None, True
        return its, its.begin() if trains else its.cycles, its.serial

    def _largest(self, value: float) -> float:
        """Maximum over the data groups."""
        if self.grid.data_size == 1:
            return value
        return self.grid.data_comm.allreduce(value, op=MPI.MAX)

    def _solve(self, kind: str, now: Pass, solve: Callable) -> Any:
        """Solve with the number of cycles and the start that apply, and store the result and the C-points.

        ``solve(cycles=, serial=, warm=)`` returns the result of the sweep, its array, and more, which is returned.
        """
        its, cycles, serial = self._cycles(kind, now.trains)
        named = now.batch is not None and now.trains
        warm = self.warm_starts.get((kind, now.batch)) if named else None

        def attempt(**how: Any) -> Any:
            if not now.shares:
                return solve(**how)
            return collectively(self.grid.comm, f"{kind} sweep", partial(solve, **how))

        try:
            result, array, *more = attempt(cycles=cycles, serial=serial, warm=warm)
        except SolverFailure:  # of any group: all take the same branch
            if serial or not now.trains or not its.fail():
                raise
            result, array, *more = attempt(cycles=None, serial=True, warm=None)
        self.results[kind] = result
        if now.trains:
            if not its.serial:
                its.end(result, self._largest)
            if now.batch is not None:
                self.warm_starts[kind, now.batch] = self.sweeps.c_points(kind, array)
        return more

    def propagate(
        self, now: Pass, u0: Tensor, shape: Sequence[int], dtype: torch.dtype, theta: Sequence[Tensor]
    ) -> Any:
        """The forward sweep from ``u0`` on the first rank; returns the trajectory."""
        first = u0.detach() if self.grid.is_first else None
        trajectory = self.new_trajectory(now, shape, dtype)

        def solve(**how: Any) -> tuple[SolveResult, Any]:
            return self.run_forward(trajectory, first, theta, now.trains, **how), trajectory.U

        self._solve("forward", now, solve)
        return trajectory

    def propagate_back(
        self, now: Pass, trajectory: Any, last: Tensor | None
    ) -> tuple[Tensor | None, list[Tensor | None], list[Tensor | None]]:
        """The backward sweep from the derivative with respect to the last state, on the last rank: derivatives with
        respect to the first state, the own parameters (means over the data groups) and the extra inputs.
        """
        try:
            first, gradients, extra = self._solve("backward", now, partial(self.run_backward, trajectory, last))
            finite = are_finite(gradients)
        except SolverFailure:
            if now.nonfinite == "raise":
                raise
            first, gradients, extra, finite = None, [], [], False
        if not now.all_agree(finite):
            if now.nonfinite == "raise":
                failure = SolverFailure(f"derivatives with respect to the parameters of {self.name} are not finite")
                raise mark_shared(self.grid.layer_comm, failure)
            nan = lambda p: torch.full_like(p, torch.nan) if p.requires_grad else None
            gradients = [nan(p) for p in self.parameters()]
            first = None if first is None else torch.full_like(first, torch.nan)
        return first, now.mean_over_data(gradients), extra


def _real(t: Tensor) -> Tensor:
    """Complex numbers as pairs of real ones."""
    return torch.view_as_real(t) if t.is_complex() else t


def are_finite(gradients: Sequence[Tensor | None]) -> bool:
    """Whether all values are finite, by one read from a device: their sums are, or else each by itself."""
    given = [g for g in gradients if g is not None and g.device.type != "meta"]
    if not given or torch.isfinite(torch.stack([_real(g).sum(dtype=torch.float32) for g in given])).all():
        return True
    return all(bool(torch.isfinite(g).all()) for g in given)


class Propagation(torch.autograd.Function):
    """Propagation from the first state to the last one through the layers of all ranks."""

    @staticmethod
    def forward(
        ctx: Any, stage: Stage, now: Pass, shape: Sequence[int], dtype: torch.dtype, anchor: Tensor, u0: Tensor,
        counts: tuple[int, int], *inputs: Tensor,
    ) -> Tensor:  # fmt: skip
        """The last state, on the last rank.

        ``anchor`` has a derivative on all ranks where one of them trains. ``inputs``, with the ``counts`` of the first
        two kinds: inputs of the network, which this connects to the output on all ranks; extra inputs of the layers;
        parameters of the own layers.
        """
        ctx.stage, ctx.now, ctx.counts, ctx.like = stage, now, counts, (u0.shape, u0.dtype, u0.device)
        ctx.trajectory = trajectory = stage.propagate(now, u0, shape, dtype, inputs[sum(counts) :])
        last = stage.last_state(trajectory) if stage.grid.is_last else u0.new_zeros((), dtype=dtype)
        if now.trains:
            ctx.owner = _TrajectoryOwner(stage, trajectory)
        else:
            stage.release(trajectory)
            ctx.trajectory = None
        return last

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Derivatives with respect to the first state, on the first rank, the extra inputs and the own parameters."""
        stage, now = ctx.stage, ctx.now
        now.check_backward()
        if now.nonfinite == "gradient" and stage is now.network.stages[-1]:
            now.agree_on_gradients()
        with torch.no_grad():
            last = gradient.contiguous() if stage.grid.is_last else None
            first, gradients, extra = stage.propagate_back(now, ctx.trajectory, last)
        shape, dtype, device = ctx.like
        if not ctx.needs_input_grad[5]:
            first = None
        elif not stage.grid.is_first or first is None:
            fill = torch.nan if stage.grid.is_first else 0.0
            first = torch.full(shape, fill, dtype=dtype, device=device)
        links, extras = ctx.counts
        return None, None, None, None, None, first, None, *[None] * links, *(extra or [None] * extras), *gradients


class _TrajectoryOwner:
    """Returns a trajectory to its stage when autograd has deleted its graph."""

    def __init__(self, stage: Stage, trajectory: Any):
        self.stage, self.trajectory = stage, trajectory

    def __del__(self) -> None:
        self.stage.release(self.trajectory)


def means_over_groups(grid: Grid, gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Means of gradients over the data groups, in one message of each type of values (collective)."""
    if grid.data_size == 1:
        return list(gradients)
    paired = [g is not None and g.is_complex() for g in gradients]
    out = [g if g is None else _real(g.to_dense() if g.is_sparse else g) for g in gradients]
    for dtype in dict.fromkeys(g.dtype for g in out if g is not None):
        some = [i for i, g in enumerate(out) if g is not None and g.dtype == dtype]
        wide = dtype if dtype in (torch.float32, torch.float64) else torch.float32
        flat = torch.cat([out[i].detach().to("cpu", wide).reshape(-1) for i in some])  # type: ignore[union-attr]
        values: np.ndarray = flat.numpy()
        grid.mean_over_data(values)
        for i, part in zip(some, flat.split([out[i].numel() for i in some]), strict=True):  # type: ignore[union-attr]
            g = out[i]
            assert g is not None
            out[i] = part.reshape(g.shape).to(g.device, dtype)
    return [
        torch.view_as_complex(g) if is_pair and g is not None else g for g, is_pair in zip(out, paired, strict=True)
    ]

"""Calls of a user's methods on copies of data, recording what they write, leave out or change."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from pint_fem.all_at_once.callbacks import require_nothing
from pint_fem.all_at_once.propagator import Propagator
from pint_fem.mgrit.checks.report import Space, UserError, patterns, raise_first
from pint_fem.mgrit.transfer import Transfer

__all__ = ["Call", "LevelCalls", "TransferCalls", "has_method"]

GUESS_CALLS = 200
"""Calls after which a step that uses its guess must have converged."""
_MARK = np.uint64(0x7FF8_0000_DEAD_BEEF)
"""A NaN that no arithmetic makes: an entry with it was not written, or computed from one that was not."""


@dataclass(frozen=True)
class Call:
    """The result of a call and the numbers of its entries that are not written or not finite, of entries of the input
    that have changed, and of those between the rows of ``out`` and the input.
    """

    out: np.ndarray
    missing: int
    infinite: int
    touched: int
    spilled: int


class LevelCalls:
    """The methods of one level's propagator, and data for them.

    Parameters
    ----------
    propagator
        The user's.
    index, nsteps
        Number of the level and of its steps.
    strides
        Strides of the step ranges that MGRIT calls with.
    state
        A typical state of the level.
    space
        Sums over the ranks that share it.
    seed, rtol
        Seed of the data; accuracy of repeated steps.
    """

    def __init__(
        self,
        propagator: Propagator,
        index: int,
        nsteps: int,
        strides: Sequence[int],
        state: np.ndarray,
        space: Space,
        seed: int,
        rtol: float,
    ):
        self.propagator, self.index, self.nsteps, self.space, self.rtol = propagator, index, nsteps, space, rtol
        self.where, self.state = f"level {index}", state
        self.uses_guess = bool(getattr(propagator, "uses_guess", False))
        several = max(5, int(getattr(propagator, "block", 0) or 0) + 1)  # more than a full block
        #: At both ends of the level: one step, and several with each stride.
        self.ranges = []
        for m in sorted({1, *strides}):
            for k in (1, min(several, -(-nsteps // m))):
                self.ranges += [range(0, (k - 1) * m + 1, m), range(nsteps - 1 - (k - 1) * m, nsteps, m)]
        self.ranges = list(dict.fromkeys(self.ranges))
        #: At both ends of the level, for derivatives: two steps and one.
        self.ends = [range(min(2, nsteps)), range(nsteps - 1, nsteps)]
        count = max(map(len, self.ranges)) + 1
        squares, size = space.total(np.array([np.sum(state * state), state.size]))
        self.scale = math.sqrt(squares / size) if squares else 1.0
        rng = np.random.default_rng([seed, index, space.comm.rank])
        shape = (count, *state.shape)
        #: States within a tenth of the typical size around the typical one; directions and adjoints of its size.
        self.u = state + 0.1 * self.scale * rng.uniform(-1, 1, shape)
        self.directions, self.adjoints = self.scale * rng.standard_normal((2, *shape))

    def has(self, method: str) -> bool:
        """Whether the propagator has a method (``None`` is no derivative)."""
        return has_method(self.propagator, method)

    def inputs(self, method: str, k: int, *, last: bool = False) -> tuple[np.ndarray, ...]:
        """Input of ``k`` steps, from the first or the last of the data."""
        second = {"step": (), "tangent": (self.directions,), "adjoint": (self.adjoints,)}[method]
        return tuple(x[-k:] if last else x[:k] for x in (self.u, *second))

    def call(
        self,
        method: str,
        steps: range,
        *inputs: np.ndarray,
        guess: np.ndarray | None = None,
        stride: int = 1,
        out_stride: int = 1,
    ) -> Call:
        """Call a method with arrays of some strides over rows; the guess is the state before the step by default."""
        laid = [_laid_out(x, stride) for x in inputs]
        if method != "step" or not self.uses_guess:
            guess = _marked((len(steps), *self.state.shape))
        buffer, out = _laid_out(inputs[0] if guess is None else guess, out_stride)
        function = lambda: getattr(self.propagator, method)(steps, *(view for _, view in laid), out)
        _call(self.space, f"{method}({steps})", lambda: require_nothing(method, function()))
        result, missing = np.array(out), int(_has_mark(out).sum())
        infinite = int((~np.isfinite(out)).sum()) - missing
        touched = sum(int((patterns(view) != patterns(x)).sum()) for (_, view), x in zip(laid, inputs, strict=True))
        spilled = 0
        for whole, view in [(buffer, out), *laid]:
            view[...] = _marked(view.shape)
            spilled += int((~_has_mark(whole)).sum())
        return Call(result, *map(int, self.space.total(np.array([missing, infinite, touched, spilled]))))

    def apply(self, method: str, steps: range, *inputs: np.ndarray, guess: np.ndarray | None = None) -> np.ndarray:
        """The result of a call, which has to be complete and finite."""
        c = self.call(method, steps, *inputs, guess=guess)
        if c.missing or c.infinite:
            raise UserError(f"{method}({steps}) gives values that are not {'written' if c.missing else 'finite'}")
        return c.out

    def phi(self, steps: range, u: np.ndarray) -> np.ndarray:
        """The exact step: one that uses a guess is repeated from its own result until that does not change."""
        out = self.apply("step", steps, u)
        for _ in range(GUESS_CALLS if self.uses_guess else 0):
            last, out = out, self.apply("step", steps, u, guess=out)
            if self.space.difference(out, last) <= 0.01 * self.rtol:
                break
        return out

    def trajectory(self, nsteps: int) -> np.ndarray:
        """Exact steps one after another from the typical state, ``(nsteps + 1, *state)``."""
        U = np.empty((nsteps + 1, *self.state.shape))
        U[0] = self.state
        for n in range(nsteps):
            U[n + 1 : n + 2] = self.phi(range(n, n + 1), U[n : n + 1])
        return U

    def sweep(self, first: int, u0: np.ndarray, guess: np.ndarray, G: np.ndarray | None, stride: int = 1) -> np.ndarray:
        """All rows of a ``sweep`` from ``u0``; the rows behind it hold the guess where one is used."""
        start, error, name = _marked((len(guess) + 1, *self.state.shape)), None, f"sweep({first}, ...)"
        start[0] = u0
        if self.uses_guess:
            start[1:] = guess
        U, g = _laid_out(start, stride)[1], None if G is None else _laid_out(G, stride)[1]
        _call(self.space, name, lambda: require_nothing("sweep", self.propagator.sweep(first, U, g)))
        if (patterns(U[:1]) != patterns(start[:1])).any():
            error = f"{name} changes U[0]"
        elif G is not None and (patterns(g) != patterns(G)).any():
            error = f"{name} changes G"
        elif _has_mark(U).any():
            error = f"{name} does not write all of U"
        elif not np.isfinite(U).all():
            error = f"{name} gives values that are not finite"
        raise_first(self.space.comm, error)
        return np.array(U)


class TransferCalls:
    """The maps of a transfer, on copies.

    Parameters
    ----------
    transfer
        A :class:`~pint_fem.mgrit.transfer.Transfer`.
    space
        Sums over the ranks that share a state.
    """

    def __init__(self, transfer: Transfer, space: Space):
        self.transfer, self.space = transfer, space

    def __call__(
        self, name: str, block: np.ndarray, shape: tuple[int, ...] | None = None, stride: int = 1
    ) -> np.ndarray:
        """Apply a map; ``shape``, where it is given, is that of a state in the result."""
        view, error = _laid_out(block, stride)[1], None
        function = lambda: np.array(getattr(self.transfer, name)(view), dtype=float)
        result = _call(self.space, f"{name} of {len(block)} states", function)
        expected = (len(block), *(result.shape[1:] if shape is None else shape))
        if result.shape != expected:
            error = f"{name} takes {block.shape} to {result.shape}: it should be {expected}"
        elif not np.isfinite(result).all():
            error = f"{name} gives values that are not finite"
        elif (patterns(view) != patterns(block)).any():
            error = f"{name} changes its input"
        raise_first(self.space.comm, error)
        return result


def has_method(propagator: Propagator, method: str) -> bool:
    """Whether a propagator has a method; for ``sweep``, whether MGRIT would call it."""
    return hasattr(propagator, method) and (method == "sweep" or getattr(propagator, method) is not None)


def _call(space: Space, name: str, function: Callable):
    """Call a user's function; what it raises on one rank is an error on all that share the state."""
    result = error = None
    try:
        result = function()
    except Exception as failure:
        error = f"{name} raised {type(failure).__name__}: {failure}"
    raise_first(space.comm, error)
    return result


def _marked(shape) -> np.ndarray:
    """An array of marks, for a result to be written to."""
    return np.full(shape, _MARK).view(float)


def _has_mark(array: np.ndarray) -> np.ndarray:
    """Where an array has marks."""
    return patterns(array) == _MARK


def _laid_out(values: np.ndarray, stride: int) -> tuple[np.ndarray, np.ndarray]:
    """A buffer of marks and a view of it with a stride over rows that holds a block."""
    buffer = _marked((abs(stride) * len(values), *values.shape[1:]))
    view = buffer[::stride]
    view.view(np.uint64)[...] = patterns(values)
    return buffer, view

"""Calls of a user's methods on one level, on copies, with everything recorded that a caller must not find out later."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from pint_fem.all_at_once.callbacks import require_nothing
from pint_fem.mgrit.checks.report import Space, UserError, bits, lay, marks, unwritten

__all__ = ["Call", "LevelCalls", "TransferCalls", "has_method"]

GUESS_CALLS = 200
"""Calls after which a step that uses its guess must have converged."""


@dataclass(frozen=True)
class Call:
    """One call: the result and the numbers of its entries that are not written or not finite, of entries of the input
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
        Of the level.
    strides
        Of step ranges, as MGRIT calls with them.
    state
        A typical state of the level.
    space
        Sums over the ranks that share it.
    seed, rtol
        Of the data; of repeated steps.
    """

    def __init__(self, propagator, index: int, nsteps: int, strides, state: np.ndarray, space: Space, seed, rtol):
        self.propagator, self.index, self.nsteps, self.space, self.rtol = propagator, index, nsteps, space, rtol
        self.where, self.state = f"level {index}", state
        self.uses_guess = bool(getattr(propagator, "uses_guess", False))
        several = max(5, int(getattr(propagator, "block", 0) or 0) + 1)  # more than a full block
        self.ranges = list(dict.fromkeys(_ranges(nsteps, sorted({1, *strides}), several)))
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

    def _agree(self, error: str | None) -> None:
        """Raise on all ranks that share the state if one has an error: they go on together."""
        error = next((e for e in self.space.gather(error) if e), None)
        if error:
            raise UserError(error)

    def call(self, method: str, steps: range, *inputs, guess=None, stride: int = 1, out_stride: int = 1) -> Call:
        """Call a method with arrays of some strides over rows; the guess is the state before the step by default."""
        k, error = len(steps), None
        laid = [lay(x, stride) for x in inputs]
        if method != "step" or not self.uses_guess:
            guess = unwritten((k, *self.state.shape))
        buffer, out = lay(inputs[0] if guess is None else guess, out_stride)
        try:
            require_nothing(method, getattr(self.propagator, method)(steps, *(view for _, view in laid), out))
        except Exception as failure:
            error = f"{method}({steps}) raised {type(failure).__name__}: {failure}"
        self._agree(error)
        result, missing = np.array(out), int(marks(out).sum())
        infinite = int((~np.isfinite(out)).sum()) - missing
        touched = sum(int((bits(view) != bits(x)).sum()) for (_, view), x in zip(laid, inputs, strict=True))
        spilled = 0
        for whole, view in [(buffer, out), *laid]:
            view[...] = unwritten(view.shape)
            spilled += int((~marks(whole)).sum())
        return Call(result, *map(int, self.space.total(np.array([missing, infinite, touched, spilled]))))

    def apply(self, method: str, steps: range, *inputs, guess=None) -> np.ndarray:
        """The result of a call, which must be there."""
        c = self.call(method, steps, *inputs, guess=guess)
        if c.missing or c.infinite:
            raise UserError(f"{method}({steps}) gives values that are not {'written' if c.missing else 'finite'}")
        return c.out

    def phi(self, steps: range, u: np.ndarray) -> np.ndarray:
        """The exact step: where it uses a guess, repeated from its own result until that stays."""
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
        """``sweep`` from ``u0``; rows behind it hold the guess where one is used. All rows are returned."""
        k, error = len(guess), None
        start = unwritten((k + 1, *self.state.shape))
        start[0] = u0
        if self.uses_guess:
            start[1:] = guess
        U, g = lay(start, stride)[1], None if G is None else lay(G, stride)[1]
        try:
            require_nothing("sweep", self.propagator.sweep(first, U, g))
        except Exception as failure:
            error = f"sweep({first}, ...) raised {type(failure).__name__}: {failure}"
        self._agree(error)
        if (bits(U[:1]) != bits(start[:1])).any():
            error = f"sweep({first}, ...) changes U[0]"
        elif G is not None and (bits(g) != bits(G)).any():
            error = f"sweep({first}, ...) changes G"
        elif marks(U).any():
            error = f"sweep({first}, ...) does not write all of U"
        elif not np.isfinite(U).all():
            error = f"sweep({first}, ...) gives values that are not finite"
        self._agree(error)
        return np.array(U)


def has_method(propagator, method: str) -> bool:
    """Whether a propagator has a method; for ``sweep``, whether MGRIT would call it."""
    return hasattr(propagator, method) and (method == "sweep" or getattr(propagator, method) is not None)


def _ranges(nsteps: int, strides, several: int):
    """Step ranges at both ends of a level: one step, and several with each stride."""
    for m in strides:
        for k in (1, min(several, -(-nsteps // m))):
            yield range(0, (k - 1) * m + 1, m)
            yield range(nsteps - 1 - (k - 1) * m, nsteps, m)


class TransferCalls:
    """The maps of a transfer, on copies.

    Parameters
    ----------
    transfer
        A :class:`~pint_fem.mgrit.transfer.Transfer`.
    space
        Sums over the ranks that share a state.
    """

    def __init__(self, transfer, space: Space):
        self.transfer, self.space = transfer, space

    def has(self, name: str) -> bool:
        """Whether the transfer has a map."""
        return getattr(self.transfer, name, None) is not None

    def __call__(self, name: str, block: np.ndarray, shape: tuple[int, ...] | None = None, stride: int = 1):
        """Apply a map; ``shape`` is that of a state in the result, if known."""
        view, error, result = lay(block, stride)[1], None, None
        try:
            result = np.array(getattr(self.transfer, name)(view), dtype=float)
        except Exception as failure:
            error = f"{name} of {len(block)} states raised {type(failure).__name__}: {failure}"
        else:
            wanted = (len(block), *(result.shape[1:] if shape is None else shape))
            if result.shape != wanted:
                error = f"{name} takes {block.shape} to {result.shape}: it should be {wanted}"
            elif not np.isfinite(result).all():
                error = f"{name} gives values that are not finite"
            elif (bits(view) != bits(block)).any():
                error = f"{name} changes its input"
        error = next((e for e in self.space.gather(error) if e), None)
        if error:
            raise UserError(error)
        return result

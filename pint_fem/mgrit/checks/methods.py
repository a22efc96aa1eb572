r"""Measurements for the methods of a propagator and the maps of a transfer.

Of a method: what it writes and leaves alone, whether results depend on earlier calls, on the block or on strides; of a
``sweep`` its difference from steps; of derivatives linearity, Taylor remainders of the tangent and products with the
adjoint; of transfers shapes, linearity and transposes.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from pint_fem.mgrit.checks.calls import LevelCalls, TransferCalls
from pint_fem.mgrit.checks.report import Found, Runner, UserError
from pint_fem.mgrit.transfer import Transfer

__all__ = ["MAPS", "check_adjoint", "check_method", "check_sweep", "check_tangent", "check_transfer"]
__all__ += ["fixed_point", "in_turn"]

MAPS = ("restrict", "prolong")
TAYLOR_ORDER = 1.8
"""Least order of Taylor remainders: 2 but for higher terms."""
TAYLOR_STEPS = 0.1 * 4.0 ** -np.arange(7)


def check_method(run: Runner, level: LevelCalls, method: str, between: list[str]) -> tuple[bool, bool]:
    """Check a step, tangent or adjoint: whether results are right, and whether input is left alone."""
    calls, where, space, longest = [], level.where, level.space, max(level.ranges, key=len)

    def call(steps: range, **kwargs: Any):
        return level.call(method, steps, *level.inputs(method, len(steps)), **kwargs)

    def runs():
        calls.extend(call(steps) for steps in level.ranges)
        return Found()

    def missing():
        if method != "step" or not level.uses_guess:
            return Found(sum(c.missing for c in calls))
        guess = level.u[-len(longest) :]  # an entry that keeps every guess has not been written
        guesses = guess, guess + 0.1 * level.directions[: len(longest)]
        kept = [call(longest, guess=g).out == g for g in guesses]
        return Found(space.total((kept[0] & kept[1]).sum()))

    def twice():
        first = call(longest).out
        results = [call(longest).out]
        for other in between:
            for steps in (longest[:3], level.ranges[0]):
                level.call(other, steps, *level.inputs(other, len(steps), last=True))
        results.append(call(longest).out)
        return Found(sum(not space.same(first, r) for r in results))

    def strided():
        few, others = longest[:3], []
        plain = call(few).out
        for stride, out_stride in ((2, 2), (-1, -1), (3, 1), (1, -2)):
            c = call(few, stride=stride, out_stride=out_stride)
            if c.spilled:
                raise UserError(f"{method} writes between the rows it is given")
            if c.missing or c.infinite:
                raise UserError(f"{method} does not write a strided out")
            others.append(c.out)
        return space.compare(plain, *others)

    def singles():
        found = [Found(0.0)]
        for steps in level.ranges:
            if len(steps) > 1:
                inputs = level.inputs(method, len(steps))
                part = lambda i, steps=steps, inputs=inputs: level.apply(
                    method, range(steps[i], steps[i] + 1, steps.step), *(x[i : i + 1] for x in inputs)
                )
                found.append(space.compare(np.concatenate([part(i) for i in range(len(steps))]), call(steps).out))
        return Found(max(f.value for f in found), max(f.note for f in found))

    ran = run(where, f"{method} runs", runs)
    right = run(where, f"{method} writes all of out", missing, at_most=0, unit="not written", after=ran)
    finite = lambda: Found(sum(c.infinite for c in calls))
    right &= run(where, f"{method} gives finite values", finite, at_most=0, unit="not finite", after=ran)
    touched = lambda: Found(sum(c.touched for c in calls))
    alone = run(where, f"{method} leaves its input alone", touched, at_most=0, unit="changed", after=ran)
    right = run(where, f"{method} twice, bitwise identical", twice, at_most=0, unit="changed", after=right)
    both = run(where, f"{method} on strided rows", strided, at_most=level.rtol, after=right)
    both &= run(where, f"{method}, block against single", singles, at_most=level.rtol, after=right)
    return right and both, alone


def in_turn(level: LevelCalls, present: list[str]) -> Found:
    """Count changes of a method's result after calls of the methods at other states, which must have no effect."""
    steps, changed = range(min(2, level.nsteps)), 0
    call = lambda method, last: level.apply(method, steps, *level.inputs(method, len(steps), last=last))
    for one in present:
        before = call(one, False)
        for other in present:
            for last in (True, False):
                call(other, last)
                changed += not level.space.same(before, call(one, False))
    return Found(changed)


def fixed_point(level: LevelCalls) -> Found:
    """Change of the converged result of a step with a guess by one more step from it."""
    worst = 0.0
    for steps in level.ranges:
        u = level.u[: len(steps)]
        exact = level.phi(steps, u)
        worst = max(worst, level.space.difference(level.apply("step", steps, u, guess=exact), exact))
    return Found(worst)


def check_sweep(run: Runner, level: LevelCalls, *, after: bool) -> bool:
    """Check ``sweep`` against ``step``, and in parts as on several ranks."""
    k = min(5, level.nsteps, len(level.u) - 1)
    guess, G = level.u[1 : k + 1], 0.1 * level.directions[:k]

    def against_step(G: np.ndarray | None):
        worst = 0.0
        for first in {0, level.nsteps - k}:
            U = np.empty((k + 1, *level.state.shape))
            U[0] = level.u[0]
            for i, n in enumerate(range(first, first + k)):
                U[i + 1 : i + 2] = level.apply("step", range(n, n + 1), U[i : i + 1], guess=guess[i : i + 1])
                if G is not None:
                    U[i + 1] += G[i]
            for stride in (1, -1):
                worst = max(worst, level.space.difference(level.sweep(first, level.u[0], guess, G, stride), U))
        return Found(worst)

    def in_parts():
        whole, cut = level.sweep(0, level.u[0], guess, G), (k + 1) // 2
        left = level.sweep(0, level.u[0], guess[:cut], G[:cut])
        right = level.sweep(cut, left[-1], guess[cut:], G[cut:]) if cut < k else left[-1:]
        return level.space.compare(whole, np.concatenate([left, right[1:]]))

    limit = dict(at_most=level.rtol, after=after)
    good = run(level.where, "sweep against step", lambda: against_step(None), **limit)
    good &= run(level.where, "sweep against step, with G", lambda: against_step(G), **limit)
    good &= run(level.where, "sweep in parts", in_parts, at_most=level.rtol, after=good)
    return good


# -- derivatives -------------------------------------------------------------------------------------------------------
def _linear(level: LevelCalls, method: str, d: np.ndarray) -> Found:
    """Linearity of a derivative in its direction."""
    gap = lambda steps, k: level.space.linearity(
        lambda x: level.apply(method, steps, level.u[:k], x), d[:k], d[::-1][:k]
    )
    return Found(max(gap(steps, len(steps)) for steps in level.ends))


def check_tangent(run: Runner, level: LevelCalls, *, after: bool) -> bool:
    """Check linearity and Taylor remainders: whether the tangent is the derivative."""
    linear = lambda: _linear(level, "tangent", level.directions)
    ok = run(level.where, "tangent is linear in du", linear, at_most=level.rtol, after=after)
    return run(level.where, "tangent, Taylor remainder: order", lambda: _taylor(level), at_least=TAYLOR_ORDER, after=ok)


def _taylor(level: LevelCalls) -> Found:
    """Order at the smallest ``h`` whose remainder is above round-off, the least of some steps; infinite if affine."""
    least, note = math.inf, "affine: no remainder"
    for steps in level.ends:
        k, norms = len(steps), level.space.norms
        u, d = level.u[:k], level.directions[:k]
        base, slope = level.phi(steps, u), level.apply("tangent", steps, u, d)
        R = np.array([norms(level.phi(steps, u + h * d) - base - h * slope) for h in TAYLOR_STEPS])
        # far enough above round-off that the next remainder, of order 2, is above it as well
        floor = 100 * level.rtol * np.array([norms(base) + h * norms(slope) for h in TAYLOR_STEPS])
        for r, f in zip(R.T, floor.T, strict=True):
            pairs = int(np.argmin(np.append(r[:-1] > f[:-1], False)))
            if not pairs:
                continue
            with np.errstate(divide="ignore"):
                orders = np.log(r[:pairs] / r[1 : pairs + 1]) / math.log(4)
            if orders[-1] < least:
                least = float(orders[-1])
                note = f"orders {' '.join(f'{o:.2f}' for o in orders)}, first remainder {r[0]:.1e}"
    return Found(least, note)


def check_adjoint(run: Runner, level: LevelCalls, *, tangent: bool, after: bool) -> bool:
    """Check linearity and ``<T d, lam> = <d, A lam>``, by the tangent where that is right, else by differences."""

    def tangent_or_differences(steps: range, u: np.ndarray, d):
        if tangent:
            return level.apply("tangent", steps, u, d)
        h = 0.1 * level.rtol**0.2  # of order 4: exact for affine steps
        at = lambda x: level.phi(steps, u + x * h * d)
        return (8 * (at(1) - at(-1)) - (at(2) - at(-2))) / (12 * h)

    def products():
        worst = 0.0
        for steps in level.ends:
            u, d, lam = (x[: len(steps)] for x in (level.u, level.directions, level.adjoints))
            Td = tangent_or_differences(steps, u, d)
            worst = max(worst, level.space.transposition(d, Td, lam, level.apply("adjoint", steps, u, lam)))
        return Found(worst)

    linear = lambda: _linear(level, "adjoint", level.adjoints)
    ok = run(level.where, "adjoint is linear in lam", linear, at_most=level.rtol, after=after)
    name, limit = ("tangent", level.rtol) if tangent else ("differences of steps", math.sqrt(level.rtol))
    return run(level.where, f"adjoint against {name}", products, at_most=limit, after=ok)


# -- transfers ---------------------------------------------------------------------------------------------------------
def check_transfer(run: Runner, transfer: Transfer, fine: LevelCalls, seed: int) -> tuple[np.ndarray | None, bool]:
    """Check a transfer's maps; a coarse state, or ``None``, and whether all is right."""
    maps, where = TransferCalls(transfer, fine.space), f"to level {fine.index + 1}"
    space, limit = fine.space, fine.rtol
    rng = np.random.default_rng([seed, fine.index, space.comm.rank, 1])
    data, sound, coarse = {"restrict": fine.u[:3]}, True, None

    def shapes(name):
        block = data[name]
        target = maps(name, block, None if name == "restrict" else fine.state.shape).shape[1:]
        for part in (block[:1], block[:0]):
            maps(name, part, target)
        if name == "restrict":
            data["state"] = maps(name, fine.state[None])[0]
            data["prolong"] = rng.standard_normal((len(block), *target))
        return Found()

    def singles(name):
        block = data[name]
        one = np.concatenate([maps(name, block[i : i + 1]) for i in range(len(block))])
        return space.compare(maps(name, block), one, *[maps(name, block, stride=s) for s in (2, -1)])

    def transpose(name):
        a = data[name]
        image = maps(name, a)
        y = rng.standard_normal(image.shape)
        return Found(space.transposition(a, image, y, maps(f"{name}_transposed", y, a.shape[1:])))

    def there_and_back():
        x = data["prolong"]
        return Found(space.difference(maps("restrict", maps("prolong", x)), x), "relative difference")

    for name in MAPS:
        ok = run(where, f"{name} runs, shapes", lambda name=name: shapes(name), after=sound)
        if ok and name == "restrict":  # on all ranks
            coarse = data["state"]
        linear = lambda name=name: Found(space.linearity(lambda x: maps(name, x), data[name], data[name][::-1]))
        is_linear = run(where, f"{name} is linear", linear, at_most=limit, after=ok)
        single = f"{name}, block against single"
        ok = run(where, single, lambda name=name: singles(name), at_most=limit, after=ok) and is_linear
        if getattr(transfer, f"{name}_transposed", None) is not None:
            run(where, f"{name}_transposed", lambda name=name: transpose(name), at_most=limit, after=ok)
        else:
            run.add(where, f"{name}_transposed", "not there", "adjoints need it")
        sound &= ok
    run(where, "restrict(prolong(x)) against x", there_and_back, after=sound)
    return coarse, sound

"""What holds for every method of a propagator, for ``sweep``, and for steps that use a guess."""

from __future__ import annotations

import numpy as np

from pint_fem.mgrit.checks.calls import LevelCalls
from pint_fem.mgrit.checks.report import RANKS, Found, Runner, UserError

__all__ = ["check_method", "check_sweep", "fixed_point", "in_turn"]


def check_method(run: Runner, level: LevelCalls, method: str, between: list[str]) -> tuple[bool, bool]:
    """What holds for step, tangent and adjoint alike: whether results are right, and whether input is left alone."""
    calls, where, longest = [], level.where, max(level.ranges, key=len)

    def call(steps, **kwargs):
        return level.call(method, steps, *level.inputs(method, len(steps)), **kwargs)

    def runs():
        calls.extend(call(steps) for steps in level.ranges)
        return Found()

    def missing():
        if method != "step" or not level.uses_guess:
            return Found(sum(c.missing for c in calls))
        guess = level.u[-len(longest) :]  # an entry that stays as it is whatever it is has not been written
        guesses = guess, guess + 0.1 * level.directions[: len(longest)]
        kept = [call(longest, guess=g).out == g for g in guesses]
        return Found(level.space.total((kept[0] & kept[1]).sum()))

    def twice():
        first = call(longest).out
        results = [call(longest).out]
        for other in between:
            for steps in (longest[:3], level.ranges[0]):
                level.call(other, steps, *level.inputs(other, len(steps), last=True))
        results.append(call(longest).out)
        return Found(sum(not level.space.same(first, r) for r in results))

    def strided():
        few = longest[:3]
        plain, worst, same = call(few).out, 0.0, True
        for stride, out_stride in ((2, 2), (-1, -1), (3, 1), (1, -2)):
            c = call(few, stride=stride, out_stride=out_stride)
            if c.spilled:
                raise UserError(f"{method} writes between the rows it is given")
            if c.missing or c.infinite:
                raise UserError(f"{method} does not write a strided out")
            worst = max(worst, level.space.difference(c.out, plain))
            same &= level.space.same(c.out, plain)
        return Found(worst, "" if same else RANKS)

    def singles():
        worst, same = 0.0, True
        for steps in level.ranges:
            if len(steps) == 1:
                continue
            block = call(steps).out
            inputs = level.inputs(method, len(steps))
            one = [
                level.apply(method, range(n, n + 1, steps.step), *(x[i : i + 1] for x in inputs))
                for i, n in enumerate(steps)
            ]
            one = np.concatenate(one)
            worst = max(worst, level.space.difference(block, one))
            same &= level.space.same(block, one)
        return Found(worst, "" if same else RANKS)

    ran = run(where, f"{method} runs", runs)
    right = run(where, f"{method} writes all of out", missing, at_most=0, unit="not written", after=ran)
    finite = lambda: Found(sum(c.infinite for c in calls))
    right &= run(where, f"{method} gives finite values", finite, at_most=0, unit="not finite", after=ran)
    touched = lambda: Found(sum(c.touched for c in calls))
    alone = run(where, f"{method} leaves its input alone", touched, at_most=0, unit="changed", after=ran)
    right = run(where, f"{method} twice, same bits", twice, at_most=0, unit="changed", after=right)
    both = run(where, f"{method} on strided rows", strided, at_most=level.rtol, after=right)
    both &= run(where, f"{method}, block against single", singles, at_most=level.rtol, after=right)
    return right and both, alone


def in_turn(level: LevelCalls, present: list[str]) -> Found:
    """Derivatives at other states must leave nothing behind that a step, or another derivative, sees."""
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
    """Change of the converged result by one more step from it."""
    worst = 0.0
    for steps in level.ranges:
        u = level.u[: len(steps)]
        exact = level.phi(steps, u)
        worst = max(worst, level.space.difference(level.apply("step", steps, u, guess=exact), exact))
    return Found(worst)


def check_sweep(run: Runner, level: LevelCalls, *, after: bool) -> bool:
    """``sweep`` against ``step``, and in parts as on several ranks."""
    k = min(5, level.nsteps, len(level.u) - 1)
    guess, G = level.u[1 : k + 1], 0.1 * level.directions[:k]

    def against_step(G):
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
        parts = np.concatenate([left, right[1:]])
        return Found(level.space.difference(parts, whole), "" if level.space.same(parts, whole) else RANKS)

    limit = dict(at_most=level.rtol, after=after)
    good = run(level.where, "sweep against step", lambda: against_step(None), **limit)
    good &= run(level.where, "sweep against step, with G", lambda: against_step(G), **limit)
    good &= run(level.where, "sweep in parts", in_parts, at_most=level.rtol, after=good)
    return good

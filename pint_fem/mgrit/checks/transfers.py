"""A transfer's maps: shapes, linearity, independence of the block, transposes."""

from __future__ import annotations

import numpy as np

from pint_fem.mgrit.checks.calls import LevelCalls, TransferCalls
from pint_fem.mgrit.checks.report import RANKS, Found, Runner, ratio
from pint_fem.mgrit.transfer import Transfer

__all__ = ["MAPS", "check_transfer"]

MAPS = ("restrict", "prolong")


def check_transfer(run: Runner, transfer: Transfer, fine: LevelCalls, seed: int) -> tuple[np.ndarray | None, bool]:
    """A transfer's maps: a coarse state, or ``None``, and whether all is right."""
    maps, where = TransferCalls(transfer, fine.space), f"to level {fine.index + 1}"
    space, rtol = fine.space, fine.rtol
    rng = np.random.default_rng([seed, fine.index, space.comm.rank, 1])
    data, sound, coarse = {"restrict": fine.u[:3]}, True, None

    def shape_of(name):
        def measure():
            block, target = data[name], None if name == "restrict" else fine.state.shape
            result = maps(name, block, target)
            target = result.shape[1:]
            for part in (block[:1], block[:0]):
                maps(name, part, target)
            if name == "restrict":
                data["state"] = maps(name, fine.state[None])[0]
                data["prolong"] = rng.standard_normal((len(block), *target))
            return Found()

        return measure

    def singles(name):
        block = data[name]
        whole = maps(name, block)
        one = np.concatenate([maps(name, block[i : i + 1]) for i in range(len(block))])
        rest = [maps(name, block, stride=s) for s in (2, -1)]
        worst = max(space.difference(r, whole) for r in (one, *rest))
        return Found(worst, "" if all(space.same(r, whole) for r in (one, *rest)) else RANKS)

    def linear(name):
        a, b = data[name], data[name][::-1]
        A, B, both = (maps(name, x) for x in (a, b, 2 * a - 3 * b))
        size = 2 * space.norms(A).max() + 3 * space.norms(B).max()
        gap = space.norms(both - (2 * A - 3 * B)).max()
        return Found(ratio(gap, size))

    def transpose(name):
        a = data[name]
        image = maps(name, a)
        y = rng.standard_normal(image.shape)
        back = maps(f"{name}_transposed", y, a.shape[1:])
        gap = np.abs(space.dots(image, y) - space.dots(a, back))
        size = space.norms(image) * space.norms(y) + space.norms(a) * space.norms(back)
        return Found(max(map(ratio, gap, size)))

    for name in MAPS:
        ok = run(where, f"{name} runs, shapes", shape_of(name), after=sound)
        if ok and name == "restrict":  # on all ranks
            coarse = data["state"]
        ok = run(where, f"{name} is linear", lambda name=name: linear(name), at_most=rtol, after=ok) & run(
            where, f"{name}, block against single", lambda name=name: singles(name), at_most=rtol, after=ok
        )
        if maps.has(f"{name}_transposed"):
            run(where, f"{name}_transposed", lambda name=name: transpose(name), at_most=rtol, after=ok)
        else:
            run.say(where, f"{name}_transposed", "not there", "adjoints need it")
        sound &= ok
    there_and_back = lambda: Found(
        space.difference(maps("restrict", maps("prolong", data["prolong"])), data["prolong"]), "relative difference"
    )
    run(where, "restrict(prolong(x)) against x", there_and_back, after=sound)
    return coarse, sound

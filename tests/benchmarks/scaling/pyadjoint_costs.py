"""Seconds of serial pyadjoint, which the predictions are compared with."""

from __future__ import annotations

from collections.abc import Callable

from pint_fem.scaling.timing import rounds

__all__ = ["pyadjoint_seconds"]


def pyadjoint_seconds(serial: Callable, repeats: int = 2, few: int = 4, many: int = 20) -> dict[str, float]:
    """Seconds a step of pyadjoint on the serial tape, and those that do not depend on the steps (readings), from tapes
    of two lengths.
    """

    def actions(steps: int) -> dict[tuple, Callable]:
        tape = serial(steps)
        direction = tape.q.copy(deepcopy=True).assign(1.0)
        return {
            ("value", steps): lambda: tape.rf(tape.q),
            ("gradient", steps): tape.rf.derivative,
            ("hessian", steps): lambda: tape.rf.hessian(direction),
        }

    found = {name: m.seconds for name, m in rounds(actions(few) | actions(many), repeats).items()}
    out: dict[str, float] = {"steps": many}
    for task in ("value", "gradient", "hessian"):
        short, long = found[task, few], found[task, many]
        out[task] = (long - short) / (many - few) if long > short else long / many
        out[f"{task} fixed"] = max(short - few * out[task], 0.0)
    return out

"""Refusal of options out of range, before any work starts."""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Integral, Real

import numpy as np

from pint_fem.errors import InputError

__all__ = [
    "check",
    "check_bounds",
    "check_callable",
    "check_checkpoint",
    "check_choice",
    "check_first_guess",
    "check_newton",
    "check_radii",
    "is_count",
]


def check(name: str, value: object, allowed: str, accepts: Callable[[Real], bool]) -> None:
    """Refuse an option that is no real number or out of range.

    Raises
    ------
    InputError
        With what was given and what would do.
    """
    if isinstance(value, bool) or not isinstance(value, Real) or not accepts(value):
        raise InputError(f"{name} = {value!r} is refused: give {allowed}")


def is_count(low: int) -> Callable[[Real], bool]:
    """Whether a number is an integer from `low` on."""
    return lambda v: isinstance(v, Integral) and v >= low


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Refuse what is none of the names."""
    if value not in choices:
        raise InputError(f"{name} = {value!r} is refused: give {' or '.join(map(repr, choices))}")


def check_callable(name: str, value: object) -> None:
    """Refuse what is neither None nor callable."""
    if value is not None and not callable(value):
        raise InputError(f"{name} = {value!r} is refused: give a callable or None")


def check_checkpoint(value: object) -> None:
    """Refuse what can neither save nor load."""
    if value is not None and not all(callable(getattr(value, name, None)) for name in ("save", "load")):
        raise InputError(f"checkpoint = {value!r} is refused: give an object with save and load, or None")


def check_radii(initial_radius: float | None, max_radius: float, min_radius: float) -> None:
    """Refuse radii out of range or order."""
    check("max_radius", max_radius, "a number > 0, infinity included", lambda v: v > 0)
    check("min_radius", min_radius, f"a number in [0, max_radius = {max_radius})", lambda v: 0 <= v < max_radius)
    if initial_radius is not None:
        check(
            "initial_radius",
            initial_radius,
            f"a finite number above min_radius = {min_radius} and up to max_radius = {max_radius}, or None",
            lambda v: min_radius < v <= max_radius and v < math.inf,
        )


def check_newton(
    *,
    gtol_rel: float,
    gtol_abs: float,
    max_it: int,
    radii: tuple[float | None, float, float],
    eta: float,
    hessian: str,
    cg_max_it: int,
    cg_rtol: float | None,
    preconditioner: object,
    preconditioner_memory: int,
    value_rtol: float,
    checkpoint: object,
    monitor: object,
    callback: object,
) -> None:
    """Refuse options that trust-region Newton-CG methods share; ``radii``: see :func:`check_radii`."""
    check("gtol_rel", gtol_rel, "a number in [0, 1)", lambda v: 0 <= v < 1)
    check("gtol_abs", gtol_abs, "a finite number >= 0", lambda v: 0 <= v < math.inf)
    check("max_it", max_it, "an integer >= 0", is_count(0))
    check_radii(*radii)
    check("eta", eta, "a number in [0, 0.25)", lambda v: 0 <= v < 0.25)
    check_choice("hessian", hessian, ("newton", "gauss-newton"))
    check("cg_max_it", cg_max_it, "an integer >= 1", is_count(1))
    if cg_rtol is not None:
        check("cg_rtol", cg_rtol, "a number in (0, 1), or None", lambda v: 0 < v < 1)
    if isinstance(preconditioner, str):
        check_choice("preconditioner", preconditioner, ("limited-memory",))
    else:
        check_callable("preconditioner", preconditioner)
    check("preconditioner_memory", preconditioner_memory, "an integer >= 1", is_count(1))
    check("value_rtol", value_rtol, "a number in [0, 1)", lambda v: 0 <= v < 1)
    check_checkpoint(checkpoint)
    check_callable("monitor", monitor)
    check_callable("callback", callback)


def check_first_guess(x0: np.ndarray) -> None:
    """Refuse what is no vector."""
    if np.ndim(x0) != 1 or np.iscomplexobj(x0) or not _is_real(x0):
        raise InputError(f"x0 of shape {np.shape(x0)} and type {np.asarray(x0).dtype} is refused: give 1-D real array")


def check_bounds(lower: np.ndarray | float, upper: np.ndarray | float) -> None:
    """Refuse bounds that are no numbers."""
    for name, bound in (("lower", lower), ("upper", upper)):
        if not _is_real(bound):
            raise InputError(f"{name} = {bound!r} is refused: give a real number or an array of them")


def _is_real(value: object) -> bool:
    """Whether a value can be an array of floats; text that spells numbers is none."""
    if np.asarray(value).dtype.kind not in "biufO":
        return False
    try:
        np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError):
        return False
    return True

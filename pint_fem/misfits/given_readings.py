"""Copies of a user's readings, their times and weights, and what is required of them.

Missing readings are the masked entries of a ``numpy.ma.MaskedArray``. Copies have zeros in their place, so that two
copies are equal where times, masks, weights and the readings that are there are.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from pint_fem.errors import InputError

__all__ = ["copied_readings", "real_numbers", "require_readings"]

OF_READINGS = ("readings", "missing readings", "weight")
"""Names of the arrays that may change while sensors and times stay."""


def real_numbers(name: str, given: ArrayLike, ndmin: int = 0) -> np.ndarray:
    """A copy of an array of real numbers of which none is missing.

    Raises
    ------
    InputError
        If the entries are no numbers, or some are masked.
    """
    out, mask = _numbers_and_mask(name, given)
    if mask.any():
        raise InputError(f"{name} are masked in places, but only readings may be missing: leave those entries out")
    return np.array(out, ndmin=ndmin)


def _numbers_and_mask(name: str, given: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Copies of an array of real numbers, and of its mask, which is all false where there is none."""
    try:
        masked = np.ma.array(given)  # also of a list of masked arrays
        return np.array(masked.data, float), np.ma.getmaskarray(masked).copy()
    except (TypeError, ValueError) as error:
        raise InputError(f"{name} have to be numbers: {error}") from error


def copied_readings(called: str, times: ArrayLike, values: ArrayLike, weight: ArrayLike) -> dict[str, np.ndarray]:
    """Copies of the user's arrays by name.

    Parameters
    ----------
    called
        What the sensors are called in messages.
    times, values, weight
        As :class:`~pint_fem.misfits.sensor_readings.SensorReadings` takes them.

    Raises
    ------
    InputError
        If there is something that is no number, or times or weights are masked.
    """
    what = f"{called}: times, readings and weight"
    readings, missing = _numbers_and_mask(what, values)
    readings[missing] = 0.0
    return {
        "times": real_numbers(what, times, ndmin=1),
        "readings": readings,
        "missing readings": missing,
        "weight": real_numbers(what, weight),
    }


def require_readings(called: str, given: dict[str, np.ndarray], sensors: int) -> None:
    """Require of copies that their shapes match, that all numbers are finite, that times increase, that weights are not
    negative, and that there is a reading at all; otherwise an ``InputError`` is raised.
    """
    times, data, missing, weight = (given[name] for name in ("times", "readings", "missing readings", "weight"))
    shape = (len(times), sensors)
    if data.shape != shape:
        raise InputError(f"readings have shape {data.shape}: give (times, {called}) = {shape}")
    if weight.shape not in ((), shape[1:], shape):
        raise InputError(
            f"{called}: weight of shape {weight.shape}: give a number, one for each of the {called}, {shape[1:]}, or "
            f"one for each reading, {shape}"
        )
    if not all(np.isfinite(a).all() for name, a in given.items() if name != "weight"):
        raise InputError(
            f"{called}: {', '.join(name for name in given if name not in OF_READINGS)} and readings must be finite "
            "numbers; missing readings are those of a masked array: give numpy.ma.masked_invalid(values)"
        )
    if not np.isfinite(weight).all() or (weight < 0).any():
        wrong = weight[~(np.isfinite(weight) & (weight >= 0))].flat[0]
        raise InputError(
            f"{called}: weight = {wrong:g}: give a finite number that is not negative, such as 1/(variance * readings)"
        )
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        total = (0.5 * weight * np.square(data)).sum() if weight.ndim else 0.5 * weight * np.square(data).sum()
    if not np.isfinite(total):
        raise InputError(
            f"{called}: readings as large as {np.abs(data).max():g} with weight {weight.max():g} overflow in the sum "
            "of squares; give readings in other units, or repair them"
        )
    if len(times) == 0 or (np.diff(times) <= 0).any():
        raise InputError(f"{called}: times of readings must increase")
    if missing.all():
        raise InputError(f"{called}: all {missing.size} readings are missing: give one at least")

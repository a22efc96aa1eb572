"""Sensor readings from a CSV file, checked.

The file is in long format: one reading a line, below a line of column names; blank lines and lines that start with
``#`` are skipped::

    # where this comes from
    sensor,x,y,time,temperature
    0,0.25,0.12,0.015625,0.0374

A problem with several quantities has a column for each of them (``sensor,x,y,time,ex,ey``), one in space a column
``z`` after ``y``.
Every sensor has one reading at every time, so that the readings fill a (times x sensors) array. Reading needs no
finite elements and no communication: each rank reads the file for itself and comes to the same answer or error.
"""

import csv
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pint_fem.errors import InputError
from pint_fem.files import require_regular

__all__ = [
    "COLUMNS",
    "FACTORISE_ONCE",
    "Readings",
    "checked_rows",
    "misfit_weight",
    "noise_deviation",
    "read_readings",
    "reading_lines",
    "readings_of_rows",
    "require_weights",
    "write_readings",
]

LARGEST = 1e100
"""Numbers beyond overflow where their squares are added up."""
COLUMNS = ("sensor", "x", "y", "time", "temperature")

FACTORISE_ONCE = {
    "snes_type": "ksponly",
    "snes_lag_jacobian": -2,
    "snes_lag_preconditioner": -2,
    "mat_type": "aij",
    "ksp_type": "preonly",
    "pc_type": "lu",
    "pc_factor_mat_solver_type": "mumps",
}
"""PETSc options of the runs that made the shipped readings, linear with constant operators: one factorisation."""


@dataclass(frozen=True)
class Readings:
    """Readings of ns sensors at nt times.

    Attributes
    ----------
    points : numpy.ndarray, shape (ns, dim)
        Coordinates of the sensors, two or three, in the order in which the file first names them.
    times : numpy.ndarray, shape (nt,)
        Reading times, ascending.
    values : numpy.ndarray, shape (nt, ns) or (nt, ns, nq)
        ``values[k, s]`` is the temperature at ``points[s]`` and ``times[k]``, or what several columns say. Files have
        all of them; of a ``numpy.ma.MaskedArray`` given in their place masked entries are missing.
    path : pathlib.Path
        The file they come from.
    sensors : tuple of str
        The names of the sensors in the file, ns of them.
    """

    points: np.ndarray
    times: np.ndarray
    values: np.ndarray
    path: Path
    sensors: tuple[str, ...]


def read_readings(path, final_time, columns=COLUMNS) -> Readings:
    """Read and check a file of readings.

    Parameters
    ----------
    path : str or pathlib.Path or Readings
        A CSV file as described in the module's docstring; readings that have been read are returned as they are.
    final_time : float
        End of the simulated interval (0, final_time]; later readings are refused.
    columns : tuple of str
        The line of column names; all after ``time`` are quantities.

    Returns
    -------
    Readings
        With arrays of shapes (ns, dim), (nt,) and (nt, ns), or (nt, ns, nq) for several quantities.

    Raises
    ------
    InputError
        If the file cannot be read, or a line of it cannot be used; the message names the file and the line.
    """
    if isinstance(path, Readings):
        return path
    path = Path(path)
    return readings_of_rows(path, checked_rows(path, columns), final_time, columns)


def checked_rows(path: Path, columns: tuple[str, ...]) -> list[tuple[int, list[str]]]:
    """Return the numbers and the fields of a file's lines of readings, below the checked line of column names.

    Parameters
    ----------
    path
        A CSV file as described in the module's docstring.
    columns
        The line of column names.

    Returns
    -------
    list of (int, list of str)
        At least one; a line has as many fields as there are columns.

    Raises
    ------
    InputError
        If the file cannot be read, has other columns or no readings, or a line has another number of fields.
    """
    expected = ",".join(columns)
    rows = _rows(path, expected)
    line, header = next(rows, (None, None))
    if header is None:
        raise InputError(f"{path}:1: the file is empty (no lines but comments; it should start with '{expected}')")
    if header != list(columns):
        raise InputError(
            f"{path}:{line}: wrong columns (got '{','.join(header)}'; the first line that is not a "
            f"comment should be '{expected}')"
        )
    found = []
    for number, row in rows:
        if len(row) != len(columns):
            raise InputError(
                f"{path}:{number}: wrong number of fields (got {len(row)}; should be {len(columns)}: {expected})"
            )
        found.append((number, row))
    if not found:
        raise InputError(
            f"{path}:{line}: no readings (the file ends after the line of column names; it should go on "
            f"with lines '{expected}')"
        )
    return found


def readings_of_rows(
    path: Path, rows: list[tuple[int, list[str]]], final_time: float, columns: tuple[str, ...] = COLUMNS
) -> Readings:
    """Return the readings in some lines of a file, checked.

    Parameters
    ----------
    path
        The file, for messages.
    rows
        Numbers and fields of its lines, as :func:`checked_rows` returns them.
    final_time, columns
        As for :func:`read_readings`.

    Raises
    ------
    InputError
        If a line cannot be used or a reading is missing; the message names the file and the line.
    """
    points, first_line, values, seen = {}, {}, {}, {}
    for line, row in rows:
        name, point, time, value = _reading(f"{path}:{line}", row, final_time, columns)
        if points.setdefault(name, point) != point:
            raise InputError(
                f"{path}:{line}: sensor {name} has moved (got {point}, but {points[name]} on line "
                f"{first_line[name]}; give another place another sensor name)"
            )
        first_line.setdefault(name, line)
        if (name, time) in seen:
            raise InputError(
                f"{path}:{line}: duplicate reading (sensor {name} at time {time:g} is already on line "
                f"{seen[name, time]}; remove one of them)"
            )
        seen[name, time] = line
        values[name, time] = value
    times = sorted({time for _, time in values})
    for name in points:
        for time in times:
            if (name, time) not in values:
                raise InputError(
                    f"{path}:{first_line[name]}: missing reading (sensor {name}, first named on this "
                    f"line, has none at time {time:g}; every sensor should have one at all "
                    f"{len(times)} times)"
                )
    return Readings(
        points=np.array(list(points.values())),
        times=np.array(times),
        values=np.array([[values[name, time] for name in points] for time in times]),
        path=path,
        sensors=tuple(points),
    )


def _rows(path, expected):
    """Yield (line number, fields) of each line that is neither blank nor a comment."""
    if path.is_dir():
        raise InputError(f"{path}: is a directory (give the CSV file of readings in it)")
    require_regular(path, "readings", links=True)  # every rank reads it: a FIFO would block
    try:
        # utf-8-sig: spreadsheets put a byte order mark in front of the first column name
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError:
        raise InputError(f"{path}: no such file (give a CSV file with columns '{expected}')") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}; give a readable CSV file)") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: not a text file (it is not UTF-8; give a CSV file)") from None
    for line, text in enumerate(lines, start=1):
        if not text.strip() or text.lstrip().startswith("#"):
            continue
        try:
            fields = next(csv.reader([text]))
        except csv.Error as error:
            raise InputError(f"{path}:{line}: not a line of CSV ({error}; give '{expected}')") from None
        yield line, [field.strip() for field in fields]


def _reading(where, row, final_time, columns):
    """Turn the fields of one line into (sensor, coordinates, time, temperature or several quantities)."""
    (name, *fields), dim = row, columns.index("time") - 1
    if not name:
        raise InputError(f"{where}: sensor has no name (got an empty field; give it a number or a name)")
    numbers = [_number(where, *item) for item in zip(columns[1:], fields, strict=True)]
    point, time, value = tuple(numbers[:dim]), numbers[dim], numbers[dim + 1 :]
    if time <= 0:
        raise InputError(
            f"{where}: time is not positive (got {time:g}; readings start after time 0, where the state is known)"
        )
    if time > final_time:
        raise InputError(f"{where}: time is beyond the final time (got {time:g}; should be at most {final_time:g})")
    return name, point, time, value[0] if len(value) == 1 else tuple(value)


def _number(where, column, text):
    try:
        number = float(text)
    except ValueError:
        raise InputError(f"{where}: {column} is not a number (got '{text}'; give one such as 0.25)") from None
    if not math.isfinite(number):
        raise InputError(f"{where}: {column} is not finite (got '{text}'; leave the sensor out or repair the reading)")
    if abs(number) > LARGEST:
        raise InputError(
            f"{where}: {column} is too large (got '{text}'; its square overflows: repair the reading or "
            "give it in other units)"
        )
    return number


def misfit_weight(readings: Readings, noise: float) -> float:
    """One over the noise's variance and the number of readings: a misfit with this weight is 1/2 at the noise.

    Parameters
    ----------
    readings : Readings
        What was read.
    noise : float
        Standard deviation of the noise relative to the largest absolute reading; positive.

    Raises
    ------
    InputError
        If all readings are zero, or the variance or the weight is not an ordinary number.
    """
    count = int(np.ma.count(readings.values))
    return 1 / (noise_deviation(readings.path, np.abs(readings.values).max(), count, noise) ** 2 * count)


def noise_deviation(path: Path, largest: float, count: int, noise: float) -> float:
    """Return the standard deviation of the noise of ``count`` readings from a file, ``noise`` times the largest one.

    Raises
    ------
    InputError
        If all readings are zero, or the variance or the weight that follows from it is not an ordinary number.
    """
    if largest == 0:
        raise InputError(
            f"{path}: all {count} readings are zero, and so is the noise that is "
            f"{noise:g} of the largest; give readings that are not"
        )
    variance = (noise * largest) ** 2
    if not np.finfo(float).tiny <= variance * count < np.inf:
        raise InputError(
            f"{path}: noise of {noise:g} of the largest reading, {largest:g}, has a variance of "
            f"{variance:g}, which is out of range; give another noise, or readings in other units"
        )
    return float(noise * largest)


def require_weights(alpha: float, beta: float, noise: float) -> None:
    """Refuse weights of a regularisation, and a relative noise of readings, that are not positive; alpha may be zero.

    Raises
    ------
    InputError
        Naming the one.
    """
    for name, value in (("alpha", alpha), ("beta", beta), ("noise", noise)):
        if not np.isfinite(value) or value < 0 or (value == 0 and name != "alpha"):
            raise InputError(f"{name} = {value:g}: give a {'non-negative' if name == 'alpha' else 'positive'} number")


def reading_lines(points: np.ndarray, times: np.ndarray, values: np.ndarray, *, before: str = "") -> list[str]:
    """Return the lines of a file for the readings of sensors ``0``, ``1``, ...

    Parameters
    ----------
    points, times, values
        ``(ns, dim)`` places, ``(nt,)`` times, and ``(nt, ns)`` readings, or ``(nt, ns, nq)`` of several quantities.
    before
        What each line begins with.
    """
    lines = []
    for s, place in enumerate(points):
        at = ",".join(f"{x:.6g}" for x in place)
        for t, reading in zip(times, values[:, s], strict=True):
            lines.append(f"{before}{s},{at},{t:.8g},{','.join(f'{value:.5g}' for value in np.atleast_1d(reading))}")
    return lines


def write_readings(path, points, times, values, *, columns=COLUMNS, comments=()) -> None:
    """Write readings as :func:`read_readings` reads them.

    Parameters
    ----------
    path : str or pathlib.Path
        File to write.
    points, times, values : numpy.ndarray
        As for :func:`reading_lines`.
    columns : tuple of str
        The line of column names.
    comments : sequence of str
        Lines at the beginning of the file, without ``#``.
    """
    lines = [*(f"# {line}" for line in comments), ",".join(columns), *reading_lines(points, times, values)]
    Path(path).write_text("\n".join(lines) + "\n", encoding="utf-8")

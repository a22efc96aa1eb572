r"""Gaussian noise of readings, :math:`N(0, N)`: products with the covariance and its inverse, samples, determinant.

The covariance is block-diagonal. Each block is factored by Cholesky, :math:`N = L L^T`; of a diagonal covariance the
variances are stored. Vectors of readings are ``(m,)`` and the same on every rank; nothing here communicates, and random
numbers depend on the seed only.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy.linalg import block_diag, solve_triangular

from pint_fem.all_at_once.grids import is_integer
from pint_fem.errors import InputError

__all__ = ["BlockNoise", "DiagonalNoise", "Noise", "make_noise"]

_SYMMETRIC = 1e-12
"""Largest asymmetry of a covariance, relative to its largest entry."""
_SINGULAR = 1e-14
"""Smallest squared pivot of a Cholesky factor, relative to the variance of its row."""


class Noise(ABC):
    """A Gaussian law of ``m`` readings with mean zero. Rows of readings are arrays ``(m,)`` or ``(k, m)``.

    Attributes
    ----------
    size : int
        Number ``m`` of readings.
    is_diagonal : bool
        Whether the readings are independent.
    log_det : float
        Logarithm of the covariance's determinant.
    """

    size: int
    is_diagonal: bool
    log_det: float

    @abstractmethod
    def covariance(self, rows: np.ndarray) -> np.ndarray:
        """Return the products of the covariance with rows of readings."""

    @abstractmethod
    def inverse(self, rows: np.ndarray) -> np.ndarray:
        """Return the products of the covariance's inverse with rows of readings."""

    @abstractmethod
    def whitened(self, rows: np.ndarray) -> np.ndarray:
        """Return ``L^{-1}`` times rows of readings, which turns the noise into independent numbers of variance one."""

    @abstractmethod
    def correlated(self, rows: np.ndarray) -> np.ndarray:
        """Return ``L`` times rows of readings, the inverse of :meth:`whitened`."""

    @abstractmethod
    def variance(self) -> np.ndarray:
        """Return the variance of each reading, ``(m,)``."""

    @abstractmethod
    def restricted(self, mask: ArrayLike) -> Noise:
        """Return the law of some of the readings, of which ``mask``, ``(m,)`` truth values, is true; another shape or
        type is an ``InputError``.
        """

    def sample(self, count: int, seed: int) -> np.ndarray:
        """Return ``count`` independent samples, ``(count, m)``; the first ones do not depend on ``count``. Numbers that
        are no whole numbers of at least 0 are an ``InputError``.
        """
        for name, number in (("count", count), ("seed", seed)):
            if not is_integer(number) or number < 0:
                raise InputError(f"samples of the noise: {name} = {number!r}: give a whole number of at least 0")
        return self.correlated(np.random.default_rng(int(seed)).standard_normal((int(count), self.size)))

    def _mask(self, mask: ArrayLike) -> np.ndarray:
        given = np.asarray(mask)
        if given.shape != (self.size,) or given.dtype != bool:
            raise InputError(
                f"mask of readings: an array of shape {given.shape} and type {given.dtype}: give ({self.size},) truth "
                "values"
            )
        return given


class DiagonalNoise(Noise):
    """The law of independent readings.

    Parameters
    ----------
    variance
        Variance of each reading, ``(m,)``, positive.
    """

    is_diagonal = True

    def __init__(self, variance: np.ndarray):
        self._variance, self._deviation, self.size = variance, np.sqrt(variance), len(variance)
        self.log_det = float(np.log(variance).sum())

    def covariance(self, rows: np.ndarray) -> np.ndarray:
        """Return the readings times the variances."""
        return rows * self._variance

    def inverse(self, rows: np.ndarray) -> np.ndarray:
        """Return the readings divided by the variances."""
        return rows / self._variance

    def whitened(self, rows: np.ndarray) -> np.ndarray:
        """Return the readings divided by the standard deviations."""
        return rows / self._deviation

    def correlated(self, rows: np.ndarray) -> np.ndarray:
        """Return the readings times the standard deviations."""
        return rows * self._deviation

    def variance(self) -> np.ndarray:
        """Return the variances."""
        return self._variance.copy()

    def restricted(self, mask: ArrayLike) -> DiagonalNoise:
        """Return the law of some of the readings."""
        return DiagonalNoise(self._variance[self._mask(mask)])


class BlockNoise(Noise):
    """The law of readings whose covariance is block-diagonal.

    Parameters
    ----------
    blocks
        Symmetric positive definite covariances of neighbouring readings, in their order.

    Raises
    ------
    InputError
        If a block is not finite, not symmetric, not positive definite, or singular to round-off.
    """

    is_diagonal = False

    def __init__(self, blocks: Sequence[np.ndarray]):
        self.blocks = [np.array(block, dtype=float) for block in blocks]
        ends = np.cumsum([0, *(len(block) for block in self.blocks)]).tolist()
        self._places = [slice(a, b) for a, b in pairwise(ends)]
        self.size = ends[-1]
        names = [f" (block {i} of {len(self.blocks)})" if len(self.blocks) > 1 else "" for i in range(len(self.blocks))]
        self._factors = [_cholesky(block, name) for block, name in zip(self.blocks, names, strict=True)]
        self.log_det = float(sum(2 * np.log(L.diagonal()).sum() for L in self._factors))

    def _each(self, rows: np.ndarray, product) -> np.ndarray:
        """Apply ``product(number of the block, columns)`` to the readings of each block."""
        rows = np.asarray(rows, dtype=float)
        out = np.empty(rows.shape)
        for i, place in enumerate(self._places):
            out[..., place] = product(i, rows[..., place].T).T
        return out

    def covariance(self, rows: np.ndarray) -> np.ndarray:
        """Return the products with the blocks."""
        return self._each(rows, lambda i, columns: self.blocks[i] @ columns)

    def inverse(self, rows: np.ndarray) -> np.ndarray:
        """Return the solutions with both triangular factors of each block."""

        def solved(i: int, columns: np.ndarray) -> np.ndarray:
            half = solve_triangular(self._factors[i], columns, lower=True)
            return solve_triangular(self._factors[i], half, lower=True, trans="T")

        return self._each(rows, solved)

    def whitened(self, rows: np.ndarray) -> np.ndarray:
        """Return the solutions with the lower triangular factor of each block."""
        return self._each(rows, lambda i, columns: solve_triangular(self._factors[i], columns, lower=True))

    def correlated(self, rows: np.ndarray) -> np.ndarray:
        """Return the products with the lower triangular factor of each block."""
        return self._each(rows, lambda i, columns: self._factors[i] @ columns)

    def variance(self) -> np.ndarray:
        """Return the diagonals of the blocks."""
        return np.concatenate([block.diagonal() for block in self.blocks])

    def restricted(self, mask: ArrayLike) -> BlockNoise:
        """Return the law of some of the readings, with the rows and columns of each block that are theirs."""
        kept = self._mask(mask)
        parts = [block[np.ix_(kept[p], kept[p])] for block, p in zip(self.blocks, self._places, strict=True)]
        return BlockNoise([part for part in parts if part.size])

    @cached_property
    def dense(self) -> np.ndarray:
        """The whole covariance, ``(m, m)``."""
        return block_diag(*self.blocks)


def _cholesky(block: np.ndarray, name: str) -> np.ndarray:
    """The lower triangular factor of a covariance, or an ``InputError`` that contains ``name``."""
    if not np.isfinite(block).all():
        raise InputError(f"noise{name}: the covariance has infinite or NaN entries: give finite ones")
    asymmetry = np.abs(block - block.T).max()
    if asymmetry > _SYMMETRIC * np.abs(block).max():
        raise InputError(
            f"noise{name}: the covariance is not symmetric, by up to {asymmetry:.2g}: give (C + C.T)/2 if that is "
            "what is meant"
        )
    try:
        L = np.linalg.cholesky(block)
        regular = bool((L.diagonal() ** 2 > _SINGULAR * block.diagonal()).all())
    except np.linalg.LinAlgError:
        regular = False
    if not regular:
        least = np.linalg.eigvalsh(block)[0]
        raise InputError(
            f"noise{name}: the covariance is not positive definite, or singular to round-off (smallest eigenvalue "
            f"{least:.2g}): add a positive variance to its diagonal"
        )
    return L


def make_noise(given: Any, weights: ArrayLike, groups: ArrayLike, sensors: int | None = None) -> Noise:
    """Return the noise that a user describes. All ranks have to pass the same.

    Parameters
    ----------
    given
        ``None`` for the variances ``1 / weights``, by which the misfit of the functional is minus the logarithm of the
        likelihood; a number, the standard deviation of all readings; an array ``(m,)`` with that of each reading, or
        ``(sensors,)`` of each sensor; ``{"reading": array}`` or ``{"sensor": array}``, by which the two are told apart
        where they have the same length; the covariance ``(m, m)``; a list of square blocks, or an array ``(blocks, b,
        b)``, the block-diagonal covariance in the order of the readings; or a :class:`Noise` of ``m`` readings.
    weights
        Weight of each reading in the functional, ``(m,)``. A weight of zero, with which a reading is not used, has no
        variance.
    groups
        Number of the sensor of each reading, ``(m,)``.
    sensors
        Number of sensors; default: that of the last one in ``groups``, and one.

    Raises
    ------
    InputError
        If what is given does not fit, is not finite, not symmetric, not positive definite, or ambiguous: an array of
        ``m`` numbers where there are ``m`` sensors in another order than the readings.
    """
    weights, groups = np.asarray(weights, dtype=float), np.asarray(groups, dtype=int)
    m = len(weights)
    if sensors is None:
        sensors = int(groups.max()) + 1 if m else 0
    if isinstance(given, Noise):
        if given.size != m:
            raise InputError(f"noise: a Noise of {given.size} readings: there are {m}")
        return given
    if given is None:
        return DiagonalNoise(1 / _positive(weights, "weights of the misfit", _UNUSED))
    if isinstance(given, Mapping):
        return _named(given, groups, m, sensors)
    array = _array(given)
    fits = f"give {_fitting(m, sensors)}"
    if isinstance(array, list) or array.ndim == 3:
        return _blocks(list(array), m)
    if array.ndim == 0:
        return DiagonalNoise(np.full(m, _positive(array[None], "noise", fits)[0] ** 2))
    if array.ndim == 2:
        if array.shape != (m, m):
            raise InputError(f"noise: a covariance of shape {array.shape}: {fits}")
        return BlockNoise([array]) if m else DiagonalNoise(np.zeros(0))
    if array.shape == (m,) == (sensors,) and (array != array[groups]).any():
        raise InputError(
            f"noise: {m} standard deviations for {m} readings of {m} sensors, whose orders differ: give "
            "{'reading': array} or {'sensor': array}"
        )
    if array.shape not in ((m,), (sensors,)):
        raise InputError(f"noise: an array of shape {array.shape}: {fits}")
    deviations = _positive(array, "noise", fits)
    return DiagonalNoise((deviations if len(array) == m else deviations[groups]) ** 2)


_UNUSED = (
    "a reading with the weight zero is not used by the functional, and has no variance: leave it out of the data, or "
    "give noise="
)


def _fitting(m: int, sensors: int) -> str:
    return (
        f"a positive standard deviation, an array of them for the {m} readings or the {sensors} sensors, a covariance "
        f"({m}, {m}), or a list of square blocks with {m} rows in all"
    )


def _array(given: Any) -> np.ndarray | list[np.ndarray]:
    """The numbers of an argument, or a list of blocks of different sizes."""
    try:
        if isinstance(given, (list, tuple)) and given and all(np.ndim(part) == 2 for part in given):
            return [np.asarray(part, dtype=float) for part in given]
        if isinstance(given, (bool, str)):
            raise TypeError
        made = np.asarray(given)
        if made.dtype.kind not in "iuf" or made.ndim > 3:
            raise TypeError
    except (TypeError, ValueError) as error:
        raise InputError(
            f"noise: {given!r}: give a standard deviation, an array of them, a covariance or a list of square blocks"
        ) from error
    return made.astype(float)


def _positive(values: np.ndarray, name: str, remedy: str) -> np.ndarray:
    """Values that are positive and finite, and so are their squares' inverses; others are an ``InputError``."""
    with np.errstate(all="ignore"):
        wrong = ~((values > 0) & np.isfinite(values) & np.isfinite(values**2) & np.isfinite(1 / values**2))
    if wrong.any():
        i = int(np.argmax(wrong))
        raise InputError(f"{name}: entry {i} is {values[i]:g}, not positive and finite: {remedy}")
    return values


def _named(given: Mapping, groups: np.ndarray, m: int, sensors: int) -> DiagonalNoise:
    """The law of standard deviations that are named as those of readings or of sensors."""
    lengths = {"reading": m, "sensor": sensors}
    if len(given) != 1 or next(iter(given)) not in lengths:
        raise InputError(
            f"noise: a mapping of {sorted(map(str, given))}: give {{'reading': array}} or {{'sensor': array}}"
        )
    ((name, values),) = given.items()
    array = _array(values)
    if isinstance(array, list) or array.shape != (lengths[name],):
        shape = "blocks" if isinstance(array, list) else f"an array of shape {array.shape}"
        raise InputError(f"noise of each {name}: {shape}: give ({lengths[name]},) standard deviations")
    deviations = _positive(array, f"noise of each {name}", "give positive standard deviations")
    return DiagonalNoise((deviations if name == "reading" else deviations[groups]) ** 2)


def _blocks(blocks: list[np.ndarray], m: int) -> BlockNoise:
    """The law of a block-diagonal covariance."""
    for i, block in enumerate(blocks):
        if block.shape[0] != block.shape[1] or not block.size:
            raise InputError(f"noise: block {i} has the shape {block.shape}: give square blocks")
    rows = sum(len(block) for block in blocks)
    if rows != m:
        raise InputError(f"noise: blocks with {rows} rows in all: give blocks with {m}, one row for each reading")
    return BlockNoise(blocks)

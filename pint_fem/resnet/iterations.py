r"""Number of MGRIT cycles of a sweep in training: up to a tolerance, fixed, or adapted to the observed convergence.

Training needs no exact gradients at first, but a fixed number of cycles biases them, and as the weights grow cycles
contract less. The *adaptive* mode (Jiang, Salvado, Cyr, Kopaničáková, Krause, Schroder, arXiv:2601.09026) measures
that: every ``every`` batches a sweep takes ``2 k`` cycles instead of ``k`` and compares the residuals :math:`r`,

.. math:: \rho = r_{2k} / r_k .

With :math:`\rho > 1` cycles do not contract any more, and all later sweeps are sequential. With :math:`\rho` above
``enough`` a cycle is added; beyond ``most`` cycles sequential sweeps are cheaper, too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from pint_fem.all_at_once.stopping import SolveResult
from pint_fem.errors import InputError

__all__ = ["Adaptive", "Iterations"]


@dataclass(frozen=True)
class Adaptive:
    """Rule by which the number of cycles of a sweep is adapted.

    Attributes
    ----------
    every : int
        Number of batches from one comparison of residuals to the next.
    enough : float
        Ratio of residuals up to which the number of cycles stays.
    most : int
        Number of cycles beyond which sweeps become sequential.
    """

    every: int = 50
    enough: float = 0.5
    most: int = 8

    def __post_init__(self) -> None:
        if self.every < 1 or self.most < 1 or not 0 <= self.enough <= 1:
            raise InputError(f"{self}: give every >= 1, most >= 1 and 0 <= enough <= 1")


@dataclass
class Iterations:
    """Number of cycles of one kind of sweep, forward or backward.

    Attributes
    ----------
    cycles : int or None
        ``None``: up to the tolerance.
    adaptive : Adaptive or None
    serial : bool
        Whether sweeps are sequential.
    history : list of (batch, cycles, ratio)
        Comparisons of residuals; ``cycles`` is 0 where one has made sweeps sequential.
    batches : int
        Number of sweeps so far.
    """

    cycles: int | None = None
    adaptive: Adaptive | None = None
    serial: bool = False
    history: list[tuple[int, int, float]] = field(default_factory=list)
    batches: int = 0

    def __post_init__(self) -> None:
        good = self.cycles is None or (isinstance(self.cycles, int) and self.cycles >= 1)
        if not good or isinstance(self.cycles, bool):
            raise InputError(f"iterations = {self.cycles!r}: give a positive whole number, or None for the tolerance")
        if self.adaptive and self.cycles is None:
            raise InputError("adaptive iterations need a number to begin with: give forward and backward iterations")

    def begin(self) -> int | None:
        """Number of cycles of the next sweep of the training: twice as many where residuals will be compared."""
        self.batches += 1
        return self.cycles * 2 if self._compares() else self.cycles

    def _compares(self) -> bool:
        """Whether the present sweep compares residuals."""
        return self.adaptive is not None and not self.serial and self.batches % self.adaptive.every == 0

    def end(self, result: SolveResult, largest: Callable[[float], float] = lambda ratio: ratio) -> None:
        """Adapt the number of cycles to the residuals of a sweep.

        ``largest`` returns the maximum of a ratio over the data groups (collective), so that all decide the same.
        """
        if not self._compares():
            return
        ratio = largest(self._ratio(result))
        if ratio > 1 or (ratio > self.adaptive.enough and self.cycles >= self.adaptive.most):
            self.serial = True
        elif ratio > self.adaptive.enough:
            self.cycles += 1
        self.history.append((self.batches, 0 if self.serial else self.cycles, ratio))

    def _ratio(self, result: SolveResult) -> float:
        """Ratio of residuals; infinite where cycles failed, so that all groups step sequentially, 0 on one level."""
        if result.reason in ("exact", "serial"):
            return math.inf if result.reason == "serial" else 0.0
        before, after = result.residuals[self.cycles], result.residuals[-1]
        return after / before if before > 0 else 0.0

    def fail(self) -> bool:
        """After a sweep that broke down, make this and all later ones sequential; ``False`` without a rule."""
        if self.adaptive is None:
            return False
        self.serial = True
        self.history.append((self.batches, 0, math.inf))
        return True

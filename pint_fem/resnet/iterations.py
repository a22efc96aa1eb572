r"""How many cycles a sweep takes: to a tolerance, a fixed number, or one that adapts to the training.

Training needs no exact gradients at first, but a fixed number of cycles biases them, and as the weights grow cycles
contract less. The *adaptive* mode (Jiang, Salvado, Cyr, Kopaničáková, Krause, Schroder, arXiv:2601.09026) watches that:
every ``every`` batches a sweep takes ``2 k`` cycles instead of ``k`` and compares the residuals :math:`r`,

.. math:: \rho = r_{2k} / r_k .

With :math:`\rho > 1` cycles do not contract any more and sweeps go from layer to layer from then on. With
:math:`\rho` above ``enough`` a cycle is added; beyond ``most`` cycles serial sweeps are cheaper, too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from pint_fem.all_at_once.stopping import SolveResult
from pint_fem.errors import InputError

__all__ = ["Adaptive", "Iterations"]


@dataclass(frozen=True)
class Adaptive:
    """When to look and what to do.

    Attributes
    ----------
    every : int
        Batches from one look to the next.
    enough : float
        A ratio up to which the number of cycles stays.
    most : int
        Cycles beyond which sweeps become serial.
    """

    every: int = 50
    enough: float = 0.5
    most: int = 8

    def __post_init__(self):
        if self.every < 1 or self.most < 1 or not 0 <= self.enough <= 1:
            raise InputError(f"{self}: give every >= 1, most >= 1 and 0 <= enough <= 1")


@dataclass
class Iterations:
    """Cycles of one kind of sweep.

    Attributes
    ----------
    cycles : int or None
        ``None``: to the tolerance.
    adaptive : Adaptive or None
    serial : bool
        From layer to layer.
    history : list of (batch, cycles, ratio)
        What looks have found; ``cycles`` is 0 where they made it serial.
    """

    cycles: int | None = None
    adaptive: Adaptive | None = None
    serial: bool = False
    history: list[tuple[int, int, float]] = field(default_factory=list)
    batches: int = 0

    def __post_init__(self):
        good = self.cycles is None or (isinstance(self.cycles, int) and self.cycles >= 1)
        if not good or isinstance(self.cycles, bool):
            raise InputError(f"iterations = {self.cycles!r}: give a positive whole number, or None for the tolerance")
        if self.adaptive and self.cycles is None:
            raise InputError("adaptive iterations need a number to begin with: give forward and backward iterations")

    def begin(self) -> int | None:
        """Cycles of the next sweep of the training; twice as many where it is time to look."""
        self.batches += 1
        return self.cycles * 2 if self._looks() else self.cycles

    def _looks(self) -> bool:
        return self.adaptive is not None and not self.serial and self.batches % self.adaptive.every == 0

    def end(self, result: SolveResult, largest=lambda x: x) -> None:
        """Learn from a sweep; ``largest`` makes all groups of a data-parallel run agree."""
        if not self._looks():
            return
        ratio = largest(self._ratio(result))
        if ratio > 1 or (ratio > self.adaptive.enough and self.cycles >= self.adaptive.most):
            self.serial = True
        elif ratio > self.adaptive.enough:
            self.cycles += 1
        self.history.append((self.batches, 0 if self.serial else self.cycles, ratio))

    def _ratio(self, result: SolveResult) -> float:
        """Residual after twice the cycles over that after the cycles; infinite where they failed, so that all groups
        step serially, and 0 where the sweep has one level only.
        """
        if result.reason in ("exact", "serial"):
            return math.inf if result.reason == "serial" else 0.0
        before, after = result.residuals[self.cycles], result.residuals[-1]
        return after / before if before > 0 else 0.0

    def fail(self) -> bool:
        """Whether a sweep that broke down may be done serially instead, as all later ones are then."""
        if self.adaptive is None:
            return False
        self.serial = True
        self.history.append((self.batches, 0, float("inf")))
        return True

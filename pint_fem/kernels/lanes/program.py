"""A time step as a *program*: a sequence of operations on named vectors, executed on lanes or with PETSc's objects.

A state consists of *parts*, one for a single field or two where a field is eliminated. A vector has some of the parts,
one after the other, each in an order of its own. The vector ``"state"`` is a step's start at first, and its result at
the end.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["STATE", "Operation", "StepProgram"]

STATE = "state"
"""Name of the vector that a step starts from and returns."""


@dataclass(frozen=True)
class Operation:
    """One operation of a program.

    Attributes
    ----------
    kind : str
        ``"multiply"``: ``out = factor A x``, or ``out = scale out + factor A x`` with ``flag``; ``"solve"``: ``out =
        S^{-1} out``, or with the transpose for ``flag``; ``"copy"``: ``out = factor x``; ``"add"``: ``out += factor
        x``; ``"blend"``: ``out = factor out + (1 - factor) x``; ``"exchange"``: ``out`` and ``x`` change places;
        ``"zero"``: ``out = 0``; ``"clear"``: zero some rows; ``"load"``: add given states; ``"store"``: return a copy;
        ``"project"``: subtract ``v (v . out)``.
    out, x : str
        Names of the vectors.
    part, x_part : str or None
        Their parts; ``None`` for the whole vectors.
    what : object
        PETSc's matrix, a factor, own rows of a state, the number of states to load or store, or the vector ``v``.
    factor, flag, scale : float, bool, float
        See ``kind``.
    """

    kind: str
    out: str
    x: str
    part: str | None = None
    x_part: str | None = None
    what: Any = None
    factor: float = 1.0
    flag: bool = False
    scale: float = 1.0


class StepProgram:
    """The operations of a step, in their order.

    Parameters
    ----------
    parts
        Own rows of each part in a state, slices or arrays.
    size
        Number of own unknowns of a state.

    Attributes
    ----------
    parts : dict of str to ndarray
        The rows of each part.
    vectors : dict of str to tuple of str
        Parts of each vector, those of ``"state"`` first.
    operations : list of Operation
        The operations.
    """

    def __init__(self, parts: Mapping[str, slice | np.ndarray], size: int):
        self.size = size
        self.parts = {name: np.arange(size)[rows] for name, rows in parts.items()}
        self.vectors: dict[str, tuple[str, ...]] = {STATE: tuple(parts)}
        self.operations: list[Operation] = []

    def vector(self, name: str, parts: Sequence[str] | None = None) -> str:
        """Declare a work vector with some parts, by default all of a state's; its name."""
        self.vectors[name] = self.vectors[STATE] if parts is None else tuple(parts)
        return name

    def part(self, vector: str, part: str | None) -> str:
        """The name of a vector's part; ``None`` for that of a vector of one part."""
        return self.vectors[vector][0] if part is None else part

    def multiply(self, out: str, matrix: Any, x: str, factor: float = 1.0, *, add: bool = False, scale: float = 1.0,
                 part: str | None = None, x_part: str | None = None) -> None:  # fmt: skip
        """``out = factor A x``, or with ``add`` ``out = scale out + factor A x``."""
        self.operations.append(Operation("multiply", out, x, part, x_part, matrix, factor, add, scale))

    def solve(self, out: str, factor: Any, *, transposed: bool = False) -> None:
        """``out = S^{-1} out`` for a vector of one part, with a factor of ``S`` or its transpose."""
        self.operations.append(Operation("solve", out, out, what=factor, flag=transposed))

    def copy(
        self, out: str, x: str, factor: float = 1.0, *, part: str | None = None, x_part: str | None = None
    ) -> None:
        """``out = factor x``."""
        self.operations.append(Operation("copy", out, x, part, x_part, factor=factor))

    def add(self, out: str, x: str, factor: float = 1.0, *, part: str | None = None, x_part: str | None = None) -> None:
        """``out += factor x``."""
        self.operations.append(Operation("add", out, x, part, x_part, factor=factor))

    def blend(self, out: str, x: str, factor: float) -> None:
        """``out = factor out + (1 - factor) x``."""
        self.operations.append(Operation("blend", out, x, factor=factor))

    def exchange(self, out: str, x: str) -> None:
        """Exchange two vectors with the same parts.

        Raises
        ------
        ValueError
            If their parts differ: kernels exchange the memory of vectors.
        """
        if self.vectors[out] != self.vectors[x]:
            raise ValueError(f"exchange of {out} and {x}, which have other parts")
        self.operations.append(Operation("exchange", out, x))

    def zero(self, out: str) -> None:
        """``out = 0``."""
        self.operations.append(Operation("zero", out, out))

    def clear(self, out: str, rows: np.ndarray) -> None:
        """Set some own rows of a state to zero in a vector with all parts."""
        self.operations.append(Operation("clear", out, out, what=rows))

    def load(self, out: str, number: int) -> None:
        """Add the given states number ``number``, if there are any, to a vector with all parts."""
        self.operations.append(Operation("load", out, out, what=number))

    def store(self, x: str, number: int) -> None:
        """Return a copy of a vector with all parts as states number ``number``, if they are asked for."""
        self.operations.append(Operation("store", x, x, what=number))

    def project(self, out: str, vectors: Sequence[np.ndarray]) -> None:
        """Remove what is in the span of orthonormal vectors from a vector of one part."""
        for vector in vectors:
            self.operations.append(Operation("project", out, out, what=vector))

    @property
    def stored(self) -> int:
        """Number of the states that are loaded or stored."""
        return 1 + max((op.what for op in self.operations if op.kind in ("load", "store")), default=-1)

"""Conversion between Firedrake functions and flat arrays of a rank's own degrees of freedom, and rows of conditions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from firedrake import Cofunction, DirichletBC, Function
from firedrake.functionspaceimpl import WithGeometry

__all__ = [
    "as_rows",
    "boundary_rows",
    "condition_rows",
    "get",
    "is_real",
    "like_subspace",
    "own_size",
    "put",
    "rows_in_whole",
    "split_values",
    "whole_space",
]


def as_rows(states: np.ndarray) -> np.ndarray:
    """States ``(..., n)`` as the rows of an array ``(count, n)``; a view where that is possible."""
    return states.reshape(int(np.prod(states.shape[:-1], dtype=int)), states.shape[-1])


def own_size(V: WithGeometry) -> int:
    """Number of degrees of freedom of a space that this rank owns."""
    return V.dof_dset.layout_vec.local_size


def is_real(V: WithGeometry) -> bool:
    """Whether a space is one of real numbers, ``R``; the first rank owns them."""
    return V.ufl_element().family() == "Real"


def get(f: Function | Cofunction) -> np.ndarray:
    """Copy of a function's own values, ``(own_size(V),)``."""
    with f.dat.vec_ro as vec:
        return vec.array_r.copy()


def put(f: Function | Cofunction, values: np.ndarray) -> None:
    """Set a function's own values, ``(own_size(V),)``."""
    with f.dat.vec_wo as vec:
        vec.array[:] = values


def split_values(vector: np.ndarray, functions: Sequence[Function]) -> list[np.ndarray]:
    """Views of each function's part of vectors ``(..., total own size)`` of the own values of several functions."""
    ends = np.cumsum([own_size(f.function_space()) for f in functions])
    return np.split(vector, ends[:-1], axis=-1) if len(functions) else []


def whole_space(space: WithGeometry) -> WithGeometry:
    """The space that a sub-space (``W.sub(0)``, ``V.sub(1)``, ``W.sub(0).sub(1)``) is taken from, or itself."""
    while space.parent is not None:
        space = space.parent
    return space


def rows_in_whole(space: WithGeometry) -> np.ndarray:
    """Rows of a sub-space's own degrees of freedom among those of the space that it is taken from."""
    rows = np.arange(own_size(space))
    while space.parent is not None:
        parent = space.parent
        if space.component is not None:
            rows = rows * parent.block_size + space.component
        elif len(parent) > 1:
            rows = rows + sum(own_size(parent.sub(i)) for i in range(space.index))
        space = parent
    return rows


def like_subspace(V: WithGeometry, bc: DirichletBC) -> WithGeometry:
    """The part of ``V`` that corresponds to a condition's part of its own space."""
    for index in bc._indices:
        V = V.sub(index)
    return V


def condition_rows(bc: DirichletBC) -> np.ndarray:
    """Sorted local rows of the own degrees of freedom that a condition fixes, among those of the condition's own
    (sub-)space.
    """
    space = bc.function_space()
    nodes = np.unique(np.asarray(bc.nodes))
    nodes = nodes[nodes < space.dof_dset.size]
    return (nodes[:, None] * space.block_size + np.arange(space.block_size)).ravel()


def boundary_rows(bcs: Iterable[DirichletBC], V: WithGeometry) -> np.ndarray:
    """Sorted local rows of the own degrees of freedom of ``V`` that the conditions, on it or on parts of it, fix."""
    rows = [rows_in_whole(bc.function_space())[condition_rows(bc)] for bc in bcs]
    return np.unique(np.concatenate([np.zeros(0, dtype=int), *rows])).astype(np.int32)

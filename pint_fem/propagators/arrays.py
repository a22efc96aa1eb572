"""Between Firedrake functions and flat arrays of a rank's own degrees of freedom."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from firedrake import Cofunction, DirichletBC, Function

__all__ = ["boundary_rows", "get", "is_real", "own_size", "put"]


def own_size(V) -> int:
    """Own degrees of freedom of a space on this rank."""
    return V.dof_dset.layout_vec.local_size


def is_real(V) -> bool:
    """Whether a space is one of real numbers, ``R``; the first rank owns them."""
    return V.ufl_element().family() == "Real"


def get(f: Function | Cofunction) -> np.ndarray:
    """Copy of the own degrees of freedom, shape ``(own_size(V),)``."""
    with f.dat.vec_ro as vec:
        return vec.array_r.copy()


def put(f: Function | Cofunction, values: np.ndarray) -> None:
    """Set the own degrees of freedom."""
    with f.dat.vec_wo as vec:
        vec.array[:] = values


def boundary_rows(bcs: Iterable[DirichletBC], V) -> np.ndarray:
    """Sorted local rows of the own degrees of freedom that the conditions fix."""
    bcs = list(bcs)
    if not bcs:
        return np.zeros(0, dtype=np.int32)
    nodes = np.unique(np.concatenate([np.asarray(bc.nodes) for bc in bcs]))
    nodes = nodes[nodes < V.dof_dset.size]
    return (nodes[:, None] * V.block_size + np.arange(V.block_size)).ravel().astype(np.int32)

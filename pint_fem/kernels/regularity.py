r"""Detection of singular stage matrices, before solves with them return round-off.

A factorisation of a singular matrix has a pivot that is zero, or round-off, and then continues. Whether a matrix
``S`` is regular to working precision, in any units of its rows and columns, follows from a solve that is repeated:

.. math::  S x = b , \qquad S x' = S x , \qquad \|x' - x\|_\infty \le 10^{-3} \|x\|_\infty ,

with entries of ``b`` as large as the largest ones of their rows. For a singular one ``x`` is a huge multiple of a
vector of its nullspace, ``S x`` is round-off, and ``x'`` is unrelated to ``x``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from firedrake.functionspaceimpl import WithGeometry
from firedrake.petsc import PETSc

from pint_fem.errors import InputError, is_numerical
from pint_fem.kernels.arrays import own_size, rows_in_whole
from pint_fem.kernels.factor import Factor
from pint_fem.kernels.nullspace import Nullspace

__all__ = ["is_singular", "regular_factor", "singular_message"]

REPEATABLE = 1e-3
"""Largest relative difference of the two solutions."""
ZERO = 1e-12
"""Product of a matrix and a vector, relative to the matrix's norm, below which the vector is in its nullspace."""
_MAX = PETSc.NormType.NORM_INFINITY


def is_singular(matrix: PETSc.Mat, solve: Callable[[PETSc.Vec, PETSc.Vec], None]) -> bool:
    """Whether a matrix is singular to working precision (collective).

    Parameters
    ----------
    matrix
        The matrix.
    solve
        ``solve(b, x)`` of a direct solver.
    """
    x, b = matrix.createVecs()
    again = x.duplicate()
    start, stop = b.getOwnershipRange()
    pointers, _, values = matrix.getValuesCSR()
    largest = np.maximum.reduceat(np.append(np.abs(values), 0.0), pointers[:-1])  # no row is empty: it has a diagonal
    b.array[:] = largest * np.cos(np.arange(start, stop) ** 2)
    try:
        solve(b, x)
        size = x.norm(_MAX)
        if not np.isfinite(size):
            return True
        matrix.mult(x, b)
        solve(b, again)
    except (PETSc.Error, ArithmeticError) as error:
        if not is_numerical(error):
            raise
        return True
    again.axpy(-1.0, x)
    difference = again.norm(_MAX)
    for vec in (x, b, again):
        vec.destroy()
    return not difference <= REPEATABLE * size


def singular_message(matrix: PETSc.Mat, V: WithGeometry) -> str:
    """A message about a singular stage matrix, with the fields whose constants are in its nullspace (collective).

    Parameters
    ----------
    matrix
        The matrix, with rows and columns of conditions those of the identity.
    V
        Space of the state; fields are named only where it is that of the unknowns.
    """
    text = "the stage matrix is singular: give nullspace=, or fix a value by a boundary condition"
    if own_size(V) != matrix.getLocalSize()[0]:
        return text
    x, b = matrix.createVecs()
    scale, found = matrix.norm(_MAX), []
    for i, field in enumerate(V):
        of = f"of field {i} " if len(V) > 1 else ""
        for j in range(field.block_size):
            x.set(0.0)
            x.array[rows_in_whole(V.sub(i) if len(V) > 1 else V)[j :: field.block_size]] = 1.0
            matrix.mult(x, b)
            if b.norm(_MAX) <= ZERO * scale:
                found.append(of + (f"component {j}" if field.block_size > 1 else ""))
    if not found:
        return text
    named = ", ".join(what.strip() for what in found if what.strip())
    return f"{text}. Constants {'of ' + named.removeprefix('of ') + ' ' if named else ''}are in its nullspace"


def regular_factor(evolution: Any, matrix: PETSc.Mat, nullspace: Nullspace | None, **given: Any) -> Factor:
    """The factor of a stage's matrix of a linear evolution, which has to be regular (collective).

    Parameters
    ----------
    evolution
        The evolution, for its solver parameters and its space.
    matrix
        The matrix, of the state or of the fields that are not eliminated.
    nullspace
        Its nullspace, or ``None``.
    **given
        Other parameters of :class:`~pint_fem.kernels.factor.Factor`.

    Raises
    ------
    InputError
        On every rank, if the matrix is singular beyond the nullspace.
    """
    message = lambda: singular_message(matrix, evolution.V)
    try:
        prefix = f"{evolution.options_prefix}pint_"
        given = dict(prefix=prefix, nullspace=nullspace, reproducible=evolution.reproducible, **given)
        factor = Factor(matrix, evolution.solver_parameters, **given)
    except PETSc.Error as error:
        if not is_numerical(error):
            raise
        raise InputError(f"{message()} ({error})") from error
    if factor.is_direct and is_singular(factor.matrix, factor.solve_regular):
        raise InputError(message())
    return factor

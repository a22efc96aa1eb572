r"""Singular matrices of stages are named as such, before they make round-off garbage.

A factorisation of a singular matrix ends with a pivot that is zero, or round-off, and then goes on. Whether a matrix
``S`` is regular to working precision, in whatever units its rows and columns are, shows in a solve that is done again:

.. math::  S x = b , \qquad S x' = S x , \qquad \|x' - x\|_\infty \le 10^{-3} \|x\|_\infty ,

with entries of ``b`` as large as the largest ones of their rows. For a singular one ``x`` is a huge multiple of a
vector of its nullspace, ``S x`` round-off, and ``x'`` has nothing to do with ``x``.
"""

from __future__ import annotations

import numpy as np
from firedrake.petsc import PETSc

from pint_fem.errors import InputError, is_numerical
from pint_fem.kernels.arrays import own_size, rows_in_whole
from pint_fem.kernels.blocks import Factor
from pint_fem.kernels.nullspace import Nullspace

__all__ = ["is_singular", "singular_message", "stage_factor"]

REPEATABLE = 1e-3
"""Largest relative difference of the two solutions."""
ZERO = 1e-12
"""Product of a matrix and a vector, relative to the matrix's norm, below which the vector is in its nullspace."""
_MAX = PETSc.NormType.NORM_INFINITY


def is_singular(ksp: PETSc.KSP) -> bool:
    """Whether the matrix of a direct solver is singular to working precision (collective)."""
    matrix = ksp.getOperators()[1]
    x, b = matrix.createVecs()
    again = x.duplicate()
    start, stop = b.getOwnershipRange()
    pointers, _, values = matrix.getValuesCSR()
    largest = np.maximum.reduceat(np.append(np.abs(values), 0.0), pointers[:-1])  # no row is empty: it has a diagonal
    b.array[:] = largest * np.cos(np.arange(start, stop) ** 2)
    try:
        ksp.solve(b, x)
        size = x.norm(_MAX)
        if not np.isfinite(size):
            return True
        matrix.mult(x, b)
        ksp.solve(b, again)
    except PETSc.Error as error:
        if not is_numerical(error):
            raise
        return True
    again.axpy(-1.0, x)
    difference = again.norm(_MAX)
    for vec in (x, b, again):
        vec.destroy()
    return not difference <= REPEATABLE * size


def singular_message(matrix: PETSc.Mat, V) -> str:
    """What to say of a singular matrix of a stage; names the fields whose constants are in its nullspace (collective).

    Parameters
    ----------
    matrix
        Rows and columns with a condition are those of the identity.
    V
        Space of the unknowns, or ``None`` where they are a part of the state.
    """
    text = "the stage matrix is singular: give nullspace=, or fix a value by a boundary condition"
    if V is None or own_size(V) != matrix.getLocalSize()[0]:
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


def stage_factor(evolution, matrix: PETSc.Mat, nullspace: Nullspace | None, **given) -> Factor:
    """Factor of a stage's matrix of a linear evolution (collective).

    Parameters
    ----------
    evolution
        With the solver's parameters.
    matrix
        Of the state, or of what is left of it where a field is eliminated.
    nullspace
        Of the matrix.
    **given
        See :class:`~pint_fem.kernels.blocks.Factor`.

    Raises
    ------
    InputError
        On every rank, if the matrix is singular and no nullspace says so.
    """
    message = lambda: singular_message(matrix, evolution.V)
    try:
        prefix = f"{evolution.options_prefix}pint_"
        factor = Factor(matrix, evolution.solver_parameters, prefix=prefix, nullspace=nullspace, **given)
    except PETSc.Error as error:
        if not is_numerical(error):
            raise
        raise InputError(f"{message()} ({error})") from error
    if factor.is_direct and is_singular(factor.ksp):
        raise InputError(message())
    return factor

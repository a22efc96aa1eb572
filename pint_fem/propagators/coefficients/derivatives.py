r"""Derivatives of an operator ``A(z)`` by the controls in it: along directions as matrices, and contracted with slabs.

For states :math:`p_i`, :math:`u_i` of all steps the derivative of :math:`\sum_i p_i^T A(z) u_i` requires of them the
sums of products :math:`C_e = \sum_i p_i u_i^T` in each cell (:mod:`~pint_fem.kernels.lanes.cell_products`) only,
which are contracted with :math:`A'(z)` by one assembly (:mod:`~pint_fem.evolution.cell_spaces`). Derivatives along a
direction :math:`\delta z` are sparse matrices :math:`A'(z)[\delta z]`, which are multiplied with all steps at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import ufl
from firedrake import Cofunction, Function, derivative
from firedrake.assemble import get_assembler
from firedrake.petsc import PETSc
from ufl.algorithms import expand_derivatives, extract_coefficients

from pint_fem.collective import all_ranks
from pint_fem.evolution.cell_spaces import CellUnknowns, CellVectors, contracted
from pint_fem.evolution.evolution import Evolution
from pint_fem.kernels.arrays import get, put
from pint_fem.kernels.block_operator import BlockOperator
from pint_fem.kernels.lanes.cell_products import CellProducts

__all__ = ["DirectionMatrices", "OperatorDerivatives"]


class DirectionMatrices:
    """The matrix :math:`A'(z)[\\delta z]`, whose rows with a condition are zero, and its transpose.

    Parameters
    ----------
    matrix
        The assembled matrix, which is changed.
    rows
        Own rows with a condition.
    """

    def __init__(self, matrix: PETSc.Mat, rows: np.ndarray):
        first = matrix.getOwnershipRange()[0]
        matrix.setOption(PETSc.Mat.Option.KEEP_NONZERO_PATTERN, True)
        matrix.zeroRows((rows + first).astype(PETSc.IntType), diag=0.0)
        self.product = BlockOperator(matrix)

    @cached_property
    def transposed(self) -> BlockOperator:
        """The products with the transpose."""
        return BlockOperator(self.product.matrix.transpose(PETSc.Mat()))


class OperatorDerivatives:
    """Derivatives of a bilinear form by the controls in it, at the values that the evolution's controls have.

    Parameters
    ----------
    form
        The bilinear form ``A``.
    evolution
        A private evolution, whose parameters may be in the form.
    unknowns
        The unknowns of the cells.
    bc_rows
        Own rows with a condition, which the operator does not have.
    fields
        Numbers of the fields of the state that ``A`` couples.

    Attributes
    ----------
    shape : tuple of int
        Shape of sums of products, ``(cells, a, a)``.
    vanish : bool
        Whether the derivatives by all controls are zero, as those of ``conditional(q > 0, 2, 1)``.
    """

    def __init__(
        self,
        form: ufl.Form,
        evolution: Evolution,
        unknowns: CellUnknowns,
        bc_rows: np.ndarray,
        fields: Sequence[int],
    ):
        self._form, self._evolution, self._unknowns, self._bc_rows = form, evolution, unknowns, bc_rows
        self._fields, self._mesh = fields, evolution.V.mesh().unique()
        present = set(extract_coefficients(form))
        self._controls = [
            (i, c) for i, c in enumerate(evolution.parameters)
            if c in present and not expand_derivatives(derivative(form, c)).empty()
        ]  # fmt: skip
        self.vanish = not self._controls
        self._directions = {c: Function(c.function_space(), name="direction") for _, c in self._controls}
        free = np.where(np.isin(unknowns.rows, unknowns.local_rows(bc_rows)), -1, unknowns.rows)
        self._products = CellProducts(free, unknowns.rows)
        self.shape = self._products.shape
        self._last: tuple[np.ndarray, object, DirectionMatrices] | None = None
        self._cofunctions = {c: Cofunction(c.function_space().dual()) for _, c in self._controls}

    # -- matrices along a direction ------------------------------------------------------------------------------------
    @cached_property
    def _along(self):
        slope = sum(derivative(self._form, c, self._directions[c]) for _, c in self._controls)
        return get_assembler(expand_derivatives(slope), mat_type="aij")

    def _put_directions(self, dz: np.ndarray) -> None:
        parts = self._evolution.split_controls(dz)
        for i, control in self._controls:
            put(self._directions[control], parts[i])

    def matrices(self, dz: np.ndarray, operators: object) -> DirectionMatrices:
        """The matrix of the derivative in a direction ``(nz,)`` of the controls (collective over space).

        That of the last direction is cached: experiments with the same operators have the same directions.

        Parameters
        ----------
        dz
            The direction.
        operators
            Identifies the controls at which the derivative is taken.
        """
        last = self._last
        same = last is not None and last[1] is operators and np.array_equal(last[0], dz)
        if not all_ranks(self._mesh.comm, same):
            self._put_directions(dz)
            made = DirectionMatrices(self._along.assemble().petscmat, self._bc_rows)
            self._last = last = (dz.copy(), operators, made)
        return last[2]

    # -- contractions with slabs ---------------------------------------------------------------------------------------
    def add_products(self, p: np.ndarray, u: np.ndarray, out: np.ndarray, factor: float = 1.0) -> None:
        """Add ``factor`` times the sums of products of states ``(k, n)``, without the rows of ``p`` with a condition,
        to ``out`` (collective over space).
        """
        self._products.add(self._unknowns.local(p), self._unknowns.local(u), out, factor)

    @cached_property
    def _contraction(self) -> tuple[CellVectors, CellVectors, ufl.Form]:
        V, count = self._evolution.V, self._products.shape[1]
        test, trial = (CellVectors(V, count, self._fields) for _ in range(2))
        test.put(np.broadcast_to(np.eye(count), self._products.shape))
        return test, trial, contracted(expand_derivatives(self._form), test, trial)

    @cached_property
    def _first(self) -> dict:
        form = self._contraction[2]
        return {c: get_assembler(expand_derivatives(derivative(form, c))) for _, c in self._controls}

    @cached_property
    def _second(self) -> dict:
        slope = sum(derivative(self._contraction[2], c, self._directions[c]) for _, c in self._controls)
        slope = expand_derivatives(slope)
        forms = {c: expand_derivatives(derivative(slope, c)) for _, c in self._controls}
        return {c: get_assembler(form) for c, form in forms.items() if not form.empty()}

    def gradient(self, products: np.ndarray) -> np.ndarray:
        """The derivative by the controls, ``(nz,)``, from sums of products (collective over space)."""
        return self._assembled(products, self._first)

    def second(self, products: np.ndarray, dz: np.ndarray) -> np.ndarray:
        """The derivative of :meth:`gradient` in a direction ``(nz,)`` of the controls (collective over space)."""
        if not self._second:
            return np.zeros(self._evolution.control_size)
        self._put_directions(dz)
        return self._assembled(products, self._second)

    def _assembled(self, products: np.ndarray, assemblers: dict) -> np.ndarray:
        out = np.zeros(self._evolution.control_size)
        parts = self._evolution.split_controls(out)
        self._contraction[1].put(products)
        for i, control in self._controls:
            if control in assemblers:
                parts[i][:] = get(assemblers[control].assemble(tensor=self._cofunctions[control]))
        return out

    @property
    def nbytes(self) -> int:
        """Bytes of arrays that are stored."""
        return self._products.nbytes + 2 * 8 * int(np.prod(self._products.shape))

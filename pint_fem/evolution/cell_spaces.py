"""The unknowns of each cell, and functions that have values of their own in each cell.

A bilinear form of integrals over cells and their exterior facets, contracted with a matrix ``C`` of each cell, is a
functional: with the basis functions :math:`\\phi_a` of a cell,

.. math::  \\sum_{ab} C_{ab}\\, A(\\phi_b, \\phi_a) = \\sum_a A\\Big(\\sum_b C_{ab} \\phi_b, \\phi_a\\Big) ,

in which the sum over ``a`` is one over the leading index of discontinuous functions, so that its derivatives by
coefficients of ``A`` are compiled and assembled as those of any form.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import ufl
from finat.ufl import TensorElement, VectorElement
from firedrake import BrokenElement, Function, FunctionSpace
from firedrake.functionspaceimpl import WithGeometry
from mpi4py import MPI
from ufl.classes import IndexSum, MultiIndex

from pint_fem.kernels.arrays import own_size

__all__ = ["CellUnknowns", "CellVectors", "contracted"]


class CellUnknowns:
    """Numbers of the unknowns of the own cells, for states on the ranks of a communicator in space.

    Parameters
    ----------
    V
        Space of the states, mixed or not.
    fields
        Numbers of its fields whose unknowns are meant; default: all.

    Attributes
    ----------
    rows : ndarray
        Numbers ``(cells, a)`` of the unknowns of each own cell in the arrays of :meth:`local`.
    """

    def __init__(self, V: WithGeometry, fields: Sequence[int] | None = None):
        self.comm, self._size = V.mesh().comm, own_size(V)
        cells, found = V.mesh().unique().cell_set.size, []
        local_rows = V.dof_dset.lgmap.indices
        offset = 0
        for number, part in enumerate(V):
            size = part.block_size
            if fields is None or number in fields:
                nodes = part.cell_node_map().values[:cells]
                local = offset + nodes[:, :, None] * size + np.arange(size)
                found.append(local_rows[local.reshape(cells, nodes.shape[1] * size)])
            offset += part.dof_dset.total_size * size
        rows = np.concatenate(found, axis=1).astype(np.int64)
        first = self.comm.scan(self._size) - self._size
        self.rows = rows - first
        self._sent: list[np.ndarray] = []
        self._received: list[int] = []
        if self.comm.size > 1:
            self.rows = self._with_copies(rows, first)

    def _with_copies(self, rows: np.ndarray, first: int) -> np.ndarray:
        """Numbers of unknowns where copies of those of other ranks follow the own ones; prepares the exchange."""
        ends = np.cumsum([0, *self.comm.allgather(self._size)])
        others = np.unique(rows[(rows < first) | (rows >= first + self._size)])
        owners = np.searchsorted(ends, others, side="right") - 1
        wanted = [others[owners == rank] - ends[rank] for rank in range(self.comm.size)]
        self._sent, self._received = self.comm.alltoall(wanted), [len(numbers) for numbers in wanted]
        own = (rows >= first) & (rows < first + self._size)
        copies = self._size + np.searchsorted(others, rows)
        return np.where(own, rows - first, copies)

    def local_rows(self, own: np.ndarray) -> np.ndarray:
        """Numbers of unknowns in the arrays of :meth:`local`, on all ranks that have copies of them, from the numbers
        of own unknowns on each rank (collective).
        """
        marks = np.zeros((1, self._size))
        marks[0, own] = 1.0
        return np.flatnonzero(self.local(marks)[0])

    def local(self, states: np.ndarray) -> np.ndarray:
        """States ``(k, n)`` with copies of the unknowns of other ranks that own cells have, ``(k, n + copies)``; for
        the same ``k`` on all ranks (collective).
        """
        if self.comm.size == 1:
            return states
        k, count = len(states), int(sum(self._received))
        out = np.empty((k, self._size + count))
        out[:, : self._size] = states
        given = np.concatenate([states[:, numbers].ravel() for numbers in self._sent])
        taken = np.empty(k * count)
        sent, received = ([k * size for size in sizes] for sizes in (map(len, self._sent), self._received))
        self.comm.Alltoallv([given, sent, MPI.DOUBLE], [taken, received, MPI.DOUBLE])
        first, place = 0, self._size
        for size in self._received:
            out[:, place : place + size] = taken[first : first + k * size].reshape(k, size)
            first, place = first + k * size, place + size
        return out


class CellVectors:
    """Functions with ``a`` components, which have values of their own in each cell.

    Parameters
    ----------
    V
        Space of the states; a component is a function of this space on the cell.
    components
        Number of components.
    fields
        Numbers of the fields of ``V`` that are meant; the others are zero. Default: all.

    Attributes
    ----------
    functions : list of Function
        For each of the fields the function of that field, with a leading index for the components.
    """

    def __init__(self, V: WithGeometry, components: int, fields: Sequence[int] | None = None):
        self._V, self._components = V, components
        self.fields = list(range(len(V)) if fields is None else fields)
        self.functions, self._nodes = [], []
        for number in self.fields:
            part = V[number]
            element, shape = part.ufl_element(), ()
            entries = np.arange(part.block_size)
            if isinstance(element, (VectorElement, TensorElement)):
                shape = element._shape if isinstance(element, TensorElement) else (element.num_sub_elements,)
                if isinstance(element, TensorElement):  # with symmetry entries have the same unknown
                    entries = np.array(element.flattened_sub_element_mapping())
                element = element.sub_elements[0]
            broken = TensorElement(BrokenElement(element), shape=(components, *shape))
            space = FunctionSpace(V.mesh().unique(), broken)
            self.functions.append(Function(space))
            nodes = space.cell_node_map().values[: V.mesh().unique().cell_set.size]
            self._nodes.append((nodes, entries, part.block_size))

    @property
    def size(self) -> int:
        """Number of the unknowns of a cell."""
        return sum(nodes.shape[1] * size for nodes, _, size in self._nodes)

    def put(self, values: np.ndarray) -> None:
        """Set the values ``(cells, components, b)`` of the unknowns of each own cell."""
        first = 0
        for function, (nodes, entries, size) in zip(self.functions, self._nodes, strict=True):
            data = function.dat.data_wo
            data = data.reshape(len(data), self._components, len(entries))
            for i in range(nodes.shape[1]):
                data[nodes[:, i]] = values[:, :, first + entries]
                first += size

    def at(self, index: ufl.core.multiindex.Index) -> ufl.core.expr.Expr:
        """The component with a free index, an expression with the shape of functions of ``V``."""
        made = dict(zip(self.fields, self.functions, strict=True))
        if len(self._V) == 1:
            function = self.functions[0]
            if len(function.ufl_shape) == 1:
                return function[index]
            inner = ufl.indices(len(function.ufl_shape) - 1)
            return ufl.as_tensor(function[(index, *inner)], inner)
        zero = ufl.classes.Zero((), (index.count(),), (self._components,))
        components: list = []
        for number, part in enumerate(self._V):
            shape = part.value_shape
            for inner in np.ndindex(*shape):
                components.append(made[number][(index, *inner)] if number in made else zero)
        return ufl.as_vector(components)


def contracted(form: ufl.Form, test: CellVectors, trial: CellVectors) -> ufl.Form:
    """The functional in which the basis functions of a bilinear form's arguments are replaced by the components of two
    functions, summed over the components.
    """
    index = ufl.Index()
    v, u = form.arguments()
    functional = ufl.replace(form, {v: test.at(index), u: trial.at(index)})
    summed = (
        integral.reconstruct(integrand=IndexSum(integral.integrand(), MultiIndex((index,))))
        for integral in functional.integrals()
    )
    return ufl.Form(list(summed))

r"""Loads of the stages of a linear evolution: :math:`b_i = h_i f(t_i, z)` with the lifting of boundary values.

The load is affine in the controls. Its part at ``z = 0`` is assembled for each stage and time, or once where nothing
depends on time. The part of the controls is a sum of *terms*, products of operators with the numbers of a control:
those that are the same in all steps, and those with a weight in each step
(:class:`~pint_fem.evolution.control_operators.SeparatedOperator`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import ufl
from firedrake import Constant, Function, assemble
from firedrake.assemble import get_assembler

from pint_fem.evolution.control_operators import ControlOperator, MatrixOperator
from pint_fem.evolution.evolution import Evolution
from pint_fem.evolution.tableaux import DIRK
from pint_fem.kernels.arrays import get
from pint_fem.kernels.compressed_vectors import CompressedVectors, sample_times

__all__ = ["StageLoads", "Term"]


class Term(NamedTuple):
    """A part of the controls' loads.

    Attributes
    ----------
    weights : ndarray
        A factor for each step.
    stages : sequence of int
        The stages that it contributes to.
    operators : list
        Numbers of controls with their operators, of which the term is the sum.
    constant : bool
        Whether it is the part that is the same in all steps, with that of boundary values.
    """

    weights: np.ndarray
    stages: Sequence[int]
    operators: list[tuple[int, ControlOperator]]
    constant: bool


class StageLoads:
    """The loads of one level's stages; forms are compiled and assembled when it is made (collective over space).

    Parameters
    ----------
    evolution
        A private evolution, linear with constant operators.
    dirk
        Coefficients of the integrator.
    dt
        Step size of the level.
    bc_rows
        Own rows with a condition.
    store
        Whether loads that depend on time are stored, one for each step and stage; else in compressed form where they
        have a common basis of a few vectors.
    """

    def __init__(self, evolution: Evolution, dirk: DIRK, dt: float, bc_rows: np.ndarray, *, store: bool):
        self.evolution, self.dirk, self.dt, self.bc_rows = evolution, dirk, dt, bc_rows
        self.steps, self._store = dirk.diagonal * dt, store
        self._lift, self._size = Function(evolution.V, name="lift"), evolution.state_size
        self._loads_field: dict[int, bool] = {}
        self._lifting: dict[float, MatrixOperator] = {}
        self._prepare()
        self.update_data()

    def _prepare(self) -> None:
        """Compile the forms, and assemble the matrices that lift controls in boundary values."""
        evolution = self.evolution
        form, rate = evolution.parts()
        self._h = Constant(1.0)
        at_zero = {evolution.u: self._lift, rate: self._lift / self._h}
        at_zero |= {control: Function(control.function_space()) for control in evolution.parameters}
        self._assembler = get_assembler(ufl.replace(form, at_zero))
        if evolution.boundary_controls is not None:
            M, K = evolution.linear_operators()
            for h in dict.fromkeys(self.steps):
                matrix = assemble(M + Constant(h) * K, mat_type="aij").petscmat
                self._lifting[h] = MatrixOperator(matrix, self.bc_rows)

    def update_data(self) -> None:
        """Discard stored loads, as data in them have changed."""
        self._discard()
        if not self._store:
            ev = self.evolution
            times = enumerate(sample_times(ev.time(0), ev.time(ev.nsteps)))
            samples = [partial(self._assemble, t, i % self.dirk.stages) for i, t in times]
            self._compressed = CompressedVectors(ev.V.mesh().comm, samples)

    def _discard(self) -> None:
        """Discard the loads of all steps."""
        self._loads: dict[tuple | int, np.ndarray] = {}
        self._blocks: dict[int, np.ndarray] = {}
        self._longest: tuple[int, float, float] = (0, 0.0, 0.0)

    # -- the part at z = 0 ---------------------------------------------------------------------------------------------
    def affine(self, t: float, i: int) -> np.ndarray:
        """The load of stage ``i`` of the step from ``t`` at ``z = 0``, ``(n,)``."""
        key = (float(t), i) if self.evolution.depends_on_time else i
        if not self._store:
            return self._compressed.get(key, lambda: self._assemble(t, i))
        if key not in self._loads:
            self._loads[key] = self._assemble(t, i)
        return self._loads[key]

    def _affine_rows(self, times: np.ndarray, rows: slice, i: int) -> np.ndarray:
        """The loads of stage ``i`` at ``z = 0`` of a slice of the steps that start at ``times``, ``(rows, n)``, not to
        be written to. Those of the longest ``times`` so far are stored as one array, of which rows need not be copied.
        """
        if not self.evolution.depends_on_time:
            return np.broadcast_to(self.affine(times[rows.start], i), (rows.stop - rows.start, self._size))
        steps = len(times), float(times[0]), float(times[-1])
        if self._store and steps > self._longest:
            self._longest, self._blocks = steps, {}
        if not self._store or steps != self._longest:
            return np.array([self.affine(t, i) for t in times[rows]])
        if i not in self._blocks:
            self._blocks[i] = block = np.array([self.affine(t, i) for t in times])
            self._loads |= {(float(t), i): row for t, row in zip(times, block, strict=True)}
        return self._blocks[i][rows]

    def _lift_boundary_values(self, t: float, i: int) -> None:
        """Set the time of stage ``i`` of the step from ``t``, and the lifting to the boundary values without the
        controls' part.
        """
        ev = self.evolution
        if ev.t is not None:
            ev.t.assign(t + self.dirk.c[i] * self.dt)
        self._lift.zero()
        if ev.boundary_controls is not None:
            ev.put_controls(np.zeros(ev.control_size))
        for bc in ev.bcs:
            bc.apply(self._lift)

    def _assemble(self, t: float, i: int) -> np.ndarray:
        h = self.steps[i]
        self._lift_boundary_values(t, i)
        self._h.assign(h)
        load = -h * get(self._assembler.assemble())
        load[self.bc_rows] = get(self._lift)[self.bc_rows]
        return self._scaled(load)

    def _scaled(self, load: np.ndarray, *, transposed: bool = False) -> np.ndarray:
        """A load as the recursion requires it: where a field is eliminated, times the inverse of its mass matrix."""
        fields = self.evolution.fields
        return load if fields is None else fields.scale(load, transposed=transposed)

    # -- the part of the controls --------------------------------------------------------------------------------------
    def terms(self, times: np.ndarray) -> list[Term]:
        """The terms of the controls' loads for steps that start at ``times``."""
        operators = list(enumerate(self.evolution.control_operators))
        constant = [(p, op.terms[0]) for p, op in operators if op is not None and op.constant]
        terms = []
        if constant or self.evolution.boundary_controls is not None:
            terms.append(Term(np.ones(len(times)), range(self.dirk.stages), constant, True))
        for p, op in operators:
            if op is not None and not op.constant:
                for stage, c in enumerate(self.dirk.c):
                    weights = op.coefficients(times + c * self.dt).T
                    terms += [Term(w, (stage,), [(p, term)], False) for w, term in zip(weights, op.terms, strict=True)]
        return terms

    def of_term(self, term: Term, z: np.ndarray, h: float) -> np.ndarray:
        """The load ``(n,)`` of a term with weight 1 in a stage with ``a_ii dt = h``, for controls ``(nz,)``."""
        load, parts = np.zeros(self.evolution.state_size), self.evolution.split_controls(z)
        for p, operator in term.operators:
            load += h * operator(parts[p])
        if term.constant and self.evolution.boundary_controls is not None:
            lift = self.evolution.boundary_controls.lift(z)
            load += lift - self._lifting[h](lift)
        return self._scaled(load)

    def pull_back(self, term: Term, adjoints: np.ndarray) -> np.ndarray:
        """The transpose of :meth:`of_term`, ``(nz,)``, for adjoints of the stages' right-hand sides ``(stages, n)``."""
        out, steps = np.zeros(self.evolution.control_size), self.steps[list(term.stages)]
        parts = self.evolution.split_controls(out)
        for h in dict.fromkeys(steps):
            chosen = [i for i, own in zip(term.stages, steps, strict=True) if own == h]
            y = self._scaled(np.add.reduce(adjoints[chosen], axis=0), transposed=True)
            for p, operator in term.operators:
                parts[p] += h * operator.transposed(y)
            if term.constant and self.evolution.boundary_controls is not None:
                out += self.evolution.boundary_controls.pull_back(y - self._lifting[h].transposed(y))
        return out

    def pull_back_rows(self, term: Term, adjoints: np.ndarray) -> np.ndarray:
        """:meth:`pull_back` of several adjoints, ``(k, nz)`` from ``(stages, k, n)`` (collective over space)."""
        out, steps = np.zeros((adjoints.shape[1], self.evolution.control_size)), self.steps[list(term.stages)]
        parts, boundary = self.evolution.split_controls(out), None
        if term.constant:
            boundary = self.evolution.boundary_controls
        for h in dict.fromkeys(steps):
            chosen = [i for i, own in zip(term.stages, steps, strict=True) if own == h]
            y = np.add.reduce(adjoints[chosen], axis=0) if len(chosen) > 1 else adjoints[chosen[0]]
            if boundary is not None or any(self._loads_eliminated_field(operator) for _, operator in term.operators):
                y = np.array(y)
                for row in y:
                    self._scaled(row, transposed=True)
            for p, operator in term.operators:
                products = operator.transposed_rows(y)
                products *= h
                if len(parts) == 1 and boundary is None and len(chosen) == len(steps):
                    return products
                parts[p] += products
            if boundary is not None:
                out += boundary.pull_back_rows(y - self._lifting[h].transposed_rows(y))
        return out

    def _loads_eliminated_field(self, operator: ControlOperator) -> bool:
        """Whether a control loads the field that is eliminated, so that adjoints are scaled (collective over space)."""
        fields = self.evolution.fields
        if fields is None:
            return False
        if id(operator) not in self._loads_field:
            magnitudes = operator.absolute()
            total = magnitudes(np.ones(magnitudes.transposed(np.zeros(self.evolution.state_size)).size))
            found = self.evolution.V.mesh().comm.allreduce(float(total[fields.b].max(initial=0.0)))
            self._loads_field[id(operator)] = found > 0
        return self._loads_field[id(operator)]

    def of_steps(self, times: np.ndarray, z: np.ndarray | None, *, affine: bool) -> Callable[[slice, int], np.ndarray]:
        """The loads of steps that start at ``times``, as a function of a slice of the steps and the stage.

        Parameters
        ----------
        times
            Start times, ``(k,)``.
        z
            Controls, ``(nz,)`` or ``(k, nz)``; ``None`` for none.
        affine
            Whether the part at ``z = 0`` is included.

        Returns
        -------
        callable
            Its results ``(rows, n)`` are not to be written to.
        """
        terms = [] if z is None else self.terms(times)
        affine = affine and not self.evolution.is_homogeneous
        cached: dict = {}  # loads of the terms for the present slice: stages with the same h share them

        def of_term(rows, number, h):
            if z.ndim == 2 and cached.get("rows") != rows:
                cached.clear()
                cached["rows"] = rows
            if (number, h) not in cached:
                controls = np.atleast_2d(z if z.ndim == 1 else z[rows])
                cached[number, h] = np.array([self.of_term(terms[number], zi, h) for zi in controls])
            return cached[number, h]

        def loads(rows, i):
            b = self._affine_rows(times, rows, i) if affine else None
            for number, term in enumerate(terms):
                if i in term.stages:
                    load = of_term(rows, number, self.steps[i])
                    load = load if term.constant else term.weights[rows, None] * load
                    b = load if b is None else b + load
            shape = rows.stop - rows.start, self._size
            return np.zeros(shape) if b is None else np.broadcast_to(b, shape)

        return loads

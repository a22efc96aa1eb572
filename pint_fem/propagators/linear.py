r"""The linear propagator: operators assembled once, one factorisation per stage coefficient, blocks of states.

For :math:`M \dot u + K u = f(t, z)` with constant :math:`M, K` and :math:`f` affine in the control. With :math:`h_i =
a_{ii} \Delta t`,

.. math::  S_i U_i = M W_i + b_i , \quad S_i = M + h_i K, \quad b_i = h_i f(t_i, z),

on the free degrees of freedom, and the boundary values of time :math:`t_i` on the others (``S`` has unit rows and
columns there, ``M`` zero rows, and ``b`` carries the lifting; the rows' adjoints are those of the boundary values).
``W`` and the step follow from :class:`~pint_fem.evolution.tableaux.DIRK`. Where the evolution eliminates a field,
stages are solved as :mod:`~pint_fem.propagators.elimination` says.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import ufl
from firedrake import Constant, Function, assemble
from firedrake.assemble import get_assembler
from firedrake.petsc import PETSc

from pint_fem.errors import InputError
from pint_fem.evolution.control_operators import ControlOperator, MatrixOperator
from pint_fem.evolution.evolution import Evolution
from pint_fem.evolution.fields import Fields
from pint_fem.evolution.tableaux import DIRK
from pint_fem.kernels.arrays import boundary_rows, get
from pint_fem.kernels.blocks import Factor, Workspace, is_symmetric, lanes
from pint_fem.kernels.direct import matrix_bytes
from pint_fem.kernels.multigrid import Geometry
from pint_fem.kernels.regularity import stage_factor
from pint_fem.kernels.row_space import MOST, RowSpace, sample_times
from pint_fem.propagators.base import FEPropagator, StepData
from pint_fem.propagators.elimination import BlockFields, EliminatedRecursion, StateFields
from pint_fem.propagators.recursion import BlockRecursion, Recursion, StateRecursion

__all__ = ["LinearPropagator"]


class _Term(NamedTuple):
    """A part of the steps' loads: in some stages, the products of operators with the numbers of their controls, times
    a weight of each step; the constant part, with weights one, has that of boundary values as well.
    """

    weights: np.ndarray
    stages: Sequence[int]
    operators: list[tuple[int, ControlOperator]]
    boundary: bool


class LinearPropagator(FEPropagator):
    """See the module.

    Raises
    ------
    InputError
        If the evolution is not linear with constant operators.
    """

    is_linear = True
    #: Whether loads that depend on time are kept, one a step and stage, or in a small space if they are in one.
    keeps_loads = True

    def __init__(self, evolution: Evolution, *, stride: int = 1, tableau=None):
        super().__init__(evolution, stride=stride, tableau=tableau)
        evolution = self.evolution
        operators = evolution.linear_operators()
        if operators is None:
            raise InputError("the evolution is not linear with constant operators: use the form propagator")
        self.dirk = DIRK(self.tableau)
        self.bc_rows = boundary_rows(evolution.bcs, evolution.V)
        self.steps_of_stage = self.dirk.diagonal * self.dt
        #: Blocks of the operators where a field is eliminated.
        self.fields: Fields | None = evolution.fields
        self.factors: dict[float, Factor] = {}
        self._block, self._single = self._recursions(operators)
        self._loads = None
        self._row_space: RowSpace | None = None
        self._lifting: dict[float, MatrixOperator] = {}

    def _recursions(self, operators) -> tuple[Recursion, Recursion]:
        """Factor, and make the recursions on a block and on one state."""
        ev, given = self.evolution, (self.dirk, self.steps_of_stage, self.factors, self.bc_rows)
        given += (ev.boundary_controls is None,)
        if self.fields is not None:
            for h in dict.fromkeys(self.steps_of_stage):
                matrix = self.fields.complement(h)
                known = dict(symmetric=self.fields.symmetric, geometry=self.fields.geometry)
                self.factors[h] = stage_factor(ev, matrix, self.fields.nullspace, **known)
            sizes = (ev.state_size, None)
            block = EliminatedRecursion(
                BlockFields(self.fields, self.factors), Workspace.zeros(sizes, self.fields.M_b.comm), *given
            )
            return block, EliminatedRecursion(StateFields(self.fields, self.factors), np.zeros(ev.state_size), *given)
        parts = [assemble(form, mat_type="aij").petscmat for form in operators if not form.empty()]
        mass, symmetric = parts[0], all(is_symmetric(part) for part in parts)
        known = dict(symmetric=symmetric, geometry=Geometry(ev.V, ev.bcs))
        for h in dict.fromkeys(self.steps_of_stage):
            self.factors[h] = stage_factor(ev, self._stage_matrix(h), ev.nullspace, **known)
        symmetric_mass = mass.isSymmetric(0.0) and not len(self.bc_rows)
        self.M = self._mass_matrix()
        self.MT = self.M if symmetric_mass else self.M.transpose(PETSc.Mat())
        return BlockRecursion(self.M, self.MT, *given), StateRecursion(self.M, self.MT, *given)

    def shifted_parts(self, h: float) -> tuple[PETSc.Mat, ...]:
        """What the systems of ParaDiag's frequencies are sums of for a stage with ``a_ii dt = h``: ``S`` (regular, see
        :mod:`~pint_fem.kernels.nullspace`) and ``M``, or :math:`S_a`, :math:`M_a` and :math:`-G X`.
        """
        if self.fields is None:
            return self.factors[h].ksp.getOperators()[1], self.M
        return self.fields.regular_part(h), self.fields.matrices["M"], self.fields.stiffness()

    def _stage_matrix(self, h: float) -> PETSc.Mat:
        M, K = self.evolution.linear_operators()
        return assemble(M + Constant(h) * K, bcs=self.evolution.bcs, mat_type="aij").petscmat

    def _mass_matrix(self) -> PETSc.Mat:
        M = assemble(self.evolution.linear_operators()[0], mat_type="aij").petscmat.copy()
        M.zeroRows((self.bc_rows + M.getOwnershipRange()[0]).astype(PETSc.IntType), diag=0.0)
        return M

    # -- on blocks -----------------------------------------------------------------------------------------------------
    def apply(self, u: np.ndarray, out: np.ndarray, lane: int, load=None) -> None:
        """The step without forcing, or with ``load(rows, i)``, the stage loads of some rows of the block."""
        for rows, where in lanes(len(u), lane):
            self._block.workspace.load(u[rows], where)
            add = None
            if load is not None:

                def add(rhs, i, rows=rows, where=where):
                    rhs[where] += load(rows, i)

            out[rows] = self._block.forward(add)[where]

    def apply_transposed(self, lam: np.ndarray, out: np.ndarray, lane: int, on_stage=None) -> None:
        """Its transpose; ``on_stage(rows, i, y)`` sees the stage adjoints."""
        for rows, where in lanes(len(lam), lane):
            self._block.workspace.load(lam[rows], where)
            see = None if on_stage is None else lambda i, y, rows=rows, where=where: on_stage(rows, i, y[where])
            out[rows] = self._block.backward(see)[where]

    # -- one state after another ---------------------------------------------------------------------------------------
    def sweep(self, U: np.ndarray, G: np.ndarray | None, *, transposed: bool = False) -> None:
        """Homogeneous steps one after another in place, ``U[i+1] = Phi_u U[i] + G[i]``, or with the transpose."""
        single = self._single
        for i in range(len(U) - 1):
            single.w[...] = U[i]
            U[i + 1] = single.backward() if transposed else single.forward()
            if G is not None:
                U[i + 1] += G[i]

    # -- forcing -------------------------------------------------------------------------------------------------------
    def _prepare_loads(self) -> None:
        """Compile and assemble what the forcing needs, once: the affine part at ``z = 0``, the lifting."""
        if self._loads is not None:
            return
        ev = self.evolution
        form, rate = ev.parts()
        self._lift = Function(ev.V, name="lift")
        repl = {ev.u: self._lift, rate: self._lift / (h := Constant(1.0))}
        repl |= {control: Function(control.function_space()) for control in ev.parameters}
        self._load_assembler, self._load_h = get_assembler(ufl.replace(form, repl)), h
        self._start_loads()
        if ev.boundary_controls is not None:
            M, K = ev.linear_operators()
            for h in self.factors:
                self._lifting[h] = MatrixOperator(assemble(M + Constant(h) * K, mat_type="aij").petscmat, self.bc_rows)

    def update_data(self, changed):
        """See :class:`FEPropagator`: loads only, so that operators and factors stay."""
        if changed & self.evolution.operator_data:
            return False
        if changed and self._loads is not None:
            self._start_loads()
        return True

    def _start_loads(self) -> None:
        """Keep no load yet; where none is to be kept, find a small space that they may be in."""
        ev, self._loads = self.evolution, {}
        if not self.keeps_loads:
            samples = enumerate(sample_times(ev.time(0), ev.time(ev.nsteps)))
            makers = [partial(self._assemble_load, t, i % self.dirk.stages) for i, t in samples]
            self._row_space = RowSpace(ev.V.mesh().comm, makers)

    def _affine_load(self, t: float, i: int) -> np.ndarray:
        """``h f(t_i, 0)`` with lifting, for the step that starts at ``t``; assembled once where nothing depends on
        time.
        """
        key = (float(t), i) if self.evolution.depends_on_time else i
        if not self.keeps_loads:
            return self._row_space.get(key, lambda: self._assemble_load(t, i))
        if key not in self._loads:
            self._loads[key] = self._assemble_load(t, i)
        return self._loads[key]

    def _assemble_load(self, t: float, i: int) -> np.ndarray:
        ev, h = self.evolution, self.steps_of_stage[i]
        if ev.t is not None:
            ev.t.assign(t + self.dirk.c[i] * self.dt)
        self._lift.zero()
        if ev.boundary_controls is not None:
            ev.put_controls(np.zeros(ev.control_size))
        for bc in ev.bcs:
            bc.apply(self._lift)
        self._load_h.assign(h)
        load = -h * get(self._load_assembler.assemble())
        load[self.bc_rows] = get(self._lift)[self.bc_rows]
        return self._scaled(load)

    def _terms(self, times: np.ndarray) -> list[_Term]:
        """What the loads of steps from ``times`` are made of."""
        operators = list(enumerate(self.evolution.control_operators))
        constant = [(p, op.terms[0]) for p, op in operators if op is not None and op.constant]
        terms = []
        if constant or self.evolution.boundary_controls is not None:
            terms.append(_Term(np.ones(len(times)), range(self.dirk.stages), constant, True))
        for p, op in operators:
            if op is not None and not op.constant:
                for stage, c in enumerate(self.dirk.c):
                    weights = op.coefficients(times + c * self.dt).T
                    terms += [_Term(w, (stage,), [(p, term)], False) for w, term in zip(weights, op.terms, strict=True)]
        return terms

    def _term_load(self, term: _Term, z: np.ndarray, h: float) -> np.ndarray:
        """A term's load of a stage for a step's vector of controls, ``(n,)``."""
        load, parts = np.zeros(self.evolution.state_size), self.evolution.split_controls(z)
        for p, operator in term.operators:
            load += h * operator(parts[p])
        if term.boundary and self.evolution.boundary_controls is not None:
            lift = self.evolution.boundary_controls.lift(z)
            load += lift - self._lifting[h](lift)
        return self._scaled(load)

    def _term_pull_back(self, term: _Term, adjoints: np.ndarray) -> np.ndarray:
        """Its transpose, of the adjoints of the stages' right-hand sides ``(stages, n)``, ``(nz,)``."""
        out, steps = np.zeros(self.evolution.control_size), self.steps_of_stage[list(term.stages)]
        parts = self.evolution.split_controls(out)
        for h in dict.fromkeys(steps):
            some = [i for i, own in zip(term.stages, steps, strict=True) if own == h]
            y = self._scaled(np.add.reduce(adjoints[some], axis=0), transposed=True)
            for p, operator in term.operators:
                parts[p] += h * operator.transposed(y)
            if term.boundary and self.evolution.boundary_controls is not None:
                out += self.evolution.boundary_controls.pull_back(y - self._lifting[h].transposed(y))
        return out

    def _scaled(self, load: np.ndarray, *, transposed: bool = False) -> np.ndarray:
        """A stage's load as the recursion takes it (see ``fields``)."""
        return load if self.fields is None else self.fields.scale(load, transposed=transposed)

    def forcing(self, data: StepData, lane: int = 0) -> np.ndarray:
        """The affine part of ``step``: ``Phi(0, z)`` of each step, ``(k, n)``; a broadcast row where all are the
        same.
        """
        return self._forced(data, data.z, True, lane)

    def control_forcing(self, data: StepData, dz: np.ndarray, lane: int = 0) -> np.ndarray:
        """``Phi_z dz`` of each step, ``(k, n)``."""
        return self._forced(data, dz, False, lane)

    def _forced(self, data: StepData, z, affine: bool, lane: int) -> np.ndarray:
        k, n, ev = len(data.t), self.evolution.state_size, self.evolution
        affine = affine and not ev.is_homogeneous
        if (affine and ev.depends_on_time) or (z is not None and z.ndim == 2):
            out = np.empty((k, n))
            self.apply(np.broadcast_to(np.zeros(n), out.shape), out, lane, self._load(data, z, affine))
            return out
        rows, weights = self._responses(data, z, affine)
        if not weights:
            return np.broadcast_to(rows[0], (k, n))
        out = np.tile(rows[0], (k, 1))
        for w, row in zip(weights, rows[1:], strict=True):
            for i in range(k):  # a product of matrices may round a row with the number of rows
                out[i] += w[i] * row
        return out

    def _responses(self, data: StepData, z, affine: bool) -> tuple[np.ndarray, list[np.ndarray]]:
        """Ends of steps from zero with what is the same in all of them, and of each term that is not with its weight 1,
        ``(1 + terms, n)``; the weights of these in each step.
        """
        self._prepare_loads()
        terms = self._terms(data.t) if z is not None else []
        same, moving = ([t for t in terms if t.boundary == constant] for constant in (True, False))
        loads = np.zeros((self.dirk.stages, 1 + len(moving), self.evolution.state_size))
        for i, h in enumerate(self.steps_of_stage):
            if affine and len(data.t):
                loads[i, 0] += self._affine_load(data.t[0], i)
            for row, some in enumerate([same, *([t] for t in moving)]):
                for term in some:
                    if i in term.stages:
                        loads[i, row] += self._term_load(term, z, h)
        out = np.empty(loads.shape[1:])
        self.apply(np.zeros_like(out), out, 0, lambda rows, i: loads[i, rows])
        return out, [term.weights for term in moving]

    def _load(self, data: StepData, z: np.ndarray | None, affine: bool):
        """``load(rows, i)`` of a stage, for :meth:`apply`: of the controls ``z``, and the affine part where asked."""
        self._prepare_loads()
        terms = [] if z is None else self._terms(data.t)
        affine = affine and not self.evolution.is_homogeneous
        known = {}  # of the terms, by coefficient: stages share them

        def control(part, number, h):
            if z.ndim == 2 and known.get("part") != part:
                known.clear()
                known["part"] = part
            if (number, h) not in known:
                some = np.atleast_2d(z if z.ndim == 1 else z[part])
                known[number, h] = np.array([self._term_load(terms[number], zi, h) for zi in some])
            return known[number, h]

        def load(part, i):
            b = np.zeros((part.stop - part.start, self.evolution.state_size))
            if affine:
                b += [self._affine_load(t, i) for t in data.t[part]]
            for number, term in enumerate(terms):
                if i in term.stages:
                    of_z = control(part, number, self.steps_of_stage[i])
                    b += of_z if term.boundary else term.weights[part, None] * of_z
            return b

        return load

    # -- the interface -------------------------------------------------------------------------------------------------
    def step(self, data, u, out, lane=0):
        """See :class:`FEPropagator`."""
        self.apply(u, out, lane, self._load(data, data.z, True))

    def tangent(self, data, du, dz, out, lane=0):
        """See :class:`FEPropagator`."""
        self.apply(du, out, lane, None if dz is None else self._load(data, dz, False))

    def adjoint(self, data, lam, out, lane=0):
        """See :class:`FEPropagator`."""
        self.apply_transposed(lam, out, lane)

    def control_adjoint(self, data, lam, lane=0):
        """See :class:`FEPropagator`; for a static control the adjoints are summed before the one solve a term."""
        if not self.evolution.per_step:
            return self.control_adjoint_of_sums(data, self.control_sums(data, lam))
        self._prepare_loads()
        terms, adjoints = self._terms(data.t), self._stage_adjoints(lam, lane)
        out = np.zeros((len(lam), self.evolution.control_size))
        for row, gz in enumerate(out):
            for term in terms:
                gz += term.weights[row] * self._term_pull_back(term, adjoints[:, row])
        return out

    def control_sums(self, data, lam):
        """See :class:`FEPropagator`; a row for each term."""
        terms = self._terms(data.t)
        sums = [np.add.reduce(lam if term.boundary else term.weights[:, None] * lam, axis=0) for term in terms]
        return np.array(sums).reshape(len(terms), self.evolution.state_size)

    def control_adjoint_of_sums(self, data, sums):
        """See :class:`FEPropagator`."""
        self._prepare_loads()
        adjoints = self._stage_adjoints(sums, 0)
        parts = (self._term_pull_back(term, adjoints[:, row]) for row, term in enumerate(self._terms(data.t)))
        return sum(parts, np.zeros(self.evolution.control_size))

    def _stage_adjoints(self, lam: np.ndarray, lane: int) -> np.ndarray:
        """Adjoints of the stages' right-hand sides, ``(stages, k, n)``."""
        adjoints = np.zeros((self.dirk.stages, *lam.shape))

        def on_stage(rows, i, y):
            adjoints[i][rows] = y

        self.apply_transposed(lam, np.empty_like(lam), lane, on_stage)
        return adjoints

    # -- memory --------------------------------------------------------------------------------------------------------
    def kept_bytes(self, count):
        """Loads and the stages' own arrays."""
        stages = rows = self.dirk.stages
        if self.evolution.depends_on_time:
            rows = stages * count if self.keeps_loads else min(MOST, stages * count)
        if self.evolution.is_homogeneous:
            rows = 0
        return 8 * self.evolution.state_size * rows + self._block.nbytes + self._single.nbytes

    def petsc_bytes(self, memories):
        """See :class:`FEPropagator`."""
        if self.fields is not None:
            matrices = self.fields.held if self.stride == 1 else []  # levels share them
        else:
            matrices = [self.M] if self.MT is self.M else [self.M, self.MT]
        parts = [factor.nbytes for factor in self.factors.values()]
        return {
            "blocks": self._block.petsc_bytes,
            "matrices": sum(map(matrix_bytes, matrices)) + sum(part["matrices"] for part in parts),
            "factors": sum(part["factors"] for part in parts),
        }

    def second_order(self, data, du, dz, lam, end=None):
        """Zero: the step is affine."""
        return np.zeros_like(lam), self._collect([np.zeros(self.evolution.control_size)] * len(lam))

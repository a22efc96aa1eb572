r"""The linear propagator: operators assembled once, one factorisation per stage coefficient, blocks of states.

For :math:`M \dot u + K u = f(t, z)` with constant :math:`M, K` and :math:`f` affine in the control. With :math:`h_i =
a_{ii} \Delta t`,

.. math::  S_i U_i = M W_i + b_i , \quad S_i = M + h_i K, \quad b_i = h_i f(t_i, z),

on the free degrees of freedom, and the boundary values of time :math:`t_i` on the others (``S`` has unit rows and
columns there, ``M`` zero rows, and ``b`` carries the lifting; the rows' adjoints are those of the boundary values).
``W`` and the step follow from :class:`~pint_fem.propagators.tableaux.DIRK`. Where the evolution eliminates a field,
stages are solved as :mod:`~pint_fem.propagators.fields` says.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import ufl
from firedrake import Constant, Function, assemble
from firedrake.petsc import PETSc

from pint_fem.errors import InputError
from pint_fem.propagators.arrays import boundary_rows, get
from pint_fem.propagators.base import FEPropagator, StepData
from pint_fem.propagators.blocks import Factor, Workspace, is_symmetric, lanes
from pint_fem.propagators.evolution import Evolution
from pint_fem.propagators.fields import BlockFields, EliminatedRecursion, Fields, StateFields
from pint_fem.propagators.multigrid import Geometry
from pint_fem.propagators.operators import ControlOperator, MatrixOperator
from pint_fem.propagators.recursion import BlockRecursion, Recursion, StateRecursion
from pint_fem.propagators.tableaux import DIRK

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

    def __init__(self, evolution: Evolution, *, stride: int = 1, tableau=None):
        super().__init__(evolution, stride=stride, tableau=tableau)
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
        self._lifting: dict[float, MatrixOperator] = {}

    def _recursions(self, operators) -> tuple[Recursion, Recursion]:
        """Factor, and make the recursions on a block and on one state."""
        ev, given = self.evolution, (self.dirk, self.steps_of_stage, self.factors, self.bc_rows)
        given += (ev.boundary_controls is None,)
        if self.fields is not None:
            for h in dict.fromkeys(self.steps_of_stage):
                matrix = self.fields.complement(h)
                known = dict(symmetric=self.fields.symmetric, geometry=self.fields.geometry)
                self.factors[h] = Factor(matrix, ev.solver_parameters, **known)
            sizes = (ev.state_size, None)
            block = EliminatedRecursion(
                BlockFields(self.fields, self.factors), Workspace.zeros(sizes, self.fields.M_b.comm), *given
            )
            return block, EliminatedRecursion(StateFields(self.fields, self.factors), np.zeros(ev.state_size), *given)
        parts = [assemble(form, mat_type="aij").petscmat for form in operators if not form.empty()]
        mass, symmetric = parts[0], all(is_symmetric(part) for part in parts)
        M, zero_rows = mass.copy(), (self.bc_rows + mass.getOwnershipRange()[0]).astype(PETSc.IntType)
        M.zeroRows(zero_rows, diag=0.0)
        for h in dict.fromkeys(self.steps_of_stage):
            S = assemble(operators[0] + Constant(h) * operators[1], bcs=ev.bcs, mat_type="aij").petscmat
            self.factors[h] = Factor(S, ev.solver_parameters, symmetric=symmetric, geometry=Geometry(ev.V, ev.bcs))
        symmetric_mass = mass.isSymmetric(0.0) and not len(self.bc_rows)
        self.M, self.MT = M, M if symmetric_mass else M.transpose(PETSc.Mat())
        return BlockRecursion(self.M, self.MT, *given), StateRecursion(self.M, self.MT, *given)

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
        """Compile and assemble what the forcing needs: the affine part at ``z = 0`` and the controls' operators."""
        ev = self.evolution
        form, rate = ev.parts()
        self._lift = Function(ev.V, name="lift")
        repl = {ev.u: self._lift, rate: self._lift / (h := Constant(1.0))}
        repl |= {control: Function(control.function_space()) for control in ev.parameters}
        self._load_form, self._load_h = ufl.replace(form, repl), h
        self._loads = {}
        if ev.boundary_controls is not None:
            M, K = ev.linear_operators()
            for h in self.factors:
                self._lifting[h] = MatrixOperator(assemble(M + Constant(h) * K, mat_type="aij").petscmat, self.bc_rows)

    def _affine_load(self, t: float, i: int) -> np.ndarray:
        """``h f(t_i, 0)`` with lifting, for the step that starts at ``t``; assembled once where nothing depends on
        time.
        """
        key = (float(t), i) if self.evolution.depends_on_time else i
        if key not in self._loads:
            ev, h = self.evolution, self.steps_of_stage[i]
            if ev.t is not None:
                ev.t.assign(t + self.dirk.c[i] * self.dt)
            self._lift.zero()
            if ev.boundary_controls is not None:
                ev.put_controls(np.zeros(ev.control_size))
            for bc in ev.bcs:
                bc.apply(self._lift)
            self._load_h.assign(h)
            load = -h * get(assemble(self._load_form))
            load[self.bc_rows] = get(self._lift)[self.bc_rows]
            self._loads[key] = self._scaled(load)
        return self._loads[key]

    def _terms(self, times: np.ndarray) -> list[_Term]:
        """What the loads of steps from ``times`` are made of, for static controls."""
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

    def _term_pull_back(self, term: _Term, y: np.ndarray, h: float) -> np.ndarray:
        """Its transpose, of the adjoint of a stage's right-hand side."""
        out, y = np.zeros(self.evolution.control_size), self._scaled(y.copy(), transposed=True)
        parts = self.evolution.split_controls(out)
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
        return self._forced(data, data.z, self._affine_load, lane)

    def control_forcing(self, data: StepData, dz: np.ndarray, lane: int = 0) -> np.ndarray:
        """``Phi_z dz`` of each step, ``(k, n)``."""
        return self._forced(data, dz, None, lane)

    def _forced(self, data: StepData, z, affine, lane: int) -> np.ndarray:
        if self._loads is None:
            self._prepare_loads()
        k, n = len(data.t), self.evolution.state_size
        parts = [np.zeros((min(k, 1), n))]
        if affine is not None and not self.evolution.is_homogeneous:
            moving = self.evolution.depends_on_time
            load = lambda rows, i: np.array([affine(t, i) for t in data.t[rows if moving else slice(1)]])
            parts.append(self._responses(k if moving else min(k, 1), load, lane if moving else 0))
        if z is not None and self.evolution.parameters and k:
            parts += self._stepwise_forcing(data.t, z, lane) if z.ndim == 2 else self._static_forcing(data.t, z)
        out = sum(parts[1:], parts[0])
        return np.broadcast_to(out, (k, n)) if len(out) < k else out

    def _responses(self, count: int, load, lane: int) -> np.ndarray:
        """Ends of steps from zero with ``load(rows, i)``, ``(count, n)``."""
        out = np.empty((count, self.evolution.state_size))
        self.apply(np.zeros_like(out), out, lane, load)
        return out

    def _static_forcing(self, times: np.ndarray, z: np.ndarray) -> list[np.ndarray]:
        """``Phi_z z`` of each step as a sum; one solve a term."""
        terms = self._terms(times)
        loads = [{i: self._term_load(term, z, self.steps_of_stage[i]) for i in term.stages} for term in terms]
        nothing = np.zeros(self.evolution.state_size)
        responses = self._responses(len(terms), lambda rows, i: np.array([l.get(i, nothing) for l in loads[rows]]), 0)
        pairs = zip(terms, responses, strict=True)
        # one after another: a product of matrices may round a row with the number of rows
        return [row[None] if term.boundary else term.weights[:, None] * row for term, row in pairs]

    def _stepwise_forcing(self, times: np.ndarray, z: np.ndarray, lane: int) -> list[np.ndarray]:
        """``Phi_z z`` of each step for controls ``(k, nz)``."""
        terms = self._terms(times)

        def load(rows, i):
            out, h = np.zeros((rows.stop - rows.start, self.evolution.state_size)), self.steps_of_stage[i]
            for term in terms:
                if i in term.stages:
                    out += [w * self._term_load(term, zi, h) for w, zi in zip(term.weights[rows], z[rows], strict=True)]
            return out

        return [self._responses(len(times), load, lane)]

    # -- the interface -------------------------------------------------------------------------------------------------
    def step(self, data, u, out, lane=0):
        """See :class:`FEPropagator`."""
        self.apply(u, out, lane)
        out += self.forcing(data, lane)

    def tangent(self, data, du, dz, out, lane=0):
        """See :class:`FEPropagator`."""
        self.apply(du, out, lane)
        if dz is not None:
            out += self.control_forcing(data, dz, lane)

    def adjoint(self, data, lam, out, lane=0):
        """See :class:`FEPropagator`."""
        self.apply_transposed(lam, out, lane)

    def control_adjoint(self, data, lam, lane=0):
        """See :class:`FEPropagator`; for a static control the adjoints are summed before the one solve a term."""
        if self._loads is None:
            self._prepare_loads()
        terms, stages = self._terms(data.t), range(self.dirk.stages)
        if not self.evolution.per_step:
            sums = [np.add.reduce(lam if term.boundary else term.weights[:, None] * lam, axis=0) for term in terms]
            lam, lane = np.array(sums).reshape(len(terms), self.evolution.state_size), 0
        adjoints = [np.zeros_like(lam) for _ in stages]

        def on_stage(rows, i, y):
            adjoints[i][rows] = y

        self.apply_transposed(lam, np.empty_like(lam), lane, on_stage)
        back = lambda term, i, row: self._term_pull_back(term, adjoints[i][row], self.steps_of_stage[i])
        if not self.evolution.per_step:
            return sum(
                (back(term, i, row) for row, term in enumerate(terms) for i in term.stages),
                np.zeros(self.evolution.control_size),
            )
        out = np.zeros((len(lam), self.evolution.control_size))
        for row, gz in enumerate(out):
            for term in terms:
                for i in term.stages:
                    gz += term.weights[row] * back(term, i, row)
        return out

    def second_order(self, data, du, dz, lam, end=None):
        """Zero: the step is affine."""
        return np.zeros_like(lam), self._collect([np.zeros(self.evolution.control_size)] * len(lam))

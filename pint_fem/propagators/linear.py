r"""The linear propagator: operators assembled once, one factorisation per stage coefficient, blocks of states.

For :math:`M \dot u + K u = f(t, z)` with constant :math:`M, K` and :math:`f` affine in the control. With :math:`h_i =
a_{ii} \Delta t`,

.. math::  S_i U_i = M W_i + b_i , \quad S_i = M + h_i K, \quad b_i = h_i f(t_i, z),

on the free degrees of freedom, and the boundary values of time :math:`t_i` on the others (``S`` has unit rows and
columns there, ``M`` zero rows, and ``b`` carries the lifting; the rows' adjoints are those of the boundary values).
``W`` and the step follow from :class:`~pint_fem.propagators.tableaux.DIRK`.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import ufl
from firedrake import Constant, Function, assemble
from firedrake.assemble import get_assembler
from firedrake.petsc import PETSc

from pint_fem.errors import InputError
from pint_fem.propagators.arrays import boundary_rows, get
from pint_fem.propagators.base import FEPropagator, StepData
from pint_fem.propagators.blocks import Factor, is_symmetric, lanes, matrix_bytes
from pint_fem.propagators.evolution import Evolution
from pint_fem.propagators.operators import ControlOperator, MatrixOperator, control_operator
from pint_fem.propagators.recursion import BlockRecursion, StateRecursion
from pint_fem.propagators.rows import MOST, RowSpace, sample_times
from pint_fem.propagators.tableaux import DIRK

__all__ = ["LinearPropagator"]


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
        operators = evolution.linear_operators()
        if operators is None:
            raise InputError("the evolution is not linear with constant operators: use the form propagator")
        self.dirk = DIRK(self.tableau)
        self.bc_rows = boundary_rows(evolution.bcs, evolution.V)
        parts = [assemble(form, mat_type="aij").petscmat for form in operators if not form.empty()]
        mass, symmetric = parts[0], all(is_symmetric(part) for part in parts)
        start = mass.getOwnershipRange()[0]
        self._zero_rows = (self.bc_rows + start).astype(PETSc.IntType)
        self.M = mass.copy()
        self.M.zeroRows(self._zero_rows, diag=0.0)
        self.steps_of_stage = self.dirk.diagonal * self.dt
        self.factors = {}
        for h in dict.fromkeys(self.steps_of_stage):
            S = assemble(operators[0] + Constant(h) * operators[1], bcs=evolution.bcs, mat_type="aij").petscmat
            self.factors[h] = Factor(S, evolution.solver_parameters, symmetric=symmetric)
        symmetric_mass = mass.isSymmetric(0.0) and not len(self.bc_rows)
        self.MT = self.M if symmetric_mass else self.M.transpose(PETSc.Mat())
        given = (self.M, self.MT, self.dirk, self.steps_of_stage, self.factors, self.bc_rows)
        given += (evolution.boundary_controls is None,)
        self._block, self._single = BlockRecursion(*given), StateRecursion(*given)
        self._loads = None
        self._operators: list[ControlOperator | None] = []
        self._lifting: dict[float, MatrixOperator] = {}

    def stage_matrix(self, h: float) -> PETSc.Mat:
        """``S`` of a stage with ``a_ii dt = h``."""
        return self.factors[h].ksp.getOperators()[0]

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
        self._load_assembler, self._load_h = get_assembler(ufl.replace(form, repl)), h
        self._loads = {}
        samples = enumerate(sample_times(ev.time(0), ev.time(ev.nsteps)))
        self._row_space = RowSpace(
            ev.V.mesh().comm, [partial(self._assemble_load, t, i % self.dirk.stages) for i, t in samples]
        )
        self._operators = [control_operator(-form, control, self.bc_rows) for control in ev.parameters]
        if ev.boundary_controls is not None:
            M, K = ev.linear_operators()
            for h in self.factors:
                self._lifting[h] = MatrixOperator(assemble(M + Constant(h) * K, mat_type="aij").petscmat, self.bc_rows)

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
        return load

    def _control_load(self, z: np.ndarray, h: float) -> np.ndarray:
        """``db/dz z`` of a stage for a step's vector of controls, ``(n,)``."""
        load = np.zeros(self.evolution.state_size)
        for operator, part in zip(self._operators, self.evolution.split_controls(z), strict=True):
            if operator is not None:
                load += h * operator(part)
        if self.evolution.boundary_controls is not None:
            lift = self.evolution.boundary_controls.lift(z)
            load += lift - self._lifting[h](lift)
        return load

    def _control_pull_back(self, y: np.ndarray, h: float) -> np.ndarray:
        """Its transpose, of the adjoint of a stage's right-hand side."""
        out = np.zeros(self.evolution.control_size)
        for operator, part in zip(self._operators, self.evolution.split_controls(out), strict=True):
            if operator is not None:
                part += h * operator.transposed(y)
        if self.evolution.boundary_controls is not None:
            out += self.evolution.boundary_controls.pull_back(y - self._lifting[h].transposed(y))
        return out

    def forcing(self, data: StepData, lane: int = 0) -> np.ndarray:
        """The affine part of ``step``: ``Phi(0, z)`` of each step, ``(k, n)``; a broadcast row where all are the
        same.
        """
        return self._forced(data, data.z, True, lane)

    def control_forcing(self, data: StepData, dz: np.ndarray, lane: int = 0) -> np.ndarray:
        """``Phi_z dz`` of each step, ``(k, n)``."""
        return self._forced(data, dz, False, lane)

    def _forced(self, data: StepData, z, affine: bool, lane: int) -> np.ndarray:
        k, n = len(data.t), self.evolution.state_size
        same = not (affine and self.evolution.depends_on_time) and (z is None or z.ndim == 1)
        rows = min(k, 1) if same else k
        out = np.empty((rows, n))
        self.apply(np.broadcast_to(np.zeros(n), out.shape), out, 0 if same else lane, self._load(data, z, affine))
        return np.broadcast_to(out, (k, n)) if same and k else out

    def _load(self, data: StepData, z: np.ndarray | None, affine: bool):
        """``load(rows, i)`` of a stage, for :meth:`apply`: of the controls ``z``, and the affine part where asked."""
        if self._loads is None:
            self._prepare_loads()
        z = z if self.evolution.parameters else None
        known = {}  # of the controls, by coefficient: stages share it

        def control(part, h):
            if z is not None and z.ndim == 2 and known.get("part") != part:
                known.clear()
                known["part"] = part
            if h not in known:
                known[h] = np.array([self._control_load(zi, h) for zi in np.atleast_2d(z if z.ndim == 1 else z[part])])
            return known[h]

        def load(part, i):
            b = np.zeros((part.stop - part.start, self.evolution.state_size))
            if affine:
                b += [self._affine_load(t, i) for t in data.t[part]]
            if z is not None:
                b += control(part, self.steps_of_stage[i])
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
        """See :class:`FEPropagator`; for a static control the adjoints are summed before the one solve."""
        if self._loads is None:
            self._prepare_loads()
        if not self.evolution.per_step:
            lam, lane = (
                np.add.reduce(lam, axis=0, keepdims=True) if len(lam) else np.zeros((1, self.evolution.state_size)),
                0,
            )
        loads = {h: np.zeros_like(lam) for h in self.factors}

        def on_stage(rows, i, y):
            loads[self.steps_of_stage[i]][rows] += y

        self.apply_transposed(lam, np.empty_like(lam), lane, on_stage)
        out = np.zeros((len(lam), self.evolution.control_size))
        for h, adjoints in loads.items():
            for y, gz in zip(adjoints, out, strict=True):
                gz += self._control_pull_back(y, h)
        return out if self.evolution.per_step else out[0]

    # -- memory --------------------------------------------------------------------------------------------------------
    def kept_bytes(self, count):
        """Loads and the stages' own arrays."""
        stages = self.dirk.stages
        rows = stages * count if self.evolution.depends_on_time and self.keeps_loads else stages
        if self.evolution.depends_on_time and not self.keeps_loads:
            rows = min(MOST, stages * count)
        return 8 * self.evolution.state_size * rows + self._block.nbytes + self._single.nbytes

    def petsc_bytes(self, memories):
        """See :class:`FEPropagator`."""
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

r"""The form propagator: steps and derivatives from the UFL residual by UFL's own calculus, compiled once per level.

Stage ``i`` solves :math:`F(U, W, z) = 0` for ``U`` by Newton's method to round-off
(:mod:`~pint_fem.propagators.newton`). With an adjoint :math:`y` of the stage, :math:`L = F(U, W, z; y)`, all
derivatives are those of ``F`` and ``L``:

.. math::
    F_U\, dU = -(F_W\, dW + F_z\, dz), \qquad  F_U^T y = \bar U, \quad \bar W \mathrel{-}= F_W^T y, \quad \bar z
    \mathrel{-}= F_z^T y,

and at second order, in the direction :math:`(dU, dW, dz)` with :math:`D` the derivative of a gradient of ``L`` in it,

.. math::
    F_U^T dy = d\bar U - D L_U, \qquad d\bar W \mathrel{-}= D L_W + F_W^T dy, \qquad d\bar z \mathrel{-}= D L_z +
    F_z^T dy.

The bars of ``u_0`` follow from the stages' recursion (:class:`~pint_fem.evolution.tableaux.DIRK`) in reverse.

Where the data of a block has memories of its steps (``StepData.kept``), stage values and matrices are computed once
for a linearisation, and derivatives are products and triangular solves
(:mod:`~pint_fem.propagators.linearisation`); else everything is computed in each call.
"""

from __future__ import annotations

import numpy as np
from firedrake.petsc import PETSc
from mpi4py import MPI

from pint_fem.errors import InputError
from pint_fem.evolution.evolution import Evolution
from pint_fem.evolution.tableaux import DIRK
from pint_fem.kernels.direct import matrix_bytes
from pint_fem.kernels.factors import FACTOR_MEMORY, Factors
from pint_fem.propagators.base import FEPropagator, StepData, direction
from pint_fem.propagators.linearisation import StageMemory, StepMemory
from pint_fem.propagators.newton import NEWTON, StageNewton
from pint_fem.propagators.stage import StageForms

__all__ = ["NEWTON", "FormPropagator"]

_NONE = np.zeros(0)  # the control of a step without one


class FormPropagator(FEPropagator):
    """See the module.

    Parameters
    ----------
    evolution, stride, tableau
        As for every propagator.
    factor_memory
        Bytes of factors that are kept on a rank for this level; default 1 GB; see
        :mod:`~pint_fem.kernels.factors`. Without room a stage is factored again
        whenever another one was between, with the same result to round-off.

    Attributes
    ----------
    counts : Counter
        Of ``"newton"`` solves, ``"residual"``, ``"jacobian"`` and ``"derivative"`` assemblies, ``"factorisation"`` and
        ``"solve"``; ``"petsc newton"``: stages that PETSc's Newton solved.

    Raises
    ------
    InputError
        If ``factor_memory`` is negative.
    """

    def __init__(self, evolution: Evolution, *, stride: int = 1, tableau=None, factor_memory: int = FACTOR_MEMORY):
        super().__init__(evolution, stride=stride, tableau=tableau)
        evolution = self.evolution
        if not factor_memory >= 0:
            raise InputError(f"factor_memory = {factor_memory!r}: give a number of bytes, 0 keeps no factor")
        self.dirk = DIRK(self.tableau)
        self.forms = StageForms(evolution, self.dirk, self.dt)
        self.bc_rows, self.counts = self.forms.bc_rows, self.forms.counts
        self.factors = Factors(
            evolution.solver_parameters, evolution.V, factor_memory, self.counts, evolution.nullspace,
            f"{evolution.options_prefix}pint_form_",
        )  # fmt: skip
        self.newton = StageNewton(self.forms, self.factors, self.factors.parameters)
        with self.forms.U.dat.vec_ro as vec:
            self._w, self._b, self._x = vec.duplicate(), vec.duplicate(), vec.duplicate()
        self._scratch = StepMemory(self.forms, keep=False)
        self._control = _NONE
        self._control_vecs: dict[int, tuple[PETSc.Vec, PETSc.Vec]] = {}

    def update_data(self, changed):
        """See :class:`FEPropagator`: forms are assembled with the new values unless a matrix is kept for all steps."""
        return self.forms.update_data(changed)

    # -- memory --------------------------------------------------------------------------------------------------------
    def memory(self, count, *, often=True) -> list[StepMemory]:
        """See :class:`FEPropagator`."""
        return [StepMemory(self.forms, refine=not often) for _ in range(count)]

    def memory_bytes(self):
        """See the module :mod:`~pint_fem.propagators.linearisation`."""
        return 8 * ((8 * self.dirk.stages + 5) * self.evolution.state_size + self.evolution.control_size)

    def petsc_bytes(self, memories):
        """Matrices of the stages that move, and factors as far as the budget goes: from a factorisation of a Jacobian
        at the values that the functions have, if there was none yet.
        """
        forms, stages = self.forms, memories * self.dirk.stages
        J = forms.J.assemble()
        if self.factors.bytes is None:
            self.factors.measure(J)
        moving = [form for form in (forms.J, forms.F_W, forms.F_U, *forms.F_z) if form is not None]
        count = sum(not form.empty and not form.constant for form in moving)
        each = max(self.factors.bytes, 1)
        kept = self.dirk.stages if forms.J.constant else min(stages, self.factors.memory // each)
        return {"matrices": (stages * count + kept) * matrix_bytes(J), "factors": kept * each}

    def _memory(self, data: StepData, i: int) -> StepMemory:
        if data.kept is not None:
            return data.kept[i]
        self._scratch.forget()
        return self._scratch

    def _linearised(self, data: StepData, i: int) -> StepMemory:
        """The memory of a step, with the stages and matrices of the linearisation."""
        memory = self._memory(data, i)
        if not memory.current:
            self._solve_stages(memory, data, i, data.u[i], linearise=True)
            memory.current = True
        return memory

    # -- stages --------------------------------------------------------------------------------------------------------
    def _base(self, stage: int, u: np.ndarray, d: list) -> np.ndarray:
        W = u.copy()
        for j in range(stage):
            if self.dirk.alpha[stage, j]:
                W += self.dirk.alpha[stage, j] * d[j]
        return W

    def _finish(self, u: np.ndarray, U: np.ndarray, d: list) -> np.ndarray:
        if self.dirk.stiffly_accurate:
            return U
        return u + sum(beta * di for beta, di in zip(self.dirk.beta, d, strict=True))

    def _solve_stages(self, memory: StepMemory, data, i: int, u: np.ndarray, *, linearise=False):
        """``u_1``; the stage values are remembered."""
        d, control = [], data.control(i)
        given = _NONE if control is None else control
        solved = linearise and memory.control is not None  # by the state sweep's last call of the step, mostly
        solved = solved and self._same((memory.stages[0].W, u), (memory.control, given))
        memory.control = None
        for stage in memory.stages:
            self.forms.set(data.t[i], control, stage.index)
            if not solved:
                W = self._base(stage.index, u, d)
                stage.W, stage.U = W, self.newton.solve(stage, W, data.t[i], data.sweep)
            if linearise:
                self.forms.put_state(stage.W, stage.U)
                stage.linearise(self.forms)
            d.append(stage.U - stage.W)
        memory.control = self._kept(given)
        return self._finish(u, stage.U, d)

    def _kept(self, control: np.ndarray) -> np.ndarray:
        """A copy of a step's control; one for all steps where it is static."""
        if self.evolution.per_step or not np.array_equal(control, self._control):
            self._control = control.copy()
        return self._control

    # -- products and solves -------------------------------------------------------------------------------------------
    def _solve(self, stage: StageMemory, rhs: np.ndarray, *, transposed: bool = False) -> np.ndarray:
        self._b.array[:] = rhs
        self._b.array[self.bc_rows] = 0
        self.factors.solve(stage, self._b, self._x, transposed=transposed)
        return self._x.array_r.copy()

    def _base_tangent(self, stage: StageMemory, dW: np.ndarray, load: np.ndarray | float) -> np.ndarray:
        """``-F_W dW - load``."""
        if stage.F_W is None:
            return np.zeros_like(dW) - load
        self._w.array[:] = dW
        stage.F_W.mult(self._w, self._b)
        return -self._b.array_r - load

    def _base_adjoint(self, stage: StageMemory, y: np.ndarray) -> np.ndarray:
        """``F_W^T y``."""
        if stage.F_W is None:
            return np.zeros_like(y)
        self._w.array[:] = y
        stage.F_W.multTranspose(self._w, self._b)
        return self._b.array_r.copy()

    def _control_tangent(self, stage: StageMemory, dz: np.ndarray | None) -> np.ndarray | float:
        """``F_z dz``."""
        if dz is None:
            return 0.0
        total = np.zeros(self.evolution.state_size)
        for index, (F_z, part) in enumerate(zip(stage.F_z, self.forms.parts(dz), strict=True)):
            if F_z is not None:
                x, b = self._vecs(index, F_z)
                x.array[:] = part
                F_z.mult(x, b)
                total += b.array_r
        return total

    def _vecs(self, index: int, F_z: PETSc.Mat) -> tuple[PETSc.Vec, PETSc.Vec]:
        """Vectors for the derivative by a control: the same ones for all stages, as what several ranks in space drop is
        destroyed later only.
        """
        if index not in self._control_vecs:
            self._control_vecs[index] = F_z.createVecs()
        return self._control_vecs[index]

    def _lift(self, stage: StageMemory, dz: np.ndarray | None, t: float) -> np.ndarray | None:
        """Change of the boundary values in a direction of the controls; ``None`` where none is in them."""
        if dz is None or stage.F_U is None:
            return None
        self._at(t, stage)
        return self.evolution.boundary_controls.lift(dz)

    def _at(self, t: float, stage: StageMemory) -> None:
        """Take the time of a stage of the step from ``t``."""
        if self.evolution.t is not None:
            self.evolution.t.assign(t + self.dirk.c[stage.index] * self.dt)

    def _control_adjoint(self, stage: StageMemory, y: np.ndarray, edge: np.ndarray, t: float) -> np.ndarray:
        """``F_z^T y``, less what the adjoints ``edge`` of the rows with conditions and ``F_U^T y`` make of boundary
        values.
        """
        out = self._residual_adjoint(stage, y)
        if stage.F_U is not None:
            self._w.array[:] = y
            stage.F_U.multTranspose(self._w, self._b)
            r = np.zeros_like(y)
            r[self.bc_rows] = edge - self._b.array_r[self.bc_rows]
            self._at(t, stage)
            out -= self.evolution.boundary_controls.pull_back(r)
        return out

    def _residual_adjoint(self, stage: StageMemory, y: np.ndarray) -> np.ndarray:
        """``F_z^T y``."""
        parts = []
        for index, F_z in enumerate(stage.F_z):
            if F_z is None:
                parts.append(0.0)
                continue
            x, b = self._vecs(index, F_z)
            b.array[:] = y
            F_z.multTranspose(b, x)
            parts.append(x.array_r)
        return self.forms.control_vector(parts)

    # -- a step's derivatives ------------------------------------------------------------------------------------------
    def _tangent_step(self, memory: StepMemory, du: np.ndarray, dz, t: float) -> tuple[np.ndarray, list]:
        """``du_1`` and the pairs ``(dW, dU)`` of the stages; those of the last direction are remembered."""
        if memory.tangent is not None:
            known, known_dz, *result = memory.tangent
            if (known_dz is None) == (dz is None) and self._same((known, du), (known_dz, dz)):
                return tuple(result)
        d, pairs = [], []
        for stage in memory.stages:
            dW = self._base(stage.index, du, d)
            rhs = self._base_tangent(stage, dW, self._control_tangent(stage, dz))
            lift = self._lift(stage, dz, t)
            if lift is not None:
                self._w.array[:] = lift
                stage.F_U.mult(self._w, self._b)
                rhs -= self._b.array_r
            dU = self._solve(stage, rhs)
            if lift is not None:
                dU[self.bc_rows] = lift[self.bc_rows]
            pairs.append((dW, dU))
            d.append(dU - dW)
        out = self._finish(du, dU, d)
        memory.tangent = (du.copy(), None if dz is None else dz.copy(), out, pairs)
        return out, pairs

    def _reverse(self, memory: StepMemory, lam: np.ndarray, stage_adjoint) -> np.ndarray:
        """Transpose of the stages' recursion; ``stage_adjoint(stage, U_bar) -> W_bar``."""
        dirk = self.dirk
        out = np.zeros_like(lam) if dirk.stiffly_accurate else lam.copy()
        bar = [np.zeros_like(lam) if dirk.stiffly_accurate else beta * lam for beta in dirk.beta]
        for stage in reversed(memory.stages):
            i = stage.index
            last = i == dirk.stages - 1 and dirk.stiffly_accurate
            W_bar = stage_adjoint(stage, bar[i] + lam if last else bar[i]) - bar[i]
            out += W_bar
            for j in range(i):
                bar[j] = bar[j] + dirk.alpha[i, j] * W_bar
        return out

    def _adjoint_step(self, memory: StepMemory, lam: np.ndarray, use: str) -> tuple[np.ndarray, list]:
        """``lam_0`` and the stage adjoints, with those of the rows with conditions; those of the last ``lam`` of each
        use are remembered.
        """
        for known, *result in memory.adjoints.values():
            if self._same((known, lam)):
                memory.adjoints[use] = (known, *result)
                return tuple(result)
        ys = [None] * len(memory.stages)

        def stage_adjoint(stage, U_bar):
            y = self._solve(stage, U_bar, transposed=True)
            ys[stage.index] = y, U_bar[self.bc_rows]
            return -self._base_adjoint(stage, y)

        out = self._reverse(memory, lam, stage_adjoint)
        memory.adjoints[use] = (lam.copy(), out, ys)
        return out, ys

    def _same(self, *pairs: tuple) -> bool:
        """Whether the arrays of each pair are the same on all ranks in space."""
        same, comm = all(a is b or np.array_equal(a, b) for a, b in pairs), self.forms.comm
        return bool(same if comm.size == 1 else comm.allreduce(same, op=MPI.LAND))

    # -- the interface -------------------------------------------------------------------------------------------------
    def step(self, data, u, out, lane=0):
        """See :class:`FEPropagator`."""
        for i in range(len(u)):
            memory = self._memory(data, i)
            memory.renew()
            out[i] = self._solve_stages(memory, data, i, u[i])

    def tangent(self, data, du, dz, out, lane=0):
        """See :class:`FEPropagator`."""
        for i in range(len(du)):
            out[i] = self._tangent_step(self._linearised(data, i), du[i], direction(dz, i), data.t[i])[0]

    def adjoint(self, data, lam, out, lane=0):
        """See :class:`FEPropagator`."""
        for i in range(len(lam)):
            out[i] = self._adjoint_step(self._linearised(data, i), lam[i], "sweep")[0]

    def control_adjoint(self, data, lam, lane=0):
        """See :class:`FEPropagator`."""
        rows = []
        for i in range(len(lam)):
            memory = self._linearised(data, i)
            ys = self._adjoint_step(memory, lam[i], "sweep")[1]
            pairs = zip(memory.stages, ys, strict=True)
            rows.append(-sum(self._control_adjoint(stage, *pair, data.t[i]) for stage, pair in pairs))
        return self._collect(rows)

    def second_order(self, data, du, dz, lam, end=None):
        """See :class:`FEPropagator`."""
        deferred = self.dirk.stages - 1 if end is not None and self.dirk.stiffly_accurate else None
        out, rows = np.empty_like(lam), []
        for i in range(len(lam)):
            memory, dzi = self._linearised(data, i), direction(dz, i)
            pairs = self._tangent_step(memory, du[i], dzi, data.t[i])[1]
            ys = self._adjoint_step(memory, lam[i], "second order")[1]
            z_bar = np.zeros(self.evolution.control_size)

            def stage_adjoint(stage, U_bar, i=i, dz=dzi, pairs=pairs, ys=ys, z_bar=z_bar):
                j = stage.index
                self.forms.set(data.t[i], data.control(i), j)
                of_U, of_W, of_z = self.forms.second_order((stage.W, stage.U), pairs[j], ys[j][0], dz)
                if j == deferred:  # the stage is the end state: what acts on it goes through the step's adjoint
                    end[i] = -of_U
                    z_bar -= of_z
                    return np.zeros_like(U_bar) - of_W
                rhs = U_bar - of_U
                dy = self._solve(stage, rhs, transposed=True)
                z_bar -= of_z + self._control_adjoint(stage, dy, rhs[self.bc_rows], data.t[i])
                return -(of_W + self._base_adjoint(stage, dy))

            out[i] = self._reverse(memory, np.zeros_like(lam[i]), stage_adjoint)
            rows.append(z_bar)
        return out, self._collect(rows)

r"""Steps of nonlinear evolutions and their derivatives, from the UFL residual by UFL's calculus.

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

Where the data of a block has linearisations of its steps (``StepData.linearisations``), stage values and matrices are
computed once for a linearisation, and derivatives are products and triangular solves
(:mod:`~pint_fem.propagators.linearisation`); else everything is computed in each call.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from firedrake.petsc import PETSc
from irksome.tableaux.ButcherTableaux import ButcherTableau
from mpi4py import MPI

from pint_fem.errors import InputError
from pint_fem.evolution.evolution import Evolution
from pint_fem.evolution.tableaux import DIRK
from pint_fem.kernels.direct import matrix_bytes
from pint_fem.kernels.factors import FACTOR_MEMORY, StageFactors
from pint_fem.propagators.base import FEPropagator, StepData, direction
from pint_fem.propagators.linearisation import StageLinearisation, StepLinearisation
from pint_fem.propagators.newton import StageNewton
from pint_fem.propagators.stage import StageForms

__all__ = ["FormPropagator"]

_NO_CONTROL = np.zeros(0)


class FormPropagator(FEPropagator):
    """Steps of an evolution that may be nonlinear, with forms compiled once per level.

    Parameters
    ----------
    evolution, stride, tableau
        As for every propagator.
    factor_memory
        Bytes of factors that are stored on a rank for this level; default 1 GB. Beyond, a stage is factored again
        whenever another one was factored in between, with the same result to round-off
        (:mod:`~pint_fem.kernels.factors`).

    Attributes
    ----------
    dirk, bc_rows : DIRK, ndarray
        Coefficients of the integrator, and own rows with a condition.
    counts : Counter
        Numbers of ``"newton"`` solves, ``"residual"``, ``"jacobian"`` and ``"derivative"`` assemblies,
        ``"factorisation"`` and ``"solve"``; ``"petsc newton"``: stages that PETSc's Newton solved.

    Raises
    ------
    InputError
        If ``factor_memory`` is negative.
    """

    def __init__(
        self,
        evolution: Evolution,
        *,
        stride: int = 1,
        tableau: ButcherTableau | None = None,
        factor_memory: int = FACTOR_MEMORY,
    ):
        super().__init__(evolution, stride=stride, tableau=tableau)
        evolution = self.evolution
        if not factor_memory >= 0:
            raise InputError(f"factor_memory = {factor_memory!r}: give a number of bytes, 0 stores no factor")
        self.dirk = DIRK(self.tableau)
        self.forms = StageForms(evolution, self.dirk, self.dt)
        self.bc_rows, self.counts = self.forms.bc_rows, self.forms.counts
        self.factors = StageFactors(
            evolution.solver_parameters, evolution.V, factor_memory, self.counts, evolution.nullspace,
            f"{evolution.options_prefix}pint_form_", evolution.reproducible,
        )  # fmt: skip
        self.newton = StageNewton(self.forms, self.factors, self.factors.parameters)
        with self.forms.U.dat.vec_ro as vec:
            self._w, self._b, self._x = vec.duplicate(), vec.duplicate(), vec.duplicate()
        self._scratch = StepLinearisation(self.forms, keep=False)
        self._control = _NO_CONTROL
        self._control_vecs: dict[int, tuple[PETSc.Vec, PETSc.Vec]] = {}

    def update_data(self, changed: set) -> bool:
        """Discard boundary values; ``False`` where data have changed in matrices that all steps share."""
        return self.forms.update_data(changed)

    # -- memory --------------------------------------------------------------------------------------------------------
    def step_linearisations(self, count: int, *, repeated: bool = True) -> list[StepLinearisation]:
        """Empty linearisations of ``count`` steps, which factor at once where steps are evaluated repeatedly."""
        return [StepLinearisation(self.forms, refine=not repeated) for _ in range(count)]

    def linearisation_nbytes(self) -> int:
        """Bytes of the stage values, adjoints and tangents in the linearisation of a step."""
        return 8 * ((8 * self.dirk.stages + 5) * self.evolution.state_size + self.evolution.control_size)

    def operator_nbytes(self, count: int) -> dict[str, int]:
        """Bytes of matrices and of factors, as far as the budget goes, with ``count`` linearisations; a Jacobian is
        factored to measure it if none was before.
        """
        forms, stages = self.forms, count * self.dirk.stages
        J = forms.J.assemble()
        if self.factors.bytes is None:
            self.factors.measure(J)
        moving = [form for form in (forms.J, forms.F_W, forms.F_U, *forms.F_z) if form is not None]
        matrices = sum(not form.empty and not form.constant for form in moving)
        each = max(self.factors.bytes, 1)
        kept = self.dirk.stages if forms.J.constant else min(stages, self.factors.memory // each)
        return {"matrices": (stages * matrices + kept) * matrix_bytes(J), "factors": kept * each}

    def _linearisation(self, data: StepData, i: int) -> StepLinearisation:
        """The linearisation of a step of a block, which may be outdated; an empty one where none is cached."""
        if data.linearisations is not None:
            return data.linearisations[i]
        self._scratch.reset()
        return self._scratch

    def _linearised(self, data: StepData, i: int) -> StepLinearisation:
        """The linearisation of a step of a block, with stage values and matrices."""
        step = self._linearisation(data, i)
        if not step.current:
            self._solve_stages(step, data, i, data.u[i], linearise=True)
            step.current = True
        return step

    # -- stages --------------------------------------------------------------------------------------------------------
    def _base(self, stage: int, u: np.ndarray, d: list[np.ndarray]) -> np.ndarray:
        """The base value ``W`` of a stage from the increments ``d`` of earlier ones."""
        W = u.copy()
        for j in range(stage):
            if self.dirk.alpha[stage, j]:
                W += self.dirk.alpha[stage, j] * d[j]
        return W

    def _finish(self, u: np.ndarray, U: np.ndarray, d: list[np.ndarray]) -> np.ndarray:
        """The end of a step from its last stage value and its increments."""
        if self.dirk.stiffly_accurate:
            return U
        return u + sum(beta * di for beta, di in zip(self.dirk.beta, d, strict=True))

    def _solve_stages(
        self, step: StepLinearisation, data: StepData, i: int, u: np.ndarray, *, linearise: bool = False
    ) -> np.ndarray:
        """The end ``u_1`` of a step, with stage values and matrices stored in its linearisation."""
        d: list[np.ndarray] = []
        control = data.control(i)
        given = _NO_CONTROL if control is None else control
        solved = linearise and step.control is not None  # mostly by the last evaluation in the state sweep
        solved = solved and self._same((step.stages[0].W, u), (step.control, given))
        step.control = None
        for stage in step.stages:
            self.forms.set(data.t[i], control, stage.index)
            if not solved:
                W = self._base(stage.index, u, d)
                stage.W, stage.U = W, self.newton.solve(stage, W, data.t[i], data.sweep)
            if linearise:
                self.forms.put_state(stage.W, stage.U)
                stage.linearise(self.forms)
            d.append(stage.U - stage.W)
        step.control = self._copy_of(given)
        return self._finish(u, stage.U, d)

    def _copy_of(self, control: np.ndarray) -> np.ndarray:
        """A copy of a step's control; the same one for all steps where it is static."""
        if self.evolution.per_step or not np.array_equal(control, self._control):
            self._control = control.copy()
        return self._control

    # -- products and solves -------------------------------------------------------------------------------------------
    def _solve(self, stage: StageLinearisation, rhs: np.ndarray, *, transposed: bool = False) -> np.ndarray:
        """The solution with a stage's Jacobian, or its transpose, zero on rows with a condition."""
        self._b.array[:] = rhs
        self._b.array[self.bc_rows] = 0
        self.factors.solve(stage, self._b, self._x, transposed=transposed)
        return self._x.array_r.copy()

    def _base_tangent(self, stage: StageLinearisation, dW: np.ndarray, load: np.ndarray | float) -> np.ndarray:
        """The right-hand side ``-F_W dW - load`` of a stage's tangent."""
        if stage.F_W is None:
            return np.zeros_like(dW) - load
        self._w.array[:] = dW
        stage.F_W.mult(self._w, self._b)
        return -self._b.array_r - load

    def _base_adjoint(self, stage: StageLinearisation, y: np.ndarray) -> np.ndarray:
        """The product ``F_W^T y``."""
        if stage.F_W is None:
            return np.zeros_like(y)
        self._w.array[:] = y
        stage.F_W.multTranspose(self._w, self._b)
        return self._b.array_r.copy()

    def _control_tangent(self, stage: StageLinearisation, dz: np.ndarray | None) -> np.ndarray | float:
        """The product ``F_z dz``."""
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
        """Work vectors for the derivative by a control, shared by all stages, as vectors that several ranks in space
        drop are destroyed only later.
        """
        if index not in self._control_vecs:
            self._control_vecs[index] = F_z.createVecs()
        return self._control_vecs[index]

    def _lift(self, stage: StageLinearisation, dz: np.ndarray | None, t: float) -> np.ndarray | None:
        """Change of the boundary values in a direction of the controls; ``None`` where none is in them."""
        if dz is None or stage.F_U is None:
            return None
        self._set_time(t, stage)
        return self.evolution.boundary_controls.lift(dz)

    def _set_time(self, t: float, stage: StageLinearisation) -> None:
        """Set the time of a stage of the step from ``t``."""
        if self.evolution.t is not None:
            self.evolution.t.assign(t + self.dirk.c[stage.index] * self.dt)

    def _control_adjoint(self, stage: StageLinearisation, y: np.ndarray, edge: np.ndarray, t: float) -> np.ndarray:
        """The product ``F_z^T y``, less the derivative by boundary values, with their adjoint ``edge - F_U^T y``."""
        out = self._residual_adjoint(stage, y)
        if stage.F_U is not None:
            self._w.array[:] = y
            stage.F_U.multTranspose(self._w, self._b)
            r = np.zeros_like(y)
            r[self.bc_rows] = edge - self._b.array_r[self.bc_rows]
            self._set_time(t, stage)
            out -= self.evolution.boundary_controls.pull_back(r)
        return out

    def _residual_adjoint(self, stage: StageLinearisation, y: np.ndarray) -> np.ndarray:
        """The product ``F_z^T y``."""
        parts: list[np.ndarray | float] = []
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
    def _tangent_step(
        self, step: StepLinearisation, du: np.ndarray, dz: np.ndarray | None, t: float, member: int
    ) -> tuple[np.ndarray, list]:
        """The tangent ``du_1`` and the stages' ``(dW, dU)``; those of a batch member's last direction are cached."""
        if member in step.tangents:
            last_du, last_dz, *result = step.tangents[member]
            if (last_dz is None) == (dz is None) and self._same((last_du, du), (last_dz, dz)):
                return tuple(result)
        d: list[np.ndarray] = []
        pairs: list[tuple[np.ndarray, np.ndarray]] = []
        for stage in step.stages:
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
        step.tangents[member] = (du.copy(), None if dz is None else dz.copy(), out, pairs)
        return out, pairs

    def _reverse(
        self,
        step: StepLinearisation,
        lam: np.ndarray,
        stage_adjoint: Callable[[StageLinearisation, np.ndarray], np.ndarray],
    ) -> np.ndarray:
        """The transposed recursion over the stages, with ``stage_adjoint(stage, U_bar) -> W_bar``."""
        dirk = self.dirk
        out = np.zeros_like(lam) if dirk.stiffly_accurate else lam.copy()
        bar = [np.zeros_like(lam) if dirk.stiffly_accurate else beta * lam for beta in dirk.beta]
        for stage in reversed(step.stages):
            i = stage.index
            last = i == dirk.stages - 1 and dirk.stiffly_accurate
            W_bar = stage_adjoint(stage, bar[i] + lam if last else bar[i]) - bar[i]
            out += W_bar
            for j in range(i):
                bar[j] = bar[j] + dirk.alpha[i, j] * W_bar
        return out

    def _adjoint_step(
        self, step: StepLinearisation, lam: np.ndarray, use: str, member: int = 0
    ) -> tuple[np.ndarray, list]:
        """The adjoint ``lam_0`` and the stages' adjoints, with those of the rows with conditions; those of the last
        ``lam`` of each use and of each member of a batch are cached.
        """
        for key in dict.fromkeys([(use, member), ("sweep", 0), ("second order", 0)]):
            if key in step.adjoints and self._same((step.adjoints[key][0], lam)):
                step.adjoints[use, member] = step.adjoints[key]
                return step.adjoints[key][1:]
        ys: list = [None] * len(step.stages)

        def stage_adjoint(stage: StageLinearisation, U_bar: np.ndarray) -> np.ndarray:
            y = self._solve(stage, U_bar, transposed=True)
            ys[stage.index] = y, U_bar[self.bc_rows]
            return -self._base_adjoint(stage, y)

        out = self._reverse(step, lam, stage_adjoint)
        step.adjoints[use, member] = (lam.copy(), out, ys)
        return out, ys

    def _same(self, *pairs: tuple) -> bool:
        """Whether the arrays of each pair are the same on all ranks in space."""
        same, comm = all(a is b or np.array_equal(a, b) for a, b in pairs), self.forms.comm
        return bool(same if comm.size == 1 else comm.allreduce(same, op=MPI.LAND))

    # -- the interface -------------------------------------------------------------------------------------------------
    def step(self, data: StepData, u: np.ndarray, out: np.ndarray) -> None:
        """Write ``Phi(u)`` of each step to ``out``."""
        for i in range(len(u)):
            step = self._linearisation(data, i)
            step.invalidate()
            out[i] = self._solve_stages(step, data, i, u[i])

    def tangent(self, data: StepData, du: np.ndarray, dz: np.ndarray | None, out: np.ndarray) -> None:
        """Write ``Phi_u du + Phi_z dz`` of each step to ``out``."""
        for i in range(len(du)):
            step = self._linearised(data, i)
            out[i] = self._tangent_step(step, du[i], direction(dz, i), data.t[i], data.member)[0]

    def adjoint(self, data: StepData, lam: np.ndarray, out: np.ndarray) -> None:
        """Write ``Phi_u^T lam`` of each step to ``out``."""
        for i in range(len(lam)):
            out[i] = self._adjoint_step(self._linearised(data, i), lam[i], "sweep", data.member)[0]

    def control_adjoint(self, data: StepData, lam: np.ndarray) -> np.ndarray:
        """``Phi_z^T lam``, from the stages' adjoints."""
        rows: list = []
        for i in range(len(lam)):
            step = self._linearised(data, i)
            ys = self._adjoint_step(step, lam[i], "sweep", data.member)[1]
            pairs = zip(step.stages, ys, strict=True)
            rows.append(-sum(self._control_adjoint(stage, y, edge, data.t[i]) for stage, (y, edge) in pairs))
        return self._collect(rows)

    def second_order(
        self, data: StepData, du: np.ndarray, dz: np.ndarray | None, lam: np.ndarray, end: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Derivatives of :meth:`adjoint` and :meth:`control_adjoint` in a direction, from those of ``L``."""
        deferred = self.dirk.stages - 1 if end is not None and self.dirk.stiffly_accurate else None
        out, rows = np.empty_like(lam), []
        for i in range(len(lam)):
            step, dzi = self._linearised(data, i), direction(dz, i)
            pairs = self._tangent_step(step, du[i], dzi, data.t[i], data.member)[1]
            ys = self._adjoint_step(step, lam[i], "second order")[1]
            z_bar = np.zeros(self.evolution.control_size)

            def stage_adjoint(
                stage: StageLinearisation, U_bar: np.ndarray, i: int = i, dz: np.ndarray | None = dzi,
                pairs: list = pairs, ys: list = ys, z_bar: np.ndarray = z_bar,
            ) -> np.ndarray:  # fmt: skip
                j = stage.index
                self.forms.set(data.t[i], data.control(i), j)
                of_U, of_W, of_z = self.forms.second_order((stage.W, stage.U), pairs[j], ys[j][0], dz)
                if j == deferred:  # the stage is the end state: its source goes through the step's adjoint
                    end[i] = -of_U
                    z_bar -= of_z
                    return np.zeros_like(U_bar) - of_W
                rhs = U_bar - of_U
                dy = self._solve(stage, rhs, transposed=True)
                z_bar -= of_z + self._control_adjoint(stage, dy, rhs[self.bc_rows], data.t[i])
                return -(of_W + self._base_adjoint(stage, dy))

            out[i] = self._reverse(step, np.zeros_like(lam[i]), stage_adjoint)
            rows.append(z_bar)
        return out, self._collect(rows)

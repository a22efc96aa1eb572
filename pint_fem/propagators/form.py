r"""The form propagator: steps and derivatives from the UFL residual by UFL's own calculus, compiled once per level.

Stage ``i`` solves :math:`F(U, W, z) = 0` for ``U`` by Newton's method from ``W`` (so the result depends on nothing
but the input). With an adjoint :math:`y` of the stage, :math:`L = F(U, W, z; y)`, all derivatives are those of ``F``
and ``L``:

.. math::
    F_U\, dU = -(F_W\, dW + F_z\, dz), \qquad  F_U^T y = \bar U, \quad \bar W \mathrel{-}= F_W^T y, \quad \bar z
    \mathrel{-}= F_z^T y,

and at second order, in the direction :math:`(dU, dW, dz)` with :math:`D` the derivative of a gradient of ``L`` in it,

.. math::
    F_U^T dy = d\bar U - D L_U, \qquad d\bar W \mathrel{-}= D L_W + F_W^T dy, \qquad d\bar z \mathrel{-}= D L_z +
    F_z^T dy.

The bars of ``u_0`` follow from the stages' recursion (:class:`~pint_fem.propagators.tableaux.DIRK`) in reverse.
"""

from __future__ import annotations

import numpy as np
from firedrake import (
    Cofunction,
    Constant,
    Function,
    NonlinearVariationalProblem,
    NonlinearVariationalSolver,
    TestFunction,
    TrialFunction,
    derivative,
    replace,
)
from firedrake.assemble import get_assembler
from firedrake.petsc import PETSc
from petsctools import OptionsManager
from pyadjoint.tape import stop_annotating
from ufl.algorithms import expand_derivatives, extract_coefficients

from pint_fem.propagators.arrays import boundary_rows, get, put
from pint_fem.propagators.base import FEPropagator, direction
from pint_fem.propagators.blocks import default_solver
from pint_fem.propagators.evolution import Evolution
from pint_fem.propagators.tableaux import DIRK

__all__ = ["NEWTON", "FormPropagator"]

NEWTON = {
    "snes_rtol": 1e-13,
    "snes_atol": 1e-50,
    "snes_stol": 1e-10,
    "snes_max_it": 25,
    "snes_linesearch_type": "basic",
}
"""Newton to round-off, as derivatives are those of the exact stage equations: after a last step of relative size
1e-10 the error is its square.
"""


class _Assembled:
    """A 1-form compiled once; nothing where the derivative vanished."""

    def __init__(self, form, space, bcs=()):
        form = expand_derivatives(form)
        self.empty = form.empty()
        self.tensor = Cofunction(space.dual())
        self.assembler = None if self.empty else get_assembler(form, bcs=bcs)

    def __call__(self) -> np.ndarray | float:
        return 0.0 if self.empty else get(self.assembler.assemble(tensor=self.tensor))


class FormPropagator(FEPropagator):
    """See the module."""

    def __init__(self, evolution: Evolution, *, stride: int = 1, tableau=None):
        super().__init__(evolution, stride=stride, tableau=tableau)
        self.dirk = DIRK(self.tableau)
        V, z = evolution.V, evolution.control
        self.bc_rows = boundary_rows(evolution.bcs, V)
        self.U, self.W, self.y = Function(V, name="U"), Function(V, name="W"), Function(V, name="y")
        self.dU, self.dW, self.dy = Function(V), Function(V), Function(V)
        self.h = Constant(1.0)
        self.F = evolution.stage_form(self.U, self.W, self.h)
        J = derivative(self.F, self.U, TrialFunction(V))
        linear = self.U not in extract_coefficients(expand_derivatives(J))
        solver = default_solver(V.mesh().comm)
        parameters = {**({"snes_type": "ksponly"} if linear else NEWTON), **solver, **evolution.solver_parameters}
        problem = NonlinearVariationalProblem(self.F, self.U, bcs=evolution.bcs, J=J)
        self.newton = NonlinearVariationalSolver(problem, solver_parameters=parameters)
        homogeneous = [bc.reconstruct(g=0) for bc in evolution.bcs]
        self.J_assembler = get_assembler(expand_derivatives(J), bcs=homogeneous, mat_type="aij")
        self.J = self.J_assembler.allocate()
        self.ksp = PETSc.KSP().create(V.mesh().comm)
        self.ksp.setOperators(self.J.petscmat)
        OptionsManager({**solver, **evolution.solver_parameters}, "pint_form_").set_from_options(self.ksp)
        self.ksp.setErrorIfNotConverged(True)
        self._b, self._x = self.J.petscmat.createVecs()
        self._prepare_derivatives(V, z)

    def _prepare_derivatives(self, V, z) -> None:
        self.dz = None if z is None else Function(z.function_space())
        pairs = [(self.U, self.dU), (self.W, self.dW)] + ([] if z is None else [(z, self.dz)])
        self.tangent_rhs = _Assembled(sum((derivative(self.F, x, dx) for x, dx in pairs[1:]), start=_zero(self.F)), V)
        L = replace(self.F, {self.F.arguments()[0]: self.y})
        Ldy = replace(self.F, {self.F.arguments()[0]: self.dy})
        gradient = lambda functional, x: derivative(functional, x, TestFunction(x.function_space()))
        along = lambda form: sum((derivative(form, x, dx) for x, dx in pairs), start=_zero(form))
        self.L_W = _Assembled(gradient(L, self.W), V)
        self.second_U = _Assembled(along(gradient(L, self.U)), V)
        self.second_W = _Assembled(along(gradient(L, self.W)), V)
        self.Ldy_W = _Assembled(gradient(Ldy, self.W), V)
        if z is not None:
            Z = z.function_space()
            self.L_z = _Assembled(gradient(L, z), Z)
            self.second_z = _Assembled(along(gradient(L, z)), Z)
            self.Ldy_z = _Assembled(gradient(Ldy, z), Z)

    # -- one step: stages, tangents, adjoints --------------------------------------------------------------------------
    def _set(self, data, i: int, stage: int) -> None:
        ev = self.evolution
        if ev.control is not None:
            put(ev.control, data.control(i))
        if ev.t is not None:
            ev.t.assign(data.t[i] + self.dirk.c[stage] * self.dt)
        self.h.assign(self.dirk.diagonal[stage] * self.dt)

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

    def _stages(self, data, i: int, u: np.ndarray) -> tuple[np.ndarray, list[tuple[np.ndarray, np.ndarray]]]:
        """``u_1`` and the pairs ``(W, U)`` of the stages."""
        d, pairs = [], []
        with stop_annotating():
            for stage in range(self.dirk.stages):
                self._set(data, i, stage)
                W = self._base(stage, u, d)
                put(self.W, W)
                put(self.U, W)
                self.newton.solve()
                pairs.append((W, get(self.U)))
                d.append(pairs[-1][1] - W)
        return self._finish(u, pairs[-1][1], d), pairs

    def _linearise(self, data, i: int, stage: int, pair) -> None:
        """Set the functions of a stage and factor its Jacobian."""
        self._set(data, i, stage)
        put(self.W, pair[0])
        put(self.U, pair[1])
        self.J_assembler.assemble(tensor=self.J)
        self.ksp.setOperators(self.J.petscmat)

    def _solve(self, rhs: np.ndarray, transposed: bool = False) -> np.ndarray:
        self._b.array[:] = rhs
        self._b.array[self.bc_rows] = 0
        (self.ksp.solveTranspose if transposed else self.ksp.solve)(self._b, self._x)
        return self._x.array_r.copy()

    def _tangent_stages(self, data, i, pairs, du, dz):
        """``du_1`` and the pairs ``(dW, dU)``."""
        d, out = [], []
        if self.dz is not None:
            put(self.dz, 0.0 if dz is None else dz)
        for stage, pair in enumerate(pairs):
            self._linearise(data, i, stage, pair)
            dW = self._base(stage, du, d)
            put(self.dW, dW)
            dU = self._solve(-self.tangent_rhs() + np.zeros_like(du))
            out.append((dW, dU))
            d.append(dU - dW)
        return self._finish(du, out[-1][1], d), out

    def _reverse(self, lam, stage_adjoint):
        """Transpose of the stages' recursion; ``stage_adjoint(stage, U_bar) -> W_bar``."""
        dirk = self.dirk
        out = np.zeros_like(lam) if dirk.stiffly_accurate else lam.copy()
        bar = [np.zeros_like(lam) if dirk.stiffly_accurate else beta * lam for beta in dirk.beta]
        for stage in reversed(range(dirk.stages)):
            last = stage == dirk.stages - 1 and dirk.stiffly_accurate
            W_bar = stage_adjoint(stage, bar[stage] + lam if last else bar[stage]) - bar[stage]
            out += W_bar
            for j in range(stage):
                bar[j] = bar[j] + dirk.alpha[stage, j] * W_bar
        return out

    def _adjoint_step(self, data, i, lam, pairs):
        """``(lam_0, z_bar, stage adjoints)``."""
        ys, z_bar = [None] * len(pairs), np.zeros(self.evolution.control_size)

        def stage_adjoint(stage, U_bar):
            self._linearise(data, i, stage, pairs[stage])
            ys[stage] = self._solve(U_bar, transposed=True)
            put(self.y, ys[stage])
            if self.dz is not None:
                z_bar[:] -= self.L_z()
            return -self.L_W()

        return self._reverse(lam, stage_adjoint), z_bar, ys

    # -- the interface -------------------------------------------------------------------------------------------------
    def step(self, data, u, out, lane=0):
        """See :class:`FEPropagator`."""
        for i in range(len(u)):
            out[i] = self._stages(data, i, u[i])[0]

    def tangent(self, data, du, dz, out, lane=0):
        """See :class:`FEPropagator`."""
        for i in range(len(du)):
            pairs = self._stages(data, i, data.u[i])[1]
            out[i] = self._tangent_stages(data, i, pairs, du[i], direction(dz, i))[0]

    def adjoint(self, data, lam, out, lane=0):
        """See :class:`FEPropagator`."""
        for i in range(len(lam)):
            out[i] = self._adjoint_step(data, i, lam[i], self._stages(data, i, data.u[i])[1])[0]

    def control_adjoint(self, data, lam, lane=0):
        """See :class:`FEPropagator`."""
        steps = range(len(lam))
        return self._collect(
            [self._adjoint_step(data, i, lam[i], self._stages(data, i, data.u[i])[1])[1] for i in steps]
        )

    def second_order(self, data, du, dz, lam):
        """See :class:`FEPropagator`."""
        out, rows = np.empty_like(lam), []
        for i in range(len(lam)):
            pairs = self._stages(data, i, data.u[i])[1]
            tangents = self._tangent_stages(data, i, pairs, du[i], direction(dz, i))[1]
            ys = self._adjoint_step(data, i, lam[i], pairs)[2]
            z_bar = np.zeros(self.evolution.control_size)

            def stage_adjoint(stage, U_bar, i=i, pairs=pairs, tangents=tangents, ys=ys, z_bar=z_bar):
                self._linearise(data, i, stage, pairs[stage])
                put(self.dW, tangents[stage][0])
                put(self.dU, tangents[stage][1])
                put(self.y, ys[stage])
                put(self.dy, self._solve(U_bar - self.second_U(), transposed=True))
                if self.dz is not None:
                    z_bar -= self.second_z() + self.Ldy_z()
                return -(self.second_W() + self.Ldy_W())

            out[i] = self._reverse(np.zeros_like(lam[i]), stage_adjoint)
            rows.append(z_bar)
        return out, self._collect(rows)


def _zero(form):
    """A zero form with the arguments of ``form``, to start sums with."""
    return 0 * form

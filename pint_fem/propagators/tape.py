"""Steps by any Firedrake code, recorded once by pyadjoint, with derivatives by pyadjoint.

These steps exist for every evolution and are the reference in tests; they are evaluated one state at a time, slowly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import ufl
from firedrake import Cofunction, DirichletBC, Function, solve
from firedrake.adjoint import Control, ReducedFunctional, Tape, continue_annotation, pause_annotation, set_working_tape
from firedrake.adjoint_utils.blocks.solving import GenericSolveBlock
from irksome.tableaux.ButcherTableaux import ButcherTableau
from pyadjoint import Block
from pyadjoint.block_variable import BlockVariable
from pyadjoint.tape import annotate_tape, get_working_tape, stop_annotating

from pint_fem.errors import InputError
from pint_fem.evolution.boundary import boundary_value
from pint_fem.evolution.evolution import Evolution
from pint_fem.evolution.private_copies import data_of
from pint_fem.evolution.tableaux import DIRK
from pint_fem.kernels.arrays import get, put
from pint_fem.kernels.direct import completed
from pint_fem.kernels.nullspace import Nullspace
from pint_fem.propagators.base import FEPropagator, StepData, direction
from pint_fem.propagators.newton import NEWTON

__all__ = ["TapePropagator", "recording"]


@contextmanager
def recording() -> Iterator[Tape]:
    """Record on a new tape; afterwards the working tape and whether it records are as before.

    Yields
    ------
    Tape
        The new tape.
    """
    annotating = annotate_tape()
    with set_working_tape() as tape:
        continue_annotation()
        try:
            yield tape
        finally:
            (continue_annotation if annotating else pause_annotation)()


class _ProjectedGuess(Block):
    """Removes the part of the first guess of a solve in a nullspace, which would stay in the solution; derivatives do
    not depend on it.
    """

    def __init__(self, U: Function, nullspace: Nullspace):
        super().__init__()
        self._nullspace = nullspace
        self.add_dependency(U)
        put(U, nullspace.project_solution(get(U)))
        get_working_tape().add_block(self)
        self.add_output(U.create_block_variable())

    def recompute_component(self, inputs: list, block_variable: BlockVariable, idx: int, prepared: object) -> Function:
        """The projected guess, when pyadjoint replays the tape."""
        U = inputs[0].copy(deepcopy=True)
        put(U, self._nullspace.project_solution(get(U)))
        return U

    def evaluate_tlm_component(
        self, inputs: list, tlm_inputs: list, block_variable: BlockVariable, idx: int, prepared: object = None
    ) -> None:
        """No tangent, as pyadjoint's derivatives do not depend on the guess."""


def _copy_data(tape: Tape, controls: set[int]) -> None:
    """Store on a tape the present values of functions that it only reads.

    pyadjoint stores the value that a function had when any tape first read it, also for tapes of other times.
    """
    blocks = tape.get_blocks()
    written = [variable for block in blocks for variable in block.get_outputs()]
    kept = controls | {id(variable) for variable in written}
    changing, copies = {id(variable.output) for variable in written}, {}
    for block in blocks:
        dependencies = block.get_dependencies()
        for i, variable in enumerate(dependencies):
            f = variable.output
            if isinstance(f, Function) and id(variable) not in kept and id(f) not in changing:
                if id(f) not in copies:
                    copies[id(f)] = BlockVariable(f)
                    copies[id(f)].save_output()
                dependencies[i] = copies[id(f)]


class TapePropagator(FEPropagator):
    """Steps by recorded Firedrake code.

    Parameters
    ----------
    evolution, stride, tableau
        As for every propagator.
    one_step
        ``one_step(u0) -> u1`` in Firedrake; it reads the evolution's controls and ``t`` (the start time of the step):
        the user's own functions, or those of ``evolution`` where that is the private copy that a factory given as
        ``propagator=`` gets. Other functions are data and copied with the recording. Default: the evolution's own
        stages by ``firedrake.solve``.

    Raises
    ------
    InputError
        If ``one_step`` is given and the evolution's time is a ``Constant``.
    """

    def __init__(
        self,
        evolution: Evolution,
        *,
        stride: int = 1,
        tableau: ButcherTableau | None = None,
        one_step: Callable[[Function], Function] | None = None,
    ):
        if one_step is not None and evolution.posed.time_constant is not None:
            raise InputError(
                "one_step= with a Constant as t: its value on the tape would be that of all steps; give "
                "t=pint_fem.time_function(mesh), and read that in one_step"
            )
        super().__init__(evolution, stride=stride, tableau=tableau)
        self._step = one_step or self._one_step
        self._record()
        inputs = [control.control for control in self.rf.controls]
        self._inputs = [Function(f.function_space()) for f in inputs]
        self._directions = [Function(f.function_space()) for f in inputs]
        self._lam = Cofunction(evolution.V.dual())
        self._zero = Cofunction(evolution.V.dual())

    def _options(self) -> tuple[dict, dict, dict]:
        """Solver parameters, and arguments of forward and of adjoint solves with the evolution's nullspaces. Singular
        matrices are not pinned here, but factored by MUMPS, which detects pivots that are zero.
        """
        ev = self.evolution
        parameters = completed(ev.solver_parameters, ev.V.mesh().comm, ev.V.dim(), reproducible=ev.reproducible)
        bases = {} if ev.nullspace is None else ev.nullspace.bases(ev.V)
        if bases and parameters.get("ksp_type") == "preonly":
            parameters = {"ksp_type": "preonly", "pc_type": "lu", "pc_factor_mat_solver_type": "mumps"}
            parameters["mat_mumps_icntl_24"] = 1
        turned = {"nullspace": "transpose_nullspace", "transpose_nullspace": "nullspace"}
        return parameters, bases, {turned[name]: basis for name, basis in bases.items()}

    def _set_tangent_options(self) -> None:
        """Replace the tangent solves of pyadjoint, which has default parameters and no nullspaces there."""
        parameters, bases, _ = self._options()

        def assembled_solve(lhs: ufl.Form, rhs: Cofunction, func: Function, bcs: object, **kwargs: Any) -> Function:
            solve(lhs, func, rhs, solver_parameters=parameters, **bases, **kwargs)
            return func

        for block in self.tape.get_blocks():
            if isinstance(block, GenericSolveBlock):
                block._assembled_solve = assembled_solve

    def update_data(self, changed: set) -> bool:
        """Record the step again, with the new values of data."""
        self._record()
        return True

    def _record(self) -> None:
        """Record the step with the present data, and restore the values of the user's functions afterwards."""
        ev = self.evolution
        own, given = ([*e.parameters, *([] if e.t is None else [e.t])] for e in (ev, ev.posed))
        kept = [get(f) for f in given]
        u0 = Function(ev.V, name="u0").assign(ev.initial)
        with recording() as self.tape:
            start, *pairs = Control(u0), *((Control(a), Control(b)) for a, b in zip(own, given, strict=True))
            # u1 = u0 must be a new node on the tape even where the step returns a function that it solved in place
            u1 = Function(ev.V, name="u1")
            u1.assign(self._step(u0))
            read = {id(d): d for block in self.tape.get_blocks() for d in block.get_dependencies()}
            controls = [start, *(a if id(a.block_variable) in read else b for a, b in pairs)]
            self.rf = ReducedFunctional(u1, controls, tape=self.tape)
        if ev.nullspace is not None and self._step == self._one_step:
            self._set_tangent_options()
        with stop_annotating():
            for f, values in zip(given, kept, strict=True):
                put(f, values)
            _copy_data(self.tape, {id(control.block_variable) for control in controls})

    def _one_step(self, u0: Function) -> Function:
        """The recorded stages of the tableau; ``t`` is set to the time of each stage."""
        ev, dirk = self.evolution, DIRK(self.tableau)
        linear, bases, turned = self._options()
        parameters = {**NEWTON, **linear}
        adjoint = {"adj_kwargs": {"solver_parameters": parameters, **turned}} if bases else {}
        d: list[Function] = []
        U = None
        for i, h in enumerate(dirk.diagonal * self.dt):
            W = Function(ev.V).assign(u0)
            for j in range(i):
                if dirk.alpha[i, j]:
                    W.assign(W + float(dirk.alpha[i, j]) * d[j])
            if ev.t is not None:
                ev.t.assign(ev.t + float((dirk.c[i] - (dirk.c[i - 1] if i else 0)) * self.dt))
            U = Function(ev.V).assign(W)
            if ev.nullspace is not None:
                _ProjectedGuess(U, ev.nullspace)
            # firedrake.solve replays time-dependent boundary values; NonlinearVariationalSolver keeps the recorded ones
            form = ev.stage_form(U, W, float(h))
            solve(form == 0, U, bcs=self._taped_bcs(), solver_parameters=parameters, **bases, **adjoint)
            d.append(Function(ev.V).assign(U - W))
        if dirk.stiffly_accurate:
            return U
        out = Function(ev.V).assign(u0)
        for beta, di in zip(dirk.beta, d, strict=True):
            out.assign(out + float(beta) * di)
        return out

    def _taped_bcs(self) -> list[DirichletBC]:
        """The conditions with functions on the tape as values: expressions are not replayed, and a condition keeps the
        value that it had on its first tape.
        """
        taped = lambda bc: bc.reconstruct(g=Function(bc.function_space()).interpolate(boundary_value(bc)))
        return [taped(bc) if data_of(boundary_value(bc)) else bc for bc in self.evolution.bcs]

    def _evaluate(self, data: StepData, i: int, u: np.ndarray) -> Function:
        """Replay the tape for step ``i`` of a block from the state ``u``; the end."""
        ev = self.evolution
        values = [u] if data.z is None else [u, *ev.split_controls(data.control(i))]
        for f, value in zip(self._inputs, values, strict=False):
            put(f, value)
        if ev.t is not None:
            self._inputs[-1].assign(float(data.t[i]))
        return self.rf(self._inputs)

    def _in_direction(self, du: np.ndarray, dz: np.ndarray | None) -> list[Function]:
        """The directions of the tape's controls."""
        for f in self._directions:
            f.zero()
        put(self._directions[0], du)
        if dz is not None:
            for f, value in zip(self._directions[1:], self.evolution.split_controls(dz), strict=False):
                put(f, value)
        return self._directions

    def _control_part(self, derivatives: list[Cofunction]) -> np.ndarray:
        """A step's vector of derivatives by the controls, ``(nz,)``."""
        count = len(self.evolution.parameters)
        return np.concatenate([np.zeros(0), *(get(d) for d in derivatives[1 : 1 + count])])

    def step(self, data: StepData, u: np.ndarray, out: np.ndarray) -> None:
        """Write ``Phi(u)`` of each step to ``out``."""
        for i in range(len(u)):
            out[i] = get(self._evaluate(data, i, u[i]))

    def tangent(self, data: StepData, du: np.ndarray, dz: np.ndarray | None, out: np.ndarray) -> None:
        """Write ``Phi_u du + Phi_z dz`` of each step to ``out``."""
        for i in range(len(du)):
            self._evaluate(data, i, data.u[i])
            out[i] = get(self.rf.tlm(self._in_direction(du[i], direction(dz, i))))

    def _derivative(self, data: StepData, i: int, lam: np.ndarray) -> list[Cofunction]:
        """Derivatives of a step by the tape's controls, with the adjoint ``lam``."""
        self._evaluate(data, i, data.u[i])
        put(self._lam, lam)
        return self.rf.derivative(adj_input=self._lam)

    def adjoint(self, data: StepData, lam: np.ndarray, out: np.ndarray) -> None:
        """Write ``Phi_u^T lam`` of each step to ``out``."""
        for i in range(len(lam)):
            out[i] = get(self._derivative(data, i, lam[i])[0])

    def control_adjoint(self, data: StepData, lam: np.ndarray) -> np.ndarray:
        """``Phi_z^T lam``, by the tape's derivative."""
        return self._collect([self._control_part(self._derivative(data, i, lam[i])) for i in range(len(lam))])

    def second_order(
        self, data: StepData, du: np.ndarray, dz: np.ndarray | None, lam: np.ndarray, end: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Derivatives of :meth:`adjoint` and :meth:`control_adjoint` in a direction, by the tape's Hessian action."""
        out, rows = np.empty_like(lam), []
        for i in range(len(lam)):
            self._derivative(data, i, lam[i])
            result = self.rf.hessian(self._in_direction(du[i], direction(dz, i)), hessian_input=self._zero)
            out[i] = get(result[0])
            rows.append(self._control_part(result))
        return out, self._collect(rows)

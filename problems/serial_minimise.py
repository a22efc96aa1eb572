"""Recover the controls of a pyadjoint tape with pyadjoint's own optimiser: the baseline of the comparison."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from firedrake import Function
from firedrake.petsc import PETSc
from pyadjoint import Control, MinimizationProblem, TAOSolver
from pyadjoint.enlisting import Enlist
from pyadjoint.optimization.tao_solver import PETScVecInterface, TAOConvergenceError
from pyadjoint.reduced_functional import AbstractReducedFunctional
from pyadjoint.tape import stop_annotating

from problems.serial_pyadjoint import SerialSource

__all__ = ["SerialResult", "minimise"]


@dataclass
class SerialResult:
    """What :func:`minimise` found.

    Attributes
    ----------
    control : Function or list of Function
    value, gradient_norm : float
        At ``control``; the norm is the prior's.
    iterations, evaluations, gradients, hessians : int
        Calls of the reduced functional.
    seconds : float
    converged : bool
    """

    control: Function | list[Function]
    value: float
    gradient_norm: float
    iterations: int
    evaluations: int
    gradients: int
    hessians: int
    seconds: float
    converged: bool


_METHODS = {
    "lmvm": {"tao_type": "lmvm"},
    "nls": {
        "tao_type": "nls",
        "tao_nls_ksp_type": "cg",
        "tao_nls_pc_type": "python",
        "tao_nls_pc_python_type": "pyadjoint.optimization.tao_solver.RieszMapPC",
        "tao_nls_ksp_rtol": 1e-4,
    },
}


@dataclass
class _Counts:
    evaluations: int = 0
    gradients: int = 0
    hessians: int = 0
    history: list = field(default_factory=list)


class _Counted(AbstractReducedFunctional):
    """A functional that counts its calls; TAO takes the inner products of its controls."""

    def __init__(self, rf: AbstractReducedFunctional, controls: Sequence[Control] | None = None):
        self.rf, self.counts = rf, _Counts()
        self._controls = rf.controls if controls is None else Enlist(controls)

    @property
    def controls(self):
        return self._controls

    def __call__(self, values):
        self.counts.evaluations += 1
        return self.rf(values)

    def derivative(self, adj_input=1.0, apply_riesz=False):
        self.counts.gradients += 1
        return self.rf.derivative(adj_input=adj_input, apply_riesz=apply_riesz)

    def hessian(self, m_dot, hessian_input=None, evaluate_tlm=True, apply_riesz=False):
        self.counts.hessians += 1
        return self.rf.hessian(m_dot, hessian_input, evaluate_tlm=evaluate_tlm, apply_riesz=apply_riesz)

    def tlm(self, m_dot):
        return self.rf.tlm(m_dot)


def minimise(
    serial: SerialSource,
    *,
    method: str = "lmvm",
    gttol: float = 1e-8,
    max_it: int = 200,
    printer: Callable[[str], object] | None = print,
    callback: Callable[[object], object] | None = None,
    parameters: dict | None = None,
    controls: Sequence[Control] | None = None,
) -> SerialResult:
    """Recover the controls with pyadjoint's own ``TAOSolver``.

    Parameters
    ----------
    serial
        A recorded problem.
    method
        ``"lmvm"``: limited-memory BFGS that starts from the prior's inverse. ``"nls"``: Newton-CG, preconditioned by
        it.
    gttol
        Stop when the gradient's norm has fallen by this factor.
    max_it
        Largest number of iterations.
    printer
        Gets a line an iteration.
    callback
        Gets the controls of each iteration.
    parameters
        More PETSc options of TAO.
    controls
        With the inner products of TAO's method; default: the functional's own.
    """
    rf, start = _Counted(serial.rf, controls), time.perf_counter()
    counts, sought = rf.counts, Enlist(serial.q)
    options = {
        **_METHODS[method],
        "tao_gatol": 0.0,
        "tao_grtol": 0.0,
        "tao_gttol": gttol,
        "tao_max_it": max_it,
        **(parameters or {}),
    }
    comm = sought[0].function_space().mesh().comm
    # TAO's quasi-Newton matrix keeps 5 pairs by default, which costs 10 times the iterations here; it ignores the
    # solver's options prefix
    database, pairs = PETSc.Options(), "tao_lmvm_mat_lmvm_hist_size"
    given = database.hasName(pairs)
    if not given:
        database[pairs] = max_it
    try:
        solver = TAOSolver(MinimizationProblem(rf), options, comm=comm)
    finally:
        if not given:
            database.delValue(pairs)

    def values_of(x):
        values = [Function(q.function_space(), name=q.name()) for q in sought]
        PETScVecInterface(values, comm=comm).from_petsc(x, values)
        return sought.delist(values)

    def monitor(tao):
        if printer is not None:
            if not counts.history:
                printer(f"{'it':>4} {'J':>16} {'|g|':>10} {'J calls':>8} {'seconds':>8}")
            iteration, value, norm, *_ = tao.getSolutionStatus()
            counts.history.append(iteration)
            printer(
                f"{iteration:4d} {value:16.9e} {norm:10.3e} {counts.evaluations:8d} {time.perf_counter() - start:8.1f}"
            )
        if callback is not None:
            callback(values_of(tao.getSolution()))

    solver.tao.setMonitor(monitor)
    for control, q in zip(rf.controls, sought, strict=True):  # start there, wherever the tape was evaluated last
        control.update(q.copy(deepcopy=True))
    converged = True
    try:
        with stop_annotating():
            solver.solve()
    except (
        TAOConvergenceError,
        AttributeError,
    ) as error:  # AttributeError: this pyadjoint does not find this petsc4py's names of reasons
        if solver.tao.getConvergedReason() > 0:
            raise
        converged = False
        if printer is not None:
            printer(f"  not converged, TAO's reason {solver.tao.getConvergedReason()} ({error})")
    iterations, value, norm, *_ = solver.tao.getSolutionStatus()
    return SerialResult(
        values_of(solver.x),
        value,
        norm,
        iterations,
        counts.evaluations,
        counts.gradients,
        counts.hessians,
        time.perf_counter() - start,
        converged,
    )

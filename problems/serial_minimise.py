"""Recover the source from a pyadjoint tape with pyadjoint's own optimiser: the opponent's half of the comparison."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from firedrake import Function
from firedrake.petsc import PETSc
from pyadjoint import MinimizationProblem, TAOSolver
from pyadjoint.optimization.tao_solver import TAOConvergenceError
from pyadjoint.tape import stop_annotating

from problems.serial_pyadjoint import SerialSource

__all__ = ["SerialResult", "minimise"]


@dataclass
class SerialResult:
    """What :func:`minimise` found.

    Attributes
    ----------
    control : Function
    value, gradient_norm : float
        At ``control``; the norm is the prior's.
    iterations, evaluations, gradients, hessians : int
        Calls of the reduced functional.
    seconds : float
    converged : bool
    """

    control: Function
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


def minimise(
    serial: SerialSource,
    *,
    method: str = "lmvm",
    gttol: float = 1e-8,
    max_it: int = 200,
    printer: Callable[[str], object] | None = print,
    callback: Callable[[Function], object] | None = None,
    parameters: dict | None = None,
) -> SerialResult:
    """Recover the source with pyadjoint's own ``TAOSolver``.

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
        Gets the source of each iteration.
    parameters
        More PETSc options of TAO.
    """
    rf, counts = serial.rf, _Counts()
    start = time.perf_counter()
    before = rf.eval_cb_post, rf.derivative_cb_post, rf.hessian_cb_post

    def count(name, result=None):
        setattr(counts, name, getattr(counts, name) + 1)
        return result

    rf.eval_cb_post = lambda *_: count("evaluations")
    rf.derivative_cb_post = lambda checkpoint, derivatives, controls: count("gradients", derivatives)
    rf.hessian_cb_post = lambda *_: count("hessians")
    options = {
        **_METHODS[method],
        "tao_gatol": 0.0,
        "tao_grtol": 0.0,
        "tao_gttol": gttol,
        "tao_max_it": max_it,
        **(parameters or {}),
    }
    comm = serial.q.function_space().mesh().comm
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
            q = Function(serial.q.function_space())
            q._ad_from_petsc(tao.getSolution())
            callback(q)

    solver.tao.setMonitor(monitor)
    rf.controls[0].update(serial.q.copy(deepcopy=True))  # start there, wherever the tape was evaluated last
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
    finally:
        rf.eval_cb_post, rf.derivative_cb_post, rf.hessian_cb_post = before
    q = Function(serial.q.function_space(), name="source")
    q._ad_from_petsc(solver.x)
    iterations, value, norm, *_ = solver.tao.getSolutionStatus()
    return SerialResult(
        q,
        value,
        norm,
        iterations,
        counts.evaluations,
        counts.gradients,
        counts.hessians,
        time.perf_counter() - start,
        converged,
    )

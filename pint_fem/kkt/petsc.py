r"""The KKT system of all steps as a matrix of PETSc, with preconditioners and Krylov methods under the prefix ``kkt_``.

In the order states, controls, adjoints the system is symmetric and indefinite:

.. math::
   \begin{pmatrix} Q & & -A^T \\ & R & \Psi^T \\ -A & \Psi & \end{pmatrix}
   \begin{pmatrix} u \\ z \\ \lambda \end{pmatrix} = \begin{pmatrix} -b \\ c \\ -a \end{pmatrix}

for the right-hand sides of :class:`~pint_fem.kkt.operator.KKTOperator`, where :math:`A` has the steps of all time
points. A vector has the communicator of the whole grid; each rank has the states of its own steps ``(k, n)``, its
controls and its adjoints ``(k, n)``. Static controls are unknowns of the first rank in time, whose values the others
receive.

There are two preconditioners of PETSc's type ``python``:

* the circulant system itself (:class:`~pint_fem.kkt.circulant.CirculantKKT`), indefinite like the KKT system, for
  ``fgmres`` (the default), ``gmres`` and other methods for nonsymmetric matrices;
* for ``minres`` and ``symmlq``, which require a positive definite one, the block diagonal :math:`\mathrm{diag}(Q, R,
  S)^{-1}` with the Schur complement :math:`S = A Q^{-1} A^T + \Psi R^{-1} \Psi^T` of the circulant system:
  :math:`S^{-1} a` is the adjoint of its solution for the right-hand side ``(a, 0, 0)``. With the exact Schur complement
  of the KKT system three iterations would suffice (Murphy, Golub, Wathen, SISC 21(6), 2000). It requires that ``Q`` is
  positive definite, thus misfits of the whole state at all steps, and a positive definite regularisation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from firedrake.petsc import PETSc
from petsctools import OptionsManager, flatten_parameters

from pint_fem.all_at_once.stopping import DivergedError
from pint_fem.collective import collectively
from pint_fem.errors import FAILURES, InputError, is_numerical
from pint_fem.evolution.control_layout import ControlLayout
from pint_fem.kernels.block_operator import ManySolves
from pint_fem.kernels.factor import Factor
from pint_fem.kkt.circulant import CirculantKKT
from pint_fem.kkt.operator import KKTOperator
from pint_fem.petsc_options.checks import require_types

__all__ = ["KKTResult", "KKTVectors", "kkt_matrix", "solve_kkt"]

Preconditioner = Callable[[np.ndarray, np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray, np.ndarray]]
"""``(a, b, c) -> (u, z, lam)`` with controls as flat vectors."""

_DEFAULTS = {"ksp_type": "fgmres", "ksp_rtol": 1e-8, "ksp_atol": 0.0, "ksp_max_it": 200, "ksp_gmres_restart": 100}
_DEFINITE = ("minres", "symmlq")
"""Methods for symmetric indefinite matrices, with a positive definite preconditioner."""
_REFUSED = ("cg", "pipecg", "pipecgrr", "groppcg", "fcg", "pipefcg", "nash", "stcg", "gltr", "chebyshev")
"""Methods for positive definite matrices."""
_RIGHT = ("gmres", "lgmres", "pgmres", "dgmres", "bcgs", "bcgsl", "ibcgs", "fbcgs")
"""Methods that take the preconditioner on the right, so that residuals are those of the system."""
_TRIAL = 1e-6
"""Error of a solution of ``Q x = Q t`` above which ``Q`` is singular."""


class KKTVectors:
    """The layout of vectors of a KKT system.

    Parameters
    ----------
    operator
        The KKT operator, on a grid with one group of experiments.

    Attributes
    ----------
    size : int
        Own numbers of a vector.

    Raises
    ------
    InputError
        On every rank, if there are several groups of experiments.
    """

    def __init__(self, operator: KKTOperator):
        self.spacetime, self.layout = operator.spacetime, operator.layout
        if self.spacetime.experiments_comm.size > 1:
            raise InputError(
                "the KKT system is distributed over space and time: give a grid with one group of experiments, such as "
                f"{self.spacetime.space_size}x{self.spacetime.time_size}"
            )
        (self.k, self.n), *_ = operator.shapes
        self._owned = np.flatnonzero(self.layout.owned)
        states, controls = self.k * self.n, len(self._owned)
        self._ends = np.cumsum([states, controls, states])
        self.size = int(self._ends[-1])

    def join(self, u: np.ndarray, z: np.ndarray, lam: np.ndarray) -> np.ndarray:
        """The own numbers of a vector, from states and adjoints ``(k, n)`` and controls ``(layout.size,)``."""
        return np.concatenate([np.ravel(u), z[self._owned], np.ravel(lam)])

    def split(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Copies of states, controls, with those of other ranks that this one has copies of, and adjoints
        (collective over time).
        """
        u, owned, lam, _ = np.split(values, self._ends)
        z = np.zeros(self.layout.size)
        z[self._owned] = owned
        self.layout.share(z)
        return u.reshape(self.k, self.n).copy(), z, lam.reshape(self.k, self.n).copy()


class _Guarded:
    """Maps of vectors as PETSc calls them: a failure makes the result NaN, which ends the iteration on all ranks."""

    def __init__(self) -> None:
        self.failure: BaseException | None = None

    def write(self, y: PETSc.Vec, work: Callable[[], np.ndarray]) -> None:
        """Write the result of ``work``, which fails on all ranks or on none, to ``y``."""
        if self.failure is None:
            try:
                y.array[:] = work()
                return
            except FAILURES as error:
                self.failure = error
        y.array[:] = np.nan


class _Symmetric(_Guarded):
    """The context of the matrix."""

    def __init__(self, operator: KKTOperator, vectors: KKTVectors):
        super().__init__()
        self._operator, self._vectors = operator, vectors

    def mult(self, matrix: PETSc.Mat, x: PETSc.Vec, y: PETSc.Vec) -> None:
        """Write the product to ``y``."""
        self.write(y, lambda: self._product(x.array_r))

    multTranspose = mult

    def _product(self, x: np.ndarray) -> np.ndarray:
        a, b, c = self._operator(*self._vectors.split(x))
        return self._vectors.join(-b, c, -a)


class _Indefinite(_Guarded):
    """The context of the preconditioner by a solve of a KKT system."""

    def __init__(self, solve: Preconditioner, vectors: KKTVectors):
        super().__init__()
        self._solve, self._vectors = solve, vectors

    def apply(self, pc: PETSc.PC, x: PETSc.Vec, y: PETSc.Vec) -> None:
        """Write the solution for the residual ``x`` to ``y``."""
        self.write(y, lambda: self._solution(x.array_r))

    def _solution(self, x: np.ndarray) -> np.ndarray:
        r, c, s = self._vectors.split(x)
        return self._vectors.join(*self._solve(-s, -r, c))


class _Definite(_Guarded):
    """The context of the block-diagonal preconditioner."""

    def __init__(self, kkt: CirculantKKT, vectors: KKTVectors):
        super().__init__()
        self._kkt, self._vectors = kkt, vectors
        if kkt.systems.single:
            raise InputError("minres requires a symmetric preconditioner: give the KKT system's single=False")
        matrices = [(matrix, weight) for matrix, weight in kkt.model.misfit_matrices if weight]
        if not matrices or any(weight < 0 for _, weight in matrices):
            raise InputError(f"{_NO_MISFIT} as no misfit acts at all steps")
        Q = matrices[0][0].copy()
        Q.scale(matrices[0][1])
        for matrix, weight in matrices[1:]:
            Q.axpy(weight, matrix, PETSc.Mat.Structure.DIFFERENT_NONZERO_PATTERN)
        self._inverse = _inverse(Q)

    def apply(self, pc: PETSc.PC, x: PETSc.Vec, y: PETSc.Vec) -> None:
        """Write the products of the three inverses to ``y``."""
        self.write(y, lambda: self._solution(x.array_r))

    def _solution(self, x: np.ndarray) -> np.ndarray:
        vectors, model = self._vectors, self._kkt.model
        r, c, s = vectors.split(x)
        u = self._inverse(r)
        z = vectors.layout.from_steps(model.weights.solve(_rows(vectors.layout, c)))
        return vectors.join(u, z, self._kkt.solve(a=s, ends=False).lam)


_NO_MISFIT = "minres requires a positive definite second derivative of the misfits at each step: use fgmres,"


def _inverse(Q: PETSc.Mat) -> Callable[[np.ndarray], np.ndarray]:
    """Solves with the second derivative of the misfits, which is required to be positive definite (collective)."""
    x, y = Q.createVecs()
    x.array[:] = np.cos(np.arange(x.getLocalSize()) ** 2) + 1.5
    Q.mult(x, y)
    try:
        solves = ManySolves(Factor(Q, {}, symmetric=True, prefix="kkt_misfit_"))
        found = solves(y.array_r[None].copy())[0]
        found -= x.array_r
        error = x.duplicate()
        error.array[:] = found
        accurate = error.norm(PETSc.NormType.INFINITY) <= _TRIAL
    except Exception as failure:
        if not is_numerical(failure):
            raise
        accurate = False
    if not accurate or x.dot(y) <= 0:
        raise InputError(f"{_NO_MISFIT} as it is singular or indefinite here")
    return solves


def _rows(layout: ControlLayout, z: np.ndarray) -> np.ndarray:
    """The controls of the own steps, ``(k, nz)``, in a flat vector."""
    return np.ascontiguousarray(layout.steps(z))


def kkt_matrix(operator: KKTOperator) -> PETSc.Mat:
    """Return the symmetric KKT system as a Python matrix of PETSc on all ranks (collective).

    Parameters
    ----------
    operator
        The KKT operator.

    Raises
    ------
    InputError
        On every rank, if there are several groups of experiments.
    """
    vectors = KKTVectors(operator)
    sizes = vectors.size, None
    matrix = PETSc.Mat().createPython((sizes, sizes), _Symmetric(operator, vectors), comm=operator.spacetime.comm)
    matrix.setUp()
    matrix.setOption(PETSc.Mat.Option.SYMMETRIC, True)
    return matrix


class KKTResult(NamedTuple):
    """A solution of the own steps, and how it was found.

    Attributes
    ----------
    u, lam : ndarray, shape (k, n)
        States and adjoints at the ends of the own steps.
    z : ndarray, shape (layout.size,)
        Controls.
    iterations : int
        Iterations of the Krylov method.
    reason : str
        PETSc's name of the reason why it stopped, such as ``"CONVERGED_RTOL"``.
    residuals : ndarray
        Residual norms, the first one included.
    """

    u: np.ndarray
    z: np.ndarray
    lam: np.ndarray
    iterations: int
    reason: str
    residuals: np.ndarray


def solve_kkt(
    operator: KKTOperator,
    kkt: CirculantKKT | None = None,
    a: np.ndarray | None = None,
    b: np.ndarray | None = None,
    c: np.ndarray | None = None,
    *,
    solver_parameters: Mapping | None = None,
    options_prefix: str = "",
) -> KKTResult:
    r"""Solve the KKT system of all steps by a Krylov method of PETSc (collective).

    Parameters
    ----------
    operator
        The KKT operator.
    kkt
        The circulant system that preconditions it; ``None`` for no preconditioner.
    a, b, c
        Right-hand sides of the own steps' state and adjoint equations, ``(k, n)``, and of the controls,
        ``(layout.size,)``; zero by default.
    solver_parameters
        PETSc options: ``ksp_type`` (default ``fgmres``), ``ksp_rtol`` (1e-8, relative to the right-hand side's
        Euclidean norm of coefficients in the symmetric form), ``pc_type`` (``python`` or ``none``) and others. Options
        of PETSc's database with the prefix ``kkt_``, such as ``-kkt_ksp_monitor``, precede them.
    options_prefix
        Prefix of all these, such as ``"heat_"`` for ``-heat_kkt_ksp_type``.

    Returns
    -------
    KKTResult

    Raises
    ------
    InputError
        On every rank, if a right-hand side or an option does not fit.
    SolverFailure
        On every rank, where a step or a system of a frequency fails, and as
        :class:`~pint_fem.all_at_once.stopping.DivergedError` where the method does not converge, with PETSc's reason.
    """
    comm, prefix = operator.spacetime.comm, f"{options_prefix}kkt_"
    given = {"pc_type": "none" if kkt is None else "python", **flatten_parameters(solver_parameters or {})}
    parameters = {**_DEFAULTS, **given}
    vectors, matrix = KKTVectors(operator), kkt_matrix(operator)
    right, x = matrix.createVecs()
    ksp = PETSc.KSP().create(comm)
    try:
        right.array[:] = collectively(comm, "KKT system: right-hand side", _right_hand_side, vectors, a, b, c)
        collectively(comm, "KKT system: options", require_types, parameters, prefix)
        ksp.setOperators(matrix)
        options = OptionsManager(parameters, prefix)
        options.set_from_options(ksp)
        contexts = [matrix.getPythonContext()]
        contexts += collectively(comm, "KKT system: preconditioner", _prepare, ksp, options, kkt, vectors)
        ksp.setErrorIfNotConverged(False)
        ksp.setConvergenceHistory()
        with options.inserted_options():
            ksp.solve(right, x)
        for context in contexts:
            if context.failure is not None:
                raise context.failure
        reason = _reason(ksp)
        history = np.array(ksp.getConvergenceHistory())
        if ksp.getConvergedReason() <= 0:
            last = history[-1] / history[0] if len(history) and history[0] else np.nan
            raise DivergedError(
                f"the KKT system: {ksp.getType()} stopped after {ksp.getIterationNumber()} iterations at {last:.1e} of "
                f"the first residual ({reason})"
            )
        return KKTResult(*vectors.split(x.array_r), ksp.getIterationNumber(), reason, history)
    finally:
        for thing in (ksp, matrix, right, x):
            thing.destroy()


def _right_hand_side(
    vectors: KKTVectors, a: np.ndarray | None, b: np.ndarray | None, c: np.ndarray | None
) -> np.ndarray:
    """The own numbers of the right-hand side of the symmetric form."""
    states = vectors.k, vectors.n
    values = []
    for name, given, shape in (("a", a, states), ("b", b, states), ("c", c, (vectors.layout.size,))):
        rows = np.zeros(shape) if given is None else np.asarray(given, dtype=float)
        if rows.shape != shape:
            raise InputError(f"right-hand side {name} of shape {rows.shape}: give {shape}")
        if not np.isfinite(rows).all():
            raise InputError(f"right-hand side {name} has entries that are infinite or NaN")
        values.append(rows)
    return vectors.join(-values[1], values[2], -values[0])


def _prepare(ksp: PETSc.KSP, options: OptionsManager, kkt: CirculantKKT | None, vectors: KKTVectors) -> list[_Guarded]:
    """Check the method, and set its preconditioner, which is returned where it is one of this module's (collective)."""
    method, pc, prefix = ksp.getType(), ksp.getPC(), options.options_prefix
    if method in _REFUSED:
        raise InputError(
            f"-{prefix}ksp_type {method}: the KKT system is indefinite: give 'fgmres', 'gmres' or, with a misfit "
            "of the whole state at all steps, 'minres'"
        )
    if pc.getType() not in ("python", "none"):
        raise InputError(f"-{prefix}pc_type {pc.getType()}: the KKT system has no entries: give 'python' or 'none'")
    if method in _RIGHT and "ksp_pc_side" not in options.parameters:
        ksp.setPCSide(PETSc.PC.Side.RIGHT)
    if pc.getType() == "none" or "pc_python_type" in options.parameters:
        return []
    if kkt is None:
        raise InputError(f"-{prefix}pc_type python: there is no circulant system: give kkt=, or 'none'")
    context: _Guarded
    if method in _DEFINITE:
        context = _Definite(kkt, vectors)
    else:
        layout = vectors.layout

        def solve(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            found = kkt.solve(a, b, _rows(layout, c), ends=False)
            return found.u, layout.from_steps(found.z), found.lam

        context = _Indefinite(solve, vectors)
    pc.setPythonContext(context)
    return [context]


def _reason(ksp: PETSc.KSP) -> str:
    """PETSc's name of the reason why a method stopped."""
    names = {value: name for name, value in vars(PETSc.KSP.ConvergedReason).items() if isinstance(value, int)}
    return names.get(int(ksp.getConvergedReason()), str(ksp.getConvergedReason()))

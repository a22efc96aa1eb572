r"""MGRIT as a preconditioner: Krylov methods of PETSc on all steps at once.

With :math:`u_0` moved to the right-hand side, a linear evolution of :math:`N` steps is one system for
:math:`u_1 \dots u_N`, its transpose one for :math:`w_N \dots w_1`:

.. math::  (A u)_{n+1} = u_{n+1} - \Phi_n u_n ,\quad u_0 = 0, \qquad
           (A^T w)_n = w_n - \Phi_n^T w_{n+1} ,\quad w_{N+1} = 0 .

One MGRIT cycle from zero is a linear map :math:`B \approx A^{-1}`; plain MGRIT is the iteration
:math:`u \leftarrow u + B (b - A u)`. FGMRES with the same :math:`B` has the smallest residual of all combinations of
its iterates, so without a restart it is never behind, and its residual never grows. It is no cure for a coarse level
that is far off: :math:`B A` is block triangular in time, all its eigenvalues are one (with C-weights of one), and the
more it differs from the identity the closer the number of iterations comes to that of exact termination.

**Cost.** An iteration is one cycle and one product with :math:`A`, which is ``N`` propagator calls: about one
F-relaxation more than a plain cycle.

**Memory.** To that of :mod:`~pint_fem.mgrit.space_time_operator` FGMRES adds two vectors per iteration, up to a restart
(``ksp_gmres_restart``, here ``max_it``); GCR allocates two for each of 30 iterations at once (``ksp_gcr_restart``).

**Reproducibility.** :math:`A x`, :math:`A^T x`, :math:`B x` and :math:`B^T x` are bitwise identical for every number of
time ranks. PETSc's dot products are MPI reductions: iterates may differ in round-off between numbers of ranks.

This module needs petsc4py and petsctools; :mod:`pint_fem.mgrit` does not import it.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from petsc4py import PETSc
from petsctools import OptionsManager

from pint_fem.all_at_once.levels import Level, Propagator
from pint_fem.all_at_once.stopping import DivergedError, SolveResult
from pint_fem.collective import any_rank, collectively, ending_all_ranks, raise_report
from pint_fem.errors import FailureReport, InputError, SolverFailure
from pint_fem.logs import logger
from pint_fem.mgrit.options import MGRITOptions
from pint_fem.mgrit.space_time_operator import Direction, Hierarchies, MGRITPreconditioner

__all__ = ["KrylovMGRIT"]

_REASONS = {2: "rtol", 3: "atol", 4: "its", -3: "max_it", -4: "diverged"}
_NOT_FINITE = (-9, -11, -13)  # NaN or infinity; a failed preconditioner, should a user's options bring one


class KrylovMGRIT:
    """Krylov-accelerated MGRIT for linear evolutions, ``U[n+1] = Phi_n U[n] + G[n]``, and for their transposes.

    The interface is that of :class:`~pint_fem.mgrit.solver.MGRIT`. The method is PETSc's: default FGMRES (right
    preconditioning), ``gcr`` and others by ``ksp_type``; the norm is the unpreconditioned one, so residuals are those
    of all points, ``|b - A u|``, with the initial value's part ``Phi_0 u_0`` in ``b``.

    Parameters
    ----------
    propagators, nsteps, transposed, options, comm, bounds, transfers, petsc_comm, reversed_comm, name
        Those of :class:`Hierarchies`. Of the options for stopping, ``rtol``, ``atol`` and ``max_it`` are taken, and
        ``rtol`` is **relative to the right-hand side's norm**, not to the trajectory's. With ``residual="none"``,
        ``max_it`` iterations are done. ``start``, ``nested_cycles``, ``on_divergence``, ``monitor`` and ``view`` are as
        for MGRIT.
    solver_parameters
        PETSc options of the ``KSP``, such as ``{"ksp_type": "gcr", "ksp_rtol": 1e-10, "ksp_monitor": None}``.
    options_prefix
        Prefix in PETSc's database, which comes before ``solver_parameters``: ``-mgrit_ksp_type gcr
        -mgrit_ksp_monitor -mgrit_ksp_view``.

    Raises
    ------
    ValueError
        On every rank, on bad options.
    """

    def __init__(
        self,
        propagators: Sequence[Propagator],
        nsteps: int,
        *,
        options: MGRITOptions | Mapping | None = None,
        solver_parameters: Mapping | None = None,
        options_prefix: str = "mgrit_",
        name: str = "mgrit",
        **hierarchy: Any,
    ):
        self.options = options = MGRITOptions.make(options)
        self.hierarchies = Hierarchies(propagators, nsteps, options=options, name=name, **hierarchy)
        self.name, self.nsteps = name, nsteps
        self._parameters, self._prefix = dict(solver_parameters or {}), options_prefix
        self._petsc_options: OptionsManager | None = None
        self.ksp: PETSc.KSP | None = None
        self._matrix: PETSc.Mat | None = None
        self._b: np.ndarray | None = None
        self._checked: set[bool] = set()
        self._viewed, self._raises = not options.view, False

    def solve(self, U: np.ndarray, G: np.ndarray | None = None, *, start: str | None = None) -> SolveResult:
        """Solve in place.

        Parameters
        ----------
        U
            ``(k + 1, *state)``, C-contiguous: first guess in, solution out. Row 0 is the initial value on the first
            rank, and the left neighbour's last point on the others that have steps (set on return).
        G
            Right-hand side of the own steps, ``(k, *state)``, or ``None`` for zero.
        start
            ``"guess"``, ``"skip"`` or ``"nested"``; default: the option.

        Returns
        -------
        SolveResult
            ``residuals`` before each iteration, ``cycles`` the preconditioner's, ``scale`` the right-hand side's norm.

        Raises
        ------
        ValueError
            On every rank, on arrays that do not fit or propagators that are affine (their forcing belongs to ``G``).
        SolverFailure
            On every rank, if a step failed or a value is not finite on any.
        DivergedError
            Where PETSc's ``ksp_error_if_not_converged`` is set.
        """
        side = self._begin(U, G, transposed=False)
        self._b[...] = 0 if G is None else G
        self._guess(side, U, start)
        self._add_initial(side.level, U)
        result = self._run(side, U[1:])
        side.level.exchange(U)
        return result

    def solve_transposed(self, W: np.ndarray, G: np.ndarray | None = None, *, start: str | None = None) -> SolveResult:
        r"""Solve :math:`w_n - \Phi_n^T w_{n+1} = g_n`, ``n = N..1``, in place.

        Parameters
        ----------
        W
            ``(k + 1, *state)``, C-contiguous: first guess in, solution out; row ``i`` is point ``lo + i`` as in a
            forward solve. Row 0 (set on return) is :math:`\Phi_0^T w_1` on the first rank, the derivative by the
            initial value, and the left neighbour's last point on the others.
        G
            ``(k, *state)``, row ``i`` belonging to point ``lo + 1 + i``, or ``None`` for zero.
        start
            ``"guess"``, ``"skip"`` or ``"nested"``; default: the option.

        Returns
        -------
        SolveResult

        Raises
        ------
        ValueError, SolverFailure, DivergedError
            On every rank, for the reasons that :meth:`solve` has.
        """
        side = self._begin(W, G, transposed=True)
        self._b[...] = 0 if G is None else G
        W[0] = 0
        self._guess(side, W, start)
        result = self._run(side, W[1:])
        self._derivative_by_initial(side.level, W)
        self._raise_failures(side)
        return result

    def _add_initial(self, fine: Level, U: np.ndarray) -> None:
        """Add ``Phi_0 u_0`` to the right-hand side, on the rank that takes the first step."""
        start = U[:1].copy()
        first = fine.lo == 0 and fine.k > 0
        fine.wait(fine.post_receive(start) if first else None, None if fine.k else fine.post_send(start))
        if first:
            out = start.copy()
            fine.phi(range(1), start, out)
            self._b[:1] += out

    def _derivative_by_initial(self, reverse: Level, W: np.ndarray) -> None:
        """Step ``N`` of the reversed grid, then ghosts; a first rank without steps gets its row from the next."""
        fine = self.hierarchies.solver.levels[0]
        if fine.lo == 0 and fine.k:
            if reverse.uses_guess:
                W[0] = W[1]
            reverse.phi(range(self.nsteps, self.nsteps + 1), W[1:2], W[:1])
            if fine.left is not None:
                fine.comm.Send(W[:1], dest=fine.left)
        elif not fine.k and fine.right is not None:
            fine.comm.Recv(W[:1], source=fine.right)
        fine.exchange(W)

    def _guess(self, side: Direction, U: np.ndarray, start: str | None) -> None:
        start = MGRITOptions.make(self.options, start=self.options.start if start is None else start).start
        if start in ("skip", "nested"):
            side.guess(self._b, U[1:], initial=U[0], nested=start == "nested")

    def _begin(self, U: np.ndarray, G: np.ndarray | None, *, transposed: bool) -> Direction:
        """Check the arrays on all ranks and make PETSc's objects where they are missing."""
        self._check_arrays(U, G)
        h = self.hierarchies
        if any_rank(h.petsc_comm, self.ksp is None or h.state_shape != U.shape[1:]):
            h.set_state(U.shape[1:])
            self._checked = set()
            self._build()
        side = h.direction(transposed=transposed)
        if transposed not in self._checked:
            if any_rank(h.petsc_comm, side.is_affine()):
                raise ValueError(f"{self.name}: a propagator is affine, Phi(0) is not 0: put its forcing into G")
            self._checked.add(transposed)
        if not self._viewed:
            self._viewed = True
            self._print(self.view())
        side.clear()
        return side

    def _check_arrays(self, U: np.ndarray, G: np.ndarray | None) -> None:
        """Refuse arrays that do not fit (collective)."""
        h = self.hierarchies
        shapes = h.comm.allgather(np.shape(U)[1:])

        def check() -> None:
            k = h.solver.levels[0].k
            if not U.ndim or len(U) != k + 1 or (G is not None and G.shape != (k, *U.shape[1:])):
                raise InputError(f"U {U.shape} and G {None if G is None else G.shape} for {k} own steps")
            if U.dtype != float:
                raise InputError(f"U of type {U.dtype}: give {np.dtype(float)}")
            if not U.flags.c_contiguous:
                raise InputError("U is not C-contiguous: PETSc's vector is its memory")
            if len(set(shapes)) > 1:
                raise InputError(f"states of different shapes on the ranks: {shapes}")

        collectively(h.petsc_comm, self.name, check)

    def _build(self) -> None:
        """Make the ``KSP`` for the present shape of states."""
        options, h = self.options, self.hierarchies
        self._destroy_petsc()
        self._b = np.zeros((h.solver.levels[0].k, *h.state_shape))
        self._matrix = h.matrix()
        self.ksp = ksp = PETSc.KSP().create(h.petsc_comm)
        ksp.setOperators(self._matrix)
        ksp.setType(PETSc.KSP.Type.FGMRES)
        ksp.setNormType(PETSc.KSP.NormType.UNPRECONDITIONED)
        fixed = options.residual == "none"
        # a poor guess beside a small right-hand side is no divergence: PETSc tests for it only by a user's option
        ksp.setTolerances(0 if fixed else options.rtol, 0 if fixed else options.atol, 1e300, options.max_it)
        ksp.setConvergenceHistory(reset=True)
        pc = ksp.getPC()
        pc.setType(PETSc.PC.Type.PYTHON)
        pc.setPythonContext(MGRITPreconditioner(h))
        if options.monitor:
            me = weakref.ref(self)  # PETSc's solver keeps a reference to what it calls
            ksp.setMonitor(lambda ksp, it, norm: me()._print(f"  {me().name} {it:3d} residual {norm:.6e}"))
        # no restart: it may fall behind the plain iteration; PETSc allocates with the iterations
        parameters = {"ksp_gmres_restart": options.max_it} | self._parameters
        self._petsc_options = OptionsManager(parameters, self._prefix)
        self._petsc_options.set_from_options(ksp)
        # PETSc would raise on the ranks where a norm is NaN, and the others would wait: _run raises instead
        self._raises = ksp.getErrorIfNotConverged()
        ksp.setErrorIfNotConverged(False)

    def _run(self, side: Direction, x: np.ndarray) -> SolveResult:
        """Solve for the rows ``x`` by PETSc, from their present values."""
        ksp, h = self.ksp, self.hierarchies
        ksp.setInitialGuessNonzero(any_rank(h.petsc_comm, x.any()))
        solution, b = h.vec(x), h.vec(self._b)
        # an overflow shows in PETSc's norm
        with (
            ending_all_ranks(h.petsc_comm),
            self._petsc_options.inserted_options(),
            np.errstate(over="ignore", invalid="ignore"),
        ):
            (ksp.solveTranspose if side.solver.transposed else ksp.solve)(b, solution)
            scale = b.norm()
        reason = ksp.getConvergedReason()
        result = SolveResult(reason > 0, cycles=side.cycles, scale=scale)
        result.residuals = [float(r) for r in ksp.getConvergenceHistory()]
        result.reason = _REASONS.get(reason, "exact" if reason > 0 else "stagnated")
        if reason == PETSc.KSP.ConvergedReason.DIVERGED_MAX_IT and self.options.residual == "none":
            result.converged, result.reason = True, "its"
        serial = not result.converged and self.options.on_divergence == "serial"
        self._raise_failures(side, finite=reason not in _NOT_FINITE, mistakes_only=serial)
        if not result.converged:
            name = next(n for n, v in vars(PETSc.KSP.ConvergedReason).items() if v == reason and n.isupper())
            result.message = f"PETSc's {ksp.getType()} ended with {name} after {result.cycles} cycles"
        if serial:
            self._print(f"  {self.name}: {result.message}; stepping sequentially instead")
            side.clear()
            side.step(self._b, x)
            self._raise_failures(side, finite=bool(np.isfinite(x).all()))
            result.converged, result.reason = True, "serial"
        elif not result.converged and self._raises:
            raise DivergedError(f"{self.name}: {result.message}")
        return result

    def _raise_failures(self, side: Direction, *, finite: bool = True, mistakes_only: bool = False) -> None:
        """Raise on every rank if a step failed on any, or if ``finite`` is false on any."""
        first, mine = side.level.first_failure, None
        if first.text is not None:
            mine = FailureReport.of(first.error or SolverFailure(first.text), first.text)
        comm = self.hierarchies.petsc_comm
        reports = comm.allgather((finite, mine))
        found = [rank for rank, (_, report) in enumerate(reports) if report is not None]
        if found:
            rank = min(found, key=lambda r: reports[r][1].kind)
            report = reports[rank][1]
        elif not all(ok for ok, _ in reports):
            text = "right-hand side, guess or an iterate is not finite, or its norm is too large"
            rank, report = None, FailureReport.of(SolverFailure(text))
        else:
            return
        if mistakes_only and report.is_numerical:
            return
        text = f"{self.name}: {report.text}"
        if rank is not None and side.solver.transposed:
            text += " (steps of the transposed sweep: step i of N is Phi_{N-i}^T)"
        raise_report(comm, report, text, first.error if comm.rank == rank else None)

    def _print(self, text: str) -> None:
        if self.hierarchies.petsc_comm.rank == 0:
            logger.info(text)

    def view(self, state_nbytes: int | None = None) -> str:
        """Describe the hierarchy in a few lines; PETSc's ``ksp_view`` prints it as that of the preconditioner."""
        o = self.options
        tolerance = f"rtol {o.rtol:g} of the right-hand side, at most {o.max_it} iterations"
        return self.hierarchies.solver.view(state_nbytes, kind="Krylov-accelerated MGRIT", tolerance=tolerance)

    def _destroy_petsc(self) -> None:
        for handle in filter(None, (self.ksp, self._matrix)):
            handle.destroy()
        self.ksp = self._matrix = None

    def destroy(self) -> None:
        """Free PETSc's objects and the reversed communicator (collective)."""
        self._destroy_petsc()
        self.hierarchies.set_state(())
        self.hierarchies.destroy()

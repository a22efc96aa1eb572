r"""MGRIT as a preconditioner: Krylov methods of PETSc on all steps at once.

With :math:`u_0` moved to the right-hand side, a linear evolution of :math:`N` steps is one system for
:math:`u_1 \dots u_N`:

.. math::  (A u)_{n+1} = u_{n+1} - \Phi_n u_n ,\quad u_0 = 0 .

One MGRIT cycle from zero is a linear map :math:`B \approx A^{-1}`; plain MGRIT is the iteration
:math:`u \leftarrow u + B (b - A u)`. FGMRES with the same :math:`B` has the smallest residual of all combinations of
its iterates, so without a restart it is never behind, and its residual never grows. It is no cure for a coarse level
that is far off: :math:`B A` is block triangular in time, all its eigenvalues are one (with C-weights of one), and the
more it differs from the identity the closer the number of iterations comes to that of exact termination.

**Cost.** An iteration is one cycle and one product with :math:`A`, which is ``N`` propagator calls: about one
F-relaxation more than a plain cycle.

**Memory.** To that of :mod:`~pint_fem.mgrit.space_time_operator` FGMRES adds two vectors per iteration, up to a restart
(``ksp_gmres_restart``, here ``max_it``); GCR allocates two for each of 30 iterations at once (``ksp_gcr_restart``).

**Reproducibility.** :math:`A x` and :math:`B x` are bitwise identical for every number of time ranks. PETSc's dot
products are MPI reductions: iterates may differ in round-off between numbers of ranks.

This module needs petsc4py and petsctools; :mod:`pint_fem.mgrit` does not import it.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from petsc4py import PETSc
from petsctools import OptionsManager

from pint_fem.all_at_once.arrays import Array, copied, finite_rows, is_contiguous, is_tensor, kind_of, quiet
from pint_fem.all_at_once.propagator import Propagator
from pint_fem.all_at_once.stopping import DivergedError, SolveResult
from pint_fem.collective import any_rank, collectively, ending_all_ranks, raise_report
from pint_fem.errors import FailureReport, InputError, SolverFailure
from pint_fem.logs import logger
from pint_fem.mgrit.options import MGRITOptions
from pint_fem.mgrit.space_time_operator import MGRITPreconditioner, SpaceTimeOperator

__all__ = ["KrylovMGRIT"]

_REASONS = {2: "rtol", 3: "atol", 4: "its", -3: "max_it", -4: "diverged"}
_NOT_FINITE = (-9, -11, -13)  # NaN or infinity; a failed preconditioner, should a user's options bring one


class KrylovMGRIT:
    """Krylov-accelerated MGRIT for linear evolutions, ``U[n+1] = Phi_n U[n] + G[n]``.

    The interface is that of :class:`~pint_fem.mgrit.solver.MGRIT`. The method is PETSc's: default FGMRES (right
    preconditioning), ``gcr`` and others by ``ksp_type``; the norm is the unpreconditioned one, so residuals are those
    of all points, ``|b - A u|``, with the initial value's part ``Phi_0 u_0`` in ``b``.

    Parameters
    ----------
    propagators, nsteps, options, comm, bounds, transfers, petsc_comm, trace, name
        Those of :class:`~pint_fem.mgrit.space_time_operator.SpaceTimeOperator`. Of the options for stopping, ``rtol``,
        ``atol`` and ``max_it`` are taken, and ``rtol`` is **relative to the right-hand side's norm**, not to the
        trajectory's. With ``residual="none"``, ``max_it`` iterations are done. ``start``, ``nested_cycles``,
        ``on_divergence``, ``monitor`` and ``view`` are as for MGRIT.
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
        **given: Any,
    ):
        self.options = options = MGRITOptions.make(options)
        self.operator = SpaceTimeOperator(propagators, nsteps, options=options, name=name, **given)
        self.name = name
        self._parameters, self._prefix = dict(solver_parameters or {}), options_prefix
        self._petsc_options: OptionsManager | None = None
        self.ksp: PETSc.KSP | None = None
        self._matrix: PETSc.Mat | None = None
        self._b: Array | None = None
        self._is_checked = False
        self._viewed, self._raises = not options.view, False

    def solve(self, U: Array, G: Array | None = None, *, start: str | None = None) -> SolveResult:
        """Solve in place.

        Parameters
        ----------
        U
            ``(k + 1, *state)``, C-contiguous: first guess in, solution out. Row 0 is the initial value on the first
            rank, and the left neighbour's last point on the others that have steps (set on return). A numpy array of
            float64 or a CPU tensor of it, whose memory PETSc's vectors share; propagators then get tensors.
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
        self._begin(U, G)
        with quiet(U):
            return self._solve(U, G, start)

    def _solve(self, U: Array, G: Array | None, start: str | None) -> SolveResult:
        self._b[...] = 0 if G is None else G
        start = MGRITOptions.make(self.options, start=self.options.start if start is None else start).start
        if start in ("skip", "nested"):
            self.operator.guess(self._b, U[1:], initial=U[0], nested=start == "nested")
        self._add_initial(U)
        result = self._run(U[1:])
        self.operator.level.exchange(U)
        return result

    def _add_initial(self, U: Array) -> None:
        """Add ``Phi_0 u_0`` to the right-hand side, on the rank that takes the first step."""
        fine, start = self.operator.level, copied(U[:1])
        first = fine.lo == 0 and fine.k > 0
        fine.wait(fine.post_receive(start) if first else None, None if fine.k else fine.post_send(start))
        if first:
            out = copied(start)
            fine.phi(range(1), start, out)
            self._b[:1] += out

    def _begin(self, U: Array, G: Array | None) -> None:
        """Check the arrays on all ranks and make PETSc's objects where they are missing."""
        self._check_arrays(U, G)
        operator = self.operator
        kind = kind_of(U)
        if any_rank(
            operator.petsc_comm, self.ksp is None or (operator.state_shape, operator.kind) != (U.shape[1:], kind)
        ):
            operator.set_state(U.shape[1:], kind)
            self._is_checked = False
            self._build()
        if not self._is_checked:
            if any_rank(operator.petsc_comm, operator.is_affine()):
                raise ValueError(f"{self.name}: a propagator is affine, Phi(0) is not 0: put its forcing into G")
            self._is_checked = True
        if not self._viewed:
            self._viewed = True
            self._print(self.view())
        operator.clear()

    def _check_arrays(self, U: Array, G: Array | None) -> None:
        """Refuse arrays that do not fit (collective)."""
        operator = self.operator
        shapes = operator.comm.allgather(tuple(np.shape(U))[1:])

        def check() -> None:
            k = operator.level.k
            if not U.ndim or len(U) != k + 1 or (G is not None and G.shape != (k, *U.shape[1:])):
                raise InputError(f"U {tuple(U.shape)} and G {None if G is None else tuple(G.shape)} for {k} own steps")
            if is_tensor(U) and (U.device.type != "cpu" or (G is not None and not is_tensor(G)) or U.requires_grad):
                raise InputError(
                    f"U is a tensor on {U.device}{', which requires a gradient' if U.requires_grad else ''}, G a "
                    f"{type(G).__name__}: PETSc's vectors are on the host; give CPU tensors, such as U.detach().cpu()"
                )
            if str(U.dtype).removeprefix("torch.") != "float64":
                raise InputError(f"U of type {U.dtype}: give {np.dtype(float)}")
            if not is_contiguous(U):
                raise InputError("U is not C-contiguous: PETSc's vector is its memory")
            if len(set(shapes)) > 1:
                raise InputError(f"states of different shapes on the ranks: {shapes}")

        collectively(operator.petsc_comm, self.name, check)

    def _build(self) -> None:
        """Make the ``KSP`` for the present shape of states."""
        options, operator = self.options, self.operator
        self.destroy()
        self._b = operator.kind.zeros(operator.level.k, *operator.state_shape)
        self._matrix = operator.matrix()
        self.ksp = ksp = PETSc.KSP().create(operator.petsc_comm)
        ksp.setOperators(self._matrix)
        ksp.setType(PETSc.KSP.Type.FGMRES)
        ksp.setNormType(PETSc.KSP.NormType.UNPRECONDITIONED)
        fixed = options.residual == "none"
        # a poor guess beside a small right-hand side is no divergence: PETSc tests for it only by a user's option
        ksp.setTolerances(0 if fixed else options.rtol, 0 if fixed else options.atol, 1e300, options.max_it)
        ksp.setConvergenceHistory(reset=True)
        pc = ksp.getPC()
        pc.setType(PETSc.PC.Type.PYTHON)
        pc.setPythonContext(MGRITPreconditioner(operator))
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

    def _run(self, x: Array) -> SolveResult:
        """Solve for the rows ``x`` by PETSc, from their present values."""
        ksp, operator = self.ksp, self.operator
        ksp.setInitialGuessNonzero(any_rank(operator.petsc_comm, x.any()))
        solution, b = operator.vec(x), operator.vec(self._b)
        # an overflow shows in PETSc's norm
        with ending_all_ranks(operator.petsc_comm), self._petsc_options.inserted_options():
            ksp.solve(b, solution)
            scale = b.norm()
        reason = ksp.getConvergedReason()
        result = SolveResult(reason > 0, cycles=operator.cycles, scale=scale)
        result.residuals = [float(r) for r in ksp.getConvergenceHistory()]
        result.reason = _REASONS.get(reason, "exact" if reason > 0 else "stagnated")
        if reason == PETSc.KSP.ConvergedReason.DIVERGED_MAX_IT and self.options.residual == "none":
            result.converged, result.reason = True, "its"
        serial = not result.converged and self.options.on_divergence == "serial"
        self._raise_failures(finite=reason not in _NOT_FINITE, mistakes_only=serial)
        if not result.converged:
            name = next(n for n, v in vars(PETSc.KSP.ConvergedReason).items() if v == reason and n.isupper())
            result.message = f"PETSc's {ksp.getType()} ended with {name} after {result.cycles} cycles"
        if serial:
            self._print(f"  {self.name}: {result.message}; stepping sequentially instead")
            operator.clear()
            operator.step(self._b, x)
            self._raise_failures(finite=bool(finite_rows(x).all()))
            result.converged, result.reason = True, "serial"
        elif not result.converged and self._raises:
            raise DivergedError(f"{self.name}: {result.message}")
        return result

    def _raise_failures(self, *, finite: bool = True, mistakes_only: bool = False) -> None:
        """Raise on every rank if a step failed on any, or if ``finite`` is false on any."""
        first, mine = self.operator.level.first_failure, None
        first.read()
        if first.text is not None:
            mine = FailureReport.of(first.error or SolverFailure(first.text), first.text)
        comm = self.operator.petsc_comm
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
        raise_report(comm, report, f"{self.name}: {report.text}", first.error if comm.rank == rank else None)

    def _print(self, text: str) -> None:
        if self.operator.petsc_comm.rank == 0:
            logger.info(text)

    def view(self, state_nbytes: int | None = None) -> str:
        """Describe the hierarchy in a few lines; PETSc's ``ksp_view`` prints it as that of the preconditioner."""
        o = self.options
        tolerance = f"rtol {o.rtol:g} of the right-hand side, at most {o.max_it} iterations"
        return self.operator.solver.view(state_nbytes, kind="Krylov-accelerated MGRIT", tolerance=tolerance)

    def destroy(self) -> None:
        """Free PETSc's objects (collective)."""
        for handle in filter(None, (self.ksp, self._matrix)):
            handle.destroy()
        self.ksp = self._matrix = None

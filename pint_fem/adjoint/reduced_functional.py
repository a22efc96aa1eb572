"""The reduced functional as pyadjoint knows it, and its trust-region minimisation."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from firedrake import Cofunction, EnsembleCofunction, EnsembleFunction, EnsembleFunctionSpace, Function
from firedrake.ensemble.ensemble_functionspace import EnsembleFunctionSpaceBase
from firedrake.petsc import PETSc
from mpi4py import MPI
from pyadjoint import AdjFloat, Control, ReducedFunctional
from pyadjoint.enlisting import Enlist
from pyadjoint.reduced_functional import AbstractReducedFunctional
from pyadjoint.tape import stop_annotating

from pint_fem.adjoint.memory import Memory
from pint_fem.adjoint.minimisation import one_shot, scipy_method, trust_region
from pint_fem.adjoint.problem import ReducedProblem
from pint_fem.adjoint.riesz import ControlInner
from pint_fem.adjoint.sweeps import Sweeps
from pint_fem.adjoint.time_solver import mgrit_options, read_time_solver
from pint_fem.errors import InputError
from pint_fem.optimize import OneShotResult, TrustRegionResult
from pint_fem.petsc_types import require_types
from pint_fem.propagators import Evolution, make_propagator
from pint_fem.propagators.arrays import get, put
from pint_fem.spacetime import SpaceTime

__all__ = ["TimeParallelReducedFunctional", "mgrit_options"]


class TimeParallelReducedFunctional(AbstractReducedFunctional):
    r"""``J(z)`` of an evolution's control, its derivative and Hessian action, parallel in time.

    Converged, it is the functional that a serial pyadjoint tape of the same steps differentiates; use it with
    ``taylor_test``, ``minimize`` and ``TAOSolver``, or :meth:`minimize_trust_region`.

    Parameters
    ----------
    evolution
        The problem, with a ``control`` or several.
    misfits
        One or several of :mod:`pint_fem.adjoint.misfits`.
    regularisation
        UFL functional of the controls, or several; of controls with a value a step it is summed with weight ``dt``.
    spacetime
        Process grid; the evolution's mesh lives on its ``space_comm``. Default: all ranks of the mesh's communicator
        in space.
    solver_parameters
        ``{"mgrit": {...}, "paradiag": {...}, "time_solver": "mgrit" | "paradiag" | "serial" | "auto",
        "spatial_coarsening": [0, 1]}``; options of the time solvers also from the command line (``-mgrit_rtol 1e-8``,
        ``-paradiag_alpha 1e-4``). ``"auto"`` asks theory and prints what it chose and why. ``spatial_coarsening``
        steps on coarser meshes of the evolution's ``MeshHierarchy`` on coarse levels: for each how many meshes coarser
        than the finest it is, the last number going on, or ``True`` for one more on each
        (:class:`~pint_fem.propagators.spatial.SpatialLevels`). It changes the iterates, not what they converge to.
        ``"norm"``: residuals in ``"l2"`` of coefficients or ``"L2"``.
        ``"krylov": {"ksp_type": "fgmres"}`` accelerates linear sweeps (also ``-mgrit_ksp_type``...).
    riesz_map
        Of the trust region and of ``apply_riesz``: a kind of :class:`~pint_fem.adjoint.riesz.RieszMap` (``"L2"``,
        ``"H1"``, ``"l2"``, ``"lumped"``, a bilinear form or a ``firedrake.RieszMap``), or a list with one a control.
    coarse_tableau
        Integrator of the coarse levels; default: the evolution's.
    propagator
        Class or factory of the propagators; default: the fastest exact one.
    coarse_evolutions
        Instead of ``spatial_coarsening``: an evolution for each coarse level, on meshes of the same hierarchy.

    Raises
    ------
    InputError
        On every rank, when something does not fit.
    """

    def __init__(
        self,
        evolution: Evolution,
        misfits,
        *,
        regularisation=None,
        spacetime: SpaceTime | None = None,
        solver_parameters: Mapping | None = None,
        riesz_map="L2",
        coarse_tableau=None,
        propagator: Callable = make_propagator,
        coarse_evolutions=None,
        printer: Callable[[str], None] = print,
    ):
        space_comm = evolution.V.mesh().comm
        if spacetime is None:
            spacetime = SpaceTime((space_comm.size, 1), comm=space_comm)
        if MPI.Comm.Compare(spacetime.space_comm, space_comm) not in (MPI.IDENT, MPI.CONGRUENT):
            raise InputError(
                f"the mesh lives on {space_comm.size} ranks, the grid has {spacetime.space_size} space ranks: "
                "build the mesh with comm=spacetime.space_comm"
            )
        parameters, own = dict(solver_parameters or {}), evolution.private()
        solver = read_time_solver(parameters, own, spacetime, coarse_tableau)
        if solver.why and spacetime.is_root:
            printer(solver.why)
        spatial_coarsening = parameters.pop("spatial_coarsening", None)
        norm, krylov = parameters.pop("norm", "l2"), parameters.pop("krylov", None)
        if krylov is None and any(name.startswith("ksp_") for name in PETSc.Options("mgrit_").getAll()):
            krylov = {}
        if krylov is not None and not isinstance(krylov, Mapping):
            raise InputError(f"krylov {krylov!r}: give PETSc options, such as {{'ksp_type': 'fgmres'}}")
        require_types(krylov or {}, "mgrit_", "krylov")
        if krylov is not None and solver.kind == "paradiag":
            raise InputError("krylov accelerates MGRIT's sweeps, not time_solver 'paradiag': leave one of them out")
        if parameters:
            raise InputError(
                f"unknown solver parameters {sorted(parameters)}: known are 'mgrit', 'paradiag', "
                "'time_solver', 'spatial_coarsening', 'krylov' and 'norm'"
            )
        #: As the user gave it.
        self.evolution, self.spacetime = evolution.posed, spacetime
        try:
            sweeps = Sweeps(
                own,
                spacetime,
                options=solver.mgrit,
                paradiag=(solver.paradiag, solver.systems),
                time_solver=solver.kind,
                coarse_tableau=coarse_tableau,
                propagator=propagator,
                spatial_coarsening=spatial_coarsening,
                coarse_evolutions=coarse_evolutions,
                krylov=krylov,
                norm=norm,
                printer=printer,
            )
        except ValueError as error:
            raise InputError(str(error)) from error
        self.problem = ReducedProblem(sweeps, misfits, regularisation)
        forms = regularisation if isinstance(regularisation, (list, tuple)) else [regularisation]
        #: The functionals of the regularisation.
        self.regularisation = [form for form in forms if form is not None]
        self.layout = self.problem.layout
        self.inner = ControlInner(self.layout, riesz_map)
        with stop_annotating():
            self._spaces = [self._space(control) for control in evolution.controls]
            values = [self._new(space) for space in self._spaces]
            for value, control in zip(values, evolution.controls, strict=True):
                for part in _parts(value):
                    part.assign(control)
                if isinstance(value, Function):
                    value.rename(control.name())
        self._controls = Enlist([Control(value) for value in values])
        if len(values) == 1:
            self._controls = Enlist(self._controls[0])
        self._z: np.ndarray | None = None

    def _space(self, control: Function):
        """Where pyadjoint's values of a control live."""
        space = control.function_space()
        if control not in self.evolution.stepwise:
            return space
        try:
            return EnsembleFunctionSpace([space] * self.layout.slab.k, self.spacetime.ensemble)
        except ValueError as error:
            raise InputError(f"{error}: build the mesh with comm=spacetime.space_comm") from error

    def _new(self, space, *, dual: bool = False):
        if isinstance(space, EnsembleFunctionSpaceBase):
            return EnsembleCofunction(space.dual()) if dual else EnsembleFunction(space)
        return Cofunction(space.dual()) if dual else Function(space)

    # -- between pyadjoint's values and arrays ------------------------------------------------------------------------
    def array(self, values) -> np.ndarray:
        """Flat own values of the controls, or of a direction, ``(layout.size,)``.

        Raises
        ------
        InputError
            If they are not in the controls' spaces.
        """
        values = Enlist(values)
        if len(values) != len(self._spaces):
            raise InputError(f"{len(values)} controls given, the functional has {len(self._spaces)}")
        arrays = []
        for f, space in zip(values, self._spaces, strict=True):
            stepwise = isinstance(space, EnsembleFunctionSpaceBase)
            kind = EnsembleFunction if stepwise else Function
            if not isinstance(f, kind) or f.function_space() != space:
                if stepwise:
                    what = "an EnsembleFunction with one function a step (see rf.controls[i].control)"
                    raise InputError(f"control: given is a {type(f).__name__}; give {what}")
                what = f"a function of {f.function_space()}" if isinstance(f, Function) else f"a {type(f).__name__}"
                raise InputError(f"control: given is {what}, the control lives in {space}")
            arrays.append(np.array([get(part) for part in f.subfunctions]) if stepwise else get(f))
        return self.layout.join(arrays)

    def function(self, array: np.ndarray, *, dual: bool = False):
        """Controls (or with ``dual`` derivatives) from flat own values: a function, or a list of several."""
        with stop_annotating():
            made = [self._new(space, dual=dual) for space in self._spaces]
            self._fill(made, array)
        return self._controls.delist(made)

    def _fill(self, functions, array: np.ndarray) -> None:
        """Put own values into controls or derivatives."""
        for f, values in zip(functions, self.layout.parts(np.ravel(array)), strict=True):
            for part, row in zip(_parts(f), np.atleast_2d(values), strict=True):
                put(part, row)

    # -- pyadjoint's interface ----------------------------------------------------------------------------------------
    @property
    def controls(self):
        """The control, as pyadjoint wraps it."""
        return self._controls

    def _current(self) -> np.ndarray:
        return self.array([c.control for c in self.controls]) if self._z is None else self._z

    def __call__(self, values) -> AdjFloat:
        """``J`` at values of the controls."""
        self._z = self.array(values)
        with stop_annotating():
            for control, value in zip(self.controls, Enlist(values), strict=True):
                control.update(value)
            return AdjFloat(self.problem.value(self._z))

    def derivative(self, adj_input=1.0, apply_riesz=False):
        """``J'`` at the last control value, a dual function; with ``apply_riesz`` its representative."""
        with stop_annotating():
            g = float(adj_input) * self.problem.derivative(self._current())
            return self.function(self.inner.primal(g)) if apply_riesz else self.function(g, dual=True)

    def hessian(self, m_dot, hessian_input=None, evaluate_tlm=True, apply_riesz=False):
        """``J''`` at the last control value in a direction; no ``hessian_input``, as ``J`` is a number."""
        if hessian_input not in (None, 0, 0.0):
            raise InputError("hessian_input is not supported: the functional is the end of the computation")
        with stop_annotating():
            h = self.problem.hessian_action(self._current(), self.array(m_dot))
            return self.function(self.inner.primal(h)) if apply_riesz else self.function(h, dual=True)

    def tlm(self, m_dot):
        """``J' m_dot`` by a tangent sweep."""
        with stop_annotating():
            return AdjFloat(self.problem.tangent_value(self._current(), self.array(m_dot)))

    def update_data(self) -> list[str]:
        """Read the user's data again: coefficients, boundary values and the initial condition of the evolution, data of
        misfits (readings of sensors, too) and of the regularisation (collective).

        All of these are copied when the functional is made, so that a later change of their values is not seen (it is
        warned of) until this call. Forms, operators and factors stay as far as nothing in them has changed: new
        readings, loads, boundary values or initial conditions cost no factorisation. The next solves start from the
        trajectories of the old data.

        Returns
        -------
        list of str
            What has other values than before.

        Raises
        ------
        InputError
            On every rank, if new values do not fit.
        """
        return self.problem.update_data()

    def memory(self) -> Memory:
        """Memory of this rank by part and at the peak of an evaluation, in bytes; known before a run.

        Collective; see :mod:`pint_fem.adjoint.memory` for the formula. ``print(rf.memory())`` shows it, as
        ``-mgrit_view`` does before the first solve.
        """
        with stop_annotating():
            return self.problem.memory()

    # -- optimisation -------------------------------------------------------------------------------------------------
    def minimize_trust_region(
        self,
        start=None,
        *,
        monitor: Callable[[str], None] | None = None,
        inexact=None,
        bounds=None,
        constraints=None,
        preconditioner=None,
        checkpoint=None,
        if_save_fails: str = "stop",
        **options,
    ) -> TrustRegionResult:
        """Minimise by :func:`pint_fem.optimize.minimize_trust_region` in the controls' inner product.

        Parameters
        ----------
        start
            First controls; default: their values at construction.
        monitor
            Gets a line an iteration, on the first rank only.
        inexact
            ``True``, :class:`~pint_fem.optimize.InexactOptions` or a dictionary of them: sweeps are solved as
            accurately as convergence needs and no more, at best to their ``rtol``.
        bounds
            ``(lower, upper)``, numbers or controls: by :func:`pint_fem.optimize.bounded.minimize_bounded`. The inner
            product has to be diagonal; where it is not, ``"lumped"`` is used.
        constraints
            Pairs of a UFL functional that is linear in the controls and its value, such as ``(q*dx, 1.0)``.
        preconditioner
            Of conjugate gradients: ``"regularisation"`` (the inverse of its second derivative), a bilinear form or a
            list with one a control, ``"limited-memory"``, or a callable on flat representatives.
        checkpoint
            A file (HDF5) that keeps the run after each iteration; if it is there, the run goes on from it. See
            :mod:`pint_fem.adjoint.checkpoint`.
        if_save_fails
            What happens where that file cannot be written, as on a full disk: ``"stop"`` raises ``InputError`` on every
            rank, ``"continue"`` prints a line and goes on. The last complete file stays in either case.
        **options
            Of the minimiser. For a quadratic ``J`` the first radius is unlimited by default.

        Returns
        -------
        TrustRegionResult
            The controls take the values found; ``x`` holds the own values of the minimiser; :meth:`function` makes
            functions of them.

        Raises
        ------
        InputError, ValueError
            On options that do not fit, before anything is solved.
        """
        result = trust_region(
            self, self._start(start), monitor=self._monitor(monitor), inexact=inexact, bounds=bounds,
            constraints=constraints, preconditioner=preconditioner, checkpoint=checkpoint,
            if_save_fails=if_save_fails, **options,
        )  # fmt: skip
        self._take(result.x)
        return result

    def minimize_one_shot(
        self, start=None, *, monitor=None, constraints=None, preconditioner=None, checkpoint=None,
        if_save_fails: str = "stop", **options,
    ) -> OneShotResult:  # fmt: skip
        """Minimise while solving: one MGRIT cycle for state and adjoint between two updates of the controls.

        See :func:`pint_fem.optimize.one_shot.minimize_one_shot` for options and result, and
        :meth:`minimize_trust_region` for the arguments. ``memory``: 40 pairs by default, 10 where a control has a value
        a step; as many as there are directions that the data determine make the run short.
        """
        result = one_shot(
            self, self._start(start), monitor=self._monitor(monitor), constraints=constraints,
            preconditioner=preconditioner, checkpoint=checkpoint, if_save_fails=if_save_fails, **options,
        )  # fmt: skip
        self._take(result.x)
        return result

    def minimize_scipy(self, start=None, method: str = "trust-krylov", *, bounds=None, **options):
        """Minimise by scipy, whose vectors are whole on each rank: for controls of moderate size.

        See :func:`pint_fem.optimize.scipy_adapter.scipy_minimize` for methods, options and result. The variables are
        scaled by the root of the lumped mass matrix, and derivatives are exact in these coordinates (pyadjoint's
        ``minimize`` hands scipy Riesz representatives).
        """
        result = scipy_method(self, self._start(start), method, bounds=bounds, **options)
        self._take(result.x)
        return result

    def _start(self, start) -> np.ndarray:
        return self._current() if start is None else self.array(start)

    def _monitor(self, monitor):
        """On the first rank only."""
        return monitor if self.spacetime.is_root else None

    def _take(self, z: np.ndarray) -> None:
        """Make an array the controls' value."""
        self._z = z
        with stop_annotating():
            for control, value in zip(self.controls, Enlist(self.function(z)), strict=True):
                control.update(value)
            self._fill([control.control for control in self.controls], z)


def _parts(f) -> list:
    """Functions of the own steps, or the one."""
    return list(f.subfunctions) if isinstance(f, (EnsembleFunction, EnsembleCofunction)) else [f]


# pyadjoint's ``minimize`` puts its own functionals, and what counts as one, behind numpy arrays
ReducedFunctional.register(TimeParallelReducedFunctional)

"""The reduced functional as pyadjoint knows it, and its trust-region minimisation."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from firedrake import Cofunction, EnsembleCofunction, EnsembleFunction, EnsembleFunctionSpace, Function
from firedrake.petsc import PETSc
from mpi4py import MPI
from pyadjoint import AdjFloat, Control
from pyadjoint.enlisting import Enlist
from pyadjoint.reduced_functional import AbstractReducedFunctional
from pyadjoint.tape import stop_annotating

from pint_fem.adjoint.problem import ReducedProblem
from pint_fem.adjoint.riesz import RieszMap
from pint_fem.adjoint.sweeps import Sweeps
from pint_fem.errors import InputError
from pint_fem.mgrit import MGRITOptions, SolverFailure
from pint_fem.mgrit.option_strings import parse_options
from pint_fem.optimize import TrustRegionResult, minimize_trust_region
from pint_fem.propagators import Evolution, make_propagator
from pint_fem.propagators.arrays import get, put
from pint_fem.spacetime import SpaceTime

__all__ = ["TimeParallelReducedFunctional", "mgrit_options"]


def mgrit_options(parameters: Mapping | MGRITOptions | None, prefix: str = "mgrit_") -> MGRITOptions:
    """MGRIT options from a dictionary, with those of PETSc's options database (``-mgrit_levels 3 -mgrit_coarsening
    8,4``) on top.

    Raises
    ------
    InputError
        On an unknown option or a bad value.
    """
    database = {
        name: value for name, value in PETSc.Options(prefix).getAll().items() if not name.startswith(("ksp_", "pc_"))
    }
    try:
        return MGRITOptions.make(parameters, **parse_options(database))
    except ValueError as error:
        raise InputError(str(error)) from None


class TimeParallelReducedFunctional(AbstractReducedFunctional):
    r"""``J(z)`` of an evolution's control, its derivative and Hessian action, parallel in time.

    Converged, it is the functional that a serial pyadjoint tape of the same steps differentiates; use it with
    ``taylor_test``, ``minimize`` and ``TAOSolver``, or :meth:`minimize_trust_region`.

    Parameters
    ----------
    evolution
        The problem, with a ``control``.
    misfits
        One or several of :mod:`pint_fem.adjoint.misfits`.
    regularisation
        UFL functional of the control; for one control a step it is summed with weight ``dt``.
    spacetime
        Process grid; the evolution's mesh lives on its ``space_comm``. Default: all ranks of the mesh's communicator
        in space.
    solver_parameters
        ``{"mgrit": {...}, "time_solver": "mgrit" | "serial", "spatial_coarsening": [0, 1]}``; MGRIT options also from
        the command line (``-mgrit_rtol 1e-8``). ``spatial_coarsening`` steps on coarser meshes of the evolution's
        ``MeshHierarchy`` on coarse levels: for each how many meshes coarser than the finest it is, the last number
        going on, or ``True`` for one more on each (:class:`~pint_fem.propagators.spatial.SpatialLevels`). It changes
        the iterates, not what they converge to. ``"norm"``: residuals in ``"l2"`` of coefficients or ``"L2"``.
        ``"krylov": {"ksp_type": "fgmres"}`` accelerates linear sweeps (also ``-mgrit_ksp_type``...).
    riesz_map
        ``"L2"``, ``"H1"``, ``"l2"`` or a bilinear form on the control's space, of the trust region and of
        ``apply_riesz``.
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
        parameters = dict(solver_parameters or {})
        options = mgrit_options(parameters.pop("mgrit", None))
        solver = parameters.pop("time_solver", "mgrit")
        if solver not in ("mgrit", "serial"):
            raise InputError(f"time_solver {solver!r}: give 'mgrit' or 'serial'")
        spatial_coarsening = parameters.pop("spatial_coarsening", None)
        norm, krylov = parameters.pop("norm", "l2"), parameters.pop("krylov", None)
        if krylov is None and any(name.startswith("ksp_") for name in PETSc.Options("mgrit_").getAll()):
            krylov = {}
        if krylov is not None and not isinstance(krylov, Mapping):
            raise InputError(f"krylov {krylov!r}: give PETSc options, such as {{'ksp_type': 'fgmres'}}")
        if parameters:
            raise InputError(
                f"unknown solver parameters {sorted(parameters)}: known are 'mgrit', 'time_solver', "
                "'spatial_coarsening', 'krylov' and 'norm'"
            )
        if solver == "serial":
            options = MGRITOptions.make(options, levels=1)
        self.evolution, self.spacetime = evolution, spacetime
        try:
            sweeps = Sweeps(
                evolution,
                spacetime,
                options=options,
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
        space, per_step = evolution.control.function_space(), evolution.per_step
        self.riesz = RieszMap(space, riesz_map, spacetime, step_weight=evolution.dt if per_step else None)
        with stop_annotating():
            if per_step:
                try:
                    self._space = EnsembleFunctionSpace([space] * sweeps.slab.k, spacetime.ensemble)
                except ValueError as error:
                    raise InputError(f"{error}: build the mesh with comm=spacetime.space_comm") from error
                value = EnsembleFunction(self._space)
                for f in value.subfunctions:
                    f.assign(evolution.control)
            else:
                self._space = space
                value = Function(space, name=evolution.control.name()).assign(evolution.control)
        self._controls = Enlist(Control(value))
        self._z: np.ndarray | None = None

    # -- between pyadjoint's values and arrays ------------------------------------------------------------------------
    def array(self, value) -> np.ndarray:
        """Own values of a control or a derivative: ``(nz,)`` or ``(k, nz)``.

        Raises
        ------
        InputError
            If it is not in the control's space.
        """
        value = Enlist(value)
        if len(value) != 1:
            raise InputError(f"{len(value)} controls given, the functional has one")
        f = value[0]
        if self.evolution.per_step:
            if not isinstance(f, EnsembleFunction) or f.function_space() != self._space:
                raise InputError(
                    "control: give an EnsembleFunction with one function a step (see rf.controls[0].control)"
                )
            return np.array([get(part) for part in f.subfunctions])
        if not isinstance(f, Function) or f.function_space() != self._space:
            what = f"a function of {f.function_space()}" if isinstance(f, Function) else f"a {type(f).__name__}"
            raise InputError(f"control: given is {what}, the control lives in {self._space}")
        return get(f)

    def function(self, array: np.ndarray, *, dual: bool = False):
        """A control (or with ``dual`` a derivative) from own values."""
        with stop_annotating():
            space = self._space.dual() if dual else self._space
            if self.evolution.per_step:
                f = (EnsembleCofunction if dual else EnsembleFunction)(space)
            else:
                f = (Cofunction if dual else Function)(space)
            self._fill(f, array)
            return f

    def _fill(self, f, array: np.ndarray) -> None:
        """Put own values into a control or a derivative."""
        parts, rows = (f.subfunctions, array) if self.evolution.per_step else ([f], [array])
        for part, row in zip(parts, rows, strict=True):
            put(part, row)

    # -- pyadjoint's interface ----------------------------------------------------------------------------------------
    @property
    def controls(self):
        """The control, as pyadjoint wraps it."""
        return self._controls

    def _current(self) -> np.ndarray:
        return self.array(self.controls[0].control) if self._z is None else self._z

    def __call__(self, values) -> AdjFloat:
        """``J`` at a control value."""
        self._z = self.array(values)
        with stop_annotating():
            self.controls[0].update(Enlist(values)[0])
            return AdjFloat(self.problem.value(self._z))

    def derivative(self, adj_input=1.0, apply_riesz=False):
        """``J'`` at the last control value, a dual function; with ``apply_riesz`` its representative."""
        with stop_annotating():
            g = float(adj_input) * self.problem.derivative(self._current())
            return self.function(self.riesz.primal(g)) if apply_riesz else self.function(g, dual=True)

    def hessian(self, m_dot, hessian_input=None, evaluate_tlm=True, apply_riesz=False):
        """``J''`` at the last control value in a direction; no ``hessian_input``, as ``J`` is a number."""
        if hessian_input not in (None, 0, 0.0):
            raise InputError("hessian_input is not supported: the functional is the end of the computation")
        with stop_annotating():
            h = self.problem.hessian_action(self._current(), self.array(m_dot))
            return self.function(self.riesz.primal(h)) if apply_riesz else self.function(h, dual=True)

    def tlm(self, m_dot):
        """``J' m_dot`` by a tangent sweep."""
        with stop_annotating():
            return AdjFloat(self.problem.tangent_value(self._current(), self.array(m_dot)))

    # -- optimisation -------------------------------------------------------------------------------------------------
    def minimize_trust_region(
        self, start=None, *, monitor: Callable[[str], None] | None = None, **options
    ) -> TrustRegionResult:
        """Minimise by :func:`pint_fem.optimize.minimize_trust_region` in the control's inner product.

        Parameters
        ----------
        start
            First control; default: the control's value at construction.
        monitor
            Gets a line an iteration, on the first rank only.
        **options
            Of :func:`~pint_fem.optimize.minimize_trust_region`. For a quadratic ``J`` the first radius is unlimited by
            default.

        Returns
        -------
        TrustRegionResult
            The control takes the value found; ``x`` holds the own values of the minimiser; :meth:`function` makes a
            function of them.
        """
        z = self._current() if start is None else self.array(start)
        if monitor is not None and not self.spacetime.is_root:
            monitor = None
        shape = z.shape
        if self.problem.is_quadratic:
            options.setdefault(
                "initial_radius", min(1e99, options.get("max_radius", np.inf))
            )  # the model is J itself: a bound would only cut steps short
        options.setdefault("value_rtol", 10 * self.problem.sweeps.options.rtol)
        with stop_annotating():
            arrays = _Arrays(self.problem, self.riesz, shape)
            result = minimize_trust_region(arrays, z.ravel(), monitor=monitor, **options)
            self._z = result.x.reshape(shape)
            self.controls[0].update(self.function(self._z))
            self._fill(self.controls[0].control, self._z)
        return result


class _Arrays:
    """The reduced problem in its Riesz inner product, on flat arrays: what the trust region asks for."""

    def __init__(self, problem: ReducedProblem, riesz: RieszMap, shape: tuple[int, ...]):
        self.problem, self.riesz, self.shape = problem, riesz, shape

    def value(self, x):
        try:
            return self.problem.value(x.reshape(self.shape))
        except SolverFailure:  # on every rank alike; the trial step is shortened
            return np.inf

    def gradient(self, x):
        return self.riesz.primal(self.problem.derivative(x.reshape(self.shape))).ravel()

    def hessian_action(self, x, v):
        return self.riesz.primal(self.problem.hessian_action(x.reshape(self.shape), v.reshape(self.shape))).ravel()

    def inner(self, a, b):
        return self.riesz.inner(a.reshape(self.shape), b.reshape(self.shape))

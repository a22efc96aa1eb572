"""The functional ``J(z)`` of an evolution, or of several that share controls: arguments, defaults and checks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import ufl
from firedrake import Function
from irksome.tableaux.ButcherTableaux import ButcherTableau
from mpi4py import MPI
from ufl.algorithms import extract_coefficients

from pint_fem.adjoint.composed import problem_with_initial_expression
from pint_fem.adjoint.experiments.distributed import DistributedExperiments
from pint_fem.adjoint.experiments.given import Experiments
from pint_fem.adjoint.functional import ControlFunctional
from pint_fem.adjoint.interface import SweptProblem
from pint_fem.adjoint.problem import ReducedProblem
from pint_fem.adjoint.riesz import ControlInner, RieszKind
from pint_fem.adjoint.states import FinalState
from pint_fem.adjoint.sums import sum_of_problems
from pint_fem.collective import collectively, require_same
from pint_fem.errors import InputError, InputTypeError
from pint_fem.evolution.affine_parts import obstacle
from pint_fem.evolution.evolution import Evolution
from pint_fem.misfits.base import Misfit
from pint_fem.petsc_options.spelling import require_prefix
from pint_fem.propagators import make_propagator
from pint_fem.spacetime import SpaceTime
from pint_fem.sweeps.automatic import share_measured_seconds
from pint_fem.sweeps.selection import READ, TimeSolverChoice, krylov_options, mgrit_options, read_time_solver
from pint_fem.sweeps.shared.operators import have_same_operators, sharing
from pint_fem.sweeps.sweeps import Sweeps

__all__ = ["TimeParallelReducedFunctional", "mgrit_options"]


class TimeParallelReducedFunctional(ControlFunctional):
    """``J(z)`` of an evolution's controls, its derivative and Hessian action, parallel in time.

    Converged, it is the functional that a serial pyadjoint tape of the same steps differentiates; it works with
    ``taylor_test``, ``minimize`` and ``TAOSolver``, and has :meth:`minimize_trust_region`. Functionals can be added and
    multiplied by numbers (:class:`~pint_fem.adjoint.functional.ControlFunctional`). Forms and their derivatives are
    integrated with the quadrature degrees that ``assemble`` uses for the forms as they are given; pyadjoint estimates
    the degree of each derivative anew, so give ``dx(degree=...)`` to compare with it where no rule is exact
    (:mod:`~pint_fem.evolution.quadrature`).

    Parameters
    ----------
    evolution
        The problem, with one or several controls. A list stands for several experiments: ``J`` is their sum, and
        controls that are the same Function are shared. On a grid with several groups of experiments, such as
        ``SpaceTime("1x2x4")``, each group of ranks solves a part of the list
        (:mod:`~pint_fem.adjoint.experiments.distributed`); the program is the same on all ranks, and gives the whole
        list. Evolutions of one kind with other data are :class:`~pint_fem.adjoint.experiments.given.Experiments`.
        Experiments with the same operators share a factorisation, and their sweeps are solved at once.
    misfits
        One or several of :mod:`pint_fem.misfits.functionals`; for a list of evolutions a list with as many entries; for
        experiments with one evolution a list of pairs ``(data, misfits)``. Left out with ``Experiments``.
    regularisation
        UFL functional of the controls, or several; for controls with one value per step it is summed with weight
        ``dt``. With several evolutions it counts once, and the controls in each functional are of one evolution.
    spacetime
        Process grid; the evolution's mesh lives on its ``space_comm``. Default: all ranks of the mesh's communicator
        in space. Groups of experiments require a list of at least as many evolutions.
    solver_parameters
        ``{"mgrit": {...}, "paradiag": {...}, "time_solver": "mgrit" | "paradiag" | "serial" | "auto", "typical_rtol":
        1e-2, "spatial_coarsening": [0, 1]}``; options of the time solvers also from the command line (``-mgrit_rtol
        1e-8``, ``-paradiag_alpha 1e-4``). ``"auto"`` chooses the fastest one by measured times of a step and predicted
        residuals, and with it the levels, coarsening, relaxation and coarse steps of MGRIT where none of these are
        given (:mod:`~pint_fem.sweeps.automatic`); where times are not measured, the time solver by a-priori convergence
        estimates. It prints the choice and the reason. ``typical_rtol`` is the relative tolerance of most solves, 1e-2
        with an inexact minimiser; default: between ``rtol`` and its square root. ``spatial_coarsening`` uses coarser
        meshes of the evolution's ``MeshHierarchy`` on coarse levels: for each level the number of refinements less than
        on the finest (the last number holds for all further levels), or ``True`` for one less on each
        (:class:`~pint_fem.propagators.spatial.SpatialLevels`). It changes the iterates, not their limit. ``"norm"``:
        residuals in ``"l2"`` of coefficients or ``"L2"``.
        ``"krylov": {"ksp_type": "fgmres"}`` accelerates linear sweeps (also ``-mgrit_ksp_type``...).
    riesz_map
        The inner product of the trust region and of ``apply_riesz``: a kind of
        :class:`~pint_fem.adjoint.riesz.RieszMap` (``"L2"``, ``"H1"``, ``"l2"``, ``"lumped"``, a bilinear form or a
        ``firedrake.RieszMap``), or a list with one for each control.
    coarse_tableau
        Integrator of the coarse levels; default: the evolution's.
    propagator
        Class or factory of the propagators; default: the fastest exact one.
    final_state
        A Function in the state's space that holds the final state after each evaluation ``J(z)``, on all ranks in time,
        such as the evolution's ``u`` (which then needs ``initial=`` a function of its own); a list for several
        evolutions, whose functions are set on all ranks. Default: no function of the user changes. :meth:`state`
        returns states at all times.
    coarse_evolutions
        Instead of ``spatial_coarsening``: an evolution for each coarse level, on meshes of the same hierarchy.
    options_prefix
        Prefix of this functional's options in PETSc's database, such as ``"heat_"`` for ``-heat_mgrit_rtol``,
        ``-heat_paradiag_alpha`` and ``-heat_pint_ksp_view``, so that functionals in one program have options of their
        own. Without it they read ``-mgrit_rtol`` and so on.

    Raises
    ------
    InputError
        On every rank, if an argument does not fit; InputTypeError where one is no Evolution or SpaceTime.
    """

    def __init__(
        self,
        evolution: Evolution | Sequence[Evolution] | Experiments,
        misfits: Misfit | Sequence[Misfit] | Sequence[Misfit | Sequence[Misfit]] | Sequence[tuple] | None = None,
        *,
        regularisation: ufl.Form | Sequence[ufl.Form] | None = None,
        spacetime: SpaceTime | None = None,
        solver_parameters: Mapping | None = None,
        riesz_map: RieszKind | Sequence[RieszKind] = "L2",
        coarse_tableau: ButcherTableau | None = None,
        propagator: Callable = make_propagator,
        coarse_evolutions: Sequence[Evolution] | None = None,
        final_state: Function | Sequence[Function] | None = None,
        options_prefix: str = "",
    ):
        forms: list = list(regularisation) if isinstance(regularisation, (list, tuple)) else [regularisation]
        forms = [form for form in forms if form is not None]
        given_misfits: Any = misfits
        if isinstance(misfits, (list, tuple)) and misfits and isinstance(misfits[0], tuple):
            shots = Experiments(cast(Evolution, evolution), misfits)
            evolution, given_misfits = shots.evolutions, shots.misfits
        elif isinstance(evolution, Experiments):
            if misfits is not None:
                raise InputError("misfits beside Experiments, which have their own: leave them out")
            given_misfits, evolution = evolution.misfits, evolution.evolutions
        several = isinstance(evolution, (list, tuple))
        evolutions: list = list(evolution) if isinstance(evolution, (list, tuple)) else [evolution]
        own_misfits: list = [given_misfits]
        if several:
            own_misfits = _misfits_of_each(evolutions, given_misfits, forms, coarse_evolutions)
        if not all(isinstance(ev, Evolution) for ev in evolutions):
            raise InputTypeError(f"evolution = {evolution!r}: give an Evolution or a list of them")
        if not isinstance(spacetime, SpaceTime | None):
            raise InputTypeError(f"spacetime = {spacetime!r}: give a process grid, such as SpaceTime(space=1)")
        if spacetime is None:
            space_comm = evolutions[0].V.mesh().comm
            spacetime = SpaceTime((space_comm.size, 1), comm=space_comm)
        steps = dict(coarse_tableau=coarse_tableau, propagator=propagator, coarse_evolutions=coarse_evolutions)
        given = spacetime.group, solver_parameters, options_prefix, steps
        problem: SweptProblem
        if several:
            made: list[tuple[Sweeps, TimeSolverChoice]] = []
            make = lambda e: _problem(evolutions[e], own_misfits[e], [], *given, made)
            if spacetime.experiments_size > 1 and (solver_parameters or {}).get("time_solver") == "auto":
                share_measured_seconds(evolutions[0].private(), spacetime)
            problem = _problem_of_experiments(evolutions, own_misfits, forms, spacetime, make)
        elif spacetime.experiments_size > 1:
            space, _, groups = spacetime.shape
            raise InputError(
                f"one evolution on the grid {'x'.join(map(str, spacetime.shape))} (space x time x experiments), which "
                f"has {groups} groups of ranks for experiments: give a list of evolutions and of their misfits, or a "
                f"grid of two numbers, such as {space}x{spacetime.comm.size // space}"
            )
        else:
            problem = _problem(evolutions[0], own_misfits[0], forms, *given)
        final: list = [] if final_state is None else list(final_state) if several else [final_state]
        if final and len(final) != len(evolutions):
            raise InputError(f"final_state: {len(final)} functions for {len(evolutions)} evolutions; give one for each")
        final = [FinalState(problem, ev, f) for ev, f in zip(evolutions, final, strict=False)]
        super().__init__(problem, ControlInner(problem.layout, riesz_map), forms, final)


def _problem_of_experiments(
    evolutions: list, misfits: list, forms: list, spacetime: SpaceTime, make: Callable[[int], SweptProblem]
) -> SweptProblem:
    """The problem of several experiments, of which ``make(number)`` returns that of one of the own group."""
    own = spacetime.own_experiments(len(evolutions))
    require_same(spacetime.comm, experiments=len(evolutions), steps=[(ev.dt, ev.nsteps) for ev in evolutions])
    problems = collectively(spacetime.comm, "", lambda: [make(number) for number in own])
    together = collectively(spacetime.comm, "", sum_of_problems, [(1.0, problem) for problem in problems])
    lists = [[of] if isinstance(of, Misfit) else list(of) for of in misfits]
    return DistributedExperiments(together, evolutions, lists, forms, spacetime)


def _misfits_of_each(
    evolutions: list, misfits: object, forms: list, coarse_evolutions: Sequence[Evolution] | None
) -> list:
    """The misfits of each evolution, after a check of the arguments for several."""
    if not evolutions or not all(isinstance(ev, Evolution) for ev in evolutions):
        raise InputError("evolution: give an Evolution or a list of them")
    if coarse_evolutions is not None:
        raise InputError("coarse_evolutions with several evolutions: make a functional of each and add them, J1 + J2")
    if not isinstance(misfits, (list, tuple)) or len(misfits) != len(evolutions):
        raise InputError(
            f"misfits: give a list with {len(evolutions)} entries, the misfit or misfits of each evolution"
        )
    controls = [set(ev.sought) for ev in evolutions]
    for form in forms:
        found = set(extract_coefficients(form)) & set().union(*controls) if isinstance(form, ufl.Form) else set()
        if not any(found <= of for of in controls):
            raise InputError(
                "regularisation: a functional contains controls that no evolution has all of: give a list of "
                "functionals, each of controls of one evolution"
            )
    return list(misfits)


def _problem(
    evolution: Evolution,
    misfits: Misfit | Sequence[Misfit],
    forms: list,
    spacetime: SpaceTime,
    solver_parameters: Mapping | None,
    options_prefix: str,
    steps: dict,
    made: list[tuple[Sweeps, TimeSolverChoice]] | None = None,
) -> SweptProblem:
    """The problem of one evolution, with arguments as for :class:`TimeParallelReducedFunctional`; ``steps``: those that
    are passed on to the sweeps. ``made`` has the sweeps of other evolutions, whose operators are used where they are
    the same, with the choice of their time solver; those of this evolution are added.
    """
    space_comm = evolution.V.mesh().comm
    if MPI.Comm.Compare(spacetime.space_comm, space_comm) not in (MPI.IDENT, MPI.CONGRUENT):
        raise InputError(
            f"the mesh lives on {space_comm.size} ranks, the grid has {spacetime.space_size} space ranks: "
            "build the mesh with spacetime.mesh(UnitSquareMesh, 16, 16), or comm=spacetime.space_comm"
        )
    parameters, own = dict(solver_parameters or {}), evolution.private()
    own.options_prefix = require_prefix(options_prefix)
    plain = steps["propagator"] is make_propagator and steps["coarse_evolutions"] is None
    plain = plain and all(parameters.get(name) is None for name in ("spatial_coarsening", "krylov"))
    prefix = own.options_prefix
    like, solver = None, None
    if plain:
        alike = ((s, choice) for s, choice in made or () if have_same_operators(s.evolution, own))
        like, solver = next(alike, (None, None))
    if solver is None:
        solver = read_time_solver(parameters, own, spacetime, steps["coarse_tableau"], prefix, own_steps=plain)
        if solver.why:
            spacetime.log(solver.why)
    else:
        for name in READ:
            parameters.pop(name, None)
    if plain:
        steps = steps | {"propagator": solver.propagator if like is None else sharing(like)}
    spatial_coarsening = parameters.pop("spatial_coarsening", None) or solver.meshes or None
    norm, krylov = parameters.pop("norm", "l2"), krylov_options(parameters.pop("krylov", None), own.options_prefix)
    if krylov is not None and solver.kind == "paradiag":
        raise InputError("krylov accelerates MGRIT's sweeps, not time_solver 'paradiag': leave one of them out")
    if parameters:
        raise InputError(
            f"unknown solver parameters {sorted(parameters)}: there are 'mgrit', 'paradiag', "
            "'time_solver', 'typical_rtol', 'spatial_coarsening', 'krylov' and 'norm'"
        )
    try:
        sweeps = Sweeps(
            own, spacetime, options=solver.mgrit, paradiag=(solver.paradiag, solver.systems), time_solver=solver.kind,
            spatial_coarsening=spatial_coarsening, krylov=krylov, norm=norm, **steps,
        )  # fmt: skip
    except ValueError as error:
        raise InputError(str(error)) from error
    if made is not None:
        sweeps.solvers.reported |= like is not None  # the same estimates
        made.append((sweeps, solver))
    if plain and like is None and (why := obstacle(own)):
        stages = evolution.nsteps * own.dirk.stages
        spacetime.log(
            f"form propagator: controls are in the operators, and {why}: each sweep assembles and factors {stages} "
            "matrices, one step after another, where operators that depend on static controls only take one of each "
            "stage for a control"
        )
    if evolution.initial_expression is None:
        return ReducedProblem(sweeps, misfits, forms)
    only = set(evolution.sought) - set(evolution.controls)  # controls of the initial condition alone
    apart = [form for form in forms if isinstance(form, ufl.Form) and only & set(extract_coefficients(form))]
    rest = [form for form in forms if form not in apart]
    return problem_with_initial_expression(ReducedProblem(sweeps, misfits, rest), apart)

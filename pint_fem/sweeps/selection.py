"""The choice of the time solver and its options: from ``solver_parameters``, PETSc's options, or a-priori estimates of
convergence, which are also printed before the first solve.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from firedrake.petsc import PETSc
from irksome.tableaux.ButcherTableaux import ButcherTableau

from pint_fem.all_at_once.options import SHARED, is_number
from pint_fem.collective import require_same
from pint_fem.errors import InputError
from pint_fem.evolution.evolution import Evolution
from pint_fem.mgrit.options import MGRITOptions
from pint_fem.paradiag.options import ParaDiagOptions
from pint_fem.petsc_options.checks import require_types
from pint_fem.petsc_options.spelling import refuse_near_misses
from pint_fem.spacetime import SpaceTime
from pint_fem.sweeps.automatic import MadePropagator, automatic
from pint_fem.theory.estimates import mgrit_estimate, paradiag_contraction
from pint_fem.theory.two_level import ConvergenceEstimate

__all__ = [
    "KINDS",
    "READ",
    "TimeSolverChoice",
    "choose",
    "estimate_lines",
    "has_shape",
    "krylov_options",
    "mgrit_options",
    "read_time_solver",
    "require_supported",
]

KINDS = ("mgrit", "paradiag", "serial", "auto")
READ = ("time_solver", "typical_rtol", "mgrit", "paradiag")
"""Entries of ``solver_parameters`` that :func:`read_time_solver` reads and removes."""
CYCLES = 20
"""MGRIT cycles that cost about as much as two iterations of ParaDiag on many ranks, factorisations included."""
_SHAPE = ("levels", "coarsening", "relax", "c_weight", "coarse_steps", "coarse_solver", "cycle", "start", "storage")
_PETSC = ("ksp_", "pc_", "mat_", "sub_")


@dataclass(frozen=True)
class TimeSolverChoice:
    """A time solver and its options.

    Attributes
    ----------
    kind : str
        ``"mgrit"``, ``"paradiag"`` or ``"serial"``.
    mgrit, paradiag : MGRITOptions, ParaDiagOptions
        Options of both.
    systems : dict
        PETSc options of ParaDiag's shifted systems.
    why : str
        The reason in one line, where the solver was chosen by ``"auto"``.
    propagator : MadePropagator
        Makes the propagators; it has that of the finest level where times of its steps were measured.
    meshes : int
        Number of meshes by which the coarse level is coarser, where ``"auto"`` has chosen MGRIT.
    """

    kind: str
    mgrit: MGRITOptions
    paradiag: ParaDiagOptions
    systems: dict = field(default_factory=dict)
    why: str = ""
    propagator: MadePropagator = field(default_factory=MadePropagator)
    meshes: int = 0


def mgrit_options(parameters: Mapping | MGRITOptions | None, prefix: str = "mgrit_") -> MGRITOptions:
    """MGRIT options from a dictionary, overridden by those in PETSc's options database (``-mgrit_levels 3``).

    Parameters
    ----------
    parameters
        Nested or flat options; ``None``: the defaults.
    prefix
        Prefix of the names in the database.

    Raises
    ------
    InputError
        On an unknown option or a bad value.
    """
    try:
        return MGRITOptions.make(parameters, **MGRITOptions.parse(_database(prefix)[0]))
    except ValueError as error:
        raise InputError(str(error)) from None


def _database(prefix: str) -> tuple[dict, dict]:
    """Options with a prefix in PETSc's database: a time solver's own, and those of PETSc's solvers."""
    found = PETSc.Options(prefix).getAll()
    petsc = {name: found.pop(name) for name in list(found) if name.startswith(_PETSC)}
    return found, petsc


def _paradiag_options(given: Any, mgrit: MGRITOptions, prefix: str) -> tuple[ParaDiagOptions, dict]:
    """Options of ParaDiag, which default to MGRIT's for stopping and printing, and PETSc's options of its systems."""
    if given is not None and not isinstance(given, Mapping):
        raise InputError(f"paradiag {given!r}: give a dictionary of options, such as {{'alpha': 1e-4}}")
    given = dict(given or {})
    systems = {k: given.pop(k) for k in list(given) if str(k).startswith(_PETSC)}
    database, petsc = _database(prefix)
    require_types(systems, prefix, "paradiag")
    plain = MGRITOptions()
    shared = {name: getattr(mgrit, name) for name in SHARED if getattr(mgrit, name) != getattr(plain, name)}
    try:
        return ParaDiagOptions.make({**shared, **given, **ParaDiagOptions.parse(database)}), systems | petsc
    except ValueError as error:
        raise InputError(str(error)) from None


def krylov_options(given: Any, options_prefix: str = "") -> Mapping | None:
    """PETSc options of a Krylov method around MGRIT; ``None`` where neither they nor ``-mgrit_ksp_...`` are given.

    Raises
    ------
    InputError
        On a type of solver that PETSc does not have, or a misspelt name.
    """
    prefix = f"{options_prefix}mgrit_"
    if given is None and any(name.startswith("ksp_") for name in PETSc.Options(prefix).getAll()):
        given = {}
    if given is not None and not isinstance(given, Mapping):
        raise InputError(f"krylov {given!r}: give PETSc options, such as {{'ksp_type': 'fgmres'}}")
    require_types(given or {}, prefix, "krylov")
    return given


def read_time_solver(
    parameters: dict,
    evolution: Evolution,
    spacetime: SpaceTime,
    coarse_tableau: ButcherTableau | None,
    options_prefix: str = "",
    *,
    own_steps: bool = True,
) -> TimeSolverChoice:
    """Take ``time_solver``, ``typical_rtol``, ``mgrit`` and ``paradiag`` out of the parameters (collective).

    Parameters
    ----------
    parameters
        A copy of the user's ``solver_parameters``, from which what is read is removed.
    evolution, spacetime, coarse_tableau
        The problem, the process grid and the integrator of the coarse levels.
    options_prefix
        Prefix of this functional's options in PETSc's database: ``-PREFIXmgrit_rtol``, ``-PREFIXparadiag_alpha``.
    own_steps
        Whether the steps of all levels are made here, on one mesh: only then are times of them measured.

    Raises
    ------
    InputError
        On every rank: on parameters or an evolution that differ between ranks, on bad options, or ParaDiag for an
        evolution that is not linear with constant operators.
    """
    require_same(
        spacetime.comm, nsteps=evolution.nsteps, dt=evolution.dt, t0=evolution.t0, tableau=evolution.tableau,
        coarse_tableau=coarse_tableau, controls=len(evolution.controls), given=parameters,
        options_prefix=options_prefix,
    )  # fmt: skip
    kind = parameters.pop("time_solver", "mgrit")
    typical = parameters.pop("typical_rtol", None)
    if typical is not None and (not is_number(typical) or not 0 < typical < 1):
        raise InputError(f"typical_rtol {typical!r}: give a number between 0 and 1, such as 1e-2")
    if kind not in KINDS:
        raise InputError(f"time_solver {kind!r}: give one of {', '.join(map(repr, KINDS))}")
    refuse_near_misses(PETSc.Options().getAll(), options_prefix)
    require_types(evolution.solver_parameters, f"{options_prefix}pint_")
    prefix = f"{options_prefix}mgrit_"
    given = parameters.pop("mgrit", None)
    mgrit, shaped = mgrit_options(given, prefix), has_shape(given, prefix)
    unread = _database(prefix)[1]
    if unread and parameters.get("krylov") is None and not any(name.startswith("ksp_") for name in unread):
        raise InputError(
            f"-{prefix}{next(iter(unread))}: only a Krylov method around MGRIT reads it; give -{prefix}ksp_type fgmres "
            f"as well, or -{options_prefix}pint_... for the solvers of a step"
        )
    paradiag, systems = _paradiag_options(parameters.pop("paradiag", None), mgrit, f"{options_prefix}paradiag_")
    why, propagator, chosen, meshes = "", MadePropagator(), None, 0
    if kind == "auto":
        try:
            if own_steps and not shaped:
                chosen = automatic(evolution, spacetime, mgrit, paradiag, coarse_tableau, propagator, typical)
            if chosen is not None:
                kind, mgrit, why, meshes = chosen.kind, chosen.mgrit, chosen.why, chosen.meshes
            else:
                kind, why = choose(evolution, spacetime, mgrit, paradiag, coarse_tableau)
        except ValueError as error:
            raise InputError(str(error)) from None
    if kind == "serial":
        # two levels have C-points, without cycles the coarse one is not stepped
        stored = dict(levels=2, cycle="none") if mgrit.storage == "C" else dict(levels=1)
        mgrit = MGRITOptions.make(mgrit, **stored, of_levels=())
    return TimeSolverChoice(kind, mgrit, paradiag, systems, why, propagator, meshes)


def has_shape(given: Any, prefix: str) -> bool:
    """Whether options of MGRIT that decide on the work of a cycle are given, in a dictionary or with a prefix in
    PETSc's database.
    """
    made, plain = mgrit_options(given, prefix), MGRITOptions()
    names = {*(given if isinstance(given, Mapping) else ()), *_database(prefix)[0]}
    return any(name in names or getattr(made, name) != getattr(plain, name) for name in _SHAPE)


def require_supported(options: MGRITOptions, factors: tuple, nsteps: int) -> None:
    """Raise a ``ValueError`` on coarsening ``factors`` that do not fit ``nsteps`` equal steps, or their storage."""
    uneven = [m for m in factors if not isinstance(m, int)]
    if uneven:
        raise ValueError(
            f"mgrit coarsening {uneven[0]}: an evolution has equal steps on each level; give factors such as (8, 4)"
        )
    if options.storage == "C" and factors and nsteps % factors[0]:
        m = factors[0]
        raise ValueError(
            f"mgrit storage 'C' with {nsteps} steps and coarsening {m}: state and adjoint have the same C-points only "
            f"where the steps are a multiple of it; give {nsteps - nsteps % m} or {nsteps - nsteps % m + m} steps, "
            "another coarsening or storage='all'"
        )


def choose(
    evolution: Evolution,
    spacetime: SpaceTime,
    mgrit: MGRITOptions,
    paradiag: ParaDiagOptions,
    coarse_tableau: ButcherTableau | None = None,
) -> tuple[str, str]:
    """The time solver that a-priori convergence estimates favour (collective).

    It is MGRIT where its estimate is at most :data:`CYCLES` cycles, else ParaDiag where no mode grows too much for it,
    else sequential stepping; and MGRIT where there is no estimate.

    Returns
    -------
    str, str
        The solver, and the reason in one line.

    Raises
    ------
    ValueError
        If MGRIT's options do not fit the steps.
    """
    kind, why = _choose(evolution, mgrit, paradiag, coarse_tableau)
    if kind != "serial" and spacetime.time_size == 1:
        why += "; on one time rank 'serial' is faster"
    return spacetime.comm.bcast((kind, f"time_solver auto: {kind}, {why}"))  # the same in spite of round-off


def _choose(
    evolution: Evolution, mgrit: MGRITOptions, paradiag: ParaDiagOptions, coarse_tableau: ButcherTableau | None
) -> tuple[str, str]:
    try:
        estimates = mgrit_estimate(evolution, mgrit, coarse_tableau)
    except ValueError:
        if mgrit.levels is not None:
            raise
        estimates = []
    if estimates == []:
        return "serial", f"{evolution.nsteps} steps are too few for a coarse level"
    if estimates is None:
        return "mgrit", "as there is no theory for this evolution (it is not linear with constant operators)"
    worst = max(estimates, key=lambda v: v.factor)
    bound = f"MGRIT's two-level bound is {worst.factor:.3g}"
    if worst.iterations <= CYCLES and worst.converges:
        return "mgrit", f"as {bound}: {worst.iterations:.0f} cycles for {worst.tolerance:g} at most"
    rate = paradiag_contraction(evolution, paradiag.alpha)
    if rate is not None and rate < 0.5:
        return "paradiag", f"as {bound}, an iteration of ParaDiag contracts by {rate:.2g} (alpha {paradiag.alpha:g})"
    return "serial", f"as {bound}, and modes that grow leave ParaDiag a factor of {rate:.2g}"


def estimate_lines(
    evolution: Evolution, options: MGRITOptions | ParaDiagOptions, estimates: Sequence[ConvergenceEstimate]
) -> Iterator[tuple[int, str]]:
    """Yield lines on the convergence of a time solver with their level of :mod:`logging` (collective over space):
    warnings, and with the options ``monitor`` or ``view`` all estimates.

    Parameters
    ----------
    evolution
        The problem.
    options
        Options of the time solver.
    estimates
        Estimate of each pair of MGRIT levels.
    """
    everything = options.monitor or options.view
    if isinstance(options, ParaDiagOptions):
        text, warns = _paradiag_estimate(evolution, options.alpha)
        if everything or warns:
            yield logging.WARNING if warns else logging.INFO, text
    for level, estimate in enumerate(estimates):
        where = f"levels {level} and {level + 1}"
        if everything:
            yield logging.INFO, f"theory, {where}: {estimate}"
        elif not estimate.converges:
            yield logging.WARNING, f"warning, {where}: {estimate.warning}"


def _paradiag_estimate(evolution: Evolution, alpha: float) -> tuple[str, bool]:
    """A line on the contraction of ParaDiag, and whether it is a warning."""
    rate = paradiag_contraction(evolution, alpha)
    if rate is None:
        return "theory: none for this evolution; ParaDiag uses operators averaged in time and reports its factor", False
    text = f"an iteration of ParaDiag contracts by {rate:.3g} (alpha {alpha:g})"
    if rate < 0.5:
        return f"theory: {text}", False
    return f"warning: {text}, as modes grow over the {evolution.nsteps} steps; use 'mgrit' or 'serial'", True

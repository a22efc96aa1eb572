"""Which solver the sweeps use: read from ``solver_parameters`` and PETSc's options, or chosen by theory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from firedrake.petsc import PETSc

from pint_fem.all_at_once.options import SHARED
from pint_fem.collective import require_same
from pint_fem.errors import InputError
from pint_fem.evolution.evolution import Evolution
from pint_fem.mgrit.options import MGRITOptions
from pint_fem.paradiag.options import ParaDiagOptions
from pint_fem.petsc_options.spelling import refuse_near_misses
from pint_fem.petsc_options.types import require_types
from pint_fem.spacetime import SpaceTime
from pint_fem.theory.estimates import mgrit_verdict, paradiag_contraction

__all__ = ["KINDS", "TimeSolver", "choose", "mgrit_options", "read_time_solver"]

KINDS = ("mgrit", "paradiag", "serial", "auto")
CYCLES = 20
"""MGRIT cycles that cost about as much as two iterations of ParaDiag on many ranks, factorisations included."""
_PETSC = ("ksp_", "pc_", "mat_", "sub_")


@dataclass(frozen=True)
class TimeSolver:
    """What to solve sweeps by.

    Attributes
    ----------
    kind : str
        ``"mgrit"``, ``"paradiag"`` or ``"serial"``.
    mgrit, paradiag : MGRITOptions, ParaDiagOptions
        Options of both.
    systems : dict
        PETSc options of ParaDiag's shifted systems.
    why : str
        One line, where it was chosen.
    """

    kind: str
    mgrit: MGRITOptions
    paradiag: ParaDiagOptions
    systems: dict = field(default_factory=dict)
    why: str = ""


def mgrit_options(parameters: Mapping | MGRITOptions | None, prefix: str = "mgrit_") -> MGRITOptions:
    """MGRIT options from a dictionary, with those of PETSc's options database (``-mgrit_levels 3 -mgrit_coarsening
    8,4``) on top.

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
    return {k: v for k, v in found.items() if not k.startswith(_PETSC)}, {
        k: v for k, v in found.items() if k.startswith(_PETSC)
    }


def _paradiag_options(given, mgrit: MGRITOptions) -> tuple[ParaDiagOptions, dict]:
    """Options of ParaDiag, and PETSc's of its systems. What MGRIT's options say of stopping and showing holds for it,
    too, where its own do not say otherwise.
    """
    if given is not None and not isinstance(given, Mapping):
        raise InputError(f"paradiag {given!r}: give a dictionary of options, such as {{'alpha': 1e-4}}")
    given = dict(given or {})
    systems = {k: given.pop(k) for k in list(given) if str(k).startswith(_PETSC)}
    database, petsc = _database("paradiag_")
    require_types(systems, "paradiag_", "paradiag")
    plain = MGRITOptions()
    shared = {name: getattr(mgrit, name) for name in SHARED if getattr(mgrit, name) != getattr(plain, name)}
    try:
        return ParaDiagOptions.make({**shared, **given, **ParaDiagOptions.parse(database)}), systems | petsc
    except ValueError as error:
        raise InputError(str(error)) from None


def read_time_solver(parameters: dict, evolution: Evolution, spacetime: SpaceTime, coarse_tableau) -> TimeSolver:
    """Take ``time_solver``, ``mgrit`` and ``paradiag`` out of the parameters; collective.

    Raises
    ------
    InputError
        On every rank: on parameters or an evolution that differ between ranks, on bad options, or ParaDiag for an
        evolution that is not linear with constant operators.
    """
    require_same(
        spacetime.comm,
        nsteps=evolution.nsteps,
        dt=evolution.dt,
        t0=evolution.t0,
        tableau=evolution.tableau,
        coarse_tableau=coarse_tableau,
        controls=len(evolution.controls),
        given=parameters,
    )
    kind = parameters.pop("time_solver", "mgrit")
    if kind not in KINDS:
        raise InputError(f"time_solver {kind!r}: give one of {', '.join(map(repr, KINDS))}")
    refuse_near_misses(PETSc.Options().getAll())
    mgrit = mgrit_options(parameters.pop("mgrit", None))
    unread = _database("mgrit_")[1]
    if unread and parameters.get("krylov") is None and not any(name.startswith("ksp_") for name in unread):
        raise InputError(
            f"-mgrit_{next(iter(unread))}: only a Krylov method around MGRIT reads it; give -mgrit_ksp_type fgmres as "
            "well, or -pint_... for the solvers of a step"
        )
    paradiag, systems = _paradiag_options(parameters.pop("paradiag", None), mgrit)
    why = ""
    if kind == "auto":
        try:
            kind, why = choose(evolution, spacetime, mgrit, paradiag, coarse_tableau)
        except ValueError as error:
            raise InputError(str(error)) from None
    if kind == "serial":
        mgrit = MGRITOptions.make(mgrit, levels=1, of_levels=())
    return TimeSolver(kind, mgrit, paradiag, systems, why)


def choose(
    evolution: Evolution, spacetime: SpaceTime, mgrit: MGRITOptions, paradiag: ParaDiagOptions, coarse_tableau=None
) -> tuple[str, str]:
    """The solver that theory prefers, and why in one line: MGRIT where its bound promises at most :data:`CYCLES`
    cycles, else ParaDiag where no mode grows too much for it; where there is no theory, MGRIT.

    Returns
    -------
    str, str

    Raises
    ------
    ValueError
        If MGRIT's options do not fit the steps.
    """
    kind, why = _choose(evolution, mgrit, paradiag, coarse_tableau)
    if kind != "serial" and spacetime.time_size == 1:
        why += "; on one time rank 'serial' is faster"
    return spacetime.comm.bcast((kind, f"time_solver auto: {kind}, {why}"))  # one answer, whatever the round-off


def _choose(evolution: Evolution, mgrit: MGRITOptions, paradiag: ParaDiagOptions, coarse_tableau) -> tuple[str, str]:
    too_few = "serial", f"{evolution.nsteps} steps are too few for a coarse level"
    try:
        verdicts = mgrit_verdict(evolution, mgrit, coarse_tableau)
    except ValueError:
        if mgrit.levels is not None:
            raise
        return too_few
    if verdicts == []:
        return too_few
    if verdicts is None:
        return "mgrit", "as there is no theory for this evolution (it is not linear with constant operators)"
    worst = max(verdicts, key=lambda v: v.factor)
    bound = f"MGRIT's two-level bound is {worst.factor:.3g}"
    if worst.iterations <= CYCLES and worst.converges:
        return "mgrit", f"as {bound}: {worst.iterations:.0f} cycles for {worst.tolerance:g} at most"
    rate = paradiag_contraction(evolution, paradiag.alpha)
    if rate is not None and rate < 0.5:
        return "paradiag", f"as {bound}, an iteration of ParaDiag contracts by {rate:.2g} (alpha {paradiag.alpha:g})"
    return "serial", f"as {bound}, and modes that grow leave ParaDiag a factor of {rate:.2g}"

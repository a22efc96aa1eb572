"""The inversion of the heat and the Maxwell demo: by the map from controls to readings, with the whole posterior, or by
the trust region; and the beginning of its summary.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np
from mpi4py import MPI

from pint_fem.cli import ProgramParser, file_name, positive, waiting
from pint_fem.errors import InputError

if TYPE_CHECKING:
    from pint_fem.inverse.map import ParameterToObservable
    from pint_fem.inverse.posterior import GaussianPosterior
    from pint_fem.sweeps.sweeps import Sweeps

__all__ = [
    "MapResult",
    "add_method",
    "add_plate",
    "add_trust_region",
    "invert",
    "mean_over_coefficients",
    "posterior_of",
    "settle_method",
    "sum_of_counts",
    "summary_of",
]

TRUST_REGION = {"rtol": 1e-9, "gtol": 1e-8, "max_iterations": 30, "exact": False}
"""Options of the trust region and their defaults."""


# -- options -----------------------------------------------------------------------------------------------------------
def add_method(add, *, default: str = "map") -> None:
    """Add the option ``--method`` to a parser, whose ``add_argument`` is given, with a default."""
    add(
        "--method",
        default=default,
        choices=["map", "trust-region", "auto"],
        help="map (one adjoint sweep per sensor, from which the whole posterior follows), trust-region (sweeps in each "
        f"iteration), auto (the one of less estimated time) ({default})",
    )


def add_plate(add, *, columns: str = "sensor,x,y,time,temperature", steps: int = 512) -> None:
    """Add the options of the plate's mesh, readings and steps to a parser, whose ``add_argument`` is given; the columns
    of the readings and the number of steps are those of the problem.
    """
    add(
        "--mesh",
        type=file_name,
        metavar="FILE.msh",
        help="gmsh mesh tagged as problems/plate.py (default: the shipped)",
    )
    add("--sensors", type=file_name, metavar="FILE.csv", help=f"{columns} (default: the shipped)")
    add("--steps", type=positive(int), default=steps, help=f"time steps ({steps})")


def add_trust_region(
    parser: ProgramParser, *, gtol: str, checkpoints: bool, heading: str = "only with --method trust-region or auto"
) -> None:
    """Add the options of ``--method trust-region``, with or without those of checkpoints, below a heading; ``gtol`` is
    the default of the tolerance in words.
    """
    add = parser.add_argument_group(heading).add_argument
    add("--rtol", type=positive(float), help="relative tolerance of the time-parallel solves (1e-9)")
    add("--gtol", type=positive(float), help=f"relative tolerance of the gradient ({gtol})")
    add("--max-iterations", type=positive(int), help="trust-region iterations (30)")
    add(
        "--exact",
        action="store_true",
        default=None,
        help="solve every sweep to --rtol, not only as accurately as convergence needs",
    )
    if not checkpoints:
        return
    add(
        "--checkpoint",
        type=file_name,
        metavar="FILE.h5",
        help="keep each iterate there, and go on from an existing file",
    )
    add(
        "--if-save-fails",
        choices=["stop", "continue"],
        help="what to do where the checkpoint cannot be written, as on a full disk (stop)",
    )


def settle_method(opts, **defaults: Any) -> None:
    """Give the options of the trust region their defaults, ``defaults`` before those of :data:`TRUST_REGION`.

    Raises
    ------
    InputError
        If one is given together with ``--method map``.
    """
    defaults = TRUST_REGION | {"checkpoint": None, "if_save_fails": "stop"} | defaults
    given = [name for name in defaults if getattr(opts, name, None) is not None]
    if given and opts.method == "map":
        words = ", ".join("--" + name.replace("_", "-") for name in given)
        raise InputError(
            f"{words}: the map takes no iterations, and this is an option of the trust region: add --method "
            "trust-region, or leave it out"
        )
    for name in defaults.keys() - set(given):
        setattr(opts, name, defaults[name])
    if opts.time_solver is None:  # the map takes sequential sweeps of its sensors, and choosing takes time
        chosen = any(word.startswith(("-mgrit_", "-paradiag_")) for word in sys.argv)
        opts.time_solver = "serial" if opts.method == "map" and not chosen else "auto"


# -- the inversion -----------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class MapResult:
    """The mean of a posterior as the result of a minimisation.

    Attributes
    ----------
    x : ndarray
        The mean, which minimises the functional.
    value, gradient_norm : float
        The functional there by a sweep, and the norm of its derivative on the map.
    standard_deviation : ndarray
        Of each entry of ``x``.
    """

    x: np.ndarray
    value: float
    gradient_norm: float
    standard_deviation: np.ndarray
    iterations: int = 0
    hessian_calls: int = 0
    history: Sequence = ()
    converged: bool = True
    reason: str = "posterior mean"


def posterior_of(F: ParameterToObservable) -> GaussianPosterior:
    """The posterior of a ready problem (collective).

    The functional divides the squares of the ``n`` readings' residuals by ``n``, so that the negative logarithm of the
    posterior's density is ``n`` times the functional: the noise has the variance ``1 / (n weight)``, and the prior's
    precision is ``n`` times the regularisation.
    """
    n = len(F.data)
    return F.posterior(noise=1 / np.sqrt(n * F.weights), alpha=n)


def invert(rf, opts, say, outputs, times: dict, **given) -> tuple[Any, GaussianPosterior | None]:
    """Find the minimiser, with the options of the command line (collective).

    Parameters
    ----------
    rf, opts, say, outputs
        The functional, the options, what prints a line, and the files.
    times
        Seconds by the names of the parts, which are added.
    **given
        Further options of the trust region.

    Returns
    -------
    result, posterior
        The posterior is ``None`` where the method is the trust region.
    """
    if opts.method == "map":
        return _by_map(rf, say, outputs, times)
    start = time.perf_counter()
    result = _by_iterations(rf, opts, say, outputs, **given)
    times["inversion"] = time.perf_counter() - start
    outputs("trace", rf.problem.leaves[0].sweeps.solvers.write_trace)
    if opts.method == "auto" and result.choice.startswith("map"):
        return _by_map(rf, say, outputs, times, rf.on_map().F)
    rf.problem.value(result.x)
    say(f"{result.reason.value} after {result.iterations} iterations, {times['inversion']:.1f} s")
    return result, None


def _by_iterations(rf, opts, say, outputs, **given):
    """The result of ``rf.minimize``, with a line on the terminal for each sweep.

    Sweeps are inexact where there are no bounds. With total variation conjugate
    gradients are preconditioned by its operator.
    """
    from pint_fem.adjoint.total_variation.functional import TotalVariation

    every = [leaf.sweeps for leaf in rf.problem.leaves]
    inexact = not opts.exact and given.get("bounds") is None
    options = dict(monitor=say, gtol_rel=opts.gtol, max_it=opts.max_iterations)
    if opts.checkpoint is not None:
        given = dict(checkpoint=opts.checkpoint, if_save_fails=opts.if_save_fails) | given
    with waiting("minimisation") as progress:
        for sweeps in every:
            sweeps.on_sweep = lambda kind, result: progress(
                f"{kind} sweep: {result.cycles} cycles; so far "
                + ", ".join(f"{n} {k}" for k, n in sum_of_counts(every).items())
            )
        if opts.method == "auto":
            return rf.minimize("auto", inexact=inexact, **options, **given)
        learned: dict = dict(preconditioner="limited-memory", preconditioner_memory=40)
        if any(isinstance(form, TotalVariation) for form in rf.regularisation):
            learned = {}
        return rf.minimize_trust_region(inexact=inexact or None, **options, **learned, **given)


def sum_of_counts(every: Sequence[Sweeps]) -> dict[str, int]:
    """The numbers of solves of each kind, and of cycles, of several evolutions."""
    return {kind: sum(sweeps.counts[kind] for sweeps in every) for kind in every[0].counts}


def _by_map(rf, say, outputs, times: dict, F=None) -> tuple[MapResult, GaussianPosterior]:
    """The mean and the standard deviation of the posterior; the map is made where it is not given."""
    clock = _Clock(times)
    if F is None:
        try:
            F = rf.parameter_to_observable()
        except InputError as error:
            raise InputError(f"{error}; here: --method trust-region") from error
        clock("map")
    with waiting("posterior and its standard deviation"):
        posterior = posterior_of(F)
        deviation = np.sqrt(posterior.variance())
    clock("posterior")
    m, n = F.shape[0], rf.spacetime.space_comm.allreduce(F.shape[1])
    say(f"map from {n} controls to {m} readings, {len(posterior.spectrum.lam)} modes")
    by_map = rf.on_map(F).problem
    g = by_map.derivative(posterior.x)
    norm = float(np.sqrt(max(rf.problem.layout.pairing(g, rf.inner.primal(g)), 0.0)))
    value = rf.problem.value(posterior.x)
    outputs("trace", rf.problem.sweeps.solvers.write_trace)
    parts = ", ".join(f"{name} {part:.8f}" for name, part in rf.problem.parts.items())
    say(f"J {value:.8f} at the mean by a sweep ({parts}); {by_map.value(posterior.x):.8f} by the map")
    made = f"map {times['map']:.2f} s, " if "map" in times else f"choice and map {times['inversion']:.2f} s, "
    say(f"set-up {times['set-up']:.2f} s, {made}posterior with standard deviation {times['posterior']:.2f} s")
    times["inversion"] = times.get("map", times.get("inversion", 0.0)) + times["posterior"]
    return MapResult(posterior.x, value, norm, deviation), posterior


class _Clock:
    """Adds the seconds since the last call to a dictionary."""

    def __init__(self, times: dict):
        self._times, self._start = times, time.perf_counter()

    def __call__(self, name: str) -> None:
        now = time.perf_counter()
        self._times[name], self._start = now - self._start, now


# -- the summary -------------------------------------------------------------------------------------------------------
def mean_over_coefficients(values: np.ndarray, space_comm: MPI.Comm) -> float:
    """The mean of the coefficients of static controls (collective over space)."""
    total, count = space_comm.allreduce(np.array([values.sum(), values.size]))
    return float(total / count)


def summary_of(name: str, settings: dict, spacetime, unknowns: int, seconds: dict) -> dict:
    """The beginning of ``summary.json``."""
    return {
        "problem": name,
        "settings": settings,
        "grid": dict(zip(("space", "time", "experiments"), spacetime.used_shape, strict=False)),
        "unknowns": unknowns,
        "seconds": seconds,
        "versions": {name: version(name) for name in ("pint_fem", "firedrake", "petsc4py", "irksome", "pyadjoint-ad")},
        "mpi": MPI.Get_library_version().split(",")[0],
    }

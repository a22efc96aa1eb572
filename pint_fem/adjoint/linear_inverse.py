"""The map from controls to readings of a functional, for linear inverse problems (:mod:`pint_fem.inverse`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pyadjoint.tape import stop_annotating

from pint_fem.adjoint.composed_map import make_map, map_of_predictions, prior_forms, readings_at_zero, require_readings
from pint_fem.adjoint.minimisation.bounds_and_constraints import Controls, named_array
from pint_fem.adjoint.minimisation.kkt.choice import choose_kkt, kkt_systems
from pint_fem.adjoint.minimisation.kkt.preconditioner import KKTPreconditioner, minimize_by_kkt
from pint_fem.adjoint.minimisation.map_problem import MapFunctional, trust_region_options
from pint_fem.adjoint.minimisation.method_choice import choose_method
from pint_fem.adjoint.problem import ReducedProblem
from pint_fem.collective import all_ranks, collectively, on_first_rank, require_same
from pint_fem.errors import InputError
from pint_fem.inverse.inference.prediction import require_predictions
from pint_fem.inverse.map import ParameterToObservable
from pint_fem.inverse.memory import require_rows_argument
from pint_fem.inverse.readings import ReadingTable
from pint_fem.logs import logger
from pint_fem.misfits.sensor_readings import SensorReadings
from pint_fem.optimize.records import TrustRegionResult

if TYPE_CHECKING:
    from pint_fem.adjoint.functional import ControlFunctional

__all__ = ["CachedMap", "LinearInverse"]

_METHODS = ("auto", "kkt", "map", "trust-region", "one-shot")


def _require_readings(functional: ControlFunctional) -> ReducedProblem:
    """The problem of a functional of one evolution that has a map; an ``InputError`` names what to use elsewhere."""
    if not isinstance(functional.problem, ReducedProblem):
        raise InputError(
            "the functional is a sum, a multiple or has an initial condition that is an expression of controls: use "
            "minimize_trust_region, or the posterior of its map, J.parameter_to_observable().posterior()"
        )
    (path,) = require_readings(functional)
    return path.problem


class LinearInverse:
    """The part of a functional that makes the map from controls to readings; it has ``problem``, ``inner``,
    ``spacetime``, ``array`` and ``function``.
    """

    def parameter_to_observable(
        self,
        *,
        load: str | Path | None = None,
        rows: str = "memory",
        path: str | Path | None = None,
        time_ranks: int | None = None,
        predict: SensorReadings | Sequence[SensorReadings] = (),
    ) -> ParameterToObservable:
        """Return the map from controls to readings as a matrix, by one adjoint sweep per sensor (collective).

        It exists for evolutions that are linear with constant operators and misfits of finitely many readings,
        ``PointSensors`` and ``LinearObservations``; of a sum its rows are those of all evolutions, and an initial
        condition may be an affine expression of controls. From it the minimiser and the whole Gaussian posterior follow
        without another sweep (:class:`~pint_fem.inverse.map.ParameterToObservable`).

        Parameters
        ----------
        load
            A file that ``F.save(path)`` wrote for the same evolution, controls, sensors and times of readings, from
            which the map is read; it may have been written on another number of ranks in time. Readings, noise and
            regularisation may be others.
        rows, path
            ``"memory"``, or ``"file"``: the rows of each rank are then in a file without a name in the folder ``path``,
            for maps that are larger than the memory. What fits no machine is refused before the sweep; the time
            solver's option ``view`` prints the memory that is needed.
        time_ranks
            Number of time ranks that solve for the adjoints of a sensor together, by the functional's time solver, the
            tolerance of which is then that of the map; it divides the number of time ranks. Default: 1, a sequential
            sweep of the sensors of each rank; with fewer sensors than time ranks the smallest number with which no rank
            is idle, if sweeps are sequential or have a tolerance of at most 1e-10.
        predict
            ``PointSensors`` and ``LinearObservations`` of which nothing is measured, and the values do not matter:
            readings at points and times without sensors, averages and fluxes, which a posterior predicts without
            another sweep (``posterior.predict()``). Their rows are computed also with ``load``, and are in memory.

        Raises
        ------
        InputError
            On every rank, where there is no map; the message names what to use. With ``load``, if the file cannot be
            read or is that of another problem; the message names the differences.
        """
        with stop_annotating():
            require_rows_argument(self.spacetime.comm, rows, path)
            require_same(self.spacetime.comm, load=None if load is None else str(load), time_ranks=time_ranks)
            named = collectively(self.spacetime.comm, "", require_predictions, predict)
            require_same(self.spacetime.comm, predictions=[type(one).__name__ for one in named])
            F = make_map(self, load=load, folder=path, time_ranks=time_ranks)
            if named:
                F.predictions = map_of_predictions(self, named)
            return F

    def on_map(self, F: ParameterToObservable | None = None) -> MapFunctional:
        """Return the functional on its map, with all methods that minimise it and none that sweeps (collective).

        Parameters
        ----------
        F
            A map of this functional, whose readings are used; default: the functional's own, made once and used again
            after :meth:`update_data` as far as that is possible (:class:`CachedMap`).
        """
        with stop_annotating():
            return MapFunctional(self, self._map.current() if F is None else F)

    @cached_property
    def _map(self) -> CachedMap:
        return CachedMap(self)

    def minimize(self, method: str = "auto", *, start: Controls | None = None, **options: Any) -> Any:
        """Minimise the functional by the method that is fastest (collective).

        Parameters
        ----------
        method
            ``"map"``: on the map from controls to readings, one adjoint sweep per sensor (:meth:`on_map`), which a
            further call with new readings uses again. ``"trust-region"``: :meth:`minimize_trust_region` with inexact
            sweeps where their accuracy can be chosen and a limited-memory preconditioner. ``"one-shot"``:
            :meth:`minimize_one_shot`. ``"kkt"``, for controls with one value per step and misfits at all steps: the
            trust region, or active sets within ``bounds=``, with the inverse Hessian from the KKT system of all steps
            (:mod:`pint_fem.kkt`), whose cost does not depend on the weight of the regularisation; for nonlinear
            evolutions :meth:`minimize_newton_kkt`. ``"auto"``: ``"kkt"`` where there is such a system, no ``bounds=``,
            and it takes less estimated time than conjugate gradients; otherwise the map where it exists, fits the
            memory and has less estimated time; else the trust region. It prints the choice and the reason to the logger
            ``pint_fem``.
        start
            First controls; default: the last ones.
        **options
            Options of the minimiser, such as ``bounds=``, ``constraints=``, ``gtol_rel=``, ``monitor=``; on the map
            products are exact, and ``inexact=`` has no effect.

        Returns
        -------
        TrustRegionResult
            Or that of the one-shot method. ``control`` holds the controls found, which are also the values of the
            functional's own ``controls``; ``choice`` the method with the reason.

        Raises
        ------
        InputError
            On every rank: another method, the map where there is none, options that do not fit.
        """
        comm = self.spacetime.comm
        require_same(comm, method=method if isinstance(method, str) else type(method).__name__)
        if not isinstance(method, str) or method not in _METHODS:
            raise InputError(
                f"minimize: method = {method!r}: give one of {', '.join(map(repr, _METHODS))}, and first controls as "
                "start="
            )
        why = "as given"
        systems = None
        _require_options(method, options)
        if method == "auto":
            with stop_annotating():
                first = self._current() if start is None else named_array(self, start, "start")
                systems, why, preconditioned = choose_kkt(self, first, options)
                if systems:
                    method = "kkt"
                else:
                    method, why = choose_method(self, _require_readings, options, no_kkt=why)
                    if method == "trust-region":
                        options = preconditioned | options
            on_first_rank(comm, "logging", logger.info, f"minimize auto: {method}, {why}")
        if method == "kkt":
            return self._minimize_kkt(start, options, systems, why)
        if method == "map":
            return self.on_map().minimize(start, choice=f"map, {why}", **options)
        if method == "one-shot":
            return self.minimize_one_shot(start, **options)
        if options.get("l1") is not None:
            return self.minimize_active_set(start, choice=f"active sets, {why}", **options)
        options.pop("l1", None)
        return self.minimize_trust_region(start, choice=f"trust-region, {why}", **trust_region_options(self, options))

    def _minimize_kkt(
        self, start: Controls | None, options: dict, systems: KKTPreconditioner | None, why: str
    ) -> TrustRegionResult:
        """Minimise by KKT systems."""
        if systems is None:
            problem = self.problem
            if isinstance(problem, ReducedProblem) and not problem.sweeps.is_affine:
                for name in ("bounds", "l1", "constraints", "checkpoint", "inexact", "preconditioner"):
                    if options.pop(name, None) is not None:
                        raise InputError(
                            f"method 'kkt' does not go with {name}= for a nonlinear evolution: use 'trust-region'"
                        )
                return self.minimize_newton_kkt(start, **options)
            with stop_annotating():
                systems = kkt_systems(self, options)
        return minimize_by_kkt(self, start, options, preconditioner=systems, why=why)


class CachedMap:
    """The map of a functional, made when first used and used again as far as its data allow.

    The rows of the map depend on the operators of the steps and of the controls, and on where and when sensors read.
    After an ``update_data()`` of the functional they are used again if the steps are the same object, which is replaced
    whenever data in an operator have other values, and the sensors have the same functionals, points and shares.
    Readings and weights are read again in any case; readings at zero controls and the prior where a function or a
    constant has another value; the posterior's spectrum is kept where neither weights nor such values have changed.

    Parameters
    ----------
    functional
        The functional, not changed.
    """

    def __init__(self, functional: Any):
        self._functional = functional
        self._F: ParameterToObservable | None = None
        self._impulses = np.zeros(0)
        self._updates = 0

    @property
    def is_made(self) -> bool:
        """Whether there is a map, which may have to be made anew."""
        return self._F is not None

    def current(self) -> ParameterToObservable:
        """Return the map with the data that the functional has (collective).

        Raises
        ------
        InputError
            As for ``parameter_to_observable``.
        """
        problem: ReducedProblem = collectively(self._functional.spacetime.comm, "", _require_readings, self._functional)
        table, updates = ReadingTable(problem.misfits), problem.data.updates
        known = self._F
        if known is None or not self._has_rows_of(known, table, problem):
            self._F = None  # the old rows are freed before the new ones are computed
            known = self._F = self._functional.parameter_to_observable()
            self._impulses = table.impulses(known.sensors)
        elif updates != self._updates:
            forms = partial(prior_forms, problem)
            self._F = known.with_readings(table, readings_at_zero(problem), forms, same=False)
        elif not (np.array_equal(table.values, known.data) and np.array_equal(table.weights, known.weights)):
            same = np.array_equal(table.weights, known.weights)
            self._F = known.with_readings(table, known.offset, known.regularisation, same=same)
        self._updates = updates
        return self._F

    def _has_rows_of(self, F: ParameterToObservable, table: ReadingTable, problem: ReducedProblem) -> bool:
        """Whether the rows of a map are those of the functional now (collective)."""
        own, pairs = F.table, ("sensor", "point", "theta")
        same = F.propagator is problem.sweeps.propagators[0]
        same = same and all(np.array_equal(getattr(own, name), getattr(table, name)) for name in pairs)
        same = all_ranks(problem.spacetime.comm, same)  # impulses are computed collectively
        return same and all_ranks(problem.spacetime.comm, np.array_equal(table.impulses(F.sensors), self._impulses))


def _require_options(method: str, options: Mapping) -> None:
    """Refuse options of minimisers that a method does not have, on every rank."""
    if method not in ("auto", "kkt") and options.get("l1") is not None:
        raise InputError(f"minimize: method {method!r} does not go with l1=: use 'kkt', or minimize_active_set")
    if method == "one-shot":
        for name in ("bounds", "inexact"):
            if options.get(name) is not None:
                raise InputError(f"minimize: method 'one-shot' does not go with {name}=: use 'trust-region' or 'auto'")

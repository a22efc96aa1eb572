r"""The map :math:`F` from controls to readings of a linear evolution with constant operators, as a matrix.

.. math::  y(z) = F z + y_0 ,

with the readings :math:`y_0` at zero controls. Each sensor takes one adjoint sweep
(:mod:`pint_fem.inverse.impulse_responses`); the sensors are divided among the ranks in time, and their rows stay there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
from firedrake.petsc import PETSc
from scipy.sparse.linalg import LinearOperator

from pint_fem.all_at_once.grids import split_steps
from pint_fem.collective import collectively
from pint_fem.errors import InputError
from pint_fem.evolution.control_layout import ControlLayout
from pint_fem.inverse.files import load_map, require_same_map, save_map
from pint_fem.inverse.impulse_responses import GROUP, lags_of_block, sequential_responses
from pint_fem.inverse.inversion import Inversion, PriorForms
from pint_fem.inverse.memory import allocate_rows, map_bytes, state_memory
from pint_fem.inverse.per_step.toeplitz import ToeplitzMap, step_map_bytes
from pint_fem.inverse.petsc_mat import make_petsc_mat
from pint_fem.inverse.posterior import GaussianPosterior
from pint_fem.inverse.readings import ReadingTable
from pint_fem.inverse.response_rows import StepTerm, collectors, own_readings, step_terms
from pint_fem.inverse.sensor_groups import SensorGroup, ranks_of_group
from pint_fem.progress import update, waiting
from pint_fem.propagators.linear import LinearPropagator
from pint_fem.sweeps.sweeps import Sweeps

__all__ = ["ParameterToObservable", "require_map"]


_OWN_PART = "own part of each control, as J.array(q) returns it, or give functions"


def require_map(sweeps: Sweeps) -> LinearPropagator:
    """The finest propagator of an evolution for which the map exists.

    Raises
    ------
    InputError
        If the evolution is not linear with constant operators.
    """
    propagator = sweeps.propagators[0]
    if sweeps.evolution.has_controlled_operators:
        names = ", ".join(repr(c.name()) for c in sweeps.evolution.posed.affine_parts.in_operators)
        raise InputError(
            f"parameter_to_observable: readings are no affine function of {names}, which the operators depend on: use "
            "minimize_trust_region, or for given coefficients pose the evolution with the sources alone as control= "
            "(what is no control is data), which has the map"
        )
    if not isinstance(propagator, LinearPropagator):
        raise InputError(
            "parameter_to_observable: the steps are not those of a linear evolution with constant operators "
            f"({type(propagator).__name__}), or a control in a boundary value has a factor that depends on time, so "
            "that responses do not depend on the lag alone: use minimize_trust_region, or give a boundary value "
            "without such a factor, also with one value per step (per_step=)"
        )
    return propagator


class ParameterToObservable(Inversion, LinearOperator):
    """The map from controls to readings, a ``scipy.sparse.linalg.LinearOperator`` of shape ``(m, layout.size)``.

    Vectors of controls are a rank's own part ``(layout.size,)`` of a distributed vector, and ``F.T @ y`` is a dual
    vector; vectors of readings ``(m,)`` are whole on every rank, in the order of :class:`ReadingTable`. All products
    are collective.

    Parameters
    ----------
    sweeps
        The solvers of the evolution; ``None`` in derived classes that have several.
    layout
        The controls.
    misfits
        Bound misfits whose observations are finitely many, or the table of their readings.
    offset
        Readings at zero controls, ``(m,)``, or a function that returns them (collective).
    functions
        What converts controls, with methods ``array(values)`` and ``function(array, dual=)``; default: none.
    regularisation
        Returns what the default prior follows from.
    inner
        The inner product of the controls, for the prior ``"riesz_map"``.
    description
        Returns the description of the problem as it is now (:mod:`pint_fem.inverse.files`), for files and to find that
        the operators have changed; default: none.
    load
        A file of :meth:`save`, from which the rows are read in place of being computed.
    folder
        A folder on a disk, where the rows are kept in files; default: they are in memory.
    sensors
        The sensors whose rows this rank has, increasing; default: their division among the ranks in time.
    view
        Whether the memory is printed; default: the time solver's option.
    time_ranks
        Number of time ranks that solve for the adjoints of a sensor together
        (:func:`~pint_fem.inverse.sensor_groups.ranks_of_group`).

    Attributes
    ----------
    table : ReadingTable
        All readings.
    offset, data, weights : ndarray, shape (m,)
        Readings at zero controls; what was measured; the weights of the readings in the functional.
    numbers : ndarray of int
        The readings whose rows this rank in time has, sensor after sensor.
    rows : ndarray, shape (len(numbers), layout.static_size)
        Their rows for the static controls and the initial condition, own columns of this rank in space.
    steps : ToeplitzMap or None
        The part of the map for controls with one value per step.
    predictions : ParameterToObservable or None
        The map to readings without data, for ``posterior.predict()``.
    """

    def __init__(
        self,
        sweeps: Sweeps | None,
        layout: ControlLayout,
        misfits: Sequence | ReadingTable,
        offset: np.ndarray | Callable[[], np.ndarray],
        *,
        functions: Any = None,
        regularisation: Callable[[], PriorForms] | None = None,
        inner: Any = None,
        description: Callable[[], dict] | None = None,
        load: str | Path | None = None,
        folder: str | Path | None = None,
        sensors: np.ndarray | None = None,
        view: bool | None = None,
        time_ranks: int | None = None,
    ):
        self.layout, self.spacetime = layout, layout.spacetime
        self.functions, self.regularisation, self.inner = functions, regularisation, inner
        self.sweeps, self.view, self.on_disk = sweeps, view, folder is not None
        if sweeps is not None:
            self.propagator = require_map(sweeps)
            self.view = sweeps.options.view if view is None else view
        self.table = misfits if isinstance(misfits, ReadingTable) else ReadingTable(misfits)
        self.data, self.weights = self.table.values, self.table.weights
        super().__init__(float, (self.table.size, layout.size))
        time_comm = self.spacetime.time_comm
        bounds = split_steps(self.table.sensors, time_comm.size)
        own = np.arange(bounds[time_comm.rank], bounds[time_comm.rank + 1])
        self.sensors = own if sensors is None else sensors
        self._time_ranks = 1 if sweeps is None else ranks_of_group(sweeps, self.table.sensors, time_ranks)
        self.numbers, self.readings = own_readings(self.table, self.sensors)
        self._state_memory()
        self.rows = allocate_rows(self.spacetime.comm, (len(self.numbers), layout.static_size), folder)
        self.steps: ToeplitzMap | None = None
        self.predictions: ParameterToObservable | None = None
        self._description = description
        self._problem = {} if description is None else description()
        if load is not None:
            terms = self._step_terms()
            self.offset = load_map(self, load, self._problem, terms)
            self._add_steps(terms)
            return
        self.offset = offset() if callable(offset) else offset
        self._build()

    def _state_memory(self) -> None:
        """Refuse a map that does not fit the memory of the machines (collective)."""
        ev, advice = self.propagator.evolution, "give fewer readings, a coarser control, or more ranks"
        parts = map_bytes(self, GROUP, lags_of_block(ev.V.mesh().comm, ev.state_size))
        if ev.per_step:
            parts["responses of steps"] = step_map_bytes(self.propagator, self.table, self.sensors, self.layout)
        if not self.on_disk:
            advice += ", or rows='file' and path=, a folder on a disk"
        state_memory(self, parts, f"{self.table.size} rows of the map from controls to readings", advice)

    @property
    def _lags(self) -> int:
        return int(self.table.point.max(initial=0)) + (self.propagator.evolution.initial_control is not None)

    def _step_terms(self) -> list[StepTerm]:
        """The terms of controls with one value per step, with responses of zero (collective over space)."""
        return step_terms(self.propagator, len(self.sensors), self._lags) if self.layout.evolution.stepwise else []

    def _add_steps(self, terms: list[StepTerm]) -> None:
        """Set up the products with the responses of controls with one value per step (collective)."""
        if self.layout.evolution.stepwise:
            self.steps = ToeplitzMap(terms, self.table, self.sensors, self.layout)

    def _build(self) -> None:
        """Compute the rows by the sweep of this rank's sensors (collective)."""

        def sweep() -> list[StepTerm]:
            terms = self._step_terms()
            if self._time_ranks > 1:
                SensorGroup(self.sweeps, self._time_ranks).build(self, terms, self._lags)
                return terms
            for first in range(0, len(self.sensors), GROUP):
                group = slice(first, first + GROUP)
                parts = [term.responses[group] for term in terms]
                found = collectors(self.propagator, self.readings[group], self.rows, parts)
                update(f"{first} of {len(self.sensors)} sensors")
                impulses = self.table.impulses(self.sensors[group])
                for block in sequential_responses(self.propagator, impulses, self._lags):
                    for collector in found:
                        collector.add(block)
            return terms

        with waiting("map from controls to readings, an adjoint sweep for each sensor"):
            self._add_steps(collectively(self.spacetime.comm, "map from controls to readings", sweep))

    def save(self, path: str | Path) -> None:
        """Write the map to an HDF5 file, from which ``J.parameter_to_observable(load=path)`` of the same problem makes
        it without a sweep on any number of ranks in time and as many in space (collective).

        Raises
        ------
        InputError
            On every rank, if the file cannot be written.
        """
        save_map(self, path, self._problem)

    # -- products ------------------------------------------------------------------------------------------------------
    def product(self, z: np.ndarray) -> np.ndarray:
        """``F z`` for several controls ``(k, layout.size)``, ``(k, m)``, on every rank (collective)."""
        out = np.zeros((len(z), self.shape[0]))
        out[:, self.numbers] = z[:, : self.layout.static_size] @ self.rows.T
        if self.steps is not None:
            out += self.steps.product(z)
        return self.spacetime.sum_over_grid(out)

    def transposed_product(self, y: np.ndarray) -> np.ndarray:
        """``F^T y`` for several data vectors ``(k, m)``, dual vectors ``(k, layout.size)`` (collective over time)."""
        out = np.zeros((len(y), self.layout.size))
        out[:, : self.layout.static_size] = self.spacetime.sum_over_time(y[:, self.numbers] @ self.rows)
        if self.steps is not None:
            self.steps.transposed_product(y, out)
        return out

    def _matvec(self, x: np.ndarray) -> np.ndarray:
        return self.product(np.ravel(x)[None])[0]

    def _rmatvec(self, x: np.ndarray) -> np.ndarray:
        return self.transposed_product(np.ravel(x)[None])[0]

    def _matmat(self, X: np.ndarray) -> np.ndarray:
        return self.product(np.ascontiguousarray(X.T)).T

    def _rmatmat(self, X: np.ndarray) -> np.ndarray:
        return self.transposed_product(np.ascontiguousarray(X.T)).T

    def dot(self, x: Any) -> np.ndarray:
        """``F x`` for a control (a function, or a list with one for each control) or for flat vectors."""
        if isinstance(x, (Real, LinearOperator)):
            return super().dot(x)
        x = self._flat(x)
        collectively(self.spacetime.comm, "", _require_vectors, x, self.shape[1], "F: controls", _OWN_PART)
        return super().dot(x)

    def _transpose(self) -> LinearOperator:
        return _Transposed(self)

    _adjoint = _transpose

    def _flat(self, values: Any) -> np.ndarray:
        """Controls as a flat vector, from functions or from such a vector."""
        if self.functions is None or isinstance(values, np.ndarray):
            return np.asarray(values)
        return collectively(self.spacetime.comm, "", self.functions.array, values)

    def petsc_mat(self) -> PETSc.Mat:
        """The map as a Python matrix of PETSc on all ranks: readings are divided among the ranks, and each entry of the
        controls is on one, those numbered ``partition.own`` in a flat vector on this one (collective).
        """
        return make_petsc_mat(self)

    def predict(self, z: Any) -> np.ndarray:
        """The readings at a control, a function or a flat vector, ``(m,)`` (collective)."""
        return self.offset + self.dot(z)

    def read_again(self) -> np.ndarray:
        """Take readings and weights as the misfits have them now, after ``J.update_data()``, and return the readings
        ``(m,)`` (collective).

        Raises
        ------
        InputError
            On every rank, if anything else has changed that the map depends on.
        """
        if self._description is not None:
            advice = "make the map again, J.parameter_to_observable()"
            what = "the map from controls to readings was made before an update of data"
            collectively(self.spacetime.comm, "", require_same_map, self._problem, self._description(), what, advice)
        self.table.read_again()
        self.data, self.weights = self.table.values, self.table.weights
        return self.data

    def with_readings(
        self, table: ReadingTable, offset: np.ndarray, regularisation: Callable[[], PriorForms] | None, *, same: bool
    ) -> ParameterToObservable:
        """The map with other readings of the same sensors at the same times, which shares its rows (collective).

        Parameters
        ----------
        table, offset, regularisation
            The readings, those at zero controls, and what the default prior follows from.
        same : bool
            Whether the regularisation and the weights of the readings are those of this map, so that the posterior has
            the same spectrum.
        """
        made = copy(self)
        made.table, made.offset, made.regularisation = table, offset, regularisation
        made.data, made.weights = table.values, table.weights
        if not np.array_equal(offset, self.offset):
            made.predictions = None  # their values at zero controls are of the old data
        if self._description is not None and not same:
            made._problem = self._description()
        found = vars(made).pop("default_posterior", None)
        if same and found is not None:
            made.default_posterior = GaussianPosterior(made, found.prior, found.noise, found.spectrum)
        return made


class _Transposed(LinearOperator):
    """``F.T``: dual vectors of controls from vectors of readings, which all ranks give (collective)."""

    def __init__(self, F: ParameterToObservable):
        self._F = F
        super().__init__(float, F.shape[::-1])

    def dot(self, x: Any) -> np.ndarray:
        """``F^T y`` for data vectors ``(m,)`` or ``(m, k)``."""
        if isinstance(x, (Real, LinearOperator)):
            return super().dot(x)
        x, comm = np.asarray(x), self._F.spacetime.comm
        order = "readings, one misfit after the other, time by time, such as values.ravel()"
        collectively(comm, "", _require_vectors, x, self.shape[1], "F.T: readings", order)
        return super().dot(x)

    def _matvec(self, x: np.ndarray) -> np.ndarray:
        return self._F._rmatvec(x)

    def _rmatvec(self, x: np.ndarray) -> np.ndarray:
        return self._F._matvec(x)

    def _matmat(self, X: np.ndarray) -> np.ndarray:
        return self._F._rmatmat(X)

    def _rmatmat(self, X: np.ndarray) -> np.ndarray:
        return self._F._matmat(X)

    def _transpose(self) -> LinearOperator:
        return self._F

    _adjoint = _transpose


def _require_vectors(x: np.ndarray, size: int, what: str, fits: str) -> None:
    """Refuse an array that is neither one vector nor columns of real numbers, on one rank before others wait for it."""
    if x.ndim not in (1, 2) or x.shape[0] != size or x.dtype.kind not in "buif":
        raise InputError(
            f"{what} of shape {x.shape} and type {x.dtype}: give ({size},), or ({size}, k) for several, real numbers: "
            f"the {fits}"
        )

r"""The map :math:`F` from controls to readings of a linear evolution with constant operators, as a matrix.

.. math::  y(z) = F z + y_0 ,

with the readings :math:`y_0` at zero controls. Each sensor takes one adjoint sweep
(:mod:`pint_fem.inverse.impulse_responses`); the sensors are divided among the ranks in time, and their rows stay there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from numbers import Real
from typing import Any, NamedTuple

import numpy as np
from scipy.sparse.linalg import LinearOperator

from pint_fem.all_at_once.grids import split_steps
from pint_fem.capacity import require_memory
from pint_fem.collective import collectively, require_same
from pint_fem.errors import InputError
from pint_fem.evolution.control_layout import ControlLayout
from pint_fem.inverse.impulse_responses import GROUP, lags_of_block, sequential_responses
from pint_fem.inverse.noise import Noise, make_noise
from pint_fem.inverse.partition import Partition
from pint_fem.inverse.per_step.applied_modes import LARGEST_DENSE, low_rank_modes, step_modes
from pint_fem.inverse.per_step.toeplitz import ToeplitzMap, step_map_bytes
from pint_fem.inverse.posterior import GaussianPosterior
from pint_fem.inverse.priors import Prior, make_prior
from pint_fem.inverse.readings import ReadingTable
from pint_fem.inverse.reduction import ReducedRows, estimated_size
from pint_fem.inverse.response_rows import StepTerm, collectors, own_readings, step_terms
from pint_fem.inverse.spectra import DataSpace, ParameterSpace, Spectrum
from pint_fem.propagators.linear import LinearPropagator
from pint_fem.sweeps.sweeps import Sweeps

__all__ = ["ParameterToObservable", "PriorForms", "require_map"]


class PriorForms(NamedTuple):
    """What the default prior follows from.

    Attributes
    ----------
    forms : list of (ufl.Form or None), or None
        Second derivatives of the regularisation by each control, ``None`` where it is zero or not constant.
    gradient : ndarray, shape (layout.size,), or None
        Derivative of the regularisation at zero.
    """

    forms: list | None
    gradient: np.ndarray | None


def require_map(sweeps: Sweeps) -> LinearPropagator:
    """The finest propagator of an evolution for which the map exists.

    Raises
    ------
    InputError
        If the evolution is not linear with constant operators.
    """
    propagator = sweeps.propagators[0]
    if not isinstance(propagator, LinearPropagator):
        raise InputError(
            "parameter_to_observable: the steps are not those of a linear evolution with constant operators "
            f"({type(propagator).__name__}), so that responses do not depend on the lag alone: use "
            "minimize_trust_region"
        )
    return propagator


class ParameterToObservable(LinearOperator):
    """The map from controls to readings, a ``scipy.sparse.linalg.LinearOperator`` of shape ``(m, layout.size)``.

    Vectors of controls are a rank's own part ``(layout.size,)`` of a distributed vector, and ``F.T @ y`` is a dual
    vector; vectors of readings ``(m,)`` are whole on every rank, in the order of :class:`ReadingTable`. All products
    are collective.

    Parameters
    ----------
    sweeps
        The solvers of the evolution.
    layout
        The controls.
    misfits
        Bound misfits whose observations are finitely many.
    offset
        Readings at zero controls, ``(m,)``.
    functions
        What converts controls, with methods ``array(values)`` and ``function(array, dual=)``; default: none.
    regularisation
        Returns what the default prior follows from.
    inner
        The inner product of the controls, for the prior ``"riesz_map"``.

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
    """

    def __init__(
        self,
        sweeps: Sweeps,
        layout: ControlLayout,
        misfits: Sequence,
        offset: np.ndarray,
        *,
        functions: Any = None,
        regularisation: Callable[[], PriorForms] | None = None,
        inner: Any = None,
    ):
        self.layout, self.spacetime = layout, layout.spacetime
        self.functions, self.regularisation, self._inner = functions, regularisation, inner
        self.propagator = require_map(sweeps)
        self.table = ReadingTable(misfits)
        self.offset, self.data, self.weights = offset, self.table.values, self.table.weights
        super().__init__(float, (self.table.size, layout.size))
        time_comm = self.spacetime.time_comm
        bounds = split_steps(self.table.sensors, time_comm.size)
        self.sensors = np.arange(bounds[time_comm.rank], bounds[time_comm.rank + 1])
        self.numbers, self.readings = own_readings(self.table, self.sensors)
        self._require_memory()
        self.rows = np.zeros((len(self.numbers), layout.static_size))
        self.steps: ToeplitzMap | None = None
        self._build()

    def _require_memory(self) -> None:
        """Refuse a map that does not fit the memory of the machines (collective)."""
        require_memory(
            self.spacetime.comm,
            self.nbytes,
            f"{self.table.size} rows of the map from controls to readings",
            "give fewer readings, a coarser control, or more ranks",
        )

    @property
    def nbytes(self) -> int:
        """Bytes of the rows of this rank, and of the sweep's blocks of lags."""
        ev, stages = self.propagator.evolution, self.propagator.dirk.stages
        lags = lags_of_block(ev.V.mesh().comm, ev.state_size)
        work = min(GROUP, len(self.sensors)) * (lags + 1) * (1 + 2 * stages) * ev.state_size
        steps = step_map_bytes(self.propagator, self.table, self.sensors, self.layout) if ev.per_step else 0
        return 8 * (len(self.numbers) * self.layout.static_size + work) + steps

    def _build(self) -> None:
        """Compute the rows by the sweep of this rank's sensors (collective)."""
        ev = self.propagator.evolution
        lags = int(self.table.point.max(initial=0)) + (ev.initial_control is not None)

        def sweep() -> list[StepTerm]:
            terms = step_terms(self.propagator, len(self.sensors), lags)
            for first in range(0, len(self.sensors), GROUP):
                group = slice(first, first + GROUP)
                parts = [term.responses[group] for term in terms]
                found = collectors(self.propagator, self.readings[group], self.rows, parts)
                impulses = self.table.impulses(self.sensors[group])
                for block in sequential_responses(self.propagator, impulses, lags):
                    for collector in found:
                        collector.add(block)
            return terms

        terms = collectively(self.spacetime.comm, "map from controls to readings", sweep)
        if ev.per_step:
            self.steps = ToeplitzMap(terms, self.table, self.sensors, self.layout)

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
        return super().dot(x if isinstance(x, (Real, LinearOperator)) else self._flat(x))

    def _flat(self, values: Any) -> np.ndarray:
        """Controls as a flat vector, from functions or from such a vector."""
        if self.functions is None or isinstance(values, np.ndarray):
            return np.asarray(values)
        return collectively(self.spacetime.comm, "", self.functions.array, values)

    def predict(self, z: Any) -> np.ndarray:
        """The readings at a control, a function or a flat vector, ``(m,)`` (collective)."""
        return self.offset + self.dot(z)

    # -- inversion -----------------------------------------------------------------------------------------------------
    @cached_property
    def partition(self) -> Partition:
        """Division of parameter vectors among the ranks in time."""
        return Partition(self.layout)

    @cached_property
    def reduced(self) -> ReducedRows:
        """Reduced rows of static controls (collective when first used)."""
        return ReducedRows(self.rows, [own.rows for own in self.readings], self.numbers, self.spacetime)

    def posterior(
        self,
        prior: Any = None,
        noise: Any = None,
        *,
        alpha: float = 1.0,
        mean: Any = None,
        tolerance: float = 1e-6,
    ) -> GaussianPosterior:
        """The Gaussian posterior of the controls (collective).

        Parameters
        ----------
        prior
            The controls' prior, as :func:`~pint_fem.inverse.priors.make_prior` takes it; default: that of the
            functional's regularisation, so that the posterior's mean minimises the functional.
        noise
            The readings' noise, as :func:`~pint_fem.inverse.noise.make_noise` takes it; default: that of the misfits'
            weights.
        alpha
            Weight of the prior: a factor of its precision.
        mean
            The prior's mean, as controls or a flat vector; default: the minimiser of the regularisation, or zero.
        tolerance
            Where there are too many readings and controls for dense matrices: the bound of eigenvalues of the misfit's
            Hessian relative to the prior that may be left out. An estimate of the largest one of these is
            ``posterior.spectrum.remainder``.

        Raises
        ------
        InputError
            On every rank, if prior, noise, weight or tolerance do not fit.
        """
        require_same(self.spacetime.comm, tolerance=tolerance)
        if not isinstance(tolerance, Real) or not 0 < tolerance < np.inf:
            raise InputError(f"posterior: tolerance = {tolerance!r}: give a positive number, such as 1e-6")
        forms = PriorForms(None, None)
        by_default = prior is None or (isinstance(prior, (list, tuple)) and any(one is None for one in prior))
        if by_default and self.regularisation is not None:
            forms = self.regularisation()
        law = make_prior(
            prior,
            self.layout,
            regularisation_forms=forms.forms,
            regularisation_gradient=forms.gradient,
            mean=None if mean is None else self._flat(mean),
            inner=self._inner,
        )
        noise = collectively(
            self.spacetime.comm, "", make_noise, noise, self.weights, self.table.sensor, self.table.sensors
        )
        return GaussianPosterior(self, law, noise, self._spectrum(law, noise, tolerance), alpha=alpha)

    def _spectrum(self, prior: Prior, noise: Noise, tolerance: float = 1e-6) -> Spectrum:
        """The spectral decomposition in the smaller one of the spaces of readings and of controls (collective)."""
        if self.steps is not None:
            return step_modes(self, prior, noise, tolerance=tolerance)
        unknowns = int(self.spacetime.space_comm.allreduce(self.layout.static_size))
        if unknowns <= self.table.sensors:
            return ParameterSpace(self, prior, noise, self.partition)
        estimated = estimated_size(self.rows, [own.rows for own in self.readings], self.spacetime)
        if min(unknowns, estimated) > LARGEST_DENSE:
            return low_rank_modes(self, prior, noise, tolerance=tolerance)
        if unknowns <= estimated:
            return ParameterSpace(self, prior, noise, self.partition)
        covered = prior.covariance(self.reduced.C, shared=False)
        return DataSpace(self.reduced, covered, noise, self.partition)

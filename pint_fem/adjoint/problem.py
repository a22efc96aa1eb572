r"""Value and gradient of the functional of one evolution, by time-parallel sweeps.

.. math::
    J(z) = \sum_n j_n(u_n) + R(z), \qquad
    J'(z) = \sum_n \Phi_{n,z}^T \lambda_{n+1} + R'(z),

with the state :math:`u_{n+1} = \Phi_n(u_n, z)` and the adjoint :math:`\lambda` driven by :math:`j_n'(u_n)`. The
derivative by the initial condition is :math:`\lambda_0`. Hessian actions are in
:mod:`pint_fem.adjoint.second_derivatives`.

Each trajectory is solved once for a control (:mod:`pint_fem.adjoint.evaluation`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import copy

import numpy as np
import ufl

from pint_fem.adjoint.consistency.problem_data import require_same_problem
from pint_fem.adjoint.consistency.user_data import UserData
from pint_fem.adjoint.evaluation import Evaluation, EvaluationCache, relative_residual
from pint_fem.adjoint.interface import SweepAccuracy, SweepLimits, SweptProblem, as_vector
from pint_fem.adjoint.memory_estimate import MemoryEstimate, estimate_memory
from pint_fem.adjoint.regularisation import Regularisation
from pint_fem.adjoint.second_derivatives import SecondDerivatives
from pint_fem.adjoint.trajectories import CPointTrajectories, StoredTrajectories, trajectories
from pint_fem.all_at_once.norms import gather_in_order
from pint_fem.errors import InputError
from pint_fem.evolution.control_layout import ControlLayout
from pint_fem.evolution.evolution import Evolution
from pint_fem.evolution.tableaux import tableau_name
from pint_fem.mgrit.options import MGRITOptions
from pint_fem.misfits.base import BlockMisfit, Misfit
from pint_fem.misfits.sensor_readings import SensorReadings
from pint_fem.sweeps.sweeps import Sweeps

__all__ = ["ReducedProblem"]

_ROUND_OFF = 16 * np.finfo(float).eps
"""Least relative error of a state."""
_NEAR = 1e3
"""A misfit is a fit to round-off where it is at most this many errors of the state."""


class ReducedProblem(SecondDerivatives, SweptProblem):
    """The functional of one evolution on arrays.

    Parameters
    ----------
    sweeps
        The solvers.
    misfits
        One or several. Those of another functional are copied.
    regularisation
        UFL functionals of the controls.

    Attributes
    ----------
    sweeps : Sweeps
        The solvers.
    misfits : list of Misfit
        The misfits, bound to the slab.
    data : UserData
        The user's data as they were read.

    Raises
    ------
    InputError
        On every rank, if an argument does not fit or differs between ranks.
    """

    def __init__(self, sweeps: Sweeps, misfits: Misfit | Sequence[Misfit], regularisation: Sequence[ufl.Form] = ()):
        self.sweeps, self.evolution, self.spacetime = sweeps, sweeps.evolution.posed, sweeps.spacetime
        self._given = [misfits] if isinstance(misfits, Misfit) else list(misfits)
        if not self._given or not all(isinstance(m, Misfit) for m in self._given):
            raise InputError("misfits: give RunningMisfit, TerminalMisfit, PointSensors or LinearObservations objects")
        self.misfits = [copy(m) if m.is_bound else m for m in self._given]
        require_same_problem(self.spacetime, self.evolution, self.misfits, regularisation)
        if not self.evolution.controls:
            raise InputError("the evolution has no control=: there is nothing to optimise")
        self.layout = ControlLayout(self.evolution, self.spacetime, sweeps.slab)
        self._trajectories = trajectories(sweeps, self.misfits)
        self.regularisation = None
        if regularisation:
            self.regularisation = Regularisation(regularisation, self.layout, sweeps.evolution)
        self.data = UserData(sweeps, self.misfits, self.regularisation)
        view = self._print_memory if sweeps.options.view else None
        self._cache = EvaluationCache(sweeps, self._trajectories, self.layout, self.data, view)

    # -- the interface's part for one evolution ------------------------------------------------------------------------
    def weighted_leaves(self, weight: float = 1.0) -> list[tuple[float, ReducedProblem]]:
        """Return the weight and the problem itself."""
        return [(weight, self)]

    def leaf_terms(self, z: np.ndarray, weight: float = 1.0) -> list[tuple[float, ReducedProblem, np.ndarray]]:
        """Return the weight, the problem itself and its controls."""
        return [(weight, self, z)]

    def leaf_numbers(self) -> list[int]:
        """Return the number of the only leaf."""
        return [0]

    def leaf_weights(self) -> list[tuple[int, float]]:
        """Return the number and the weight of the only leaf."""
        return [(0, 1.0)]

    @property
    def evolutions(self) -> list[Evolution]:
        """The evolution, as the user posed it."""
        return [self.evolution]

    @property
    def description(self) -> str:
        """Evolution, misfits and time solver in a few words."""
        ev, options = self.evolution, self.sweeps.options
        solver = "serial" if self.sweeps.solvers.is_sequential else type(options).__name__.removesuffix("Options")
        solver += f" on {options.levels} levels" if isinstance(options, MGRITOptions) and options.levels > 1 else ""
        misfits = ", ".join(type(m).__name__ for m in self.misfits)
        steps = f"{tableau_name(ev.tableau)}, {ev.nsteps} steps of {ev.dt:g}, {ev.V.dim()} unknowns"
        return f"{steps}, {misfits}, {solver}"

    @property
    def is_quadratic(self) -> bool:
        """Whether ``J`` is a quadratic function of the controls: affine steps, quadratic misfits and regularisation."""
        return self.is_piecewise_quadratic and all(m.quadratic for m in self.misfits)

    @property
    def is_piecewise_quadratic(self) -> bool:
        """Whether ``J`` is one quadratic function or several with continuous first derivatives between them."""
        regularisation = self.regularisation is None or self.regularisation.quadratic
        return self.sweeps.is_affine and all(m.quadratic or m.piecewise for m in self.misfits) and regularisation

    def invalidate(self) -> None:
        """Discard all solutions: the next solves start from the initial condition and from zero."""
        self._cache.invalidate()

    def keep_evaluations(self, count: int) -> None:
        """Store the trajectories of the last ``count`` controls, two slabs for each."""
        self._cache.resize(count)

    def update_data(self) -> list[str]:
        """Read the user's data again, and return the names of those that have other values than before."""
        changed = self.data.update()
        for evaluation in self.evaluations:
            evaluation.move_to(None)
        return changed

    def memory(self) -> MemoryEstimate:
        """Return the memory of this rank by part, before or after a run (collective)."""
        return estimate_memory(self)

    def _print_memory(self) -> None:
        self.spacetime.log(str(self.memory()))

    @property
    def cache(self) -> EvaluationCache:
        """The evaluations of the last controls, and solves for their trajectories."""
        return self._cache

    @property
    def trajectories(self) -> StoredTrajectories | CPointTrajectories:
        """The misfits along trajectories."""
        return self._trajectories

    @property
    def evaluations(self) -> tuple[Evaluation, ...]:
        """The cached evaluations, that of the last control first."""
        return tuple(self._cache.evaluations)

    @property
    def U(self) -> np.ndarray:
        """State of the last control, ``(k + 1, n)``; at the C-points with ``storage="C"``."""
        return self._cache.latest.U

    @property
    def L(self) -> np.ndarray:
        """Adjoint of the last control, as :attr:`U`."""
        return self._cache.latest.L

    def at(self, z: np.ndarray, **accuracy: float) -> Evaluation:
        """Return the evaluation of a control, of which the state need not be solved, and make it the latest one."""
        return self._cache.at(z, **accuracy)

    # -- values --------------------------------------------------------------------------------------------------------
    def value(self, z: np.ndarray, **accuracy: float) -> float:
        """Return ``J(z)``, the identical number on every rank; ``rtol`` is the tolerance of the state, by default that
        of the options.
        """
        return self._value(self._cache.state(z, **accuracy))

    def _value(self, evaluation: Evaluation) -> float:
        """Return ``J`` of the current state."""
        if evaluation.value is None:
            with self._cache.resetting_on_failure(evaluation):
                shares = self._trajectories.values(evaluation, self.layout.steps(evaluation.z))
            sums = gather_in_order(shares, self.spacetime.time_comm).sum(axis=0)
            regularisation = 0.0 if self.regularisation is None else self.regularisation.value(evaluation.z)
            evaluation.parts = {"misfit": float(sums.sum()), "regularisation": regularisation}
            evaluation.value = evaluation.parts["misfit"] + regularisation
            if not np.isfinite(evaluation.value):  # its trajectories are no first guesses
                evaluation.cold = dict.fromkeys(evaluation.cold, True)
        return evaluation.value

    @property
    def parts(self) -> dict[str, float]:
        """Value of the ``"misfit"`` and of the ``"regularisation"`` at the last control."""
        return dict(self._cache.latest.parts)

    def reassess(self, evaluation: Evaluation) -> dict[str, float]:
        """Return misfit and regularisation of the current state (collective)."""
        self._value(evaluation)
        return dict(evaluation.parts)

    def index_of(self, misfit: Misfit) -> int | None:
        """Return the number of a misfit among the problem's, ``None`` if it is not one of them."""
        pairs = enumerate(zip(self.misfits, self._given, strict=True))
        return next((i for i, pair in pairs if any(misfit is m for m in pair)), None)

    def observations(self, z: np.ndarray, misfit: BlockMisfit) -> np.ndarray:
        """Return what a misfit of the problem observes at the local points, ``(k + 1, width)`` (collective)."""
        index = self.index_of(misfit)
        if index is None or not isinstance(misfit, BlockMisfit):
            raise InputError(f"observations of {misfit!r}: give a misfit of this problem that is a BlockMisfit")
        evaluation = self._cache.state(z)
        return self._trajectories.observations(evaluation, self.layout.steps(evaluation.z), index)

    def readings(self, z: np.ndarray, misfit: SensorReadings) -> np.ndarray:
        """Return the readings of a misfit of sensors at a control's state, ``(times, sensors)`` (collective)."""
        index = self.index_of(misfit)
        if index is None or not isinstance(misfit, SensorReadings):
            raise InputError(f"readings of {misfit!r}: give a misfit of this problem that has sensors")
        return self.misfits[index].readings(self.observations(z, misfit))

    def states(self, z: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """Yield the state at all local points from left to right, for either storage: the number of the first point of
        a block, and its states ``(b, n)``. The first block is computed collectively. A block is valid until the next
        one; no other control may be evaluated before the last.
        """
        evaluation = self._cache.state(z)
        yield from self._trajectories.states(evaluation, self.layout.steps(evaluation.z))

    def adjoints(self, z: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """Yield the adjoint at all local points, as :meth:`states` yields the state."""
        self.derivative(z)
        evaluation = self._cache.latest
        yield from self._trajectories.adjoints(evaluation, self.layout.steps(evaluation.z))

    def state_residual(self, evaluation: Evaluation) -> tuple[float, float]:
        """Return the norms of the residual ``Phi(U) - U`` of the current state in all steps, and of the state
        (collective); the residual is computed by :meth:`pint_fem.sweeps.sweeps.Sweeps.state_residual`.
        """
        z = evaluation.z
        return self.sweeps.state_residual(self.layout.steps(z), evaluation.U, initial=self.layout.initial(z))

    # -- first derivatives ---------------------------------------------------------------------------------------------
    def tangent_value(self, z: np.ndarray, dz: np.ndarray) -> float:
        """Return ``J'(z) dz``, computed by a tangent sweep, the identical number on every rank."""
        dz = as_vector(dz)
        self._cache.find(z, {"direction": dz})
        evaluation = self._cache.state(z)
        dU, _ = self._tangent(evaluation, dz)
        steps, direction = self.layout.steps(evaluation.z), self.layout.steps(dz)
        shares = self._trajectories.directional(evaluation, steps, direction, dU)
        total = float(gather_in_order(shares, self.spacetime.time_comm).sum())
        if self.regularisation is not None:
            total += self.layout.pairing(self.regularisation.gradient(evaluation.z), dz)
        return total

    def derivative(self, z: np.ndarray, **accuracy: float) -> np.ndarray:
        """Return ``J'(z)`` as a dual vector; ``rtol`` is the tolerance of state and adjoint, by default that of the
        options.
        """
        return self.gradient_of(self._cache.adjoint(z, **accuracy))

    def gradient_of(self, evaluation: Evaluation) -> np.ndarray:
        """Return ``J'`` of the current state and adjoint (collective)."""
        if evaluation.gradient is None:
            with self._cache.resetting_on_failure(evaluation):
                if evaluation.controls is None:
                    steps = self.layout.steps(evaluation.z)
                    evaluation.controls = self._trajectories.direct_controls(evaluation, steps)
                evaluation.gradient = self._pull_back(evaluation, evaluation.L, evaluation.controls)
            if self.regularisation is not None:
                evaluation.gradient += self.regularisation.gradient(evaluation.z)
        return evaluation.gradient.copy()

    def current_derivative(self, z: np.ndarray, *, regularised: bool = True) -> np.ndarray:
        """Return ``J'(z)`` from the cached state and adjoint (collective)."""
        evaluation = self.at(z)
        g = self.gradient_of(evaluation)
        return g if regularised or self.regularisation is None else g - self.regularisation.gradient(evaluation.z)

    def accuracy_at(self, z: np.ndarray) -> SweepAccuracy:
        """Return how accurately state and adjoint are solved; sequential solves have no residual."""
        evaluation = self.at(z)
        state, adjoint = evaluation.state, evaluation.adjoint
        size = lambda result: result.scale if result is not None and np.isfinite(result.scale) else 0.0
        relative = np.inf if state is None else relative_residual(state)
        residual = relative * size(state) if size(state) else 0.0
        return SweepAccuracy(
            relative, np.nan if adjoint is None else relative_residual(adjoint), residual, size(adjoint)
        )

    def has_symmetric_actions(self) -> bool:
        """Return whether there are transposed cycles or iterations, which are made here (collective)."""
        return self.sweeps.solvers.transposed_adjoint is not None

    @property
    def limits(self) -> SweepLimits:
        """What the options of the sweeps allow."""
        options = self.sweeps.options
        has_residuals = not (options.residual == "none" and options.levels > 1)
        return SweepLimits(options.rtol, options.max_it, has_residuals, self.sweeps.solvers.accelerated)

    def advance(self, z: np.ndarray) -> tuple[float, np.ndarray, float]:
        """Return ``J`` and ``J'`` after one MGRIT cycle for state and adjoint, and the larger relative residual."""
        evaluation = self._cache.state(z, cycles=1)
        value = self._value(evaluation)
        self._cache.adjoint_of(evaluation, cycles=1)
        residual = max(relative_residual(r) for r in (evaluation.state, evaluation.adjoint))
        return value, self.gradient_of(evaluation), residual

    def gradient_error(self, z: np.ndarray) -> np.ndarray | None:
        """Return a dual vector of the size of the error of ``J'(z)`` where the state fits the data up to about its own
        error, else ``None`` (and then without a sweep).

        Near such a fit the adjoint's right-hand side is a difference of much larger numbers, whose relative error is
        that of the state: round-off, or the sum of the last residuals of all steps.
        """
        evaluation = self._cache.state(z)
        error = max(2 * np.sqrt(self.evolution.nsteps) * relative_residual(evaluation.state), _ROUND_OFF)
        steps = self.layout.steps(evaluation.z)
        with self._cache.resetting_on_failure(evaluation):
            source = self._trajectories.gradient(evaluation, steps)
            terms = self._trajectories.hessian(evaluation, steps, None, evaluation.U, second=False)
        last = None if self.sweeps.slab.is_last else -1
        squares = self.spacetime.sum_over_grid(np.array([(s.rows[:last] ** 2).sum() for s in (source, terms)]))
        if not np.sqrt(squares[0]) <= _NEAR * error * np.sqrt(squares[1]):
            return None
        M = self.sweeps.new_slab()
        self.sweeps.adjoint(steps, evaluation.U, terms.rows, M, cold=True)
        return error * self._pull_back(evaluation, M, terms.controls)

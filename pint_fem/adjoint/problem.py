r"""The reduced problem on arrays: ``J(z)``, ``J'(z)``, ``J''(z) dz`` by time-parallel sweeps, each computed once for
a ``z``.

.. math::
    J(z) = \sum_n j_n(u_n) + R(z), \qquad
    J'(z) = \sum_n \Phi_{n,z}^T \lambda_{n+1} + R'(z), \qquad
    J''(z)\,dz = \sum_n \Phi_{n,z}^T \mu_{n+1} + \text{second-order terms of the steps} + R''(z)\,dz,

with the adjoint :math:`\lambda` driven by :math:`j_n'(u_n)` and the second-order adjoint :math:`\mu` by
:math:`j_n''(u_n)\,\delta u_n`. The derivative by the initial condition is :math:`\lambda_0`. The Gauss-Newton action
leaves out the second-order terms of the steps.

Solves may be asked for a tolerance of their own (``rtol``): what is known to it or better is not solved again, and
what is known less well is the first guess.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy

import numpy as np

from pint_fem.adjoint.consistency.same_control import Copies
from pint_fem.adjoint.consistency.same_problem import require_same_problem
from pint_fem.adjoint.consistency.user_data import Data
from pint_fem.adjoint.control_layout import ControlLayout
from pint_fem.adjoint.evaluation import Point, relative_residual
from pint_fem.adjoint.memory import Memory, memory
from pint_fem.adjoint.regularisation import Regularisation
from pint_fem.adjoint.trajectories import Source, trajectories
from pint_fem.all_at_once.norms import gather_in_order
from pint_fem.all_at_once.stopping import SolveResult, SolverFailure
from pint_fem.collective import collectively
from pint_fem.errors import FAILURES, InputError
from pint_fem.misfits.base import BlockMisfit, Misfit
from pint_fem.sweeps.sweeps import Sweeps

__all__ = ["ReducedProblem"]


_ROUND_OFF, _NEAR = 16 * np.finfo(float).eps, 1e3
"""Least relative error of a state; fits to this times a state's error are near it."""


class ReducedProblem:
    """See the module. A control is a flat array (see :mod:`~pint_fem.adjoint.control_layout`); derivatives are dual vectors of
    that shape.

    Parameters
    ----------
    sweeps
        The solvers.
    misfits
        At least one.
    regularisation
        UFL functional of the controls, several, or ``None``.

    Attributes
    ----------
    layout : ControlLayout
    """

    def __init__(self, sweeps: Sweeps, misfits: Sequence[Misfit], regularisation=None):
        self.sweeps, self.evolution, self.spacetime = sweeps, sweeps.evolution.posed, sweeps.spacetime
        self.misfits = [misfits] if isinstance(misfits, Misfit) else list(misfits)
        if not self.misfits or not all(isinstance(m, Misfit) for m in self.misfits):
            raise InputError("misfits: give RunningMisfit, TerminalMisfit or PointSensors objects")
        self._given, self.misfits = self.misfits, [copy(m) if m.is_bound else m for m in self.misfits]  # shared
        require_same_problem(self.spacetime, self.evolution, self.misfits, regularisation)
        if not self.evolution.controls:
            raise InputError("the evolution has no control=: there is nothing to optimise")
        self.layout = ControlLayout(self.evolution, self.spacetime, sweeps.slab)
        self._trajectories = trajectories(sweeps, self.misfits)
        self.regularisation = None
        if regularisation is not None:
            self.regularisation = Regularisation(regularisation, self.layout, sweeps.evolution)
        self._copies = Copies(self.layout)
        #: What the user's data were when they were read.
        self.data = Data(sweeps, self.misfits, self.regularisation)
        self._points = [Point(sweeps)]
        self._viewed = not sweeps.options.view

    @property
    def U(self) -> np.ndarray:
        """State of the control asked for last, ``(k + 1, n)``."""
        return self._points[0].U

    @property
    def L(self) -> np.ndarray:
        """Its adjoint."""
        return self._points[0].L

    @property
    def points(self) -> tuple[Point, ...]:
        """What is known, the control asked for last first."""
        return tuple(self._points)

    @property
    def is_quadratic(self) -> bool:
        """Whether ``J`` is a quadratic function of the control: affine steps, quadratic misfits and regularisation."""
        regularisation = self.regularisation is None or self.regularisation.quadratic
        return self.sweeps.is_linear and all(m.quadratic for m in self.misfits) and regularisation

    def forget(self) -> None:
        """Forget what was solved: the next solves start cold."""
        self.sweeps.solvers.invalidate()
        for point in self._points:
            point.reset(self.sweeps.initial)

    def keep_points(self, count: int) -> None:
        """Remember the last ``count`` controls and their trajectories, two slabs each."""
        del self._points[count:]
        while len(self._points) < count:
            self._points.append(Point(self.sweeps))

    def update_data(self) -> list[str]:
        """Read the user's data again; what has other values than before (collective). See
        :meth:`~pint_fem.adjoint.functional.ControlFunctional.update_data`.
        """
        changed = self.data.update()
        for point in self._points:
            point.move_to(None)
        return changed

    def memory(self) -> Memory:
        """Memory of this rank by part, known before a run (collective); see :mod:`~pint_fem.adjoint.memory`."""
        return memory(self)

    # -- caches --------------------------------------------------------------------------------------------------------
    def _find(self, z: np.ndarray, directions: Mapping[str, np.ndarray] | None = None, **wanted) -> Point | None:
        """The point of a control, the same on all ranks; they are required to call for the same."""
        z = np.asarray(z, dtype=float)
        same = [p.z is not None and np.array_equal(p.z, z.ravel()) for p in self._points]
        votes = [*same, *(not changed for changed in self.data.changed())]
        vectors = {"control": z, **(directions or {})}
        votes = self._copies.agree(vectors, call=wanted, votes=votes, failure=self.data.failure)
        known = votes[: len(same)]
        self.data.warn(~votes[len(same) :])
        return self._points[int(np.argmax(known))] if known.any() else None

    def at(self, z: np.ndarray, **wanted) -> Point:
        """The point of a control, the state maybe not solved yet; it comes first. Copies that differ are refused."""
        z = np.array(z, dtype=float).ravel()
        point = self._find(z, **wanted)
        if point is None:
            point = self._points[-1]
            if point is not self._points[0]:
                point.start_from(self._points[0])
            point.move_to(z)
        self._points.remove(point)
        self._points.insert(0, point)
        return point

    def _solve(self, point: Point, kind: str, wanted: dict, solve) -> None:
        """Solve for the state or the adjoint of a point, unless it is known to the tolerance wanted."""
        rtol = wanted.get("rtol", self.sweeps.options.rtol)
        if "cycles" not in wanted and point.rtol[kind] <= rtol:
            return
        if not self._viewed:
            self._viewed, text = True, str(self.memory())
            show = self.sweeps.solvers.printer if self.spacetime.is_root else len
            collectively(self.spacetime.comm, "printer", show, text)
        trajectory = point.U if kind == "state" else point.L
        point.rtol[kind] = np.inf
        first_guess = self.sweeps.initial if kind == "state" else 0
        # from a first guess that another control has left, and if that fails without: no failure is due to the past
        retries = not ("cycles" in wanted or self.sweeps.solvers.is_sequential)
        for cold in (True,) if point.cold[kind] else (False, True):
            if cold:
                trajectory[:] = first_guess
            try:
                result = solve(trajectory, cold=cold)
                break
            except FAILURES as failure:
                trajectory[:] = first_guess
                self.sweeps.solvers.invalidate(factors=True)
                if cold or not retries or not isinstance(failure, SolverFailure):
                    point.cold[kind] = True
                    point.move_to(None) if kind == "state" else point.state_changed()
                    raise
        point.cold[kind] = False
        if kind == "state":
            point.state_changed()
            point.state = result
        else:
            point.gradient, point.adjoint = None, result
        point.rtol[kind] = 0.0 if result.reason in ("exact", "serial") else np.inf if "cycles" in wanted else rtol

    def _solve_state(self, z: np.ndarray, **wanted) -> Point:
        point = self.at(z, **wanted)
        steps, initial = self.layout.steps(point.z), self.layout.initial(point.z)
        solve = lambda U, cold: self.sweeps.state(steps, U, initial=initial, cold=cold, **wanted)
        self._solve(point, "state", wanted, solve)
        return point

    def _solve_adjoint(self, z: np.ndarray, **wanted) -> Point:
        point = self._solve_state(z, **{k: v for k, v in wanted.items() if k == "rtol"})
        if "cycles" in wanted or point.rtol["adjoint"] > wanted.get("rtol", self.sweeps.options.rtol):
            self._solve_adjoint_of(point, **wanted)
        return point

    def _solve_adjoint_of(self, point: Point, **wanted) -> None:
        """For a point's state as it is."""
        steps = self.layout.steps(point.z)
        with self._judging(point):
            source = self._trajectories.gradient(point, steps)
        solve = lambda L, cold: self.sweeps.adjoint(steps, point.U, source.rows, L, cold=cold, **wanted)
        self._solve(point, "adjoint", wanted, solve)
        point.controls = source.controls

    @contextmanager
    def _judging(self, point: Point) -> Iterator[None]:
        """A trajectory of which no value or gradient can be computed is no first guess."""
        try:
            yield
        except SolverFailure:
            point.reset(self.sweeps.initial)
            self.sweeps.solvers.invalidate(factors=True)
            raise

    # -- values --------------------------------------------------------------------------------------------------------
    def value(self, z: np.ndarray, **wanted) -> float:
        """``J(z)``; the same bits on every rank. ``rtol``: tolerance of the state if not the options'."""
        return self._value(self._solve_state(z, **wanted))

    def _value(self, point: Point) -> float:
        if point.value is None:
            with self._judging(point):
                points = self._trajectories.values(point, self.layout.steps(point.z))
            sums = gather_in_order(points, self.spacetime.time_comm).sum(axis=0)
            regularisation = 0.0 if self.regularisation is None else self.regularisation.value(point.z)
            point.parts = {"misfit": float(sums.sum()), "regularisation": regularisation}
            point.value = point.parts["misfit"] + regularisation
            if not np.isfinite(point.value):  # its trajectories are no first guesses
                point.cold = dict.fromkeys(point.cold, True)
        return point.value

    def observations(self, z: np.ndarray, misfit: BlockMisfit) -> np.ndarray:
        """What a misfit observes of the state of a control at the local points, ``(k + 1, width)``, with either storage
        (collective): ``sensors.readings(problem.observations(z, sensors))``.

        Raises
        ------
        InputError
            If the misfit is none of the problem's, or looks at whole slabs.
        """
        known = [i for i, pair in enumerate(zip(self.misfits, self._given, strict=True)) if misfit in pair]
        if not known or not isinstance(misfit, BlockMisfit):
            raise InputError(f"observations of {misfit!r}: give a misfit of this problem that is a BlockMisfit")
        point = self._solve_state(z)
        return self._trajectories.observations(point, self.layout.steps(point.z), known[0])

    def states(self, z: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """The state of a control at all local points, with either storage: number of the first point and states
        ``(b, n)``, from left to right; a block is valid until the next one is asked for. The first is asked for by all
        ranks; ask for no other control in between.
        """
        point = self._solve_state(z)
        yield from self._trajectories.states(point, self.layout.steps(point.z))

    def reassess(self, point: Point) -> dict[str, float]:
        """Misfit and regularisation of a point from its trajectory as it is (collective)."""
        self._value(point)
        return dict(point.parts)

    def state_residual(self, point: Point) -> tuple[float, float]:
        """Norm of what a point's state lacks to solve the steps, and of the state (collective)."""
        z = point.z
        return self.sweeps.state_residual(self.layout.steps(z), point.U, initial=self.layout.initial(z))

    @property
    def parts(self) -> dict[str, float]:
        """Misfit and regularisation of the control asked for last."""
        return dict(self._points[0].parts)

    def tangent_value(self, z: np.ndarray, dz: np.ndarray) -> float:
        """``J'(z) dz`` by a tangent sweep."""
        self._find(z, {"direction": dz})
        point = self._solve_state(z)
        dU, _ = self._tangent(point, dz)
        steps, direction = self.layout.steps(point.z), self.layout.steps(np.ravel(dz))
        points = self._trajectories.directional(point, steps, direction, dU)
        total = float(gather_in_order(points, self.spacetime.time_comm).sum())
        if self.regularisation is not None:
            total += self.layout.pairing(self.regularisation.gradient(point.z), np.ravel(dz))
        return total

    def _tangent(self, point: Point, dz: np.ndarray, **wanted) -> tuple[np.ndarray, SolveResult]:
        """Tangent of the state, from zero, and the result of its solve."""
        dz, dU = np.asarray(dz, dtype=float).ravel(), self.sweeps.new_slab()
        steps, direction = self.layout.steps(point.z), self.layout.steps(dz)
        return dU, self.sweeps.tangent(steps, point.U, direction, dU, initial=self.layout.initial(dz), **wanted)

    def derivative(self, z: np.ndarray, **wanted) -> np.ndarray:
        """``J'(z)`` as a dual vector. ``rtol``: tolerance of state and adjoint if not the options'."""
        return self.gradient_of(self._solve_adjoint(z, **wanted))

    def gradient_of(self, point: Point) -> np.ndarray:
        """``J'`` from a point's trajectories as they are."""
        if point.gradient is None:
            with self._judging(point):
                if point.controls is None:
                    point.controls = self._trajectories.direct_controls(point, self.layout.steps(point.z))
                point.gradient = self._pull_back(point, point.L, point.controls)
            if self.regularisation is not None:
                point.gradient += self.regularisation.gradient(point.z)
        return point.gradient.copy()

    def gradient_error(self, z: np.ndarray) -> np.ndarray | None:
        """What the state's error may change the gradient by where the state fits the data to not much more than that: a
        dual vector, by an adjoint sweep. ``None`` where the misfit is larger, and then without a sweep.

        Near such a fit the adjoint's right-hand side is a difference of much larger numbers, whose relative error is
        that of the state: round-off, or what the last residuals of all steps add up to.
        """
        point = self._solve_state(z)
        error = max(2 * np.sqrt(self.evolution.nsteps) * relative_residual(point.state), _ROUND_OFF)
        steps = self.layout.steps(point.z)
        with self._judging(point):
            source = self._trajectories.gradient(point, steps)
            terms = self._trajectories.hessian(point, steps, None, point.U, second=False)
        last = None if self.sweeps.slab.is_last else -1
        squares = self.spacetime.sum_over_grid(np.array([(s.rows[:last] ** 2).sum() for s in (source, terms)]))
        if not np.sqrt(squares[0]) <= _NEAR * error * np.sqrt(squares[1]):
            return None
        M = self.sweeps.new_slab()
        self.sweeps.adjoint(steps, point.U, terms.rows, M, cold=True)
        return error * self._pull_back(point, M, terms.controls)

    def adjoint_part(self, point: Point) -> np.ndarray:
        """What the regularisation leaves of ``J'``."""
        g = self.gradient_of(point)
        return g if self.regularisation is None else g - self.regularisation.gradient(point.z)

    def _pull_back(self, point: Point, L: np.ndarray, controls: np.ndarray | None) -> np.ndarray:
        """Derivatives by the controls that an adjoint gives, with what came with its right-hand side."""
        rows = self._trajectories.control_gradient(point, self.layout.steps(point.z), L, controls)
        return self.layout.gradient(rows, L[0])

    def advance(self, z: np.ndarray) -> tuple[float, np.ndarray, float]:
        """``J`` and ``J'`` after one MGRIT cycle for the state and one for the adjoint, from what is there, and the
        larger of their residuals after them, relative to the trajectories.

        Source: S. Guenther, N. R. Gauger, J. B. Schroder, arXiv:1801.06356.
        """
        point = self._solve_state(z, cycles=1)
        value = self._value(point)
        self._solve_adjoint_of(point, cycles=1)
        return value, self.gradient_of(point), max(relative_residual(r) for r in (point.state, point.adjoint))

    def hessian_action(self, z: np.ndarray, dz: np.ndarray, *, gauss_newton: bool = False, **wanted) -> np.ndarray:
        """``J''(z) dz`` as a dual vector. ``rtol``: tolerance of the two sweeps if not the options'."""
        sweeps, dz = self.sweeps, np.asarray(dz, dtype=float).ravel()
        point = self._find(z, {"direction": dz}, **wanted)
        if "rtol" not in wanted or point is None or point.state is None:
            point = self._solve_state(z)
        full = not gauss_newton and not sweeps.is_linear
        if full and point.adjoint is None:
            point = self._solve_adjoint(z)  # the second-order terms want the adjoint
        dU, _ = self._tangent(point, dz, **wanted)
        source = self._second_source(point, dz, dU, full=full)
        del dU  # its memory is the second-order adjoint's
        M = sweeps.new_slab()
        sweeps.adjoint(self.layout.steps(point.z), point.U, source.rows, M, cold=True, **wanted)
        return self._second_derivative(point, dz, M, source)

    def symmetric_action(
        self, z: np.ndarray, dz: np.ndarray, cycles: int, *, gauss_newton: bool = False
    ) -> tuple[np.ndarray, float]:
        """``H dz`` as a dual vector for a symmetric ``H`` near the Hessian: its two sweeps are ``cycles`` cycles from
        zero and their transposes (:mod:`~pint_fem.mgrit.transposed_cycles`, :mod:`~pint_fem.paradiag.transposed_iterations`); and the
        larger of their relative residuals. State and adjoint are taken as well as they are known.
        """
        sweeps, dz = self.sweeps, np.asarray(dz, dtype=float).ravel()
        point = self._find(z, {"direction": dz}, cycles=cycles)
        if point is None or point.state is None:
            point = self._solve_state(z)
        full = not gauss_newton and not sweeps.is_linear
        if full and point.adjoint is None:
            point = self._solve_adjoint(z)
        start = sweeps.solvers.transposed_adjoint.start
        dU, tangent = self._tangent(point, dz, start=start, cycles=cycles)
        source = self._second_source(point, dz, dU, full=full, symmetric=True)
        steps = self.layout.steps(point.z)
        M, result = sweeps.adjoint_by_transposed_cycles(steps, point.U, source.rows, cycles=cycles)
        return self._second_derivative(point, dz, M, source), max(map(relative_residual, (tangent, result)))

    def _second_source(self, point: Point, dz: np.ndarray, dU: np.ndarray, *, full: bool, symmetric: bool = False):
        """Of the second-order adjoint."""
        steps, direction = self.layout.steps(point.z), self.layout.steps(dz)
        return self._trajectories.hessian(point, steps, direction, dU, second=full, symmetric=symmetric)

    def _second_derivative(self, point: Point, dz: np.ndarray, M: np.ndarray, source: Source) -> np.ndarray:
        """``J'' dz`` of a second-order adjoint."""
        out = self._pull_back(point, M, source.controls)
        return out if self.regularisation is None else out + self.regularisation.hessian(point.z, dz)

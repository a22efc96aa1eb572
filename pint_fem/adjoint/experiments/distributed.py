r"""The sum over experiments that are divided over groups of ranks, with one regularisation.

.. math::
    J(z) = \sum_{e=0}^{E-1} J_e(S_e(z)) + R(z).

A process grid of space x time x experiments has several groups of ranks, and group :math:`g` has the experiments
:math:`e_g \le e < e_{g+1}`. It solves them on its own space x time grid, as the problem of the own experiments does,
and knows nothing of the others' forms. What the groups compute is then combined:

* values :math:`J_e` are exchanged and added in the order of the experiments, so that :math:`J` is bitwise the same on
  every rank and, where sweeps are sequential, for every number of groups (experiments that are iterated at once take
  the same cycles, so that iterates depend on the group up to the tolerance);
* dual vectors (gradient, Hessian actions) are added in the order of the groups: bitwise the same on all ranks, and for
  another number of groups the same up to the round-off of a sum.

Controls are copied on each group. The regularisation :math:`R`, the Riesz map and the minimiser work on all groups with
the same numbers, so that all groups take the same decisions. What one group cannot compute is an error on all ranks:
each method compares its arguments over all ranks first, and then its failures. With one group all of this is the sum of
the experiments.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import ufl

from pint_fem.adjoint.composed import ComposedProblem, Selection
from pint_fem.adjoint.consistency.control_values import ControlConsistency
from pint_fem.adjoint.consistency.problem_data import require_same_forms
from pint_fem.adjoint.experiments.regularisation import RegularisationOfAll
from pint_fem.adjoint.interface import (
    SweepAccuracy,
    SweepLimits,
    SweptProblem,
    Term,
    as_vector,
    require_directions,
)
from pint_fem.adjoint.sums import require_no_control_as_data
from pint_fem.all_at_once.norms import gather_in_order
from pint_fem.collective import all_ranks, any_rank, collectively, require_same
from pint_fem.errors import InputError, SolverFailure
from pint_fem.evolution.control_layout import ControlLayout, ControlSet
from pint_fem.evolution.evolution import Evolution
from pint_fem.meshes import require_same_meshes
from pint_fem.misfits.base import BlockMisfit, Misfit
from pint_fem.misfits.sensor_readings import SensorReadings
from pint_fem.spacetime import Slab, SpaceTime

__all__ = ["DistributedExperiments"]


class DistributedExperiments(ComposedProblem):
    """The sum of all experiments and the regularisation, of which this rank's group solves its own experiments.

    Parameters
    ----------
    own
        The problem of the group's own experiments without regularisation, on ``spacetime.group``.
    evolutions
        Those of all experiments, in their order.
    misfits
        Those of each experiment.
    regularisation
        UFL functionals of the controls.
    spacetime
        The grid of all ranks.

    Raises
    ------
    InputError
        On every rank, if experiments or the regularisation do not fit together or differ between ranks.
    """

    def __init__(
        self,
        own: SweptProblem,
        evolutions: Sequence[Evolution],
        misfits: Sequence[Sequence[Misfit]],
        regularisation: Sequence[ufl.Form],
        spacetime: SpaceTime,
    ):
        comm, self._all, self._misfits = spacetime.comm, list(evolutions), [list(of) for of in misfits]
        self._own_numbers = spacetime.own_experiments(len(self._all))
        controls = collectively(comm, "", ControlSet, self._all)
        collectively(comm, "", require_no_control_as_data, controls, [own])
        require_same_meshes(spacetime.members, self._all[0].V.mesh().unique())
        layout = ControlLayout(controls, spacetime, _common_slab(own, spacetime))
        parts = {c.name(): layout.part(np.empty(layout.size), c).shape for c in controls.controls}
        groups = spacetime.experiments_comm.allgather(parts)
        if any_rank(comm, any(other != parts for other in groups)):
            raise InputError(
                "the groups of experiments do not own the same parts of the controls: make their meshes by st.mesh, "
                "such as st.mesh(UnitSquareMesh, 8, 8), which has the same parts in all groups"
            )
        require_same_forms(spacetime, **{"the regularisation": regularisation})
        self._data = made = None
        if regularisation:
            self._data = made = RegularisationOfAll(regularisation, layout, self._all[0])
        super().__init__([Term(1.0, own, Selection(layout, own.layout))], layout, made and made.functional)
        self._own, self._consistency, self._misfit = own, ControlConsistency(layout), 0.0
        self._is_quadratic = self._is_piecewise_quadratic = True  # super() asks for both
        self._is_piecewise_quadratic = all_ranks(comm, super().is_piecewise_quadratic)
        self._is_quadratic = all_ranks(comm, super().is_quadratic)
        limits = spacetime.experiments_comm.allgather(tuple(own.limits))
        self._limits = SweepLimits.of_all([SweepLimits(*found) for found in limits])

    def __str__(self) -> str:
        """One line: evolutions and misfits of the own experiments, controls, process grid."""
        text, own = super().__str__(), self._own_numbers
        if self.spacetime.experiments_size == 1:
            return text
        return f"{len(own)} of {len(self._all)} experiments (from number {own.start}): {text}"

    # -- work of the groups --------------------------------------------------------------------------------------------
    def _require(self, vectors: Mapping[str, np.ndarray], **call: Any) -> None:
        """Require the same call on all ranks, and warn of data of the regularisation that have changed (collective)."""
        changed = np.zeros(0, dtype=bool) if self._data is None else self._data.changed()
        unchanged = self._consistency.require(vectors, call=call, votes=[not c for c in changed])
        if self._data is not None:
            self._data.warn(~unchanged)

    def _together(self, work: Callable, *args: Any, **options: Any) -> Any:
        """The result of work of the own group; what fails in one group is raised on all ranks (collective)."""
        return collectively(self.spacetime.comm, "", self._named, work, args, options)

    def _named(self, work: Callable, args: tuple, options: dict) -> Any:
        """The result of work; a failure names the group's experiments where there are several groups."""
        try:
            return work(*args, **options)
        except (SolverFailure, InputError) as error:
            if self.spacetime.experiments_size == 1:
                raise
            first, last = self._own_numbers.start, self._own_numbers.stop - 1
            which = f"experiment {first}" if first == last else f"experiments {first} to {last}"
            kind = SolverFailure if isinstance(error, SolverFailure) else InputError
            raise kind(f"{which} of {len(self._all)}: {error}") from error

    def _in_order(self, values: np.ndarray) -> np.ndarray:
        """The numbers of all groups, in their order (collective over the groups)."""
        return gather_in_order(values, self.spacetime.experiments_comm)

    def _sum(self, dual: np.ndarray) -> np.ndarray:
        """The sum over all groups of a dual vector of the own experiments' controls (collective over the groups)."""
        out = np.zeros(self.layout.size)
        self.terms[0].map.add_adjoint(out, out, dual, 1.0)
        return self.spacetime.sum_over_experiments(out)

    def _own_controls(self, z: np.ndarray) -> np.ndarray:
        """The own experiments' part of controls or of a direction."""
        return self.terms[0].map.value(z)

    # -- the interface -------------------------------------------------------------------------------------------------
    @property
    def is_quadratic(self) -> bool:
        """Whether ``J`` is a quadratic function of the controls, for all experiments."""
        return self._is_quadratic

    @property
    def is_piecewise_quadratic(self) -> bool:
        """Whether ``J`` is one quadratic function or several with continuous first derivatives between them."""
        return self._is_piecewise_quadratic

    @property
    def limits(self) -> SweepLimits:
        """What the options of the sweeps of all experiments allow."""
        return self._limits

    def has_symmetric_actions(self) -> bool:
        """Return whether all experiments have symmetric actions (collective)."""
        return all_ranks(self.spacetime.comm, self._together(self._own.has_symmetric_actions))

    @property
    def parts(self) -> dict[str, float]:
        """Value of the ``"misfit"`` and of the ``"regularisation"`` at the last control."""
        return {"misfit": self._misfit, "regularisation": self._own_part}

    @property
    def evolutions(self) -> list[Evolution]:
        """Those of all experiments, on every rank."""
        return list(dict.fromkeys(self._all))

    def group_of(self, evolution: Evolution) -> int:
        """Return the number of the group of ranks that solves an evolution."""
        return self.spacetime.group_of_experiment(self._all.index(evolution), len(self._all))

    def leaf_numbers(self) -> list[int]:
        """Return the numbers of the own experiments among all."""
        return list(self._own_numbers)

    def leaf_weights(self) -> list[tuple[int, float]]:
        """Return the number and the weight of each experiment."""
        return [(number, 1.0) for number in range(len(self._all))]

    def experiment_values(self, z: np.ndarray, **accuracy: float) -> np.ndarray:
        """Return the misfits of all experiments in their order."""
        z = as_vector(z)
        self._require({"control": z}, **accuracy)
        return self._in_order(self._together(self._own.experiment_values, self._own_controls(z), **accuracy))

    def value(self, z: np.ndarray, **accuracy: float) -> float:
        """Return ``J(z)``, the identical number on every rank."""
        z = as_vector(z)
        self._misfit = sum(self.experiment_values(z, **accuracy).tolist())
        self._own_part = 0.0 if self.regularisation is None else self.regularisation.value(z)
        return self._misfit + self._own_part

    def derivative(self, z: np.ndarray, **accuracy: float) -> np.ndarray:
        """Return ``J'(z)`` as a dual vector."""
        z = as_vector(z)
        self._require({"control": z}, **accuracy)
        g = self._sum(self._together(self._own.derivative, self._own_controls(z), **accuracy))
        return g if self.regularisation is None else g + self.regularisation.gradient(z)

    def current_derivative(self, z: np.ndarray, *, regularised: bool = True) -> np.ndarray:
        """Return ``J'(z)`` from the cached states and adjoints."""
        z = as_vector(z)
        g = self._sum(self._together(self._own.current_derivative, self._own_controls(z), regularised=regularised))
        return g + self.regularisation.gradient(z) if regularised and self.regularisation is not None else g

    def accuracy_at(self, z: np.ndarray) -> SweepAccuracy:
        """Return how accurately the trajectories of all experiments are solved."""
        own = self._together(self._own.accuracy_at, self._own_controls(as_vector(z)))
        return SweepAccuracy.of_all([(1.0, SweepAccuracy(*row)) for row in self._in_order(np.array([own])).tolist()])

    def tangent_value(self, z: np.ndarray, dz: np.ndarray) -> float:
        """Return ``J'(z) dz``, computed by a tangent sweep for each experiment."""
        z, dz = as_vector(z), as_vector(dz)
        self._require({"control": z, "direction": dz})
        own = self._together(self._own.tangent_value, self._own_controls(z), self._own_controls(dz))
        total = sum(self._in_order(np.array([own])).tolist())
        if self.regularisation is not None:
            total += self.layout.pairing(self.regularisation.gradient(z), dz)
        return total

    def hessian_action(
        self, z: np.ndarray, dz: np.ndarray, *, gauss_newton: bool = False, **accuracy: float
    ) -> np.ndarray:
        """Return ``J''(z) dz`` as a dual vector; with ``gauss_newton`` without second derivatives of the steps."""
        z, dz = as_vector(z), as_vector(dz)
        self._require({"control": z, "direction": dz}, **accuracy)
        own = self._own_controls(z), self._own_controls(dz)
        h = self._sum(self._together(self._own.hessian_action, *own, gauss_newton=gauss_newton, **accuracy))
        return h if self.regularisation is None else h + self.regularisation.hessian(z, dz)

    def symmetric_action(
        self, z: np.ndarray, dz: np.ndarray, cycles: int, *, gauss_newton: bool = False
    ) -> tuple[np.ndarray, float]:
        """Return the action of a symmetric operator near the Hessian, and the largest relative residual."""
        z, dz = as_vector(z), as_vector(dz)
        self._require({"control": z, "direction": dz}, cycles=cycles)
        own = self._own_controls(z), self._own_controls(dz), cycles
        h, residual = self._together(self._own.symmetric_action, *own, gauss_newton=gauss_newton)
        h, residual = self._sum(h), float(self._in_order(np.array([residual])).max())
        return (h if self.regularisation is None else h + self.regularisation.hessian(z, dz)), residual

    def hessian_actions(
        self,
        z: np.ndarray,
        directions: Sequence[np.ndarray],
        *,
        gauss_newton: bool = False,
        at_once: int | None = None,
    ) -> list[np.ndarray]:
        """Return ``J''(z) dz`` for each of several directions; each group has as many in a sweep as fit its memory."""
        z, (vectors, named) = as_vector(z), require_directions(self.layout, directions, at_once)
        self._require({"control": z, **named})
        along = [self._own_controls(dz) for dz in vectors]
        own = self._own_controls(z), along
        actions = self._together(self._own.hessian_actions, *own, gauss_newton=gauss_newton, at_once=at_once)
        out = [self._sum(h) for h in actions]
        if self.regularisation is not None:
            out = [total + self.regularisation.hessian(z, dz) for total, dz in zip(out, vectors, strict=True)]
        return out

    def advance(self, z: np.ndarray) -> tuple[float, np.ndarray, float]:
        """Return ``J`` and ``J'`` after one MGRIT cycle for each state and adjoint, and the largest residual."""
        z = as_vector(z)
        self._require({"control": z})
        value, dual, residual = self._together(self._own.advance, self._own_controls(z))
        value, g = sum(self._in_order(np.array([value])).tolist()), self._sum(dual)
        if self.regularisation is not None:
            value, g = value + self.regularisation.value(z), g + self.regularisation.gradient(z)
        return value, g, float(self._in_order(np.array([residual])).max())

    def gradient_error(self, z: np.ndarray) -> np.ndarray | None:
        """Return the error of ``J'(z)`` where all experiments fit their data up to about the error of their states."""
        z = as_vector(z)
        self._require({"control": z})
        own = self._together(self._own.gradient_error, self._own_controls(z))
        return None if any_rank(self.spacetime.comm, own is None) else self._sum(own)

    def has_misfit(self, misfit: Misfit) -> bool:
        """Return whether a misfit is one of those of all experiments."""
        return any(misfit is one for of in self._misfits for one in of)

    def _experiment_of(self, misfit: Misfit, what: str) -> int:
        """The number of the experiment that a misfit belongs to, the same on all ranks (collective)."""
        found = [e for e, of in enumerate(self._misfits) if any(misfit is one for one in of)]
        require_same(self.spacetime.comm, misfit=found)
        if not found:
            raise InputError(f"{what} of {misfit!r}: give a misfit of one of the experiments")
        return found[0]

    def observations(self, z: np.ndarray, misfit: BlockMisfit) -> np.ndarray:
        """Return what a misfit of one of the experiments observes at the local points, ``(k + 1, width)``, in the group
        that solves this experiment; in other groups ``InputError`` is raised, after the collective part.
        """
        z, number = as_vector(z), self._experiment_of(misfit, "observations")
        self._require({"control": z})
        own = number in self._own_numbers
        work = self._own.observations if own else (lambda *_: None)
        seen = self._together(work, self._own_controls(z), misfit)
        if not own:
            group = self.spacetime.group_of_experiment(number, len(self._all))
            raise InputError(
                f"observations of experiment {number}: they are on the ranks of group {group}, which solves it; this "
                f"one is in group {self.spacetime.experiments_comm.rank}; readings are on all ranks"
            )
        return seen

    def readings(self, z: np.ndarray, misfit: SensorReadings) -> np.ndarray:
        """Return the readings of a misfit of one of the experiments, ``(times, sensors)``, on all ranks."""
        z, number = as_vector(z), self._experiment_of(misfit, "readings")
        self._require({"control": z})
        work = self._own.readings if number in self._own_numbers else (lambda *_: None)
        seen, group = (
            self._together(work, self._own_controls(z), misfit),
            self.spacetime.group_of_experiment(number, len(self._all)),
        )
        return self.spacetime.experiments_comm.bcast(seen, root=group)

    def update_data(self) -> list[str]:
        """Read the user's data again, and return the names of those of all experiments that have other values."""
        changed = self._together(self._own.update_data)
        self.terms[0].map.update_data()
        groups = [
            *self.spacetime.experiments_comm.allgather(changed),
            [] if self._data is None else self._data.update(),
        ]
        return list(dict.fromkeys(name for names in groups for name in names))


def _common_slab(own: SweptProblem, spacetime: SpaceTime) -> Slab:
    """The slab of the controls with one value per step, the same in all groups; without such controls the own one."""
    slab, comm = own.layout.slab, spacetime.experiments_comm
    found = comm.allgather(slab.bounds if own.evolution.stepwise else None)
    given = list(dict.fromkeys(bounds for bounds in found if bounds is not None))
    if any_rank(spacetime.comm, len(given) > 1):
        raise InputError(
            "the groups of experiments divide the steps of a control with one value per step in different ways over "
            "their ranks in time: give a time_solver with its options, the same for all experiments, in place of 'auto'"
        )
    if not given:
        return slab
    place = spacetime.time_comm.rank
    return Slab(given[0][-1], given[0][place], given[0][place + 1], given[0])

r"""The map from controls to readings of several evolutions, whose controls are affine functions of common ones.

.. math::  y_i(z) = F_i S_i(z) + y_{i,0} , \qquad F = \begin{pmatrix} F_1 S_1' \\ F_2 S_2' \\ \vdots \end{pmatrix} ,

for a sum :math:`\sum_i w_i J_i(S_i(z))`, where :math:`S_i` selects the controls of an evolution, or is the initial
condition as an expression of controls. Rows are computed for one evolution after the other and pulled back to the
common controls; the sensors of all evolutions together are divided among the ranks in time. The weights of the readings
of evolution :math:`i` are those of its misfits times :math:`w_i`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from pint_fem.collective import collectively
from pint_fem.errors import InputError
from pint_fem.evolution.control_layout import ControlLayout
from pint_fem.inverse.map import ParameterToObservable
from pint_fem.inverse.readings import ReadingTable
from pint_fem.misfits.sensor_readings import SensorReadings

__all__ = ["Leaf", "SumOfMaps"]


class Leaf(NamedTuple):
    """One evolution of a sum.

    Attributes
    ----------
    weight : float
        Its weight in the sum.
    misfits : sequence of SensorReadings
        Its misfits.
    at_zero : ndarray
        Its controls where the common ones are zero, ``S(0)``.
    pull_back : callable
        ``pull_back(out, dual)`` adds ``S'^T`` of a dual vector to a dual vector of the common controls (collective over
        space).
    make : callable
        ``make(sensors)`` returns the map of the evolution with the rows of the given sensors (collective).
    """

    weight: float
    misfits: Sequence[SensorReadings]
    at_zero: np.ndarray
    pull_back: Callable[[np.ndarray, np.ndarray], None]
    make: Callable[[np.ndarray], ParameterToObservable]


class SumOfMaps(ParameterToObservable):
    """The map of several evolutions, with the interface of that of one.

    Parameters
    ----------
    leaves
        The evolutions.
    layout
        The common controls, none with one value per step.
    **given
        As for :class:`~pint_fem.inverse.map.ParameterToObservable`.

    Raises
    ------
    InputError
        On every rank, if a weight is not positive, or a control has one value per step.
    """

    def __init__(self, leaves: Sequence[Leaf], layout: ControlLayout, **given: Any):
        self._leaves = list(leaves)
        if wrong := [leaf.weight for leaf in self._leaves if not leaf.weight > 0]:
            raise InputError(
                f"parameter_to_observable: terms with weights {wrong}: the weight of a term is that of its readings; "
                "give positive ones, or use minimize_trust_region"
            )
        if layout.evolution.stepwise:
            raise InputError(
                "parameter_to_observable: the functional is a sum, or has an initial condition that is an expression, "
                "with controls that have one value per step: use minimize_trust_region, or the map of one evolution"
            )
        table = ReadingTable([misfit for leaf in self._leaves for misfit in leaf.misfits])
        counts = [sum(misfit.sensors for misfit in leaf.misfits) for leaf in self._leaves]
        self._first = np.cumsum([0, *counts])
        table.scale_weights(np.repeat([leaf.weight for leaf in self._leaves], counts))
        super().__init__(None, layout, table, None, **given)

    def _state_memory(self) -> None:
        """The maps of the evolutions state theirs."""

    def _build(self) -> None:
        """Compute the rows of one evolution after the other (collective)."""
        offsets, place = [], 0
        for first, last, leaf in zip(self._first, self._first[1:], self._leaves, strict=False):
            own = self.sensors[(self.sensors >= first) & (self.sensors < last)] - first
            F = leaf.make(own)
            offsets.append(F.predict(leaf.at_zero))
            collectively(self.spacetime.comm, "", self._pull_back, leaf, F, self.rows[place : place + len(F.rows)])
            place += len(F.rows)
        self.offset = np.concatenate(offsets)

    @staticmethod
    def _pull_back(leaf: Leaf, F: ParameterToObservable, out: np.ndarray) -> None:
        """Write the rows of an evolution as rows for the common controls."""
        dual = np.zeros(F.layout.size)
        for row, target in zip(F.rows, out, strict=True):
            dual[: F.layout.static_size] = row
            leaf.pull_back(target, dual)

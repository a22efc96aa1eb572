r"""Inner products of controls with a part of their rates of change, and their Riesz maps.

For a control with one value per step and bilinear forms :math:`a` of its values and :math:`b` of its rates,

.. math::
    (x, y) = \Delta t \sum_{n=1}^{N} a(x_n, y_n) + \Delta t \sum_{n=1}^{N-1} b\big((D x)_n, (D y)_n\big), \qquad
    (D x)_n = (x_{n+1} - x_n) / \Delta t .

The cosine transform in time (of type II) diagonalises :math:`D^T D`, with the eigenvalues
:math:`\sigma_k = (2 \sin(\pi k / 2N) / \Delta t)^2` [1], so that the Riesz map is that of :math:`a + \sigma_k b` for
each frequency :math:`k = 0, \dots, N - 1`. Frequencies are divided over the time ranks.

References
----------
[1] G. Strang, The discrete cosine transform, SIAM Review 41 (1999) 135-147.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import scipy.fft
import ufl
from firedrake import Constant, Function

from pint_fem.adjoint.riesz import ControlInner, RieszKind, RieszMap
from pint_fem.evolution.control_layout import ControlLayout
from pint_fem.kernels.arrays import own_size
from pint_fem.paradiag.distribution import TimeTransposes

__all__ = ["InnerInTime"]


class _Frequencies:
    """The maps of one control, one for each of the own frequencies.

    Parameters
    ----------
    layout
        The controls.
    control
        One with a value per step.
    values, rates
        The bilinear forms ``a`` and ``b``.
    """

    def __init__(self, layout: ControlLayout, control: Function, values: ufl.Form, rates: ufl.Form):
        space, ev, slab = control.function_space(), layout.evolution, layout.slab
        comm = layout.spacetime.time_comm
        self._transposes = TimeTransposes(comm, slab.bounds, ev.nsteps, own_size(space))
        sigma = Constant(0.0)
        form, self._maps = values + sigma * rates, []
        for k in self._transposes.own:
            sigma.assign((2 * np.sin(np.pi * k / (2 * ev.nsteps)) / ev.dt) ** 2)
            self._maps.append(RieszMap(space, form))

    def __call__(self, name: str, rows: np.ndarray) -> np.ndarray:
        """Apply ``"primal"`` or ``"dual"`` of the maps to own steps ``(k, n)`` (collective)."""
        move, options = self._transposes, {"type": 2, "axis": 0, "norm": "ortho"}
        spectrum = move.to_frequencies(scipy.fft.dct(move.to_columns(np.ascontiguousarray(rows)), **options))
        out = np.empty(spectrum.shape)
        for riesz, row, result in zip(self._maps, spectrum, out, strict=True):
            result[:] = getattr(riesz, name)(row)
        return move.from_columns(scipy.fft.idct(move.from_frequencies(out), **options))


class InnerInTime(ControlInner):
    """The inner product of all controls of a problem with parts of the rates of some, and its Riesz map.

    Parameters
    ----------
    layout
        The controls.
    kinds
        As for :class:`~pint_fem.adjoint.riesz.ControlInner`; of the controls in ``rates`` bilinear forms.
    rates
        Bilinear forms of the rates of controls with one value per step.

    Raises
    ------
    InputError
        If a kind or a form does not fit.
    """

    def __init__(
        self, layout: ControlLayout, kinds: Sequence[RieszKind | RieszMap], rates: Mapping[Function, ufl.Form]
    ):
        self._forms = dict(zip(layout.evolution.controls, kinds, strict=True))
        super().__init__(layout, ["l2" if c in rates else kind for c, kind in self._forms.items()])
        self._frequencies = {c: _Frequencies(layout, c, self._forms[c], rate) for c, rate in rates.items()}

    def _apply(self, name: str, z: np.ndarray, weight: float) -> np.ndarray:
        out = super()._apply(name, z, weight)
        for control, frequencies in self._frequencies.items():
            self.layout.part(out, control)[...] = weight * frequencies(name, self.layout.part(z, control))
        return out

    @property
    def weights(self) -> np.ndarray | None:  # type: ignore[override]
        """The diagonal of the product's matrix where no control has a part of its rates and it is diagonal."""
        return None if self._frequencies else super().weights

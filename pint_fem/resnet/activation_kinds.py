r"""Kinds of activations: functions with named derivatives, and modules with parameters differentiated by autograd.

A layer computes :math:`\sigma(z) = a\, g(c z)`. Every layer has parameters :math:`p_n` of its own for a module
:math:`\sigma(z, p)`, whose derivatives

.. math:: \sigma_z, \qquad \sigma_p^T w, \qquad \sigma_p\, \delta p, \qquad
          (\sigma_{zz}\, \delta z + \sigma_{zp}\, \delta p)\, w, \qquad
          (\sigma_{pz}\, \delta z + \sigma_{pp}\, \delta p)^T w

are those of autograd, for blocks of layers in one call where ``torch.vmap`` takes the module.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.func import functional_call, vmap

__all__ = ["Activation", "ParametricActivation"]

Tensor = torch.Tensor
Own = Sequence[Tensor]  # stacked parameters of the activation, (k, ...) each; none for most


@dataclass(frozen=True)
class Activation:
    r"""An activation :math:`\sigma(z) = a\, g(c z)`.

    Attributes
    ----------
    name : str
    function : callable
        :math:`\sigma`, differentiable by autograd.
    apply_ : callable or None
        ``g``, which overwrites its argument with the record; ``None``: the record is ``z``.
    slope, curvature : callable
        First and second derivative of :math:`\sigma` as functions of the record.
    in_scale, out_scale : float
        ``c`` and ``a``.
    slope_out : callable or None
        ``slope_out(record, out)`` writes the first derivative in one pass over memory, if that is possible.
    source : (callable, tuple) or None
        The function and the arguments that it was made by, from which pickling makes it again.
    """

    name: str
    function: Callable[[Tensor], Tensor]
    apply_: Callable[[Tensor], Tensor] | None
    slope: Callable[[Tensor], Tensor]
    curvature: Callable[[Tensor], Tensor]
    in_scale: float = 1.0
    out_scale: float = 1.0
    slope_out: Callable[[Tensor, Tensor], Tensor] | None = None
    source: Any = field(default=None, compare=False, repr=False)

    @property
    def initial(self) -> Mapping[str, Tensor]:
        """First values of the parameters of one layer's activation by name."""
        return {}

    @property
    def frozen(self) -> frozenset[str]:
        """Names of the parameters that are not trained."""
        return frozenset()

    def __reduce__(self) -> Any:
        return super().__reduce__() if self.source is None else self.source

    def __deepcopy__(self, memo: dict) -> Activation:
        return self  # it has no state

    def serial(self, z: Tensor, own: Own) -> Tensor:
        r""":math:`\sigma(z)` of one layer in torch's layout, differentiable."""
        return self.function(z)

    def output(self, z: Tensor, own: Own = ()) -> Tensor:
        """``g(z)`` for ``z`` with the factor ``c`` already in it; ``z`` is the record afterwards."""
        return self.function(z.contiguous()) if self.apply_ is None else self.apply_(z)

    def write_slope(self, record: Tensor, out: Tensor, own: Own = ()) -> None:
        """Write the first derivative to ``out``, from the record of an evaluation."""
        if self.slope_out is None:
            out.copy_(self.slope(record))
        else:
            self.slope_out(record, out)

    def gradients(self, z: Tensor, own: Own, w: Tensor) -> list[Tensor]:
        r"""Derivatives :math:`\sigma_p^T w` with respect to the parameters of each layer."""
        return []

    def along(self, z: Tensor, own: Own, d_own: Own) -> Tensor | float:
        r"""The derivative :math:`\sigma_p\, \delta p` along a direction of the parameters."""
        return 0.0

    def curvatures(self, record: Tensor) -> Tensor | None:
        """What :meth:`second` needs of a record for every direction."""
        return self.curvature(record)

    def second(
        self, curvatures: Tensor | None, record: Tensor, own: Own, w: Tensor, dz: Tensor, d_own: Own
    ) -> tuple[Tensor, list[Tensor]]:
        r"""Derivatives of :math:`\sigma_z w` and :math:`\sigma_p^T w` along ``(dz, d_own)``."""
        return curvatures * dz * w, []

    def values(self, z: Tensor) -> list[float]:
        """Values at numbers ``z``, by which activations of one name are told apart."""
        return self.function(z.clone()).tolist()


@dataclass(frozen=True, eq=False)
class ParametricActivation(Activation):
    r"""A module with parameters as activation :math:`\sigma(z, p)`; its record is ``z``.

    Methods take stacked states ``(k, *state)`` and parameters ``(k, ...)`` of ``k`` layers, or those of one layer
    without leading axes.

    Attributes
    ----------
    module : Module
        A copy of the user's, whose parameters are replaced in every call.
    names : tuple of str
        Names of its parameters, in the order of :attr:`initial`.
    sample : tuple of int
        Shape of a batch of states in torch's layout, ``(batch, channels, ...)``.
    transposed : bool
        Whether states are ``(channels, batch)``.
    batched : bool
        Whether one call for several layers is possible.
    """

    module: torch.nn.Module = field(default_factory=torch.nn.Identity)
    names: tuple[str, ...] = ()
    sample: tuple[int, ...] = ()
    transposed: bool = False
    batched: bool = True

    @property
    def initial(self) -> Mapping[str, Tensor]:
        """First values of the parameters of one layer's activation by name."""
        parameters = dict(self.module.named_parameters())
        return {f"activation_{name.replace('.', '_')}": parameters[name].detach() for name in self.names}

    @property
    def frozen(self) -> frozenset[str]:
        """Names of the parameters that are not trained."""
        trained = [p.requires_grad for _, p in self.module.named_parameters()]
        return frozenset(name for name, trains in zip(self.initial, trained, strict=True) if not trains)

    def _layout(self, z: Tensor) -> Tensor:
        """A state in torch's layout, and back."""
        return z.transpose(-1, -2) if self.transposed else z

    def serial(self, z: Tensor, own: Own) -> Tensor:
        r""":math:`\sigma(z, p)` of one layer in torch's layout, differentiable."""
        return functional_call(self.module, dict(zip(self.names, own, strict=True)), (z,))

    def _evaluate(self, z: Tensor, own: Own) -> Tensor:
        r""":math:`\sigma(z, p)`, differentiable."""
        z = self._layout(z)
        if z.ndim == len(self.sample):
            y = self.serial(z, own)
        elif self.batched:
            y = vmap(self.serial)(z, tuple(own))
        else:
            y = torch.stack([self.serial(*one) for one in zip(z, zip(*own, strict=True), strict=True)])
        return self._layout(y)

    def output(self, z: Tensor, own: Own = ()) -> Tensor:
        """The values; ``z`` is the record."""
        with torch.no_grad():
            return self._evaluate(z, own)

    def write_slope(self, record: Tensor, out: Tensor, own: Own = ()) -> None:
        """Write the first derivative to ``out``."""
        with torch.enable_grad():
            z = record.detach().requires_grad_()
            out.copy_(_gradients(self._evaluate(z, [p.detach() for p in own]), [z])[0])

    def gradients(self, z: Tensor, own: Own, w: Tensor) -> list[Tensor]:
        r"""Derivatives :math:`\sigma_p^T w` with respect to the parameters of each layer."""
        with torch.enable_grad():
            own = [p.detach().requires_grad_() for p in own]
            return _gradients(self._evaluate(z.detach(), own), own, w)

    def along(self, z: Tensor, own: Own, d_own: Own) -> Tensor:
        r"""The derivative :math:`\sigma_p\, \delta p` along a direction of the parameters."""
        with torch.enable_grad():
            own = [p.detach().requires_grad_() for p in own]
            v = torch.zeros_like(z, requires_grad=True)  # the derivative of sigma_p^T v, which is linear in v
            g = _gradients(self._evaluate(z.detach(), own), own, v, create_graph=True)
            return _gradients(sum((a * b).sum() for a, b in zip(g, d_own, strict=True)), [v])[0]

    def curvatures(self, record: Tensor) -> None:
        """Nothing: second derivatives depend on the direction of the parameters."""

    def second(
        self, curvatures: Tensor | None, record: Tensor, own: Own, w: Tensor, dz: Tensor, d_own: Own
    ) -> tuple[Tensor, list[Tensor]]:
        r"""Derivatives of :math:`\sigma_z w` and :math:`\sigma_p^T w` along ``(dz, d_own)``."""
        with torch.enable_grad():
            into = [record.detach().requires_grad_(), *(p.detach().requires_grad_() for p in own)]
            g = _gradients(self._evaluate(into[0], into[1:]), into, w.detach(), create_graph=True)
            bent, *of_own = _gradients(sum((a * b).sum() for a, b in zip(g, (dz, *d_own), strict=True)), into)
        return bent, of_own

    def values(self, z: Tensor) -> list[float]:
        """Values at numbers ``z``, by which activations of one name are told apart; all parameters are 1/2."""
        own = [torch.full_like(p, 0.5, dtype=z.dtype) for p in self.initial.values()]
        states = z.reshape(-1, *[1] * (len(self.sample) - 1)).expand(-1, *self.sample[1:])
        with torch.no_grad():
            return self.serial(states, own).reshape(len(z), -1)[:, 0].tolist()


def _gradients(y: Any, into: Sequence[Tensor], w: Tensor | None = None, *, create_graph: bool = False) -> list[Tensor]:
    """Derivatives of ``(y, w)``, zero where there is no dependence."""
    if not torch.is_tensor(y) or not y.requires_grad:
        return [torch.zeros_like(t) for t in into]
    w = torch.ones_like(y) if w is None else w
    found = torch.autograd.grad(y, into, w, create_graph=create_graph, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for g, t in zip(found, into, strict=True)]

r"""Elementwise activation functions :math:`\sigma` with their first two derivatives.

A layer computes :math:`\sigma(z) = a\, g(c z)`. The derivatives of most activations follow from the values of
:math:`g`, which is then applied in place, those of the others from :math:`z`: the *record* of an evaluation is the one
or the other. The hyperbolic tangent is evaluated as :math:`\tanh z = 2 (1 / (1 + e^{-2 z}) - 1/2)`, with an absolute
error of the size of round-off, because torch's sigmoid is faster than its tanh.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from pint_fem.errors import InputError

__all__ = ["Activation", "activation"]

Tensor = torch.Tensor


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
    """

    name: str
    function: Callable[[Tensor], Tensor]
    apply_: Callable[[Tensor], Tensor] | None
    slope: Callable[[Tensor], Tensor]
    curvature: Callable[[Tensor], Tensor]
    in_scale: float = 1.0
    out_scale: float = 1.0
    slope_out: Callable[[Tensor, Tensor], Tensor] | None = None

    def output(self, z: Tensor) -> Tensor:
        """``g(z)`` for ``z`` with the factor ``c`` already in it; ``z`` is the record afterwards."""
        return self.function(z.contiguous()) if self.apply_ is None else self.apply_(z)

    def write_slope(self, record: Tensor, out: Tensor) -> None:
        """Write the first derivative to ``out``, from the record of an evaluation."""
        if self.slope_out is None:
            out.copy_(self.slope(record))
        else:
            self.slope_out(record, out)


def _derivative(f: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The derivative of an elementwise function by autograd."""

    def df(z: Tensor) -> Tensor:
        with torch.enable_grad():
            z = z if z.requires_grad else z.detach().requires_grad_()
            y = f(z)
            if not y.requires_grad:
                return torch.zeros_like(z)
            return torch.autograd.grad(y.sum(), z, create_graph=True)[0]

    return df


# the record of tanh is y = tanh(z) / 2
def _half_tanh_(z: Tensor) -> Tensor:
    return torch.sigmoid_(z).sub_(0.5)


def _tanh_slope(y: Tensor, out: Tensor | None = None) -> Tensor:
    return torch.addcmul(y.new_ones(()), y, y, value=-4, out=out)


def _tanh_curvature(y: Tensor) -> Tensor:
    return -4 * y * (1 - 4 * y * y)


def _sigmoid_slope(s: Tensor, out: Tensor | None = None) -> Tensor:
    return torch.addcmul(s, s, s, value=-1, out=out)


_NAMED = {
    "tanh": Activation("tanh", torch.tanh, _half_tanh_, _tanh_slope, _tanh_curvature, 2.0, 2.0, _tanh_slope),
    "sigmoid": Activation(
        "sigmoid",
        torch.sigmoid,
        torch.sigmoid_,
        _sigmoid_slope,
        lambda s: s * (1 - s) * (1 - 2 * s),
        slope_out=_sigmoid_slope,
    ),
    "relu": Activation("relu", torch.relu, torch.relu_, lambda y: (y > 0).to(y.dtype), torch.zeros_like),
    "leaky_relu": Activation(
        "leaky_relu",
        F.leaky_relu,
        F.leaky_relu_,
        lambda y: torch.where(y > 0, 1.0, 0.01).to(y.dtype),
        torch.zeros_like,
    ),
    "linear": Activation("linear", lambda z: z, lambda z: z, torch.ones_like, torch.zeros_like),
}
_BY_AUTOGRAD = {"gelu": F.gelu, "silu": F.silu, "softplus": F.softplus, "elu": F.elu, "sin": torch.sin}


def activation(given: str | Callable[[Tensor], Tensor] | Activation) -> Activation:
    """An activation by name or from an elementwise function of torch.

    Parameters
    ----------
    given
        ``"tanh"``, ``"relu"``, ``"sigmoid"``, ``"leaky_relu"``, ``"linear"``, ``"gelu"``, ``"silu"``, ``"softplus"``,
        ``"elu"``, ``"sin"``, or a callable that autograd can differentiate twice.

    Returns
    -------
    Activation

    Raises
    ------
    InputError
        On an unknown name, or a callable that is not elementwise.
    """
    if isinstance(given, Activation):
        return given
    if isinstance(given, str):
        if given in _NAMED:
            return _NAMED[given]
        if given not in _BY_AUTOGRAD:
            names = [*_NAMED, *_BY_AUTOGRAD]
            near = difflib.get_close_matches(given, names, n=1)
            raise InputError(
                f"activation {given!r}: {f'did you mean {near[0]!r}?' if near else 'give one of ' + ', '.join(names)}"
            )
        name, f = given, _BY_AUTOGRAD[given]
    elif callable(given):
        name, f = getattr(given, "__name__", type(given).__name__), given
        _check_elementwise(name, f)
    else:
        raise InputError(f"activation {given!r}: give a name or an elementwise function of a tensor")
    first = _derivative(f)
    second = _derivative(first)
    return Activation(name, f, None, lambda z: first(z).detach(), lambda z: second(z).detach())


def _check_elementwise(name: str, f: Callable[[Tensor], Tensor]) -> None:
    """Refuse a function whose values on a matrix are not those on its single entries."""
    z = torch.linspace(-1.5, 1.5, 6, dtype=torch.float64)
    try:
        whole, alone = f(z.reshape(2, 3)).reshape(-1), torch.cat([f(z[i : i + 1]) for i in range(6)])
        fits = whole.shape == z.shape and torch.allclose(whole, alone)
    except Exception as error:
        raise InputError(f"activation {name}: {type(error).__name__}: {error}") from error
    if not fits:
        raise InputError(f"activation {name} is not elementwise: a value depends on others; give one that is")

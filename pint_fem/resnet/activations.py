r"""Elementwise activation functions :math:`\sigma` with their first two derivatives.

A layer computes :math:`\sigma(z) = a\, g(c z)`. The derivatives of most activations follow from the values of
:math:`g`, which is then applied in place, those of the others from :math:`z`: the *record* of an evaluation is the one
or the other. The hyperbolic tangent is evaluated as :math:`\tanh z = 2 (1 / (1 + e^{-2 z}) - 1/2)`, with an absolute
error of the size of round-off, because torch's sigmoid is faster than its tanh.

Every layer has its own copy of the parameters of a module, such as ``PReLU``, if a value depends on its entry of the
state and its channel (the feature of a :class:`~pint_fem.resnet.Dense` layer) only.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F

from pint_fem.errors import InputError
from pint_fem.resnet.activation_kinds import Activation, ParametricActivation

__all__ = ["activation"]

Tensor = torch.Tensor


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


def activation(
    given: str | Callable[[Tensor], Tensor] | Activation, sample: Sequence[int] = (2, 3), transposed: bool = False
) -> Activation:
    """An activation by name, from an elementwise function of torch, or from a module.

    Parameters
    ----------
    given
        ``"tanh"``, ``"relu"``, ``"sigmoid"``, ``"leaky_relu"``, ``"linear"``, ``"gelu"``, ``"silu"``, ``"softplus"``,
        ``"elu"``, ``"sin"``, or a callable that autograd can differentiate twice. Every layer gets a copy of the
        parameters of a module, such as ``PReLU()``, which is trained.
    sample
        Shape of a batch of states in torch's layout, by which a module with parameters is tried.
    transposed
        Whether layers store states as ``(channels, batch)``.

    Returns
    -------
    Activation

    Raises
    ------
    InputError
        On an unknown name, or a callable that is not elementwise, is random (dropout), has buffers, or depends on
        parameters of a module that is not given itself.
    """
    if isinstance(given, Activation):
        return given
    if isinstance(given, str):
        if given in _NAMED:
            return replace(_NAMED[given], source=(activation, (given,)))
        if given not in _BY_AUTOGRAD:
            names = [*_NAMED, *_BY_AUTOGRAD]
            near = difflib.get_close_matches(given, names, n=1)
            raise InputError(
                f"activation {given!r}: {f'did you mean {near[0]!r}?' if near else 'give one of ' + ', '.join(names)}"
            )
        name, f = given, _BY_AUTOGRAD[given]
    elif callable(given):
        name = getattr(given, "__name__", type(given).__name__)
        if isinstance(given, torch.nn.Module):
            _check_module(name, given)
            if next(given.parameters(), None) is not None:
                return _parametric(name, given, tuple(sample), transposed)
        f = _checked(name, given)
    else:
        raise InputError(f"activation {given!r}: give a name or an elementwise function of a tensor")
    first = _derivative(f)
    second, source = _derivative(first), (activation, (given,))
    return Activation(name, f, None, lambda z: first(z).detach(), lambda z: second(z).detach(), source=source)


def _check_module(name: str, module: torch.nn.Module) -> None:
    """Refuse a module with a state beside its parameters, or with random numbers."""
    if buffers := [key for key, _ in module.named_buffers()]:
        raise InputError(
            f"activation {name} has buffers ({', '.join(buffers)}): a step depends on the state and the parameters of "
            "a layer only; give constants as numbers, and a normalisation in a block of LayerParallel"
        )
    for part in module.modules():
        random = part.training and (isinstance(part, torch.nn.RReLU) or getattr(part, "p", 0) != 0)
        if random and isinstance(part, torch.nn.RReLU | torch.nn.modules.dropout._DropoutNd):
            raise InputError(f"activation {name}: {_random(type(part).__name__)}")


def _random(what: str) -> str:
    """Why an activation with random numbers is refused."""
    return (
        f"{what} is random, and sweeps evaluate a layer several times; give one that is not (module.eval()), or a "
        "block of LayerParallel with dropout"
    )


def _tried(name: str, f: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    """Values at ``z``, which has to be left as it is; random and failing functions are refused."""
    try:
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            y, again = f(z.clone()), f(z.clone())
    except Exception as error:
        raise InputError(f"activation {name} on a batch {tuple(z.shape)}: {type(error).__name__}: {error}") from error
    if not torch.is_tensor(y) or y.shape != z.shape:
        found = tuple(y.shape) if torch.is_tensor(y) else type(y).__name__
        raise InputError(f"activation {name} is not elementwise: it gives {found} for a tensor {tuple(z.shape)}")
    if not torch.allclose(y, again, equal_nan=True):
        raise InputError(f"activation {name}: {_random('it')}")
    return y


def _checked(name: str, given: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The function, or one that copies what it would overwrite; one that is not elementwise is refused."""
    z = torch.linspace(-1.5, 1.5, 6, dtype=torch.float64)
    whole = _tried(name, given, z.reshape(2, 3)).reshape(-1)
    if whole.requires_grad:
        raise InputError(
            f"activation {name} depends on parameters that would not be trained: give the module that has them"
        )
    alone = torch.cat([_tried(name, given, z[i : i + 1]) for i in range(6)])
    if not torch.allclose(whole, alone):
        raise InputError(f"activation {name} is not elementwise: a value depends on others; give one that is")
    given(after := z.clone())
    return given if torch.equal(after, z) else lambda z: given(z.clone())


def _parametric(name: str, module: torch.nn.Module, sample: tuple[int, ...], transposed: bool) -> Activation:
    """A module with parameters as activation of states of a shape, if a value depends on its entry and channel only."""
    module = copy.deepcopy(module)
    names = tuple(key for key, _ in module.named_parameters())
    if len({key.replace(".", "_") for key in names}) < len(names):
        raise InputError(f"activation {name}: its parameters {', '.join(names)} have the same name but for dots")
    make = lambda batched: ParametricActivation(
        name, module, None, torch.ones_like, torch.zeros_like,
        source=(activation, (module, sample, transposed)), module=module, names=names, sample=sample,
        transposed=transposed, batched=batched,
    )  # fmt: skip
    act = make(False)
    own = [p.double() for p in act.initial.values()]
    generator = torch.Generator().manual_seed(0)
    z, other = torch.randn((2, *sample), dtype=torch.float64, generator=generator)
    f = lambda z: act.serial(z, own)
    y = _tried(name, f, z)
    f(after := z.clone())
    if not torch.equal(after, z):
        raise InputError(f"activation {name} overwrites its argument: give one that does not (inplace=False)")
    if not torch.allclose(f(z[:1]), y[:1]):
        raise InputError(f"activation {name} is not elementwise: a sample's values depend on others; give one that is")
    for _ in range(4):
        kept = torch.rand(sample, generator=generator) < 0.5
        if not torch.allclose(f(torch.where(kept, z, other))[kept], y[kept]):
            raise InputError(f"activation {name} is not elementwise: a value depends on others; give one that is")
    return make(_takes_vmap(make(True), torch.stack([z, other])))


def _takes_vmap(act: ParametricActivation, z: Tensor) -> bool:
    """Whether the derivatives of two layers in one call are those of one layer each, up to round-off."""
    z = act._layout(z)
    own = [torch.stack([p.double(), 0.5 * p.double()]) for p in act.initial.values()]
    try:
        both = [act.output(z, own), *act.gradients(z, own, z), act.second(None, z, own, z, z, own)[0]]
    except Exception:
        return False
    for i in (0, 1):
        mine = [p[i] for p in own]
        alone = [act.output(z[i], mine), *act.gradients(z[i], mine, z[i])]
        alone.append(act.second(None, z[i], mine, z[i], z[i], mine)[0])
        if not all(torch.allclose(a[i], b, equal_nan=True) for a, b in zip(both, alone, strict=True)):
            return False
    return True

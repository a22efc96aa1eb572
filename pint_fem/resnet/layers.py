r"""Kinds of residual layers :math:`u \mapsto u + h\, \sigma(L_\theta u + b)` on blocks of layers.

A state is laid out for the kind's fastest call, with the batch padded so that a state fills whole vector registers: the
bits of an elementwise function then do not depend on where in a block a state stands.

* :class:`Dense`: ``(width, batch)``; a block of layers is one batched matrix product (``baddbmm``), so are its
  transpose and its gradient.
* :class:`Convolution`: ``(batch, channels, height, width)``; one convolution a layer, all else a block at a time. A
  grouped convolution of the block computes the same, no faster for batches of 16 and more, and with bits that depend
  on the number of groups (torch's float32 kernels).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from pint_fem.errors import InputError
from pint_fem.resnet.activations import activation

__all__ = ["Convolution", "Dense", "Layer", "Room"]

Tensor = torch.Tensor
Theta = Sequence[Tensor]

# values a state has a multiple of: two AVX-512 registers of float32, torch's unrolled loop
_VALUES = 32


def _is_count(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


class Room:
    """Work space for states, contiguous: what was there before, unless it is too small."""

    def __init__(self):
        self._kept: Tensor | None = None

    def __call__(self, like: Tensor) -> Tensor:
        """As large as some states."""
        kept, n = self._kept, like.shape[0]
        if kept is None or kept.shape[0] < n or kept.shape[1:] != like.shape[1:] or kept.dtype != like.dtype:
            kept = self._kept = torch.empty(like.shape, dtype=like.dtype)
        return kept if kept.shape[0] == n else kept[:n]


class Layer:
    """What the sweeps ask of a kind of layer.

    Parameters
    ----------
    activation
        Name or elementwise callable.
    """

    #: Names and shapes of a layer's parameters.
    shapes: dict[str, tuple[int, ...]]
    fan_in: int

    def __init__(self, act):
        self.activation = activation(act)

    def initial(self, generator: torch.Generator, dtype: torch.dtype) -> list[Tensor]:
        """Parameters of one layer: uniform in ``+-1/sqrt(fan_in)``, as torch's own layers begin."""
        bound = 1 / math.sqrt(self.fan_in)
        return [
            torch.empty(shape, dtype=torch.float64).uniform_(-bound, bound, generator=generator).to(dtype)
            for shape in self.shapes.values()
        ]

    def check_input(self, x: Tensor) -> None:
        """Refuse what the opening layer gives where it does not fit."""
        raise NotImplementedError

    def pack(self, x: Tensor) -> Tensor:
        """A batch as torch has it, ``(batch, ...)``, in this kind's layout, padded; differentiable."""
        raise NotImplementedError

    def unpack(self, u: Tensor, batch: int) -> Tensor:
        """The inverse of :meth:`pack`."""
        raise NotImplementedError

    def linear(self, theta: Theta, u: Tensor, out: Tensor, scale: float) -> Tensor:
        """``scale (L u + b)`` of a block of layers."""
        raise NotImplementedError

    def adjoint(self, theta: Theta, t: Tensor, lam: Tensor, h: float, out: Tensor) -> Tensor:
        """``lam + h L^T t`` of a block of layers."""
        raise NotImplementedError

    def linear_of_one(self, theta: Theta, u: Tensor, out: Tensor, scale: float) -> Tensor:
        """:meth:`linear` of a single layer, where that has a faster call: layers that go one after another."""
        return self.linear([p.unsqueeze(0) for p in theta], u.unsqueeze(0), out.unsqueeze(0), scale)

    def adjoint_of_one(self, theta: Theta, t: Tensor, lam: Tensor, h: float, out: Tensor) -> Tensor:
        """:meth:`adjoint` of a single layer."""
        return self.adjoint([p.unsqueeze(0) for p in theta], t.unsqueeze(0), lam.unsqueeze(0), h, out.unsqueeze(0))

    def gradients(self, t: Tensor, u: Tensor) -> list[Tensor]:
        """Derivatives of ``(t, L u + b)`` with respect to the parameters of a block of layers."""
        raise NotImplementedError

    def serial(self, theta: Theta, u: Tensor) -> Tensor:
        """``L u + b`` of one layer in torch's own layout, for autograd."""
        raise NotImplementedError


class Dense(Layer):
    """``L u = A u`` with a full matrix: parameters ``weight (width, width)`` and ``bias (width,)``.

    Parameters
    ----------
    width
        Size of a state.
    activation
        Name or elementwise callable.

    Raises
    ------
    InputError
        On a width that is no positive whole number, or an unknown activation.
    """

    def __init__(self, width: int, activation="tanh"):
        super().__init__(activation)
        if not _is_count(width):
            raise InputError(f"Dense width {width!r}: give a positive whole number")
        self.width = self.fan_in = width
        self.shapes = {"weight": (width, width), "bias": (width,)}
        self._multiple = _VALUES // math.gcd(_VALUES, width)
        self._room = Room()

    def check_input(self, x: Tensor) -> None:
        """See :class:`Layer`."""
        if x.ndim != 2 or x.shape[1] != self.width:
            raise InputError(
                f"the opening layer gives {tuple(x.shape)}, layers of width {self.width} want (batch, {self.width})"
            )

    def pack(self, x: Tensor) -> Tensor:
        """See :class:`Layer`."""
        return F.pad(x, (0, 0, 0, -len(x) % self._multiple)).t()

    def unpack(self, u: Tensor, batch: int) -> Tensor:
        """See :class:`Layer`."""
        return u.t()[:batch]

    def linear(self, theta: Theta, u: Tensor, out: Tensor, scale: float) -> Tensor:
        """See :class:`Layer`."""
        weight, bias = theta
        return torch.baddbmm(bias.unsqueeze(2), weight, u, beta=scale, alpha=scale, out=out)

    def adjoint(self, theta: Theta, t: Tensor, lam: Tensor, h: float, out: Tensor) -> Tensor:
        """See :class:`Layer`."""
        product = torch.bmm(theta[0].transpose(1, 2), t, out=self._room(t))
        return torch.add(lam, product, alpha=h, out=out)

    def linear_of_one(self, theta: Theta, u: Tensor, out: Tensor, scale: float) -> Tensor:
        """See :class:`Layer`."""
        weight, bias = theta
        return torch.addmm(bias.unsqueeze(1), weight, u, beta=scale, alpha=scale, out=out)

    def adjoint_of_one(self, theta: Theta, t: Tensor, lam: Tensor, h: float, out: Tensor) -> Tensor:
        """See :class:`Layer`."""
        return torch.addmm(lam, theta[0].t(), t, alpha=h, out=out)

    def gradients(self, t: Tensor, u: Tensor) -> list[Tensor]:
        """See :class:`Layer`."""
        return [torch.bmm(t, u.transpose(1, 2)), t.sum(2)]

    def serial(self, theta: Theta, u: Tensor) -> Tensor:
        """See :class:`Layer`."""
        return F.linear(u, *theta)


class Convolution(Layer):
    """``L u`` a convolution with zero padding: parameters ``weight (channels, channels, kernel, kernel)`` and ``bias``.

    Parameters
    ----------
    channels
        Channels of a state.
    kernel
        Size of the kernel, odd.
    activation
        Name or elementwise callable.

    Raises
    ------
    InputError
        On channels that are no positive whole number, an even kernel, or an unknown activation.
    """

    def __init__(self, channels: int, kernel: int = 3, activation="relu"):
        super().__init__(activation)
        if not _is_count(channels):
            raise InputError(f"Convolution channels {channels!r}: give a positive whole number")
        if not _is_count(kernel) or kernel % 2 == 0:
            raise InputError(
                f"Convolution kernel {kernel!r}: give an odd positive whole number, so that images keep their size"
            )
        self.channels, self.kernel, self.padding = channels, kernel, kernel // 2
        self.fan_in = channels * kernel**2
        self.shapes = {"weight": (channels, channels, kernel, kernel), "bias": (channels,)}

    def check_input(self, x: Tensor) -> None:
        """See :class:`Layer`."""
        if x.ndim != 4 or x.shape[1] != self.channels:
            raise InputError(
                f"the opening layer gives {tuple(x.shape)}, convolutions want (batch, {self.channels}, height, width)"
            )

    def pack(self, x: Tensor) -> Tensor:
        """See :class:`Layer`."""
        multiple = _VALUES // math.gcd(_VALUES, math.prod(x.shape[1:]))
        return F.pad(x, (0, 0, 0, 0, 0, 0, 0, -len(x) % multiple))

    def unpack(self, u: Tensor, batch: int) -> Tensor:
        """See :class:`Layer`."""
        return u[:batch]

    def linear(self, theta: Theta, u: Tensor, out: Tensor, scale: float) -> Tensor:
        """See :class:`Layer`."""
        weight, bias = theta
        for i in range(len(u)):
            out[i] = F.conv2d(u[i], weight[i], bias[i], padding=self.padding)
        return out if scale == 1 else out.mul_(scale)

    def adjoint(self, theta: Theta, t: Tensor, lam: Tensor, h: float, out: Tensor) -> Tensor:
        """See :class:`Layer`."""
        weight = theta[0]
        for i in range(len(t)):
            torch.add(lam[i], F.conv_transpose2d(t[i], weight[i], padding=self.padding), alpha=h, out=out[i])
        return out

    def gradients(self, t: Tensor, u: Tensor) -> list[Tensor]:
        """See :class:`Layer`."""
        n, p = len(t), [self.padding] * 2
        weight, bias = (torch.empty((n, *shape), dtype=t.dtype) for shape in self.shapes.values())
        like = weight.new_empty(self.shapes["weight"])
        for i in range(n):
            _, weight[i], bias[i] = torch.ops.aten.convolution_backward(
                t[i], u[i], like, [self.channels], [1, 1], p, [1, 1], False, [0, 0], 1, [False, True, True]
            )
        return [weight, bias]

    def serial(self, theta: Theta, u: Tensor) -> Tensor:
        """See :class:`Layer`."""
        return F.conv2d(u, *theta, padding=self.padding)

r"""Kinds of residual layers :math:`u \mapsto u + h\, \sigma(L_\theta u + b)`: the maps of blocks of layers.

A state is laid out for the kind's fastest call, with the batch padded so that a state fills whole vector registers: the
result of an elementwise function is then bitwise independent of the state's place in a block.

* :class:`Dense`: ``(width, batch)``; a block of layers is one batched matrix product (``baddbmm``), so are its
  transpose and its gradient.
* :class:`Convolution`: ``(batch, channels, height, width)``; one convolution per layer, all else in blocks. A grouped
  convolution of the block computes the same, no faster for batches of 16 and more, and with results whose round-off
  depends on the number of groups (torch's float32 kernels).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from pint_fem.errors import InputError
from pint_fem.resnet.activations import activation

__all__ = ["Convolution", "Dense", "Layer", "ScratchBuffer"]

Tensor = torch.Tensor
Theta = Sequence[Tensor]

_SEED_STRIDE = 1_000_003
_REGISTER = 32  # the size of a state is a multiple of it: two AVX-512 registers of float32, torch's unrolled loop


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


class ScratchBuffer:
    """A contiguous buffer for intermediate results that is allocated again only where a larger one is needed."""

    def __init__(self) -> None:
        self._buffer: Tensor | None = None

    def __call__(self, like: Tensor) -> Tensor:
        """A tensor with the shape and type of ``like`` and undefined values, valid until the next call."""
        buffer, n = self._buffer, like.shape[0]
        if buffer is None or buffer.shape[0] < n or buffer.shape[1:] != like.shape[1:] or buffer.dtype != like.dtype:
            buffer = self._buffer = torch.empty(like.shape, dtype=like.dtype)
        return buffer if buffer.shape[0] == n else buffer[:n]


class Layer:
    """Base of the kinds of layers: the maps that sweeps need of them, for ``k`` layers at once.

    Stacked parameters ``theta`` have shapes ``(k, ...)``, states, adjoints and slopes ``(k, *state)``.

    Parameters
    ----------
    act
        Activation by name, an elementwise callable, or a module with parameters of which every layer gets its own.
    sample
        Shape of a small batch of states in torch's layout; ``None``: modules with parameters are refused.
    transposed
        Whether states are ``(channels, batch)``.

    Attributes
    ----------
    shapes : dict
        Names and shapes of the parameters of one layer, those of its activation at the end.
    fan_in : int
        Number of values that a value of ``L u`` depends on.
    """

    shapes: dict[str, tuple[int, ...]]
    fan_in: int

    def __init__(
        self,
        act: str | Callable[[Tensor], Tensor],
        sample: tuple[int, ...] | None = None,
        *,
        transposed: bool = False,
    ):
        layout = () if sample is None else (sample, transposed)
        self.activation = activation(act, *layout)
        self._own = len(self.activation.initial)
        if self._own and sample is None:
            raise InputError(
                f"activation {self.activation.name}: {type(self).__name__} layers take none with parameters"
            )

    @property
    def _activation_shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the parameters of one layer's activation."""
        return {name: tuple(p.shape) for name, p in self.activation.initial.items()}

    def of_activation(self, theta: Theta) -> Theta:
        """Parameters of the activation among those of a layer."""
        return theta[len(theta) - self._own :]

    def initial(self, numbers: range, seed: int, dtype: torch.dtype) -> dict[str, Tensor]:
        """Random stacked parameters by name, uniform in ``+-1/sqrt(fan_in)`` as those of torch's own layers.

        Parameters of the activation have the values of the module that was given; the others depend on the number of
        the layer in the network and the seed only.
        """
        bound, first = 1 / math.sqrt(self.fan_in), self.activation.initial
        stacks = {name: torch.empty((len(numbers), *shape), dtype=dtype) for name, shape in self.shapes.items()}
        for i, n in enumerate(numbers):
            generator = torch.Generator().manual_seed(seed * _SEED_STRIDE + n)
            for name, shape in self.shapes.items():
                if name in first:
                    stacks[name][i] = first[name]
                    continue
                values = torch.empty(shape, dtype=torch.float64).uniform_(-bound, bound, generator=generator)
                stacks[name][i] = values  # rounded: all types get the same numbers
        return stacks

    def check_input(self, x: Tensor) -> None:
        """Raise ``InputError`` if the output of the opening layer does not have the shape of a state."""
        raise NotImplementedError

    def pack(self, x: Tensor) -> Tensor:
        """A batch ``(batch, ...)`` in this kind's layout, padded with zeros; differentiable."""
        raise NotImplementedError

    def unpack(self, u: Tensor, batch: int) -> Tensor:
        """The ``batch`` samples of a state ``u``, the inverse of :meth:`pack`; differentiable."""
        raise NotImplementedError

    def linear(self, theta: Theta, u: Tensor, out: Tensor, scale: float) -> Tensor:
        """Write ``scale (L u + b)`` of a block of layers to ``out`` and return it."""
        raise NotImplementedError

    def adjoint(self, theta: Theta, t: Tensor, lam: Tensor, h: float, out: Tensor) -> Tensor:
        """Write ``lam + h L^T t`` of a block of layers to ``out`` and return it."""
        raise NotImplementedError

    def linear_single(self, theta: Theta, u: Tensor, out: Tensor, scale: float) -> Tensor:
        """:meth:`linear` of a single layer without leading axes, for which a kind may have a faster call."""
        return self.linear([p.unsqueeze(0) for p in theta], u.unsqueeze(0), out.unsqueeze(0), scale)

    def adjoint_single(self, theta: Theta, t: Tensor, lam: Tensor, h: float, out: Tensor) -> Tensor:
        """:meth:`adjoint` of a single layer without leading axes."""
        return self.adjoint([p.unsqueeze(0) for p in theta], t.unsqueeze(0), lam.unsqueeze(0), h, out.unsqueeze(0))

    def gradients(self, t: Tensor, u: Tensor) -> list[Tensor]:
        """Derivatives of the inner product ``(t, L u + b)`` with respect to the parameters of a block of layers."""
        raise NotImplementedError

    def activation_gradients(self, theta: Theta, lam: Tensor, u: Tensor) -> list[Tensor]:
        r"""Derivatives of :math:`(\lambda, \sigma(L u + b))` with respect to the parameters of the activation."""
        own = self.of_activation(theta)
        if not len(own):
            return []
        return self.activation.gradients(self.linear(theta, u, torch.empty_like(u), 1.0), own, lam)

    def serial(self, theta: Theta, u: Tensor) -> Tensor:
        """``L u + b`` of one layer for a batch in torch's own layout, differentiable by autograd."""
        raise NotImplementedError


class Dense(Layer):
    """``L u = A u`` with a full matrix: parameters ``weight (width, width)`` and ``bias (width,)``.

    Parameters
    ----------
    width
        Size of a state.
    activation
        By name, or an elementwise callable.

    Raises
    ------
    InputError
        On a width that is no positive whole number, or an unknown activation.
    """

    def __init__(self, width: int, activation: str | Callable[[Tensor], Tensor] = "tanh"):
        if not _is_count(width):
            raise InputError(f"Dense width {width!r}: give a positive whole number")
        super().__init__(activation, (5, width), transposed=True)
        self.width = self.fan_in = width
        self.shapes = {"weight": (width, width), "bias": (width,)} | self._activation_shapes
        self._multiple = _REGISTER // math.gcd(_REGISTER, width)
        self._scratch = ScratchBuffer()

    def check_input(self, x: Tensor) -> None:
        """Raise ``InputError`` if the output of the opening layer does not have the shape of a state."""
        if x.ndim != 2 or x.shape[1] != self.width:
            raise InputError(
                f"the opening layer gives {tuple(x.shape)}, layers of width {self.width} take (batch, {self.width})"
            )

    def pack(self, x: Tensor) -> Tensor:
        """A batch in the layout of states, padded with zeros."""
        return F.pad(x, (0, 0, 0, -len(x) % self._multiple)).t()

    def unpack(self, u: Tensor, batch: int) -> Tensor:
        """The samples of a state."""
        return u.t()[:batch]

    def linear(self, theta: Theta, u: Tensor, out: Tensor, scale: float) -> Tensor:
        """Write ``scale (L u + b)`` of a block of layers to ``out``."""
        weight, bias = theta[:2]
        return torch.baddbmm(bias.unsqueeze(2), weight, u, beta=scale, alpha=scale, out=out)

    def adjoint(self, theta: Theta, t: Tensor, lam: Tensor, h: float, out: Tensor) -> Tensor:
        """Write ``lam + h L^T t`` of a block of layers to ``out``."""
        product = torch.bmm(theta[0].transpose(1, 2), t, out=self._scratch(t))
        return torch.add(lam, product, alpha=h, out=out)

    def linear_single(self, theta: Theta, u: Tensor, out: Tensor, scale: float) -> Tensor:
        """Write ``scale (L u + b)`` of one layer to ``out``."""
        weight, bias = theta[:2]
        return torch.addmm(bias.unsqueeze(1), weight, u, beta=scale, alpha=scale, out=out)

    def adjoint_single(self, theta: Theta, t: Tensor, lam: Tensor, h: float, out: Tensor) -> Tensor:
        """Write ``lam + h L^T t`` of one layer to ``out``."""
        return torch.addmm(lam, theta[0].t(), t, alpha=h, out=out)

    def gradients(self, t: Tensor, u: Tensor) -> list[Tensor]:
        """Derivatives of ``(t, L u + b)`` with respect to the parameters."""
        return [torch.bmm(t, u.transpose(1, 2)), t.sum(2)]

    def serial(self, theta: Theta, u: Tensor) -> Tensor:
        """``L u + b`` of one layer in torch's own layout."""
        return F.linear(u, *theta[:2])


class Convolution(Layer):
    """``L u`` a convolution with zero padding: parameters ``weight (channels, channels, kernel, kernel)`` and ``bias``.

    Parameters
    ----------
    channels
        Channels of a state.
    kernel
        Size of the kernel, odd.
    activation
        By name, or an elementwise callable.

    Raises
    ------
    InputError
        On channels that are no positive whole number, an even kernel, or an unknown activation.
    """

    def __init__(self, channels: int, kernel: int = 3, activation: str | Callable[[Tensor], Tensor] = "relu"):
        if not _is_count(channels):
            raise InputError(f"Convolution channels {channels!r}: give a positive whole number")
        if not _is_count(kernel) or kernel % 2 == 0:
            raise InputError(
                f"Convolution kernel {kernel!r}: give an odd positive whole number, so that images keep their size"
            )
        super().__init__(activation, (5, channels, 4, 3))
        self.channels, self.kernel, self.padding = channels, kernel, kernel // 2
        self.fan_in = channels * kernel**2
        self.shapes = {"weight": (channels, channels, kernel, kernel), "bias": (channels,)} | self._activation_shapes

    def check_input(self, x: Tensor) -> None:
        """Raise ``InputError`` if the output of the opening layer does not have the shape of a state."""
        if x.ndim != 4 or x.shape[1] != self.channels:
            raise InputError(
                f"the opening layer gives {tuple(x.shape)}, convolutions take (batch, {self.channels}, height, width)"
            )

    def pack(self, x: Tensor) -> Tensor:
        """A batch in the layout of states, padded with zeros."""
        multiple = _REGISTER // math.gcd(_REGISTER, math.prod(x.shape[1:]))
        return F.pad(x, (0, 0, 0, 0, 0, 0, 0, -len(x) % multiple))

    def unpack(self, u: Tensor, batch: int) -> Tensor:
        """The samples of a state."""
        return u[:batch]

    def linear(self, theta: Theta, u: Tensor, out: Tensor, scale: float) -> Tensor:
        """Write ``scale (L u + b)`` of a block of layers to ``out``."""
        weight, bias = theta[:2]
        for i in range(len(u)):
            out[i] = F.conv2d(u[i], weight[i], bias[i], padding=self.padding)
        return out if scale == 1 else out.mul_(scale)

    def adjoint(self, theta: Theta, t: Tensor, lam: Tensor, h: float, out: Tensor) -> Tensor:
        """Write ``lam + h L^T t`` of a block of layers to ``out``."""
        weight = theta[0]
        for i in range(len(t)):
            torch.add(lam[i], F.conv_transpose2d(t[i], weight[i], padding=self.padding), alpha=h, out=out[i])
        return out

    def gradients(self, t: Tensor, u: Tensor) -> list[Tensor]:
        """Derivatives of ``(t, L u + b)`` with respect to the parameters."""
        n, p = len(t), [self.padding] * 2
        weight, bias = (torch.empty((n, *shape), dtype=t.dtype) for shape in list(self.shapes.values())[:2])
        like = weight.new_empty(self.shapes["weight"])
        for i in range(n):
            _, weight[i], bias[i] = torch.ops.aten.convolution_backward(
                t[i], u[i], like, [self.channels], [1, 1], p, [1, 1], False, [0, 0], 1, [False, True, True]
            )
        return [weight, bias]

    def serial(self, theta: Theta, u: Tensor) -> Tensor:
        """``L u + b`` of one layer in torch's own layout."""
        weight, bias = theta[:2]
        return F.conv2d(u, weight, bias, padding=self.padding)

"""The networks of the demos in plain torch: residual blocks, and what is before, between and after them.

Nothing in here knows of layer-parallel training: a block is any module whose output has the shape of its input.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F

__all__ = [
    "AttentionBlock",
    "CharacterEmbedding",
    "CharacterLogits",
    "ConvolutionBlock",
    "downsampling",
    "image_closing",
    "image_opening",
    "normalisation",
]

Tensor = torch.Tensor


def normalisation(kind: str, channels: int) -> nn.Module:
    """``"group"``: GroupNorm with four groups where they divide the channels; ``"batch"``: BatchNorm."""
    if kind == "batch":
        return nn.BatchNorm2d(channels)
    return nn.GroupNorm(math.gcd(4, channels), channels)


class ConvolutionBlock(nn.Module):
    r"""The residual function :math:`f(u) = C_2\, \sigma(N_2(C_1\, \sigma(N_1(u))))` of a residual network with
    pre-activation (He, Zhang, Ren, Sun, arXiv:1603.05027).

    :math:`C` are convolutions with 3 x 3 kernels, :math:`N` normalisations, :math:`\sigma` is ReLU.

    Parameters
    ----------
    channels
        Channels of a state ``(batch, channels, height, width)``.
    norm
        ``"group"`` or ``"batch"``.
    """

    def __init__(self, channels: int, norm: str = "group"):
        super().__init__()
        self.norm1, self.norm2 = normalisation(norm, channels), normalisation(norm, channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)

    def forward(self, u: Tensor) -> Tensor:
        """``f(u)``, in the shape of ``u``."""
        return self.conv2(F.relu(self.norm2(self.conv1(F.relu(self.norm1(u))))))


def image_opening(channels: int, stride: int) -> nn.Module:
    """From images ``(batch, 1, height, width)`` to the first state."""
    return nn.Conv2d(1, channels, 3, stride=stride, padding=1)


def downsampling(channels: int) -> nn.Module:
    """From the last state of a stage to the first of the next: half the height and width, twice the channels."""
    return nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1)


def image_closing(channels: int, norm: str, classes: int) -> nn.Module:
    """From the last state to the logits ``(batch, classes)``, by the mean over all pixels."""
    head = [normalisation(norm, channels), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*head, nn.Linear(channels, classes))


class AttentionBlock(nn.Module):
    r"""A pre-norm transformer block, :math:`v = u + A(N_1(u))`, :math:`v + M(N_2(v))`, whose output is the next state.

    :math:`A` is causal self-attention with several heads, :math:`M` a network with one hidden layer, each followed by
    dropout. The two last linear maps begin with the deviation ``1 / sqrt(2 width depth)``, so that the sum of all
    ``depth`` blocks has the size of the state (Radford et al., "Language models are unsupervised multitask learners",
    2019, Sec. 2.3).

    Parameters
    ----------
    width
        Features of a state ``(batch, length, width)``.
    heads
        Divides the width.
    depth
        Number of blocks of the network.
    dropout
        Share of the values that are set to zero in training.
    """

    def __init__(self, width: int, heads: int, depth: int, dropout: float = 0.1):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.expand, self.contract = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.dropout = nn.Dropout(dropout)
        for last in (self.project, self.contract):
            nn.init.normal_(last.weight, std=1 / math.sqrt(2 * depth * last.in_features))
            nn.init.zeros_(last.bias)

    def forward(self, u: Tensor) -> Tensor:
        """The next state, in the shape of ``u``."""
        u = u + self.dropout(self.project(self._attention(self.norm1(u))))
        return u + self.dropout(self.contract(F.gelu(self.expand(self.norm2(u)))))

    def _attention(self, u: Tensor) -> Tensor:
        """Each place attends to itself and to those before it (written out, so that it can be batched over layers)."""
        batch, length, width = u.shape
        q, k, v = self.qkv(u).view(batch, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        later = torch.ones(length, length, dtype=torch.bool, device=u.device).triu(1)
        scores = (q @ k.transpose(2, 3) / math.sqrt(width // self.heads)).masked_fill(later, -math.inf)
        return (torch.softmax(scores, 3) @ v).transpose(1, 2).reshape(batch, length, width)


class CharacterEmbedding(nn.Module):
    """From codes of characters ``(batch, length)`` to the first state: the sum of a vector for the character and one
    for its place.

    Parameters
    ----------
    characters
        Size of the alphabet.
    length
        Places, at least as many as in a passage.
    width
        Features of a state.
    dropout
        Share of the values that are set to zero in training.
    """

    def __init__(self, characters: int, length: int, width: int, dropout: float = 0.1):
        super().__init__()
        self.character, self.place = nn.Embedding(characters, width), nn.Embedding(length, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, codes: Tensor) -> Tensor:
        """The state ``(batch, length, width)``."""
        return self.dropout(self.character(codes) + self.place.weight[: codes.shape[1]])


class CharacterLogits(nn.Module):
    """From the last state to logits ``(batch, characters, length)`` of the next character at each place.

    Parameters
    ----------
    characters
        Size of the alphabet.
    width
        Features of a state.
    """

    def __init__(self, characters: int, width: int):
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(width), nn.Linear(width, characters)

    def forward(self, u: Tensor) -> Tensor:
        """The logits, with the classes on the second axis as the loss functions of torch take them."""
        return self.linear(self.norm(u)).transpose(1, 2)

"""Whether ranks that share the layers are given the same batch."""

from __future__ import annotations

from typing import Any

import torch

from pint_fem.digests import digest

__all__ = ["batch_digest", "comparable"]


def comparable(values: Any) -> Any:
    """A batch as :func:`pint_fem.digests.digest` and :func:`~pint_fem.collective.require_same` take it.

    Parameters
    ----------
    values
        A tensor. Of sparse tensors the shape is compared, of other objects what can be.

    Returns
    -------
    array or object
    """
    if not torch.is_tensor(values):
        return values
    if values.layout != torch.strided:
        return tuple(values.shape)
    return (values.float() if values.dtype == torch.bfloat16 else values).numpy(force=True)


def batch_digest(values: Any) -> int:
    """A number that follows from a batch's type and values, the same in every process."""
    return digest(comparable(values))

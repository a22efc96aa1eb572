"""The regularisation of the ready problems: squares of a control's gradient and of its values, with weights."""

from collections.abc import Callable

from firedrake import dx, grad, inner
from ufl import Form

__all__ = ["prior_of"]


def prior_of(alpha: float, beta: float) -> Callable[..., Form]:
    """Return what makes the bilinear form of the regularisation, ``prior(a, b)``, for scalars and for vectors; half of
    ``prior(q, q)`` is the regularisation of ``q``.

    Parameters
    ----------
    alpha, beta
        Weights of the gradient and of the size.
    """
    return lambda a, b: (alpha * inner(grad(a), grad(b)) + beta * inner(a, b)) * dx

"""The interface of a time step that a user implements for the solvers of all steps."""

from __future__ import annotations

from typing import Protocol

from pint_fem.all_at_once.arrays import Array

__all__ = ["Propagator"]


class Propagator(Protocol):
    """The interface that a user implements: one time step, on a block of states at once.

    Blocks are numpy arrays or torch tensors, as the solve is given.

    The following methods and attributes are optional.

    ``sweep(first, U, G)``
        Takes the steps ``first, first + 1, ...`` one after another in place, from ``U[0]``. ``U`` has one row more than
        there are steps, with the iterate in it; ``G`` is ``None`` or has one row per step. Sequential solves use it.
    ``advance(first, m, u, out, G)``
        Takes steps one after another in each of ``k`` intervals, the steps ``first + i m, first + i m + 1, ...`` in
        interval ``i``, from ``u`` of shape ``(k, *state)``. ``out`` and ``G`` have shape ``(k, steps, *state)``:
        ``out[:, j] = Phi(out[:, j - 1]) + G[:, j]``, and ``G`` may be ``None``. A value that is not finite has to stay
        so in later steps. F-relaxation uses it; it is not called for propagators with ``uses_guess`` or ``block``.
    ``block``
        The number of states in a full block: relaxation then advances groups of that many intervals.
    ``uses_guess``
        If true, ``out`` holds a first guess of the result when ``step`` is called: the present iterate. It follows from
        the iterate alone, never from the order of calls, and is the same on both sides of the coarse equation, so the
        exact solution remains a fixed point however loosely an implicit step is solved (XBraid, ``restrict.c``).
    ``propagates_nonfinite``
        If true, a value that is not finite stays so in all later steps (``u + f(u)`` does that). Where all points are
        stored, the finest level's blocks are then not checked one by one: residuals show it, and the norms' ``finite``.
    ``may_be_last``
        Set before relaxations of the finest level: whether a step may be the solve's last at its point, for propagators
        that store something of it.
    ``keeps_input``
        If true, ``u`` and ``G`` can be written to (the propagator must not): for libraries that take no read-only
        arrays of numpy, such as torch.
    ``tangent(steps, u, du, out)``, ``adjoint(steps, u, lam, out)``
        Derivatives, for :func:`pint_fem.mgrit.check`.
    """

    def step(self, steps: range, u: Array, out: Array) -> None:
        """Write ``Phi_n(u)`` to ``out`` for each ``n`` in ``steps``, and return nothing.

        Parameters
        ----------
        steps
            The step numbers on this level; step ``n`` goes from point ``n`` to point ``n + 1``. A constant stride.
        u, out
            Arrays of shape ``(len(steps), *state)``, maybe strided along the first axis; they do not overlap. ``u`` is
            read-only. Where the solve is one of torch tensors, these are tensors on its device, within
            ``torch.no_grad()``.
        """

"""The minimisation methods of a functional."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from pint_fem.adjoint.minimisation.optimisers import named_array, one_shot, scipy_method, trust_region
from pint_fem.optimize.one_shot.records import OneShotResult
from pint_fem.optimize.records import TrustRegionResult

__all__ = ["Minimisable"]


class Minimisable:
    """What :class:`~pint_fem.adjoint.functional.ControlFunctional` offers to minimise itself by; it has ``problem``,
    ``inner``, ``spacetime`` and ``array``.
    """

    def minimize_trust_region(
        self,
        start=None,
        *,
        monitor: Callable[[str], None] | None = None,
        inexact=None,
        bounds=None,
        constraints=None,
        preconditioner=None,
        checkpoint=None,
        if_save_fails: str = "stop",
        **options,
    ) -> TrustRegionResult:
        """Minimise by :func:`pint_fem.optimize.minimize_trust_region` in the controls' inner product.

        Parameters
        ----------
        start
            First controls; default: their values at construction.
        monitor
            Gets a line an iteration, on the first rank only.
        inexact
            ``True``, :class:`~pint_fem.optimize.InexactOptions` or a dictionary of them: sweeps are solved as
            accurately as convergence needs and no more, at best to their ``rtol``.
        bounds
            ``(lower, upper)``, such as ``(0, None)``: each a number, ``None`` for no bound, values of the controls, or
            a list with one of these for each control. The method is :func:`pint_fem.optimize.trust_region.bounded.minimize_bounded`,
            together with ``constraints`` :func:`pint_fem.optimize.trust_region.multipliers.minimize_bounded_constrained`. The inner
            product has to be diagonal; where it is not, ``"lumped"`` is used.
        constraints
            Pairs of a UFL functional that is affine in the controls and its value, such as ``[(q*dx, 1.0)]``.
        preconditioner
            Of conjugate gradients: ``"regularisation"`` (the inverse of its second derivative), a bilinear form or a
            list with one a control, ``"limited-memory"``, or a callable on flat representatives.
        checkpoint
            A file (HDF5) that keeps the run after each iteration; if it is there, the run goes on from it. See
            :mod:`pint_fem.adjoint.minimisation.checkpoint`.
        if_save_fails
            What happens where that file cannot be written, as on a full disk: ``"stop"`` raises ``InputError`` on every
            rank, ``"continue"`` prints a line and goes on. The last complete file stays in either case.
        **options
            Of the minimiser. For a quadratic ``J`` the first radius is unlimited by default.

        Returns
        -------
        TrustRegionResult
            The functional's own controls, ``controls``, take the values found, not the functions that the evolution was
            given; ``x`` holds the own values of the minimiser; :meth:`function` makes
            functions of them.

        Raises
        ------
        InputError, ValueError
            On options that do not fit, before anything is solved.
        """
        result = trust_region(
            self, self._start(start), monitor=self._monitor(monitor), inexact=inexact, bounds=bounds,
            constraints=constraints, preconditioner=preconditioner, checkpoint=checkpoint,
            if_save_fails=if_save_fails, **options,
        )  # fmt: skip
        self._take(result.x)
        return result

    def minimize_one_shot(
        self, start=None, *, monitor=None, constraints=None, preconditioner=None, checkpoint=None,
        if_save_fails: str = "stop", **options,
    ) -> OneShotResult:  # fmt: skip
        """Minimise while solving: one MGRIT cycle for state and adjoint between two updates of the controls.

        See :func:`pint_fem.optimize.one_shot.method.minimize_one_shot` for options and result, and
        :meth:`minimize_trust_region` for the arguments. ``memory``: 40 pairs by default, 10 where a control has a value
        a step; as many as there are directions that the data determine make the run short.
        """
        result = one_shot(
            self, self._start(start), monitor=self._monitor(monitor), constraints=constraints,
            preconditioner=preconditioner, checkpoint=checkpoint, if_save_fails=if_save_fails, **options,
        )  # fmt: skip
        self._take(result.x)
        return result

    def minimize_scipy(self, start=None, method: str = "trust-krylov", *, bounds=None, **options):
        """Minimise by scipy, whose vectors are whole on each rank: for controls of moderate size.

        See :func:`pint_fem.optimize.scipy_methods.adapter.scipy_minimize` for methods, options and result. The variables are
        scaled by the root of the lumped mass matrix, and derivatives are exact in these coordinates (pyadjoint's
        ``minimize`` hands scipy Riesz representatives).
        """
        result = scipy_method(self, self._start(start), method, bounds=bounds, **options)
        self._take(result.x)
        return result

    def _start(self, start) -> np.ndarray:
        return self._current() if start is None else named_array(self, start, "start")

    def _monitor(self, monitor):
        """On the first rank only."""
        return monitor if self.spacetime.is_root else None

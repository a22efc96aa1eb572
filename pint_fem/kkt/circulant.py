r"""The skew-circulant KKT system and, by a correction at both ends of time, the KKT system itself.

The KKT system of all steps ``n = 1 .. N``, with :math:`u_0 = 0` and :math:`\lambda_{N+1} = 0`,

.. math::
   u_n - \Phi u_{n-1} - \Psi z_n = a_n , \qquad \lambda_n - \Phi^T \lambda_{n+1} - Q_n u_n = b_n , \qquad
   R z_n + \Psi^T \lambda_n = c_n ,

becomes ``P x = r`` with :math:`u_0 = -u_N`, :math:`\lambda_{N+1} = -\lambda_1` and one ``Q`` for all points, which
falls apart into a system for each frequency (:mod:`~pint_fem.kkt.transform`). Where these systems do not have the
controls as unknowns, they are eliminated before, :math:`z_n = R^{-1} (c_n - \Psi^T \lambda_n)`.

The two systems differ in the first equation of the state and the last one of the adjoint only: with

.. math::
   y = \begin{pmatrix} \Phi u_N \\ \Phi^T \lambda_1 + (Q_N - Q) u_N \end{pmatrix}

the solution of ``K x = r`` is :math:`x = P^{-1} (r + E y)`, where ``E`` writes ``y`` to these two equations, and ``y``
solves

.. math::  (I - G)\, y = y(P^{-1} r) , \qquad G y = y(P^{-1} E y) ,

by GMRES on vectors of two states. No transform is required for ``G``: the right-hand side of one step is known in all
frequencies, and two states of the solution are sums over these. Where rates of change of the controls are regularised,
``P`` has one more of them, from the last control to the first, and ``y`` a third part, the weighted difference of these
two, for their equations. Iterates are those of GMRES for ``K`` with the
preconditioner ``P``, at a part of the cost. The solution is as accurate as the systems of the frequencies, or as the
tolerance of GMRES.
"""

from __future__ import annotations

from functools import cached_property
from typing import NamedTuple, Protocol

import numpy as np
from firedrake.petsc import PETSc
from petsctools import OptionsManager

from pint_fem.all_at_once.stopping import DivergedError
from pint_fem.collective import collectively
from pint_fem.errors import SolverFailure
from pint_fem.kkt.model import ControlModel
from pint_fem.kkt.transform import SkewCirculant

__all__ = ["CirculantKKT", "FrequencySystems", "KKTSolution"]


_USABLE = 1e-6
"""Residual of GMRES that is small enough where its tolerance is not reached: conjugate gradients correct the rest."""


class FrequencySystems(Protocol):
    """Solves of the frequencies: :class:`~pint_fem.kkt.commuting.CommutingSystems` and others."""

    takes_controls: bool
    """Whether controls are unknowns of the systems, and not eliminated before."""
    single: bool

    @property
    def factorisations(self) -> int:
        """Number of factorisations so far."""

    @property
    def bytes(self) -> int:
        """Bytes of the cached factors."""

    @property
    def on_lanes(self) -> bool:
        """Whether several frequencies are solved at once."""

    def solve_all(
        self, frequencies: range, mu: np.ndarray, a: np.ndarray, b: np.ndarray, c: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
        """State, controls (``None`` where they are eliminated) and adjoint of some frequencies."""

    def release(self) -> None:
        """Free all factors."""


class KKTSolution(NamedTuple):
    """A solution of the own steps, and how it was found.

    Attributes
    ----------
    u, z, lam : ndarray, shape (k, n), (k, nz) and (k, n)
        States and adjoints at the ends of the steps, and controls.
    iterations : int
        Iterations of GMRES for the ends of time; 0 where they are not corrected.
    residual : float
        Its last residual relative to the first.
    """

    u: np.ndarray
    z: np.ndarray
    lam: np.ndarray
    iterations: int
    residual: float


class CirculantKKT:
    """Solves with the skew-circulant system, and with the KKT system itself (collective).

    Parameters
    ----------
    model
        The problem.
    systems
        Solves of the frequencies.
    transform
        The transform of the steps.
    rtol, max_it
        Relative tolerance and largest number of iterations of GMRES for the ends of time.
    prefix
        Prefix of that solver's options in PETSc's database.

    Attributes
    ----------
    solves, iterations : int
        Number of KKT systems solved so far, and of all iterations for them.
    """

    def __init__(
        self, model: ControlModel, systems: FrequencySystems, transform: SkewCirculant, *, rtol: float = 1e-8,
        max_it: int = 50, prefix: str = "kkt_ends_",
    ):  # fmt: skip
        self.model, self.systems, self.transform = model, systems, transform
        self.rtol, self.prefix = rtol, prefix
        self.max_it = (1 + model.weights.has_rates) * max_it
        self.solves = self.iterations = 0
        self._n = model.size

    # -- the circulant system ------------------------------------------------------------------------------------------
    @property
    def _single(self) -> bool:
        return self.systems.single and self.systems.on_lanes

    def solve(
        self,
        a: np.ndarray | None = None,
        b: np.ndarray | None = None,
        c: np.ndarray | None = None,
        *,
        ends: bool = True,
    ) -> KKTSolution:
        """Solve for right-hand sides of the own steps (collective).

        Parameters
        ----------
        a, b, c
            ``(k, n)``, ``(k, n)`` and ``(k, nz)``; zero by default.
        ends
            Whether it is the KKT system, not the circulant one, that is solved.

        Raises
        ------
        SolverFailure
            On every rank, if a system is singular; its subclass ``DivergedError`` if GMRES does not converge.
        """
        model, takes_controls = self.model, self.systems.takes_controls
        zero = np.zeros((model.slab.k, self._n))
        forward = lambda rows: self.transform.forward(zero if rows is None else rows, single=self._single).copy()
        first, second = forward(a), forward(b)
        if not takes_controls:
            # what remains of c after the adjoints' part may be a small difference, and so may the adjoints
            third = forward(None if c is None else model.load(model.weights.solve(c)))
        else:
            third = None if c is None else self._control_transform.forward(c).copy()
        solved = self._frequencies(first, second, third)
        iterations, residual = 0, 0.0
        if ends:
            y, iterations, residual = self._ends(solved)
            no_load = [] if takes_controls else [np.zeros_like(first)]
            correction = self._frequencies(*self._at_ends(y), *no_load)
            solved = [None if x is None else x + dx for x, dx in zip(solved, correction, strict=True)]
            self.solves, self.iterations = self.solves + 1, self.iterations + iterations
        u, lam = (np.array(self.transform.backward(x), float) for x in (solved[0], solved[2]))
        if takes_controls:
            z = np.array(self._control_transform.backward(solved[1]), float)
        else:
            z = -model.load_transposed(np.array(self.transform.backward(solved[1]), float))
            z = model.weights.solve(z if c is None else z + c)
        # nothing depends on the adjoints of boundary values, which systems of a pencil leave out
        rows = model.propagator.bc_rows
        if b is not None and not takes_controls:
            lam[:, rows] = b[:, rows]
        return KKTSolution(u, z, lam, iterations, residual)

    @cached_property
    def _control_transform(self) -> SkewCirculant:
        """The transform of the controls of the steps."""
        spacetime, bounds = self.model.spacetime, self.model.slab.bounds
        return SkewCirculant(self.model.nsteps, self.model.control_size, comm=spacetime.time_comm, bounds=bounds)

    def _frequencies(self, a: np.ndarray, b: np.ndarray, c: np.ndarray | None = None) -> list:
        """Solutions ``u, z, lam`` of the own frequencies for complex right-hand sides ``(f, n)``."""
        solve, own = self.systems.solve_all, self.transform.own
        return list(collectively(self.model.spacetime.comm, "KKT systems", solve, own, self.transform.mu, a, b, c))

    # -- the ends of time ----------------------------------------------------------------------------------------------
    @property
    def _length(self) -> int:
        """Own numbers of ``y``."""
        return 2 * self._n + (self.model.control_size if self.model.weights.has_rates else 0)

    def _at_ends(self, y: np.ndarray) -> list[np.ndarray]:
        """Right-hand sides ``a, b`` (and ``c``) of the own frequencies that belong to ``E y``."""
        own, N = slice(self.transform.own.start, self.transform.own.stop), self.transform.nsteps
        kind = np.complex64 if self._single else complex
        first, last = (self.transform.phases(step)[own] for step in (1, N))
        parts = [(first, y[: self._n]), (last, y[self._n : 2 * self._n])]
        if self.model.weights.has_rates:
            parts.append((first + last, y[2 * self._n :]))
        return [np.outer(phases.astype(kind), part.astype(kind)) for phases, part in parts]

    def _from_solution(self, solved: list) -> np.ndarray:
        """The vector ``y`` of a solution in frequencies, the same on all ranks in time."""
        own, n, N = slice(self.transform.own.start, self.transform.own.stop), self._n, self.transform.nsteps
        first, last = (self.transform.weights(step)[own] for step in (1, N))
        sums = [_real_sum(last, solved[0]), _real_sum(first, solved[2])]
        if self.model.weights.has_rates:
            sums.append(_real_sum(first + last, solved[1]))
        sums = self.model.spacetime.sum_over_time(np.concatenate(sums))
        u_last, lam_first = sums[None, :n], sums[None, n : 2 * n]
        out = np.empty(self._length)
        out[:n] = self.model.step(u_last)[0]
        out[n : 2 * n] = self.model.step(lam_first, transposed=True)[0]
        if self.model.differs_at_end:
            out[n : 2 * n] += self.model.end_difference(u_last)[0]
        if self.model.weights.has_rates:
            out[2 * n :] = self.model.weights.multiply_rates(sums[None, 2 * n :])[0]
        return out

    def _ends(self, solved: list) -> tuple[np.ndarray, int, float]:
        """Solve for ``y`` by GMRES, given the solution of the circulant system."""
        right, comm = self._from_solution(solved), self.model.spacetime.space_comm
        # fields of the state, and adjoints, are of different sizes
        parts = [*self.model.fields, *(slice(self._n + f.start, self._n + f.stop) for f in self.model.fields)]
        if self.model.weights.has_rates:
            parts.append(slice(2 * self._n, self._length))
        norms = np.sqrt(self.model.spacetime.sum_over_space(np.array([right[part] @ right[part] for part in parts])))
        if not np.isfinite(norms).all():
            raise SolverFailure("the solution of the circulant KKT system is not finite")
        if not norms.any():
            return right, 0, 0.0
        scale = np.empty(self._length)
        for part, norm in zip(parts, norms, strict=True):
            scale[part] = max(norm, 1e-12 * norms.max())
        problem = _Ends(self, scale)
        matrix = PETSc.Mat().createPython(((self._length, None), (self._length, None)), problem, comm=comm)
        matrix.setUp()
        ksp = PETSc.KSP().create(comm)
        ksp.setOperators(matrix)
        # orthogonality is lost where the residual falls by many orders
        orthogonal = {"ksp_orthogonalization_cgs_refinement_type": "refine_ifneeded"}
        limits = {"ksp_rtol": self.rtol, "ksp_atol": 0.0, "ksp_max_it": self.max_it, "ksp_gmres_restart": self.max_it}
        given = {"ksp_type": "gmres", "pc_type": "none"} | orthogonal | limits
        options = OptionsManager(given, self.prefix)
        options.set_from_options(ksp)
        b, x = matrix.createVecs()
        b.array[:] = right / scale
        start = b.norm()
        with options.inserted_options():
            ksp.solve(b, x)
        iterations, residual, reason = ksp.getIterationNumber(), ksp.getResidualNorm() / start, ksp.getConvergedReason()
        y = x.array_r * scale
        for thing in (ksp, matrix, b, x):
            thing.destroy()
        if (reason < 0 and not residual <= _USABLE) or not np.isfinite(residual):
            raise DivergedError(
                f"the KKT system: GMRES for the ends of time stopped after {iterations} iterations at a relative "
                f"residual of {residual:.1e} (reason {reason}); use method='trust-region'"
            )
        return y, iterations, residual


class _Ends:
    """The operator ``I - G`` in scaled unknowns, as the context of a PETSc matrix."""

    def __init__(self, solver: CirculantKKT, scale: np.ndarray):
        self._solver, self._scale = solver, scale

    def mult(self, matrix: PETSc.Mat, x: PETSc.Vec, y: PETSc.Vec) -> None:
        """Write the product to ``y``."""
        values = x.array_r * self._scale
        solver = self._solver
        solved = solver._frequencies(*solver._at_ends(values))
        y.array[:] = (values - solver._from_solution(solved)) / self._scale


def _real_sum(weights: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """The real part of the sum of complex rows ``(f, n)`` with weights, in double precision."""
    kind = rows.real.dtype
    return np.asarray(weights.real.astype(kind) @ rows.real - weights.imag.astype(kind) @ rows.imag, float)

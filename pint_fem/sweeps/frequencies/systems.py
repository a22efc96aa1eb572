r"""The linear systems of ParaDiag's frequencies: of a step with constant operators, or of operators averaged in time.

Where the operators change in time, the residual of a step is linearised to :math:`M_n \dot u + K_n u` at the states,
times and controls of some steps, and the frequencies are solved with :math:`\bar M` and :math:`\bar K`, the averages
over these. The iteration has the same fixed point; it contracts by about :math:`\alpha` plus the relative deviation of
the operators from their average. The factors are used for later states and controls as long as it contracts well.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
from firedrake import assemble, derivative
from firedrake.petsc import PETSc
from pyadjoint.tape import stop_annotating
from ufl.algorithms import expand_derivatives

from pint_fem.collective import any_rank
from pint_fem.errors import SolverFailure
from pint_fem.evolution.evolution import Evolution
from pint_fem.kernels.arrays import boundary_rows, put
from pint_fem.paradiag.distributed_systems import distributed_system
from pint_fem.paradiag.eliminated import Coupling, eliminated_system
from pint_fem.paradiag.options import ParaDiagOptions
from pint_fem.paradiag.systems import ProjectedSystem, ShiftedSteps
from pint_fem.propagators.base import FEPropagator
from pint_fem.propagators.coefficients.propagator import CoefficientPropagator
from pint_fem.propagators.linear import LinearPropagator
from pint_fem.spacetime import Slab, SpaceTime

__all__ = ["AveragedSystems", "frequency_systems"]

SAMPLES = 16
"""Steps whose operators are averaged, at most."""
SLOW = 0.3
"""Contraction above which operators are averaged again, where that can change them."""
UPDATES = 4
"""Averages in a solve of the state, at most."""


def frequency_systems(
    propagator: FEPropagator, options: ParaDiagOptions, parameters: Mapping
) -> ShiftedSteps | CurrentSystems:
    """The systems of the frequencies of a linear propagator.

    Parameters
    ----------
    propagator, options
        The step; options of ParaDiag, of which ``memory`` limits the factors.
    parameters
        PETSc options of the shifted systems; default: a direct solver.

    Raises
    ------
    ValueError
        If the propagator has no constant operators.
    """
    if isinstance(propagator, CoefficientPropagator):
        return CurrentSystems(propagator, options, parameters)
    if not isinstance(propagator, LinearPropagator):
        raise ValueError(
            "mgrit coarse_solver 'paradiag' requires an evolution that is linear with constant operators; "
            "give 'sequential'"
        )
    dt, fields, prefix = propagator.dt, propagator.fields, _prefix(propagator.evolution)
    parts = {a: propagator.shifted_parts(a * dt) for a in dict.fromkeys(propagator.dirk.diagonal)}
    if fields is None:
        systems = {a: distributed_system(matrices, parameters, prefix=prefix) for a, matrices in parts.items()}
    else:
        coupling = Coupling(fields.matrices["G"], fields.matrices["X"], fields.a, fields.b)
        eliminated = partial(eliminated_system, parameters=parameters, prefix=prefix)
        systems = {a: eliminated(coupling, a * dt, matrices) for a, matrices in parts.items()}
    return _shifted_steps(propagator, systems, propagator.evolution, options)


def _prefix(evolution: Evolution) -> str:
    """Prefix of the systems' PETSc options."""
    return f"{evolution.options_prefix}paradiag_"


def _shifted_steps(scheme, systems: dict, evolution: Evolution, options: ParaDiagOptions) -> ShiftedSteps:
    """Steps of a Runge-Kutta scheme from the systems of its stages, projected where there is a nullspace."""
    if evolution.nullspace is not None:
        systems = {a: ProjectedSystem(system, evolution.nullspace) for a, system in systems.items()}
    return ShiftedSteps(scheme.dirk.A, scheme.dirk.b, systems, 1e9 * options.memory)


class CurrentSystems:
    """The systems of the frequencies of a propagator whose operators depend on a control: those of the present one.

    Parameters
    ----------
    propagator, options, parameters
        As for :func:`frequency_systems`.
    """

    def __init__(self, propagator: CoefficientPropagator, options: ParaDiagOptions, parameters: Mapping):
        self._propagator, self._options, self._parameters = propagator, options, parameters
        self._of: LinearPropagator | None = None
        self._made: ShiftedSteps | None = None

    @property
    def _systems(self) -> ShiftedSteps:
        """The systems; factored again where the operators have changed (collective over space)."""
        frozen = self._propagator.frozen
        if self._made is None or self._of is not frozen:
            if self._made is not None:
                self._made.release()
            self._made, self._of = frequency_systems(frozen, self._options, self._parameters), frozen
        return self._made

    def solve(self, k: int, mu: complex, r: np.ndarray) -> np.ndarray:
        """Solve ``(I - mu Phi) v = r`` for frequency ``k``, complex arrays ``(n,)`` (collective over space)."""
        return self._systems.solve(k, mu, r)

    def solve_transposed(self, k: int, mu: complex, r: np.ndarray) -> np.ndarray:
        """Solve ``(I - mu Phi^T) v = r`` for frequency ``k``, complex arrays ``(n,)`` (collective over space)."""
        return self._systems.solve_transposed(k, mu, r)

    @property
    def has_lanes(self) -> bool:
        """Whether :meth:`solve_all` can be called."""
        return self._systems.has_lanes

    def solve_all(self, frequencies: range, mu: np.ndarray, rows: np.ndarray, **given: Any) -> np.ndarray:
        """Solve for several frequencies at once (:meth:`pint_fem.paradiag.systems.ShiftedSteps.solve_all`)."""
        return self._systems.solve_all(frequencies, mu, rows, **given)


class AveragedSystems:
    """The systems of the frequencies with operators averaged in time.

    Parameters
    ----------
    evolution, spacetime, slab
        The problem, the process grid and the own steps.
    options, parameters
        Options of ParaDiag, and PETSc's options of the systems.

    Attributes
    ----------
    updates : int
        How often operators have been averaged.
    """

    def __init__(
        self, evolution: Evolution, spacetime: SpaceTime, slab: Slab, options: ParaDiagOptions, parameters: Mapping
    ):
        self.evolution, self.spacetime, self.slab = evolution, spacetime, slab
        self._options, self._parameters = options, parameters
        form, self._rate = evolution.parts()
        forms = (expand_derivatives(derivative(form, x)) for x in (self._rate, evolution.u))
        self._forms = [None if f.empty() else f for f in forms]
        self._assembled = [None, None]  # Firedrake's matrices, assembled into again
        self._matrices: list[PETSc.Mat | None] = [None, None]
        self._systems: ShiftedSteps | None = None
        count = min(SAMPLES, evolution.nsteps)
        self._samples = [int((i + 0.5) * evolution.nsteps / count) for i in range(count)]
        self.updates = 0

    def solve(self, k: int, mu: complex, r: np.ndarray) -> np.ndarray:
        """Solve ``(I - mu Phi) v = r`` for frequency ``k``, complex arrays ``(n,)`` (collective over space)."""
        return self._systems.solve(k, mu, r)

    def solve_transposed(self, k: int, mu: complex, r: np.ndarray) -> np.ndarray:
        """Solve ``(I - mu Phi^T) v = r`` for frequency ``k``, complex arrays ``(n,)`` (collective over space)."""
        return self._systems.solve_transposed(k, mu, r)

    @property
    def has_lanes(self) -> bool:
        """Whether :meth:`solve_all` can be called, once operators have been averaged."""
        return self._systems is not None and self._systems.has_lanes

    def solve_all(self, frequencies: range, mu: np.ndarray, rows: np.ndarray, **given: Any) -> np.ndarray:
        """Solve for several frequencies at once (:meth:`pint_fem.paradiag.systems.ShiftedSteps.solve_all`)."""
        return self._systems.solve_all(frequencies, mu, rows, **given)

    def updater(self, z: np.ndarray | None, U: np.ndarray | None) -> Callable[[np.ndarray, float | None], None]:
        """A function that the solver calls before each iteration with its iterate and the last contraction, and that
        averages the operators where that is necessary.

        Parameters
        ----------
        z, U
            Controls and states at which a linear sweep is linearised; ``U = None``: the iterate is the state.
        """
        left = UPDATES if U is None else 1

        def update(iterate: np.ndarray, contraction: float | None) -> None:
            nonlocal left
            slow = contraction is not None and not contraction <= SLOW
            if self._systems is None or (slow and left):
                left -= 1
                self._average(z, iterate if U is None else U)

        return update

    def invalidate(self) -> None:
        """Average again in the next solve, as after a failure or a change of data."""
        self._systems = None

    def _average(self, z, U: np.ndarray) -> None:
        """Assemble the operators of the sampled steps, average them and make the systems (collective)."""
        comm = self.spacetime.time_comm
        sums: list[np.ndarray | None] = []
        for step in self._samples:
            owner = int(np.searchsorted(self.slab.bounds, step, side="right")) - 1
            if comm.rank == owner or self._matrices[0] is None:
                self._linearise(z, U, min(max(step - self.slab.lo, 0), self.slab.k - 1))
            values = [None if v is None else np.ascontiguousarray(v) for v in self._values()]
            for v in values:
                if v is not None:
                    comm.Bcast(v, root=owner)
            sums = [v if s is None else s + v for s, v in zip(sums or [None] * len(values), values, strict=True)]
        if any_rank(self.spacetime.space_comm, not all(np.isfinite(s).all() for s in sums if s is not None)):
            raise SolverFailure("the operators that are averaged over the steps are not finite")
        self._use([None if s is None else s / len(self._samples) for s in sums])
        self.updates += 1

    def _values(self) -> list[np.ndarray | None]:
        """The entries of the operators of the last linearised step; ``None`` where there is no operator."""
        return [None if matrix is None else matrix.getValuesCSR()[2] for matrix in self._matrices]

    def _use(self, averages: list[np.ndarray | None]) -> None:
        """Make the systems of averaged entries."""
        self._make_systems(*(None if v is None else self._matrix(i, v) for i, v in enumerate(averages)))

    def _linearise(self, z, U: np.ndarray, i: int) -> None:
        """Assemble the operators of the own step ``i``."""
        ev = self.evolution
        put(ev.u, U[i + 1])
        put(self._rate, (U[i + 1] - U[i]) / ev.dt)
        if ev.parameters:
            ev.put_controls(z if z.ndim == 1 else z[i])
        if ev.t is not None:
            ev.t.assign(float(ev.time(self.slab.lo + i + 1)))
        with stop_annotating():
            for j, form in enumerate(self._forms):
                if form is not None:
                    self._assembled[j] = assemble(form, mat_type="aij", tensor=self._assembled[j])
                    self._matrices[j] = self._assembled[j].petscmat

    def _matrix(self, i: int, values: np.ndarray) -> PETSc.Mat:
        """A matrix with the pattern of operator ``i`` and other values."""
        like = self._matrices[i]
        indptr, indices, _ = like.getValuesCSR()
        return PETSc.Mat().createAIJ(like.getSizes(), csr=(indptr, indices, values), comm=like.comm)

    def _make_systems(self, M: PETSc.Mat, K: PETSc.Mat | None) -> None:
        """The systems ``S - y M`` with ``S = M + a dt K`` for each diagonal coefficient ``a`` of the tableau."""
        ev = self.evolution
        rows = (boundary_rows(ev.bcs, ev.V) + M.getOwnershipRange()[0]).astype(PETSc.IntType)
        stages = {}
        for a in dict.fromkeys(ev.dirk.diagonal):
            S = M.copy()
            if K is not None:
                S.axpy(a * ev.dt, K, structure=PETSc.Mat.Structure.DIFFERENT_NONZERO_PATTERN)
            S.zeroRowsColumns(rows, diag=1.0)
            if ev.nullspace is not None:
                ev.nullspace.check(S)
                ev.nullspace.pin(S)
            stages[a] = S
        M.zeroRows(rows, diag=0.0)
        if self._systems is not None:
            self._systems.release()
        systems = {a: distributed_system((S, M), self._parameters, prefix=_prefix(ev)) for a, S in stages.items()}
        for matrix in (K, *stages.values()):  # their entries have been copied
            if matrix is not None:
                matrix.destroy()
        self._systems = _shifted_steps(ev, systems, ev, self._options)

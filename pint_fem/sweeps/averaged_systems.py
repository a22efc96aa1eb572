r"""ParaDiag's systems where operators change in time: those of their average.

The residual of a step is linearised to :math:`M_n \dot u + K_n u` at the states, times and controls of some steps, and
the frequencies are solved with :math:`\bar M` and :math:`\bar K`, the averages over these. The iteration has the same
fixed point; it contracts by about :math:`\alpha` plus the relative deviation of the operators from their average, and
what it shows is reported. Factors are kept as long as it contracts well, whatever happens to the states and controls.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

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
from pint_fem.paradiag.options import ParaDiagOptions
from pint_fem.paradiag.systems import ProjectedSystem, ShiftedSteps
from pint_fem.spacetime import Slab, SpaceTime

__all__ = ["AveragedSystems"]

SAMPLES = 16
"""Steps that operators are averaged over, at most."""
SLOW = 0.3
"""Contraction above which operators are averaged anew, where that can change anything."""
RENEWALS = 4
"""Times in a solve of the state."""


class AveragedSystems:
    """The solves of the frequencies, as of :class:`~pint_fem.paradiag.systems.ShiftedSteps`.

    Parameters
    ----------
    evolution, spacetime, slab
        The problem and who has which steps.
    options, parameters
        Of ParaDiag; PETSc's of the systems.

    Attributes
    ----------
    renewals : int
        How often operators were averaged and factors given up.
    """

    def __init__(
        self, evolution: Evolution, spacetime: SpaceTime, slab: Slab, options: ParaDiagOptions, parameters: Mapping
    ):
        self.evolution, self.spacetime, self.slab = evolution, spacetime, slab
        self._options, self._parameters = options, parameters
        form, self._rate = evolution.parts()
        forms = (expand_derivatives(derivative(form, x)) for x in (self._rate, evolution.u))
        self._forms = [None if f.empty() else f for f in forms]
        self._assembled = [None, None]  # Firedrake's matrices, used again
        self._matrices: list[PETSc.Mat | None] = [None, None]
        self._systems: ShiftedSteps | None = None
        count = min(SAMPLES, evolution.nsteps)
        self._samples = [int((i + 0.5) * evolution.nsteps / count) for i in range(count)]
        self.renewals = 0

    def solve(self, k: int, mu: complex, r: np.ndarray) -> np.ndarray:
        """See :class:`~pint_fem.paradiag.systems.ShiftedSteps`."""
        return self._systems.solve(k, mu, r)

    def solve_transposed(self, k: int, mu: complex, r: np.ndarray) -> np.ndarray:
        """See :class:`~pint_fem.paradiag.systems.ShiftedSteps`."""
        return self._systems.solve_transposed(k, mu, r)

    def renewer(self, z, U: np.ndarray | None) -> Callable[[np.ndarray, float | None], None]:
        """What a solver calls before each iteration, with its iterate and the last contraction.

        Parameters
        ----------
        z, U
            Control and states that a linear sweep is linearised at; ``None``: the iterate is the state.
        """
        left = RENEWALS if U is None else 1

        def renew(iterate: np.ndarray, contraction: float | None) -> None:
            nonlocal left
            slow = contraction is not None and not contraction <= SLOW
            if self._systems is None or (slow and left):
                left -= 1
                self._average(z, iterate if U is None else U)

        return renew

    def forget(self) -> None:
        """Give up the factors of all frequencies, as after a failure or a change of data: the next solve averages
        anew.
        """
        self._systems = None

    def _average(self, z, U: np.ndarray) -> None:
        """Assemble and average; collective over all ranks."""
        comm = self.spacetime.time_comm
        sums = [None, None]
        for step in self._samples:
            owner = int(np.searchsorted(self.slab.bounds, step, side="right")) - 1
            if comm.rank == owner or self._matrices[0] is None:
                self._linearise(z, U, min(max(step - self.slab.lo, 0), self.slab.k - 1))
            for i, matrix in enumerate(self._matrices):
                if matrix is not None:
                    values = np.ascontiguousarray(matrix.getValuesCSR()[2])
                    comm.Bcast(values, root=owner)
                    sums[i] = values if sums[i] is None else sums[i] + values
        if any_rank(self.spacetime.space_comm, not all(np.isfinite(s).all() for s in sums if s is not None)):
            raise SolverFailure("the operators that ParaDiag averages over the steps are not finite")
        averages = [None if s is None else self._matrix(i, s / len(self._samples)) for i, s in enumerate(sums)]
        self._build(*averages)
        self.renewals += 1

    def _linearise(self, z, U: np.ndarray, i: int) -> None:
        """Assemble the operators of an own step."""
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
        """A matrix like the operator with other values."""
        like = self._matrices[i]
        indptr, indices, _ = like.getValuesCSR()
        return PETSc.Mat().createAIJ(like.getSizes(), csr=(indptr, indices, values), comm=like.comm)

    def _build(self, M: PETSc.Mat, K: PETSc.Mat | None) -> None:
        ev = self.evolution
        dirk = ev.dirk
        rows = (boundary_rows(ev.bcs, ev.V) + M.getOwnershipRange()[0]).astype(PETSc.IntType)
        stages = {}
        for a in dict.fromkeys(dirk.diagonal):
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
        systems = {a: distributed_system((S, M), self._parameters) for a, S in stages.items()}
        if ev.nullspace is not None:
            systems = {a: ProjectedSystem(system, ev.nullspace) for a, system in systems.items()}
        for matrix in (K, *stages.values()):  # the systems have their entries
            if matrix is not None:
                matrix.destroy()
        self._systems = ShiftedSteps(dirk.A, dirk.b, systems, 1e9 * self._options.memory)

"""The operators of a control, shared by evolutions that differ in their loads, and homogeneous steps with them."""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable
from copy import copy
from typing import NamedTuple

import numpy as np
from irksome.tableaux.ButcherTableaux import ButcherTableau
from mpi4py import MPI

from pint_fem.errors import InputError
from pint_fem.evolution.evolution import Evolution
from pint_fem.evolution.tableaux import DIRK
from pint_fem.kernels.arrays import boundary_rows
from pint_fem.propagators.base import FEPropagator
from pint_fem.propagators.coefficients.frozen import FrozenSteps, OperatorMatrices
from pint_fem.propagators.coefficients.loads import CoefficientLoads

__all__ = ["PresentOperators"]


def _has_controlled_loads(evolution: Evolution) -> bool:
    """Whether controls are in the load or in boundary values."""
    return bool(any(evolution.control_operators)) or evolution.boundary_controls is not None


class _Cached(NamedTuple):
    """The steps of a value of the controls ``(nz,)``."""

    z: np.ndarray
    steps: FrozenSteps


class PresentOperators(FEPropagator, ABC):
    """A propagator with the operators of the control that :meth:`update` was given last.

    Parameters
    ----------
    evolution, stride, tableau
        As for every propagator.

    Attributes
    ----------
    frozen : FrozenSteps
        The steps with the present operators.
    dirk, bc_rows : DIRK, ndarray
        Coefficients of the integrator, and own rows with a condition.
    outdated : bool
        Whether data of the operators have changed, so that another propagator replaces this one.

    Raises
    ------
    InputError
        If the evolution is not linear with operators that depend on static controls.
    """

    is_linear = True
    _kind: type[FrozenSteps] = FrozenSteps

    def __init__(self, evolution: Evolution, *, stride: int = 1, tableau: ButcherTableau | None = None):
        super().__init__(evolution, stride=stride, tableau=tableau)
        ev = self.evolution
        if not ev.has_controlled_operators:
            raise InputError(
                "the evolution is not linear with operators that depend on static controls: use the linear propagator, "
                "or the form propagator"
            )
        self.dirk, self.bc_rows = DIRK(self.tableau), boundary_rows(ev.bcs, ev.V)
        self.stores_loads = True
        self._matrices = OperatorMatrices(ev)
        self._loads: CoefficientLoads | None = None
        self._cached: list[_Cached] = []
        self._controls_load = _has_controlled_loads(ev)
        self.outdated = False
        self._shared: PresentOperators | None = None  # whose operators are used
        self._of_shared: FrozenSteps | None = None
        self._own: FrozenSteps | None = None

    @property
    def loads(self) -> CoefficientLoads:
        """The loads of the stages; compiled and assembled when first used (collective over space)."""
        if self._loads is None:
            given = self.evolution, self.dirk, self.dt, self.bc_rows
            self._loads = CoefficientLoads(*given, store=self.stores_loads)
        return self._loads

    @property
    def frozen(self) -> FrozenSteps:
        """The steps with the present operators; at first those of the controls' own values (collective over space)."""
        if self._shared is not None:
            return self._adopted(self._shared.frozen)
        if not self._cached:
            self.update(self.evolution.get_controls())
        return self._cached[0].steps

    def _adopted(self, steps: FrozenSteps) -> FrozenSteps:
        """The steps of the propagator whose operators are used, with the own loads."""
        if self._of_shared is not steps:
            self._of_shared, self._own = steps, steps.for_evolution(self.evolution)
            vars(self._own)["loads"] = self.loads
            self.loads.set_operators(steps.lifting)
        return self._own

    def for_evolution(self, evolution: Evolution) -> PresentOperators:
        """The propagator of a private evolution that differs in loads and boundary values only and has the same
        controls, with the operators of this one.
        """
        made = copy(self)
        made.evolution, made._loads, made._cached = evolution, None, []
        made._shared = self if self._shared is None else self._shared
        made._of_shared = made._own = None
        made.outdated = False
        made._controls_load = _has_controlled_loads(evolution)
        vars(evolution)["fields"] = self.evolution.fields
        return made

    def update(self, z: np.ndarray | None) -> None:
        """Assemble and factor the operators of a control ``(nz,)``, unless it is one of the last two (collective over
        space).

        Raises
        ------
        ArithmeticError
            If a matrix is singular or not finite for this control, or an explicit step not stable.
        """
        if self._shared is not None:
            self._shared.update(z)
            if z is not None and self._of_shared is not self._shared.frozen:
                self.evolution.put_controls(z)
            self._adopted(self._shared.frozen)
            return
        if z is None:
            return
        same = [np.array_equal(cached.z, z) for cached in self._cached]
        comm = self.evolution.V.mesh().comm
        if comm.size > 1:  # the parts of all ranks in space are those of the same control
            votes = np.array(same, dtype=np.int32)
            comm.Allreduce(MPI.IN_PLACE, votes, op=MPI.MIN)
            same = votes.astype(bool).tolist()
        if same and same[0]:
            return
        found = self._cached.pop(same.index(True)) if any(same) else self._factored(z)
        self._cached.insert(0, found)
        del self._cached[2:]
        self.evolution.put_controls(z)
        self.loads.set_operators(found.steps.lifting)

    def _factored(self, z: np.ndarray) -> _Cached:
        """The steps of a control, with the order of elimination of earlier ones."""
        ev = self.evolution
        ev.put_controls(z)
        like = None
        if self._cached:
            like = self._cached[0].steps
            del self._cached[1:]  # not three of them in memory
        try:
            steps = self._kind(
                ev, stride=self.stride, tableau=self.tableau, matrices=self._matrices.assemble(), loads=self.loads,
                like=like,
            )  # fmt: skip
        except InputError as error:  # a matter of this control, for which the optimiser has another one
            raise ArithmeticError(f"operators at this control: {error}") from error
        return _Cached(z.copy(), steps)

    def update_data(self, changed: set) -> bool:
        """Discard loads; ``False`` where data of the operators have changed."""
        if self._shared is not None and self._shared.outdated:
            return False
        if changed & self.evolution.operator_data:
            self.outdated = True
            return False
        if changed and self._loads is not None:
            self._loads.update_data()
        return True

    # -- homogeneous steps with the present operators ------------------------------------------------------------------
    def apply(self, u: np.ndarray, out: np.ndarray, loads: Callable[[slice, int], np.ndarray] | None = None) -> None:
        """Write the step without forcing, or with given loads, to ``out`` (as of a linear propagator)."""
        self.frozen.apply(u, out, loads)

    def apply_transposed(self, lam: np.ndarray, out: np.ndarray) -> None:
        """Write the transposed step to ``out``, for adjoints ``(k, n)``."""
        self.frozen.apply_transposed(lam, out)

    def advance(
        self,
        u: np.ndarray,
        out: np.ndarray,
        added: np.ndarray | None = None,
        *,
        transposed: bool = False,
        single: bool = False,
    ) -> None:
        """Take homogeneous steps one after another from each of some states (as of a linear propagator)."""
        self.frozen.advance(u, out, added, transposed=transposed, single=single)

    def sweep(self, U: np.ndarray, G: np.ndarray | None, *, transposed: bool = False) -> None:
        """Take homogeneous steps one after another in place (as of a linear propagator)."""
        self.frozen.sweep(U, G, transposed=transposed)

    @property
    def error_of_single_precision(self) -> float:
        """The largest difference of a step in single precision (collective over space when first used)."""
        return self.frozen.error_of_single_precision

    def lane_seconds(self) -> dict[int, float] | None:
        """Measured seconds of a step by the number of states at once; ``None`` where steps are taken by PETSc."""
        return self.frozen.lane_seconds()

    def _set_controls(self) -> None:
        """Set the controls in the forms of derivatives to those of the present operators: other levels have the same
        functions, and a control whose operators could not be factored may be in them.
        """
        owner = self if self._shared is None else self._shared
        if owner._cached:
            owner.evolution.put_controls(owner._cached[0].z)

r"""Spatial coarsening: evolutions and transfers of coarse time levels on coarser meshes of a ``MeshHierarchy``.

The coarse solve does not correct all of a state at the C-points. Modes that the coarser mesh does not represent are
damped by C-relaxation only, one with eigenvalue :math:`\lambda` by :math:`|\lambda|^m`: with F-relaxation alone the
error propagation :math:`I - P A_c^{-1} R A` has the eigenvalue one, and with steps that are small for the fine mesh
(:math:`m\,\Delta t / \Delta x^2` far below one for the heat equation) cycles converge slowly. For P1 on a uniform
mesh of width h the slowest such mode of the Laplacian has the eigenvalue :math:`3/h^2`. Oscillations of Maxwell's
equations decay as :math:`\exp(-\sigma t / 2 \epsilon)`, whatever the mesh: without losses cycles do not converge. Nor
do they where data drive what does not change in time and the coarser mesh cannot represent: in three dimensions
adjoints of a misfit of B, whose part that is no curl is such a field (misfits of E have none).
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise
from numbers import Number
from typing import Any

import numpy as np
from firedrake import Function, TransferManager
from firedrake.mg.ufl_utils import ReconstructionError, coarsen
from firedrake.mg.utils import get_level
from pyadjoint.tape import stop_annotating
from ufl.algorithms import extract_coefficients

from pint_fem.all_at_once.grids import is_integer
from pint_fem.errors import InputError
from pint_fem.evolution.boundary import boundary_value
from pint_fem.evolution.evolution import Evolution
from pint_fem.kernels.arrays import get, is_real, like_subspace, put
from pint_fem.mgrit.transfer import Transfer
from pint_fem.propagators.mesh_transfers import mesh_transfer

__all__ = ["SpatialLevels", "coarse_evolution"]


# -- the evolution on a coarser mesh ---------------------------------------------------------------------------------
def coarse_evolution(evolution: Evolution, meshes: int = 1) -> Evolution:
    """Pose an evolution on a coarser mesh of its hierarchy, by Firedrake's symbolic coarsening.

    The result has a state, controls and a time function of its own. Coefficients of the residual and the conditions are
    injected, ``Constant`` objects are shared.

    Parameters
    ----------
    evolution
        An evolution on a mesh of a ``MeshHierarchy`` that is not the coarsest.
    meshes
        Number of meshes by which the result is coarser.

    Raises
    ------
    InputError
        On every rank, if there is no such mesh, or something in the residual cannot be coarsened.
    """
    _check_hierarchy(evolution, meshes)
    with stop_annotating():
        for _ in range(meshes):
            try:
                evolution = _next_coarser(evolution)
            except (ReconstructionError, NotImplementedError, AttributeError, TypeError) as error:
                raise InputError(
                    f"the evolution cannot be posed on the coarser mesh by itself ({type(error).__name__}: {error}): "
                    "pose it there yourself and give it in coarse_evolutions"
                ) from error
    return evolution


class Injection:
    """Data of a fine mesh on a coarser one: ``injection(fine, coarse)`` sets the values of ``coarse``.

    Nodal values are those of the fine function at the coarse nodes, or its mean values where it has jumps; moments of
    Nedelec, Raviart-Thomas and BDM elements are restricted as states are.
    """

    def __init__(self) -> None:
        self._manager = TransferManager()
        self._transfers: dict[tuple, Transfer] = {}

    def __call__(self, fine: Function, coarse: Function) -> None:
        """Set the values of ``coarse`` (collective over the mesh's communicator)."""
        for source, target in zip(fine.subfunctions, coarse.subfunctions, strict=True):
            V, W = source.function_space(), target.function_space()
            if is_real(V) or V.finat_element.mapping == "affine":
                self._manager.inject(source, target)
                continue
            if (V, W) not in self._transfers:
                self._transfers[V, W] = mesh_transfer(V, W)
            put(target, self._transfers[V, W].restrict(get(source)[None])[0])


def _next_coarser(ev: Evolution) -> Evolution:
    """The evolution on the next coarser mesh."""
    inject, mapping = Injection(), {}
    values = [boundary_value(bc) for bc in ev.bcs]
    found = dict.fromkeys(c for part in (ev.residual, *values) for c in extract_coefficients(part))
    for c in [f for f in (ev.u, *ev.parameters, ev.t) if f is not None] + list(found):
        if c not in mapping:
            mapping[c] = Function(coarsen(c.function_space(), coarsen), name=c.name())
            inject(c, mapping[c])
    V = mapping[ev.u].function_space()
    bcs = []
    for bc, value in zip(ev.bcs, values, strict=True):
        given = bc._original_arg
        value = given if isinstance(given, Number) else coarsen(value, coarsen, coefficient_mapping=mapping)
        bcs.append(type(bc)(like_subspace(V, bc), value, bc.sub_domain))
    initial = Function(V)
    inject(ev.initial, initial)
    bases = {name: basis and basis.rediscretise(V) for name, basis in ev.bases.items()}
    made = Evolution(
        coarsen(ev.residual, coarsen, coefficient_mapping=mapping), mapping[ev.u], tableau=ev.tableau, dt=ev.dt,
        nsteps=ev.nsteps, control=[mapping[c] for c in ev.parameters], per_step=[mapping[c] for c in ev.stepwise],
        t=mapping.get(ev.t), t0=ev.t0,
        initial=initial, bcs=bcs, solver_parameters=ev.solver_parameters, eliminate=ev.eliminate,
        reproducible=ev.reproducible, **bases,
    )  # fmt: skip
    made.copies, made.options_prefix = ev.copies, ev.options_prefix
    made.injected = mapping | {ev.initial: initial}
    return made


def _check_hierarchy(evolution: Evolution, meshes: int) -> int:
    """Number of coarser meshes in the hierarchy, at least ``meshes``."""
    hierarchy, level = get_level(evolution.V.mesh().unique())
    if hierarchy is None:
        raise InputError(
            "spatial coarsening: the mesh has no hierarchy; build MeshHierarchy(coarse_mesh, refinements) and pose the "
            "evolution on its finest mesh, hierarchy[-1]"
        )
    if Fraction(level).denominator != 1 or level < meshes:
        raise InputError(
            f"spatial coarsening by {meshes} meshes: the hierarchy has {int(level)} below the evolution's; "
            "build MeshHierarchy with more refinements or coarsen less"
        )
    return int(level)


# -- all levels --------------------------------------------------------------------------------------------------------
class SpatialLevels:
    """The evolutions of all time levels, and transfers between their spaces.

    Parameters
    ----------
    evolution
        The finest level's.
    relax
        Relaxation scheme of each level but the coarsest (``"FCF"``), hence the number of coarse levels.
    coarsening
        Number of meshes by which each coarse level is coarser than the finest: whole numbers that do not decrease, the
        last one for all further levels (``[0, 1]``: the same mesh on level 1, the next coarser from level 2 on);
        ``True``: one more on each level as far as the hierarchy goes; ``None`` or ``False``: the same mesh everywhere.
    coarse_evolutions
        Instead of ``coarsening``: the evolution of each coarse level, posed by the user with the fine step size.

    Attributes
    ----------
    evolutions : list of Evolution
        One per level; levels on the same mesh share it.
    transfers : list
        :class:`Transfer` from each level to the next, ``None`` on the same mesh.

    Raises
    ------
    InputError
        On every rank, if the hierarchy is missing or too short, a level with spatial coarsening below it has
        F-relaxation only, or a coarse evolution does not fit.
    """

    def __init__(
        self,
        evolution: Evolution,
        relax: Sequence[str],
        coarsening: bool | int | Sequence[int] | None = None,
        coarse_evolutions: Sequence[Evolution] | None = None,
    ):
        self.evolutions = [evolution]
        if coarse_evolutions is not None:
            if coarsening not in (None, False):
                raise InputError("give spatial_coarsening or coarse_evolutions, not both")
            given = _checked(evolution, coarse_evolutions, len(relax))
            self.evolutions += [ev.private(evolution.copies) for ev in given]
            for ev in self.evolutions[1:]:
                ev.options_prefix = evolution.options_prefix
        else:
            made = {0: evolution}
            for meshes in _meshes(evolution, coarsening, len(relax)):
                if meshes not in made:
                    nearest = max(made)
                    made[meshes] = coarse_evolution(made[nearest], meshes - nearest)
                self.evolutions.append(made[meshes])
        self.transfers: list[Transfer | None] = []
        for index, (fine, coarse) in enumerate(pairwise(self.evolutions)):
            if fine.V == coarse.V:
                self.transfers.append(None)
                continue
            if "C" not in relax[index]:
                raise InputError(
                    f"mgrit relax {relax[index]!r} on level {index} with spatial coarsening to the next: what the "
                    "coarser mesh does not represent is never corrected; give 'FCF'"
                )
            self.transfers.append(mesh_transfer(fine.V, coarse.V, fine.bcs, coarse.bcs))
        self._inject = Injection()

    @property
    def transposed_transfers(self) -> list[Transfer | None]:
        """The transfers of the adjoint sweep."""
        return [t if t is None else t.transposed for t in self.transfers]

    def update_data(self, changed: set) -> set:
        """Inject changed data to the coarser meshes; the changed data of all levels."""
        changed = set(changed)
        for evolution in dict.fromkeys(self.evolutions):
            for fine, coarse in evolution.injected.items():
                if fine in changed:
                    with stop_annotating():
                        self._inject(fine, coarse)
                    changed.add(coarse)
        return changed

    def states(self, index: int, u: np.ndarray | None) -> np.ndarray | None:
        """States ``(k, n)`` of the finest level, restricted to the space of level ``index``."""
        for transfer in self.transfers[:index] if u is not None else ():
            u = u if transfer is None else transfer.restrict(u)
        return u

    def controls(self, index: int, z: np.ndarray | None) -> np.ndarray | None:
        """Vectors of controls ``(nz,)`` or ``(k, nz)`` of the finest level, injected to the mesh of level ``index``."""
        fine, coarse = self.evolutions[0], self.evolutions[index]
        if z is None or not coarse.parameters:
            return None
        if coarse.V == fine.V:
            return z
        rows = np.atleast_2d(z)
        out = np.empty((len(rows), coarse.control_size))
        with stop_annotating():
            sources, targets = fine.split_controls(rows), coarse.split_controls(out)
            for f, c, source, target in zip(fine.parameters, coarse.parameters, sources, targets, strict=True):
                f, c = Function(f.function_space()), Function(c.function_space())
                for value, injected in zip(source, target, strict=True):
                    put(f, value)
                    self._inject(f, c)
                    injected[:] = get(c)
        return out if z.ndim == 2 else out[0]


def _meshes(evolution: Evolution, coarsening: bool | int | Sequence[int] | None, count: int) -> list[int]:
    """Number of meshes by which each of the ``count`` coarse levels is coarser than the finest."""
    if coarsening is None or coarsening is False:
        return [0] * count
    if coarsening is True:
        available = _check_hierarchy(evolution, 1)
        return [min(level + 1, available) for level in range(count)]
    given = list(coarsening) if isinstance(coarsening, (list, tuple)) else [coarsening]
    whole = all(is_integer(k) and k >= 0 for k in given)
    if not given or not whole or sorted(given) != given:
        raise InputError(
            f"spatial_coarsening {coarsening!r}: give True, or for each coarse level how many meshes coarser than the "
            "finest it is, such as [0, 1] (whole numbers that do not decrease)"
        )
    meshes = [int(given[min(level, len(given) - 1)]) for level in range(count)]
    if any(meshes):
        _check_hierarchy(evolution, meshes[-1])
    return meshes


def _checked(evolution: Evolution, given: Any, count: int) -> list[Evolution]:
    """The coarse evolutions that a user gives, one for each coarse level."""
    given = list(given) if isinstance(given, (list, tuple)) else [given]
    if len(given) != count or not all(isinstance(ev, Evolution) for ev in given):
        what = [type(ev).__name__ for ev in given]
        raise InputError(f"coarse_evolutions {what} for {count} coarse levels: give one Evolution to each")
    for ev in given:
        if (ev.dt, ev.t0, ev.nsteps) != (evolution.dt, evolution.t0, evolution.nsteps):
            raise InputError(
                f"a coarse evolution has dt = {ev.dt:g}, t0 = {ev.t0:g}, nsteps = {ev.nsteps}: give those of the "
                f"finest level ({evolution.dt:g}, {evolution.t0:g}, {evolution.nsteps}); steps are lengthened here"
            )
        elements = [[c.function_space().ufl_element() for c in e.parameters] for e in (ev, evolution)]
        if ev.parameters and elements[0] != elements[1]:
            raise InputError("a coarse evolution's controls are in other elements than the finest one's")
    return given

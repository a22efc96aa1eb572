"""The coupled systems of the frequencies of a problem, from the matrices of its evolution, misfits and controls."""

from __future__ import annotations

import numpy as np
from firedrake.petsc import PETSc
from scipy.sparse import csr_matrix

from pint_fem.errors import InputError
from pint_fem.evolution.control_operators import MatrixOperator
from pint_fem.kernels.arrays import own_size
from pint_fem.kkt.coupled.matrices import Layout, distributed, own_rows
from pint_fem.kkt.coupled.systems import CoupledSystems
from pint_fem.kkt.model import ControlModel

__all__ = ["coupled_systems"]


def coupled_systems(model: ControlModel, *, memory: float = np.inf) -> CoupledSystems:
    """The coupled systems of the frequencies of a problem (collective over space).

    Parameters
    ----------
    model
        The problem.
    memory
        Bytes of factors that this rank may cache.

    Raises
    ------
    InputError
        On every rank, if a control is in boundary values or the evolution has a nullspace; the message is the reason.
    """
    evolution, propagator = model.propagator.evolution, model.propagator
    if evolution.boundary_controls is not None:
        raise InputError("a control is in boundary values")
    if evolution.nullspace is not None:
        raise InputError("the evolution has a nullspace")
    M, stiffness = model.matrices
    comm, alone = M.comm, M.comm.size == 1
    mass = own_rows(M)
    K = csr_matrix(mass.shape) if stiffness is None else own_rows(stiffness)
    Q = sum((weight * own_rows(matrix) for matrix, weight in model.misfit_matrices), csr_matrix(mass.shape))
    F, R, R_time = _control_matrices(model, comm)
    given = [mass, K, F, Q, R, R_time]
    if not alone:
        columns = [model.size, model.size, model.control_size, model.size, *[model.control_size] * 2]
        given = [distributed(X, count, comm) for X, count in zip(given, columns, strict=True)]
    rates = given.pop()
    return CoupledSystems(
        propagator.dirk, model.nsteps, *given, dt=propagator.dt, free=model.free, memory=memory,
        R_time=rates if model.weights.has_rates else None,
    )  # fmt: skip


def _control_matrices(model: ControlModel, comm: PETSc.Comm) -> tuple[csr_matrix, csr_matrix, csr_matrix]:
    """Own rows of the loads of all controls of a step, one control after another, of their regularisation and of that
    of their rates of change.
    """
    evolution = model.propagator.evolution
    starts = []
    for control in evolution.parameters:
        counts = comm.tompi4py().allgather(own_size(control.function_space()))
        starts.append(np.concatenate([[0], np.cumsum(counts)]))
    layout = Layout(starts, comm.rank)
    rows, columns, values, dt = [], [], [], model.propagator.dt
    blocks: list[dict] = [{}, {}]
    for found, weights in zip(blocks, (model.weights.matrices, model.weights.rate_matrices), strict=True):
        for j, weight in enumerate(weights):
            if isinstance(weight, PETSc.Mat):
                found[j, j] = dt * own_rows(weight)
            else:  # a real number, which the first rank owns
                own = layout.own[j].stop - layout.own[j].start
                found[j, j] = csr_matrix(np.full((own, 1), dt * (weight or 0.0)))
    regularisation = [layout.matrix(found) for found in blocks]
    for j, operator in enumerate(evolution.control_operators):
        for term in [] if operator is None else operator.terms:
            own = own_rows(term.matrix) if isinstance(term, MatrixOperator) else csr_matrix(term.column[:, None])
            entries = own.tocoo()
            rows.append(entries.row)
            columns.append(layout.columns(j, entries.col))
            values.append(entries.data)
    shape = model.size, layout.total
    if not rows:
        return csr_matrix(shape), *regularisation
    joined = [np.concatenate(x) for x in (values, rows, columns)]
    return csr_matrix((joined[0], (joined[1], joined[2])), shape=shape), *regularisation

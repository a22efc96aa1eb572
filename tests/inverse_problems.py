"""Linear inverse problems with a few sensors that several test files share."""

import numpy as np
from firedrake import dx, grad, inner
from mpi4py import MPI

import pint_fem as pf
from problems.maxwell_source import maxwell_source
from tests.cavity import cavity
from tests.meshes import square
from tests.test_controls import evolution

STATIC = ("source", "wind", "initial", "wall", "level")
TABLEAUX = {"BE": pf.BackwardEuler, "SDIRK2": pf.SDIRK2, "midpoint": pf.ImplicitMidpoint}
POINTS = [[0.31, 0.33], [0.72, 0.64], [0.55, 0.21]]
SERIAL = {"time_solver": "serial"}


def grid():
    """All ranks in time, or two in space where their number is even and not two."""
    size = MPI.COMM_WORLD.size
    return pf.SpaceTime("2x2") if size == 4 else pf.SpaceTime()


def readings_of(ev, points=POINTS, *, count=4, weight=3.0, **given):
    """Sensors whose times are between steps but for the last one."""
    end = float(ev.time(ev.nsteps) - ev.t0)
    times = ev.t0 + end * np.linspace(0.23, 1, count)
    values = np.cos(np.arange(count * len(points), dtype=float)).reshape(count, len(points))
    return pf.PointSensors(points, times, values, weight=weight, **given)


def heat(st, wanted=STATIC, *, tableau="SDIRK2", solver=None, n=3, steps=10, sensors=None, alpha=1.0, **options):
    """The functional of a heat problem with controls of the wanted kinds and three sensors."""
    ev = evolution(square(n, st.space_comm), wanted, tableau=tableau, steps=steps, **options)
    forms = []
    for c in ev.controls:
        field = c.function_space().ufl_element().family() != "Real"
        size = 0.5 * alpha * (0.3 * inner(c, c) + (0.02 * inner(grad(c), grad(c)) if field else 0)) * dx
        forms.append(size)
    return pf.TimeParallelReducedFunctional(
        ev, sensors(ev) if sensors else readings_of(ev), regularisation=forms, spacetime=st,
        solver_parameters=solver or SERIAL,
    )  # fmt: skip


def waves(st, *, tableau="midpoint", solver=None, propagator=None):
    """A cavity without losses whose current's shape is sought, with readings of one component of E and of B."""
    dt = 0.03 if propagator else None
    ev = cavity(st.space_comm, n=4, steps=12, tableau=TABLEAUX[tableau](), t=True, dt=dt)
    given = {} if propagator is None else {"propagator": propagator}
    if propagator:
        ev = pf.Evolution(
            ev.residual, ev.u, tableau=ev.tableau, dt=ev.dt, nsteps=ev.nsteps, control=ev.controls, t=ev.t, eliminate=1
        )
    sensors = [readings_of(ev, field=0, component=1), readings_of(ev, POINTS[:2], field=1, weight=0.5)]
    (J,) = ev.controls
    return pf.TimeParallelReducedFunctional(
        ev, sensors, regularisation=0.5 * inner(J, J) * dx, spacetime=st, solver_parameters=solver or SERIAL, **given
    )


def lossy(st, **given):
    """The lossy Maxwell problem of the demos on a coarse mesh."""
    return maxwell_source(st, regime="lossy", cells=8, degree=1, steps=64, solver_parameters=SERIAL, **given).rf


def random_control(J, seed=0):
    """A flat vector of controls that is the same for every number of ranks in time."""
    layout = J.problem.layout
    z = np.empty(layout.size)
    z[: layout.static_size] = np.random.default_rng([seed, J.spacetime.space_comm.rank]).standard_normal(
        layout.static_size
    )
    rest = z[layout.static_size :].reshape(layout.slab.k, -1)
    for i, row in enumerate(rest):
        row[:] = np.random.default_rng([seed, 1 + layout.slab.lo + i, J.spacetime.space_comm.rank]).standard_normal(
            len(row)
        )
    return z


def readings_by_sweep(J, z):
    """The readings at controls by a sweep of the state, ``(m,)``."""
    pairs = [(m, J.problem.observations(z, m)) for m in J.problem.misfits]
    return np.concatenate([m.readings(Y)[m.present] for m, Y in pairs])


def dense_map(J):
    """The map by a sweep of the state for each control, ``(m, size)``, on one rank."""
    zero = readings_by_sweep(J, np.zeros(J.problem.layout.size))
    columns = [readings_by_sweep(J, unit) - zero for unit in np.eye(J.problem.layout.size)]
    return np.array(columns).T, zero

"""A small linear inverse problem, and its posterior by dense algebra: what tests of inference are compared with."""

from dataclasses import dataclass

import numpy as np
from firedrake import (
    Constant,
    Function,
    FunctionSpace,
    SpatialCoordinate,
    TestFunction,
    TrialFunction,
    dot,
    dx,
    grad,
    inner,
)
from irksome import Dt

import pint_fem as pf
from tests.meshes import square

TIMES = np.array([0.012, 0.02, 0.031, 0.043, 0.058, 0.07])
POINTS = np.array([[0.3, 0.2], [0.55, 0.7], [0.8, 0.35], [0.15, 0.85]])
OTHER_TIMES = np.array([0.02, 0.035, 0.08])
"""Of the last sensor, a misfit of its own."""


def problem(spacetime, *, readings=None, times=(TIMES, OTHER_TIMES), n=4, seed=0, noise=1e-3, steps=16):
    """A heat source, constant in time, from three sensors at six times and one at three others; the functional.

    ``readings`` are those of the first three sensors, ``(6, 3)``, and of the last one, ``(3, 1)``.
    """
    mesh = square(n, spacetime.space_comm)
    V = FunctionSpace(mesh, "CG", 1)
    u, v, q = Function(V), TestFunction(V), Function(V, name="source")
    x, y = SpatialCoordinate(mesh)
    F = Dt(u) * v * dx + dot(grad(u), grad(v)) * dx + u * v * dx - (q + x * y) * v * dx
    u.interpolate(Constant(0.1) + x)
    ev = pf.Evolution(F, u, tableau=pf.SDIRK2(), dt=5e-3, nsteps=steps, control=q)
    rng = np.random.default_rng(seed)
    a, b = (rng.standard_normal((6, 3)), rng.standard_normal((3, 1))) if readings is None else readings
    misfits = [
        pf.PointSensors(POINTS[:3], times[0], a, weight=1 / noise**2),
        pf.PointSensors(POINTS[3:], times[1], b, weight=1 / noise**2),
    ]
    regularisation = 0.5 * (0.02 * inner(grad(q), grad(q)) + 1.5 * q**2) * dx
    return pf.TimeParallelReducedFunctional(
        ev, misfits, regularisation=regularisation, spacetime=spacetime, solver_parameters={"time_solver": "serial"}
    )


@dataclass
class Dense:
    """The problem in dense matrices: map, prior's precision and mean, noise's covariance, readings, offset."""

    F: np.ndarray
    A: np.ndarray
    mean: np.ndarray
    N: np.ndarray
    data: np.ndarray
    offset: np.ndarray

    def restricted(self, which):
        """With some of the readings only."""
        return Dense(
            self.F[which], self.A, self.mean, self.N[np.ix_(which, which)], self.data[which], self.offset[which]
        )

    @property
    def residual(self):
        return self.data - self.offset - self.F @ self.mean

    def covariance(self, alpha=1.0):
        return np.linalg.inv(alpha * self.A + self.F.T @ np.linalg.solve(self.N, self.F))

    def x(self, alpha=1.0):
        r = self.residual
        return self.mean + self.covariance(alpha) @ self.F.T @ np.linalg.solve(self.N, r)

    def predicted(self, alpha=1.0):
        return self.offset + self.F @ self.x(alpha)

    def misfit(self, alpha=1.0):
        r = self.data - self.predicted(alpha)
        return r @ np.linalg.solve(self.N, r)

    def size(self, alpha=1.0):
        z = self.x(alpha) - self.mean
        return z @ self.A @ z

    def dof(self, alpha=1.0):
        return np.trace(self.F @ self.covariance(alpha) @ self.F.T @ np.linalg.inv(self.N))

    def log_evidence(self, alpha=1.0):
        """The density of the readings, a Gaussian's."""
        K, r = self.F @ np.linalg.solve(alpha * self.A, self.F.T) + self.N, self.residual
        return -0.5 * (r @ np.linalg.solve(K, r) + np.linalg.slogdet(K)[1] + len(r) * np.log(2 * np.pi))


def dense(posterior):
    """The dense matrices of a posterior, one rank in space."""
    F, n = posterior.F, posterior.F.layout.size
    return Dense(
        F.product(np.eye(n)).T,
        posterior.prior.precision(np.eye(n)),
        posterior.prior.mean,
        posterior.noise.covariance(np.eye(len(F.data))),
        posterior.data,
        F.offset,
    )


def simulated(posterior, noise, seed=0):
    """Readings of a smooth source, with noise of a standard deviation."""
    V = posterior.F.functions.controls[0].control.function_space()
    x, y = SpatialCoordinate(V.mesh())
    q = Function(V).interpolate(3 + 2 * x - 4 * y * x)
    return posterior.F.predict(q) + noise * np.random.default_rng(seed).standard_normal(len(posterior.data))


def mass(posterior):
    """The mass matrix of the control, dense, one rank in space."""
    from firedrake import assemble

    V = posterior.F.functions.controls[0].control.function_space()
    return assemble(inner(TrialFunction(V), TestFunction(V)) * dx).petscmat[:, :]

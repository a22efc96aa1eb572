"""Lines that a newcomer reads: monitors, summaries and messages name what they are about."""

import math

import pytest
from firedrake import DirichletBC, Function, FunctionSpace, TestFunction, UnitSquareMesh, dx, grad, inner
from irksome import Dt

import pint_fem as pf
from pint_fem.all_at_once.stopping import SolveResult
from pint_fem.errors import InputError
from pint_fem.optimize.records import UNLIMITED, CGStop, IterationRecord


def heat(misfit, tableau=None, **mgrit):
    mesh = UnitSquareMesh(4, 4)
    V = FunctionSpace(mesh, "CG", 1)
    u, v, q = Function(V), TestFunction(V), Function(V, name="q")
    F = Dt(u) * v * dx + inner(grad(u), grad(v)) * dx - q * v * dx
    tableau = pf.SDIRK2() if tableau is None else tableau
    evolution = pf.Evolution(F, u, tableau=tableau, dt=1 / 64, nsteps=64, control=q, bcs=DirichletBC(V, 0, 1))
    return pf.TimeParallelReducedFunctional(
        evolution, misfit(u), regularisation=q**2 / 2 * dx, solver_parameters={"mgrit": mgrit}
    )


def test_a_radius_without_limit_is_printed_as_infinite():
    line = str(IterationRecord(1, 1.0, 0.1, UNLIMITED, 0.2, 1.0, True, 3, CGStop.RESIDUAL))
    assert "inf" in line
    assert "e+99" not in line


@pytest.mark.parametrize(("factor", "text"), [(0.25, "0.250"), (3.2e-6, "3.2e-06"), (0.0, "0.000")])
def test_small_factors_of_a_cycle_have_digits(factor, text):
    assert f"factor {text}" in SolveResult(residuals=[1.0, factor], cycles=1, scale=1.0).monitor_line()


def test_a_sensor_outside_the_mesh_is_named():
    sensors = pf.PointSensors([[0.5, 0.5], [1.5, 0.25], [0.2, 3.0]], [0.5], [[1, 2, 3]])
    with pytest.raises(InputError, match=r"sensor 1 at \(1.5, 0.25\) is outside the mesh, and so is 1 more"):
        heat(lambda u: sensors)


def test_cycles_that_contract_but_are_too_few_are_told_apart_from_those_that_do_not():
    J = heat(lambda u: pf.RunningMisfit((u - 1) ** 2 * dx), levels=2, coarsening=4, max_it=1, rtol=1e-12)
    (q,) = J.evolution.controls
    with pytest.raises(pf.DivergedError, match="cycles contract: give a larger max_it than 1"):
        J(q.assign(1))


def test_summaries_name_the_integrator_and_the_size_of_a_posterior():
    sensors = pf.PointSensors([[0.5, 0.5], [0.25, 0.25]], [0.5, 1.0], [[1, 2], [3, 4]])
    J = heat(lambda u: sensors, tableau=pf.ImplicitMidpoint(), levels=1)
    assert "ImplicitMidpoint, 64 steps" in str(J)
    assert repr(J.parameter_to_observable().posterior(noise=0.1)) == (
        "<GaussianPosterior: 25 controls from 4 readings, alpha = 1>"
    )
    assert math.isfinite(float(J(J.evolution.controls[0])))


def test_sequential_stepping_is_viewed_without_cycles(caplog):
    J = heat(lambda u: pf.TerminalMisfit((u - 1) ** 2 * dx), levels=1, view=True)
    with caplog.at_level("INFO", logger="pint_fem"):
        J(J.evolution.controls[0])
    assert "64 steps on 1 time rank, no cycles" in caplog.text
    assert "entries" in caplog.text
    assert "million" not in caplog.text

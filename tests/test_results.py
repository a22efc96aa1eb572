"""Results of minimisers: the entries of scipy's OptimizeResult, summaries, and the controls found."""

import copy
import html
import pickle
import re

import firedrake as fd
import numpy as np
import pytest
from irksome import Dt
from scipy.optimize import OptimizeResult

import pint_fem as pf
from pint_fem.optimize import (
    StopReason,
    minimize_bounded,
    minimize_one_shot,
    minimize_trust_region,
    scipy_minimize,
)
from tests.ranks import cases


class Bowl:
    """(x - c)^2 / 2 in R^3."""

    c = np.array([1.0, 2.0, 3.0])

    def value(self, x):
        return 0.5 * float((x - self.c) @ (x - self.c))

    def gradient(self, x):
        return x - self.c

    def hessian_action(self, x, v):
        return v

    def inner(self, a, b):
        return float(a @ b)


MINIMISERS = {
    "trust region": minimize_trust_region,
    "within bounds": lambda problem, x0, **options: minimize_bounded(problem, x0, -10.0, 10.0, **options),
    "one-shot": minimize_one_shot,
    "scipy": lambda problem, x0, max_it=100, **options: scipy_minimize(
        problem, x0, "L-BFGS-B", options={"maxiter": max_it}, gtol_rel=1e-6, **options
    ),
}


@pytest.mark.parametrize("name", MINIMISERS)
def test_entries_of_scipy(name):
    """success is a bool that is true at a minimum only, nit an int that counts iterations, message a text."""
    iterations = []
    result = MINIMISERS[name](Bowl(), np.zeros(3), callback=lambda x, *_: iterations.append(x))
    assert result.success is True
    assert np.allclose(result.x, Bowl.c)
    assert type(result.nit) is int
    assert result.nit == len(iterations) - (name == "one-shot")  # whose record 0 has a callback, too
    assert type(result.message) is str
    assert result.message
    assert result.control is None
    stopped = MINIMISERS[name](Bowl(), np.zeros(3), max_it=0)
    assert stopped.success is False
    assert stopped.nit <= 1  # scipy's L-BFGS-B counts the iteration that it stops in
    assert stopped.message != result.message


@pytest.mark.parametrize("name", ["trust region", "within bounds", "one-shot"])
def test_entries_agree(name):
    """The entries of scipy are those of the package under other names."""
    for options in ({}, {"max_it": 0}, {"callback": lambda x, record: True}):
        result = MINIMISERS[name](Bowl(), np.zeros(3), **options)
        assert (result.success, result.nit, result.message) == (
            result.converged,
            result.iterations,
            result.reason.value,
        )
        assert result.success == (result.reason is StopReason.GRADIENT)


def test_scipy_result_is_one_of_scipy():
    """With its entries as keys and as attributes."""
    result = MINIMISERS["scipy"](Bowl(), np.zeros(3))
    assert isinstance(result, OptimizeResult)
    assert {"x", "fun", "jac", "success", "status", "message", "nit", "nfev", "njev", "control"} <= set(result)
    assert result["nit"] == result.nit


@pytest.mark.parametrize("name", MINIMISERS)
@pytest.mark.parametrize("max_it", [0, 100])
def test_summaries(name, max_it):
    """One paragraph, one line and a table, which state outcome, reason, iterations and J."""
    result = MINIMISERS[name](Bowl(), np.zeros(3), max_it=max_it)
    value = result.fun if name == "scipy" else result.value
    outcome = "converged" if max_it else "not converged"
    text, short, table = str(result), repr(result), result._repr_html_()
    for shown in (text, short):
        assert "\n" not in shown
        assert re.search(rf"(?<!not ){outcome} after {result.nit} iteration", shown)
        assert result.message in shown
        assert float(re.search(r"J = ([-+.e\d]+)", shown)[1].rstrip(".,")) == pytest.approx(value, rel=1e-8, abs=1e-300)
    assert text.endswith(".")
    assert len(short) < 200
    assert short.startswith(f"<{type(result).__name__}: ")
    rows = dict(re.findall(r"<tr><th>(.*?)</th><td>(.*?)</td></tr>", table))
    assert table == f"<table>{''.join(f'<tr><th>{k}</th><td>{v}</td></tr>' for k, v in rows.items())}</table>"
    assert rows["success"] == str(bool(max_it))
    assert rows["message"] == html.escape(result.message)
    assert int(rows["iterations"]) == result.nit
    assert float(rows["J"]) == pytest.approx(value, rel=1e-8, abs=1e-300)


@pytest.mark.parametrize("name", MINIMISERS)
def test_results_are_pickled(name):
    """With all their entries."""
    result = MINIMISERS[name](Bowl(), np.zeros(3))
    again = pickle.loads(pickle.dumps(result))
    assert type(again) is type(result)
    assert repr(again) == repr(result)
    assert np.array_equal(again.x, result.x)


def functional(spacetime, *, several, per_step=False):
    """A heat source, and with it a number that is added to it, from the state at all steps."""
    mesh = spacetime.mesh(fd.UnitSquareMesh, 4, 4)
    V = fd.FunctionSpace(mesh, "CG", 1)
    u, v, q = fd.Function(V), fd.TestFunction(V), fd.Function(V, name="q")
    k = fd.Function(fd.FunctionSpace(mesh, "R", 0), name="k")
    x, y = fd.SpatialCoordinate(mesh)
    F = (Dt(u) * v + fd.inner(fd.grad(u), fd.grad(v)) - (q + k) * v) * fd.dx
    ev = pf.Evolution(
        F, u, tableau=pf.BackwardEuler(), dt=0.05, nsteps=8, per_step=per_step, control=[q, k] if several else q
    )
    terms = 1e-2 * (q**2 + k**2) * fd.dx if several else 1e-2 * q**2 * fd.dx
    return pf.TimeParallelReducedFunctional(
        ev, pf.RunningMisfit((u - x * y) ** 2 * fd.dx), regularisation=terms, spacetime=spacetime,
        solver_parameters={"mgrit": {"rtol": 1e-9, "coarsening": 2, "levels": 2}},
    )  # fmt: skip


@pytest.mark.parametrize("per_step", [False, True])
@pytest.mark.parametrize("method", ["trust region", "one-shot", "scipy"])
def test_results_of_functionals_are_pickled_and_copied(method, per_step):
    """A copy shares the controls found; in pickled and deep copies they are their numbers ``x`` only."""
    result = METHODS[method](functional(pf.SpaceTime(), several=True, per_step=per_step))
    assert copy.copy(result).control is result.control
    for again in (pickle.loads(pickle.dumps(result)), copy.deepcopy(result)):
        assert type(again) is type(result)
        assert str(again) == str(result)
        assert again.control is None
        assert again.x is not result.x
        assert np.array_equal(again.x, result.x)
    assert result.control is not None


METHODS = {
    "trust region": lambda J: J.minimize_trust_region(),
    "inexact": lambda J: J.minimize_trust_region(inexact=True),
    "bounds": lambda J: J.minimize_trust_region(bounds=(-100, 100)),
    "one-shot": lambda J: J.minimize_one_shot(gtol_rel=1e-4),
    "scipy": lambda J: J.minimize_scipy(method="L-BFGS-B"),
}


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parallel([1, 3])
@pytest.mark.parametrize("method", cases(METHODS, on_ranks=["trust region", "scipy"]))
def test_control(method, several):
    """The controls found are Functions in their spaces: x as functions, and the values of the functional's controls."""
    J = functional(pf.SpaceTime(), several=several)
    controls = J.controls
    start = [control.control for control in controls]
    result = METHODS[method](J)
    assert result.success
    assert J.controls is controls
    assert [control.control for control in controls] == start
    assert isinstance(result.control, list) == several
    found = result.control if several else [result.control]
    assert all(type(f) is fd.Function for f in found)
    assert [f.function_space() for f in found] == [f.function_space() for f in start]
    assert np.array_equal(J.array(found), result.x)
    assert np.array_equal(J.array(start), result.x)
    assert all(f is not own for f, own in zip(found, start, strict=True))
    value = result.fun if method == "scipy" else result.value
    assert J(found) == pytest.approx(value, rel=1e-6)


@pytest.mark.parallel(3)
def test_control_with_one_value_per_step():
    """An EnsembleFunction."""
    J = functional(pf.SpaceTime(), several=False, per_step=True)
    result = J.minimize_trust_region(gtol_rel=1e-4)
    assert type(result.control) is fd.EnsembleFunction
    assert np.array_equal(J.array(result.control), result.x)

"""What a user gives a minimiser fails, or is unusable, on one of several ranks: all of them raise, and none waits.

Expected is the exception that was planted, or the refusal of what was given; values are exact ones.
"""

import numpy as np
import pytest
from mpi4py import MPI

from pint_fem.collective import all_ranks, any_rank, consistent_across_ranks
from pint_fem.errors import FailureReport, InputError, InputTypeError
from pint_fem.optimize import (
    InexactOptions,
    minimize_active_set,
    minimize_bounded,
    minimize_one_shot,
    minimize_trust_region,
    scipy_minimize,
)
from tests.limits import time_limit

COMM = MPI.COMM_WORLD
LAST = COMM.rank == COMM.size - 1
SIZE = 3


def raises(error):
    """A function that raises on the last rank and returns its first argument elsewhere."""

    def fails(*args):
        if LAST:
            raise error
        return args[0]

    return fails


def spoilt(function, spoil):
    """A function whose result is another one on the last rank; what communicates is through by then."""

    def other(*args):
        out = function(*args)
        return spoil(out) if LAST else out

    return other


class Bowl:
    """``J = |x - 1|^2 / 2 + |x|^4 / 4``, three entries on each rank."""

    def __init__(self, **spoils):
        self.comm = COMM
        for name, spoil in spoils.items():
            setattr(self, name, spoilt(getattr(self, name), spoil))

    def inner(self, a, b):
        return self.comm.allreduce(float(a @ b))

    def value(self, x):
        return self.inner(x - 1, x - 1) / 2 + self.inner(x, x) ** 2 / 4

    def gradient(self, x):
        return x - 1 + self.inner(x, x) * x

    def hessian_action(self, x, v):
        return v + self.inner(x, x) * v + 2 * self.inner(x, v) * x


class Inexact(Bowl):
    """The same with answers that come with an error, and a model of the Hessian."""

    def value_within(self, x, tolerance):
        return self.value(x), 0.0

    def gradient_within(self, x, tolerance):
        return self.gradient(x), 0.0

    def hessian_model(self, x, rtol):
        return lambda v: self.hessian_action(x, v)


class Running(Bowl):
    """The same with solvers that are done at once."""

    def advance(self, x):
        return self.value(x), self.gradient(x), 0.0


def scipys(problem, x0, **options):
    return scipy_minimize(problem, x0, "L-BFGS-B", comm=problem.comm, **options)


def inexact(problem, x0):
    return minimize_trust_region(problem, x0, inexact=InexactOptions())


class Learning:
    """The identity as a preconditioner that learns."""

    def __call__(self, r):
        return r

    def update(self, pairs):
        raises(KeyError("planted"))(pairs)


class Kept:
    """A checkpoint in memory."""

    def __init__(self, state=None, save=lambda *_: None):
        self.load, self.save = lambda: state, save


class SilentError(Exception):
    """Its message cannot be had, nor can it be pickled."""

    def __str__(self):
        raise RuntimeError("no message")

    def __reduce__(self):
        raise SystemExit(9)


ARRAY = np.array([True, False])
X0 = np.zeros(SIZE)
MINIMISERS = [minimize_trust_region, minimize_bounded, minimize_active_set, minimize_one_shot, scipys]
KEY, DISK = KeyError("planted"), OSError("disk full")
STATE = {"kind": "trust region 1"}, {"x": X0}
on_last = lambda there, elsewhere: there if LAST else elsewhere

PLANTED = {
    "message of an exception": (
        SilentError,
        lambda: minimize_trust_region(Bowl(), X0, callback=raises(SilentError())),
    ),
    "update": (KeyError, lambda: minimize_trust_region(Bowl(), X0, preconditioner=Learning())),
    "update bounded": (KeyError, lambda: minimize_bounded(Bowl(), X0, -1.0, 1.0, preconditioner=Learning())),
    "save": (OSError, lambda: minimize_trust_region(Bowl(), X0, checkpoint=Kept(save=raises(DISK)))),
    "save bounded": (OSError, lambda: minimize_bounded(Bowl(), X0, checkpoint=Kept(save=raises(DISK)))),
    "save one-shot": (OSError, lambda: minimize_one_shot(Bowl(), X0, checkpoint=Kept(save=raises(DISK)))),
    "model": (KeyError, lambda: inexact(Inexact(hessian_model=lambda model: spoilt(model, raises(KEY))), X0)),
}

REFUSED = {
    "value None": ("value returned None", lambda: minimize_trust_region(Bowl(value=lambda J: None), X0)),
    "value array": ("value returned a ndarray", lambda: minimize_bounded(Bowl(value=lambda J: np.array([J, J])), X0)),
    "value text": ("value returned a str", lambda: scipys(Bowl(value=lambda J: "low"), X0)),
    "gradient None": ("gradient returned", lambda: minimize_one_shot(Bowl(gradient=lambda g: None), X0)),
    "gradient text": ("gradient returned a str", lambda: minimize_trust_region(Bowl(gradient=lambda g: "steep"), X0)),
    "advance residual": (
        "the residual -1.0",
        lambda: minimize_one_shot(Running(advance=lambda out: (*out[:2], -1.0)), X0),
    ),
    "advance shape": (
        "advance returned an array",
        lambda: minimize_one_shot(Running(advance=lambda out: (out[0], out[1][:1], 0.0)), X0),
    ),
    "advance parts": ("advance returned tuple", lambda: minimize_one_shot(Running(advance=lambda out: out[:2]), X0)),
    "within shape": (
        "gradient_within returned an array",
        lambda: inexact(Inexact(gradient_within=lambda out: (out[0][:1], 0.0)), X0),
    ),
    "within error": (
        "gradient_within returned the error -1.0",
        lambda: inexact(Inexact(gradient_within=lambda out: (out[0], -1.0)), X0),
    ),
    "value within": (
        "value_within returned the error nan",
        lambda: inexact(Inexact(value_within=lambda out: (out[0], np.nan)), X0),
    ),
    "model shape": (
        "hessian_model returned an array",
        lambda: inexact(Inexact(hessian_model=lambda model: lambda v: model(v)[:1]), X0),
    ),
    "preconditioner shape": (
        "preconditioner returned an array",
        lambda: minimize_trust_region(Bowl(), X0, preconditioner=lambda r: r[:1] if LAST else r),
    ),
    "preconditioner one-shot": (
        "preconditioner returned a str",
        lambda: minimize_one_shot(Bowl(), X0, preconditioner=lambda r: on_last("none", r)),
    ),
    "bounds": ("lower = 'low'", lambda: minimize_bounded(Bowl(), X0, on_last("low", -1.0), 1.0)),
    "bounds scipy": ("upper = 'high'", lambda: scipys(Bowl(), X0, lower=-1.0, upper=on_last("high", 1.0))),
    "first guess": ("x0 of shape", lambda: minimize_trust_region(Bowl(), on_last(np.array(["a"] * SIZE), X0))),
}


def error_of(run):
    with pytest.raises(Exception) as info:  # noqa: PT011
        run()
    return info.value


@pytest.mark.parallel([1, 3])
@time_limit(30)
@pytest.mark.parametrize("case", PLANTED)
def test_what_is_raised_on_one_rank_is_raised_on_all(case):
    kind, run = PLANTED[case]
    error = error_of(run)
    assert type(error) is (kind if LAST else RuntimeError)
    if not LAST:
        assert kind.__name__ in str(error)
        assert kind is SilentError or type(error.__cause__) is kind


@pytest.mark.parallel([1, 3])
@time_limit(30)
@pytest.mark.parametrize("case", REFUSED)
def test_what_one_rank_cannot_use_is_refused_on_all(case):
    text, run = REFUSED[case]
    error = error_of(run)
    assert isinstance(error, InputError)
    assert text in str(error)


@pytest.mark.parallel([1, 3])
@time_limit(30)
@pytest.mark.parametrize("minimise", MINIMISERS)
def test_a_callback_that_answers_an_array(minimise):
    error = error_of(lambda: minimise(Bowl(), X0, callback=lambda *_: on_last(ARRAY, None)))
    assert isinstance(error, InputError)
    assert "callback returned ndarray, which is neither true nor false" in str(error)


@pytest.mark.parallel([1, 3])
@time_limit(30)
def test_conditions_without_a_truth_value():
    for ask in (any_rank, all_ranks, consistent_across_ranks):
        with pytest.raises(InputError, match="neither true nor false"):
            ask(COMM, on_last(ARRAY, True))
    assert any_rank(COMM, LAST)
    assert all_ranks(COMM, LAST) == (COMM.size == 1)
    assert not any_rank(COMM, [])


def test_a_report_of_an_exception_never_fails():
    report = FailureReport.of(SilentError())
    assert (report.pickled, report.is_numerical) == ((), False)
    assert "SilentError" in report.text
    assert FailureReport.of(ValueError(SilentError())).text.startswith("ValueError")


@pytest.mark.parallel(3)
@time_limit(30)
@pytest.mark.parametrize(
    ("given", "text"),
    [
        ((None, STATE), "on some ranks only"),
        (((STATE[0], {}), STATE), "is not the same on all ranks"),
        ((({"kind": "bounded trust region 1"}, STATE[1]), STATE), "checkpoint kind is not the same"),
    ],
)
def test_checkpoints_that_differ_are_refused(given, text):
    with pytest.raises(InputError, match=text):
        minimize_trust_region(Bowl(), X0, checkpoint=Kept(given[min(COMM.rank, 1)]))


@pytest.mark.parallel([1, 3])
@time_limit(30)
def test_functions_that_overwrite_their_arguments_spoil_nothing():
    """The run ends where it does otherwise, to the last bit."""

    class Rough(Bowl):
        def value(self, x):
            value = super().value(x)
            x[:] = 7
            return value

        def gradient(self, x):
            g = super().gradient(x)
            x[:] = 7
            return g

        def hessian_action(self, x, v):
            h = super().hessian_action(x, v)
            x[:] = v[:] = 7
            return h

    def halved(r):
        r *= 0.5
        return r

    for minimise in MINIMISERS:
        assert np.array_equal(minimise(Rough(), X0).x, minimise(Bowl(), X0).x)
    rough, gentle = (minimize_trust_region(Bowl(), X0, preconditioner=P).x for P in (halved, lambda r: 0.5 * r))
    assert np.array_equal(rough, gentle)
    # x_i = s with s - 1 + n s^3 = 0, n entries in all
    root = next(r.real for r in np.roots([SIZE * COMM.size, 0, 1, -1]) if abs(r.imag) < 1e-12)
    np.testing.assert_allclose(rough, root, rtol=1e-5)


@pytest.mark.parametrize(
    "options",
    [{"max_it": "3"}, {"gtol_rel": None}, {"eta": True}, {"monitor": 1}, {"checkpoint": 1}, {"inexact": "yes"}],
)
def test_a_wrong_type_is_a_type_error_and_an_input_error(options):
    for kind in (TypeError, ValueError, InputError, InputTypeError):
        with pytest.raises(kind, match=f"{next(iter(options))} = .* is refused: give"):
            minimize_trust_region(Bowl(), X0, **options)


@pytest.mark.parametrize("options", [{"max_it": -1}, {"gtol_rel": 2.0}, {"eta": 0.5}, {"hessian": "exact"}])
def test_a_wrong_value_is_no_type_error(options):
    with pytest.raises(InputError) as caught:
        minimize_trust_region(Bowl(), X0, **options)
    assert not isinstance(caught.value, TypeError)

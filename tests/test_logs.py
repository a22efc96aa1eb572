"""Where messages go that a program's logging receives or not, in programs of their own."""

import logging
import subprocess
import sys

import pytest

from tests.test_commands import ROOT

SET_UP = {
    "nothing": ("", "1 text\n", ""),
    "basicConfig": ("logging.basicConfig()", "", "INFO:pint_fem:1 text\n"),
    "handler of the logger": ("logger.addHandler(own)", "own 1 text\n", ""),
    "handler of the logger alone": ("logger.addHandler(own); logger.propagate = False", "own 1 text\n", ""),
    "handler of the root": ("logging.getLogger().addHandler(own)", "own 1 text\n", ""),
    "level": ("logger.setLevel('WARNING')", "", ""),
}


@pytest.mark.parametrize("name", SET_UP)
def test_messages_go_to_one_place(name):
    """To the program's handlers, to standard output where there are none; never to both."""
    code, out, error = SET_UP[name]
    lines = [
        "import logging, sys",
        "from pint_fem.logs import logger",
        "own = logging.StreamHandler(sys.stdout)",
        "own.setFormatter(logging.Formatter('own %(message)s'))",
        code,
        "logger.info('%d text', 1)",
    ]
    program = [sys.executable, "-c", "\n".join(lines)]
    done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    assert (done.stdout, done.stderr) == (out, error)


@pytest.mark.parallel([1, 2])
@pytest.mark.parametrize("case", ["choice", "view", "check"])
def test_failing_handler_reaches_all_ranks(case):
    """A handler that raises on the first rank is an error on all ranks."""
    import firedrake as fd
    from irksome import Dt

    import pint_fem as pf

    class Failing(logging.Handler):
        def emit(self, record):
            raise RuntimeError("broken")

    st = pf.SpaceTime()
    mesh = fd.UnitIntervalMesh(4, comm=st.space_comm)
    V = fd.FunctionSpace(mesh, "CG", 1)
    u, v, q = fd.Function(V), fd.TestFunction(V), fd.Function(V)
    F = (Dt(u) * v + fd.inner(fd.grad(u), fd.grad(v)) - q * v) * fd.dx
    evolution = pf.Evolution(F, u, tableau=pf.BackwardEuler(), dt=0.1, nsteps=8, control=q)
    options = {"choice": {"time_solver": "auto"}, "view": {"mgrit": {"view": True, "coarsening": 2}}}
    options = options.get(case, {"mgrit": {"coarsening": 2}})
    failing, logger = Failing(), logging.getLogger("pint_fem")

    def run():
        J = pf.TimeParallelReducedFunctional(
            evolution, pf.RunningMisfit(u**2 * fd.dx), spacetime=st, solver_parameters=options
        )
        if case == "check":
            pf.check_sweeps(J.problem.sweeps)
        J(q)

    logger.addHandler(failing)
    try:
        with pytest.raises(RuntimeError, match="broken"):
            run()
    finally:
        logger.removeHandler(failing)

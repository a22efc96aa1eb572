"""``options_prefix=``: functionals in one program have PETSc options of their own."""

from contextlib import contextmanager

import pytest
from firedrake import UnitSquareMesh, dx
from firedrake.petsc import PETSc
from mpi4py import MPI

import pint_fem as pf
from pint_fem.errors import InputError
from tests.heat import heat, point_and_direction


@contextmanager
def database(**options):
    """Options in PETSc's database."""
    for name, value in options.items():
        PETSc.Options()[name] = value
    try:
        yield
    finally:
        for name in options:
            PETSc.Options().delValue(name)


def functional(prefix="", st=None, *, linear=True, **parameters):
    st = st or pf.SpaceTime("1x1", comm=MPI.COMM_SELF)
    mesh = st.mesh(UnitSquareMesh, 4, 4)
    ev = heat(mesh, steps=32, linear=linear)
    parameters = {"mgrit": {"coarsening": (4, 2)}} | parameters
    misfit = pf.RunningMisfit(ev.u**2 * dx)
    return pf.TimeParallelReducedFunctional(
        ev, misfit, spacetime=st, solver_parameters=parameters, options_prefix=prefix
    )


def cycles(J):
    J(point_and_direction(J)[0])
    return J.problem.sweeps.counts["cycles"]


def test_tolerances_of_two_functionals():
    """Cycles are those of separate dictionaries; options without prefix are a third functional's."""
    st, rtol = pf.SpaceTime(), ("1e-2", "1e-5", "1e-12")
    expected = [cycles(functional("", st, mgrit={"coarsening": (4, 2), "rtol": float(x)})) for x in rtol]
    assert len(set(expected)) == 3
    with database(coarse_mgrit_rtol=rtol[0], fine_mgrit_rtol=rtol[1], mgrit_rtol=rtol[2]):
        found = [functional(prefix, st) for prefix in ("coarse_", "fine", "")]  # an underscore is added
    assert [cycles(J) for J in found] == expected


def test_options_of_paradiag_and_of_krylov():
    with database(
        a_paradiag_alpha="1e-2", paradiag_alpha="1e-3", a_mgrit_ksp_type="gcr", a_paradiag_ksp_type="gmres",
        a_paradiag_pc_type="lu",
    ):  # fmt: skip
        J, K = (functional(prefix, time_solver="paradiag") for prefix in ("b_", ""))
        assert (J.problem.sweeps.options.alpha, K.problem.sweeps.options.alpha) == (1e-4, 1e-3)
        with pytest.raises(InputError, match="krylov accelerates MGRIT's sweeps"):
            functional("a_", time_solver="paradiag")
        J = functional("a_")
        cycles(J)
        assert J.problem.sweeps.solvers.tangent.ksp.getType() == "gcr"
        assert not functional("b_").problem.sweeps.solvers.accelerated
    with database(a_paradiag_ksp_type="gmres", a_paradiag_pc_type="jacobi", a_paradiag_ksp_rtol="1e-14"):
        for prefix, kind in (("a_", "gmres"), ("", None)):
            J = functional(prefix, time_solver="paradiag")
            cycles(J)
            systems = J.problem.sweeps.solvers.tangent._frequency_solve.__self__
            assert getattr(systems.systems[0], "_parameters", {}).get("ksp_type") == kind


@pytest.mark.parametrize("linear", [True, False])
def test_solvers_of_a_step(linear):
    """On coarse levels, too."""
    name = "pint_" if linear else "pint_form_"
    with database(**{f"a_{name}ksp_type": "cg", f"a_{name}pc_type": "jacobi", f"a_{name}ksp_rtol": "1e-12"}):
        for prefix, kind in (("a_", "cg"), ("b_", "preonly"), ("", "preonly")):
            J = functional(prefix, linear=linear)
            cycles(J)
            for propagator in J.problem.sweeps.propagators:
                if linear:
                    found = {factor.ksp.getType() for factor in propagator.factors.values()}
                else:
                    found = {
                        propagator.factors.nearby(step.stages[0]).ksp.getType() for step in steps_of(J, propagator)
                    }
                assert found == {kind}


def steps_of(J, propagator):
    solvers = J.problem.sweeps.solvers
    steps = solvers.linearisations.forward[solvers.propagators.index(propagator)]
    return [step for step in steps if propagator.factors.nearby(step.stages[0]) is not None]


def test_slips_behind_a_prefix():
    with database(heat_mgri_rtol="1e-3"):
        functional()
        with pytest.raises(InputError, match=r"'-heat_mgri_rtol': did you mean '-heat_mgrit_rtol'"):
            functional("heat_")
    with database(heat_mgrit_rtoll="1e-3"):
        functional()
        with pytest.raises(InputError, match="did you mean 'rtol'"):
            functional("heat_")
    with database(heat_pint_ksp_type="gmress"):
        functional()
        with pytest.raises(InputError, match=r"-heat_pint_ksp_type 'gmress' .* 'gmres'"):
            functional("heat_")


@pytest.mark.parametrize("prefix", ["mgrit_", "pin", "paradig_", "a b", "-a", 3])
def test_prefixes_that_cannot_be_told_apart_are_refused(prefix):
    with pytest.raises(InputError, match="options_prefix"):
        functional(prefix)

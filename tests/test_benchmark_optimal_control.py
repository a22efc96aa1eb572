"""The benchmark of optimal control: what it compares is the same problem, its tables are whole."""

import re
from functools import partial

import numpy as np
import pytest
from firedrake import COMM_SELF
from mpi4py import MPI

from tests.benchmarks import optimal_control, optimal_control_bounds, optimal_control_iterations
from tests.benchmarks.optimal_control import Size, main, rows
from tests.benchmarks.optimal_control_iterations import Setting, counted, markdown, settings

SMALL = Size(8, 16)


def differences(found):
    """The relative differences in the notes."""
    return [float(text) for r in found for text in re.findall(r"differ\w* by ([\d.e+-]+)", r.note)]


@pytest.fixture
def one_integrator(monkeypatch):
    monkeypatch.setattr(optimal_control, "INTEGRATORS", ("BackwardEuler",))


def test_times(one_integrator, monkeypatch):
    """Measured times are of the same minimiser; a limit of zero makes them predicted."""
    lines = []
    (measured,) = rows(1, COMM_SELF, size=SMALL, parts="times", weights=[1e-4], say=lines.append)
    assert max(differences([measured])) < 1e-5
    assert measured.target == 1.0
    assert re.search(r"measured, \d+ CG steps, .*1 KKT systems?, \d+ iterations", measured.note)
    assert len(lines) == 5
    assert "another KKT solve" in lines[-1]
    monkeypatch.setattr(optimal_control, "PRECONDITIONERS", ("none",))
    (predicted,) = rows(1, COMM_SELF, size=SMALL, parts="times", weights=[1e-6], limit=0.0)
    assert "predicted" in predicted.note
    assert predicted.target == 8.0
    assert np.isfinite(predicted.ratio)


def test_serial(one_integrator):
    """The tape's functional is ours."""
    found = rows(1, COMM_SELF, size=Size(4, 3), parts="serial")
    assert [r.target for r in found] == [None, None, None, 200.0]
    assert len(differences(found)) == 3
    assert max(differences(found)) < 1e-10
    assert "not converged" not in found[-1].note


def test_bounds():
    lines = []
    found = optimal_control_bounds.bound_rows(Size(4, 8), lines.append, weights=(1e-2,))
    assert len(found) == len(differences(found)) == 2
    assert max(differences(found)) < 1e-6
    assert all(0 < int(re.search(r"(\d+)% of the values", r.note)[1]) < 100 for r in found)
    dense = r"bounds, weight 0.01: (\d+) active-set steps, .*: (\d+), .* by (\S+)"
    ours, theirs, apart = re.fullmatch(dense, lines[0]).groups()
    assert ours == theirs
    assert float(apart) < 1e-6


def test_iterations(monkeypatch):
    """The count without a preconditioner beside that with KKT systems, and the handing over of a wave, for which few
    iterations are allowed.
    """
    fewer = partial(optimal_control_iterations.KKTPreconditioner, max_it=30)
    monkeypatch.setattr(optimal_control_iterations, "KKTPreconditioner", fewer)
    heat, wave = Setting("heat", "BackwardEuler", 1, 4, 8), Setting("wave", "ImplicitMidpoint", 1, 8, 64)
    found = {heat: counted(heat, (1.0, 1e-6), seconds=60.0, say=lambda text: None)}
    found[wave] = counted(wave, (1.0, 1e-4), seconds=0.0, say=lambda text: None)
    first, second = found[heat]
    assert 0 < first.plain < second.plain
    assert second.ends < 14
    assert all(c.gradient <= 1e-8 and c.systems >= (c.replaced is None) for row in found.values() for c in row)
    assert [c.replaced is None for c in found[wave]] == [False, True]
    assert all(c.plain is None for c in found[wave])
    lines = markdown(found, (1.0, 1e-6)).splitlines()
    assert len(lines) == 2 + 2 + 2 * 2
    assert lines[2] == f"| heat | BackwardEuler | P1 | 4 x 4 | 8 | {first} | {second} |"
    assert "* / - |" in lines[3]
    assert "wanted: 14" in lines[5]
    assert "handed over in 1 of 2" in lines[7]
    assert len(list(settings())) == 9 * (4 + 2 + 1)


def test_options(capsys):
    with pytest.raises(SystemExit):
        main(["--parts", "everything"])
    assert "give some of iterations" in capsys.readouterr().err


@pytest.mark.parallel(2)
def test_two_ranks(one_integrator):
    found = rows(1, MPI.COMM_WORLD, size=SMALL, weights=[1e-4])
    if MPI.COMM_WORLD.rank == 0:
        assert [r.target for r in found] == [1.7]
        assert max(differences(found)) < 1e-8

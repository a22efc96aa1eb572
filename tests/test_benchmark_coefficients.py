"""The benchmark of coefficients: what it compares is the same problem, its table is whole."""

import re

import numpy as np
import pytest
from firedrake import COMM_SELF
from mpi4py import MPI

from tests.benchmarks import coefficients
from tests.benchmarks.coefficients import rows

SMALL = {"steps": 8, "tape_steps": 2, "size": 4}


def differences(found):
    """The relative differences in the notes."""
    return [float(text) for r in found for text in re.findall(r"differ\w* by ([\d.e+-]+)", r.note)]


def test_of_one_rank(monkeypatch):
    """Coefficient by two propagators, tape and sums over experiments give the same numbers."""
    monkeypatch.setattr(coefficients, "SOLVERS", coefficients.SOLVERS[1:])
    found = rows(1, COMM_SELF, **SMALL)
    assert [r.target for r in found].count(2.5) == 4
    assert {r.target for r in found} == {None, 2.5, 30, 100, 0.5}
    assert len(differences(found)) == 2 * 3 + 2 * 3 + 2
    assert max(differences(found)) < 1e-7
    assert all(np.isfinite(r.ratio) and r.ours >= 0 < r.theirs for r in found)
    assert all(r.met is (r.ratio <= r.target) for r in found if r.target in (2.5, 0.5))


@pytest.mark.parallel(2)
def test_of_two_ranks():
    found = rows(1, MPI.COMM_WORLD, **SMALL)
    if MPI.COMM_WORLD.rank == 0:
        assert max(differences(found)) < 1e-6
        assert [r.target for r in found if "J, gradient and Hessian" in r.what] == [1.8] * 4

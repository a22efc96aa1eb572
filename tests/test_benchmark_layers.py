"""The benchmark of training steps: rows are beside the fastest serial form, and its failure reaches all ranks."""

import pytest
from mpi4py import MPI

pytest.importorskip("torch")

import torch

from tests.benchmarks import layers
from tests.benchmarks.layers import rows

OPTIONS = {"levels": 2, "coarsening": 4, "relax": "F"}


@pytest.mark.parallel([1, 2])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_rows(monkeypatch, dtype):
    """Two cycles are exact with two intervals, one is not; the ratio is over the least of the times in the note."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    told = []
    found = rows(1, cases=((8, dtype, (((2, 2), OPTIONS), ((1, 1), OPTIONS))),), report=told.append)
    assert found == told
    errors = [float(r["note"].split("gradient error ")[1].split(";")[0]) for r in found]
    assert errors[0] < (1e-13 if dtype == "float64" else 1e-5) < errors[1]
    assert all(r["ratio"] == pytest.approx(r["theirs"] / r["ours"]) for r in found)
    if MPI.COMM_WORLD.rank == 0:
        counts = sorted({1, MPI.COMM_WORLD.size})
        listed = found[0]["note"].split("(us a layer: ")[1].rstrip(")").split("; ")
        assert {text.rsplit(" ", 1)[0] for text in listed} == {
            f"{form} on {count}" for form in ("eager", "stacked", "compiled") for count in counts
        }
        assert min(float(text.rsplit(" ", 1)[1]) for text in listed) == pytest.approx(1e3 * found[0]["theirs"], abs=0.1)


@pytest.mark.parallel([1, 2])
def test_other_gradients_of_a_form_end_all_ranks(monkeypatch):
    def wrong(*args, **given):
        raise ArithmeticError("gradients of form 'compiled' differ")

    monkeypatch.setattr(layers, "fastest", wrong)
    with pytest.raises((ArithmeticError, RuntimeError), match="gradients of form 'compiled' differ"):
        rows(1, cases=((8, "float64", (((1, 1), OPTIONS),)),))

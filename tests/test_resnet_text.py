"""The text of the character transformer and its batches: codes, targets, parts, equal batches on ranks, going on."""

import sys

import pytest

pytest.importorskip("torch", reason="pint_fem.resnet needs torch (pip install 'pint_fem[resnet]')")

import torch
from mpi4py import MPI

from pint_fem.errors import InputError
from pint_fem.resnet import Grid
from problems.text import Alphabet, RandomPassages, passages, python_reference, split


def test_text_is_the_reference_of_python(monkeypatch):
    """It has the statements of the language; where it is not installed the message says so."""
    text = python_reference()
    assert len(text) > 300_000
    for words in ("while_stmt", "lambda", '"__getattr__"'):
        assert words in text
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(InputError, match=r"pydoc_data\.topics"):
        python_reference()


def test_codes_are_places_in_the_sorted_alphabet():
    alphabet = Alphabet("banana bread")
    assert alphabet.characters == " abdenr"
    assert alphabet.encode("bad").tolist() == [2, 1, 3]
    assert alphabet.decode(alphabet.encode("brand new"[:5])) == "brand"
    with pytest.raises(InputError, match="'w' is not in the alphabet"):
        alphabet.encode("new")
    with pytest.raises(InputError, match="at least two"):
        Alphabet("aaa")


def test_targets_are_one_character_later():
    """Successive passages for the test, without the characters that fill no passage; parts that do not overlap."""
    x, y = passages(torch.arange(10), 4).tensors
    assert x.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert y.tolist() == [[1, 2, 3, 4], [5, 6, 7, 8]]
    for count, held_out in ((100, 5), (40, 5), (10, 5)):
        training, test = split(torch.arange(count), 4, test=0.05)
        assert (len(test), training.tolist() + test.tolist()) == (held_out, list(range(count)))
    with pytest.raises(InputError, match="at least 10 characters"):
        split(torch.arange(9), 4)
    with pytest.raises(InputError, match="need at least 5"):
        RandomPassages(torch.arange(4), 4, 2, 1, Grid(comm=MPI.COMM_SELF))


@pytest.mark.parallel([1, 2, 4])
def test_ranks_of_a_group_have_the_same_passages():
    """The batches of the groups together are those of one process with as many passages in a batch."""
    comm = MPI.COMM_WORLD
    grid = Grid((2, 2) if comm.size == 4 else (1, comm.size))
    codes = torch.arange(50)
    loader = RandomPassages(codes, 6, 3, 2, grid, seed=4)
    whole = RandomPassages(codes, 6, 3 * grid.data_size, 2, Grid(comm=MPI.COMM_SELF), seed=4)
    for epoch in (1, 2):
        loader.sampler.set_epoch(epoch)
        whole.sampler.set_epoch(epoch)
        assert len(loader) == 2
        for (x, y), (of_all, _) in zip(loader, whole, strict=True):
            assert torch.equal(y, x + 1)
            assert torch.equal(x, x[:, :1] + torch.arange(6))
            assert len(set(map(str, grid.layer_comm.allgather(x.tolist())))) == 1
            assert [row for part in grid.data_comm.allgather(x.tolist()) for row in part] == of_all.tolist()


def test_training_goes_on_from_any_batch():
    """The second epoch has the batches that follow those of the first; another seed has others."""
    grid, codes = Grid(comm=MPI.COMM_SELF), torch.arange(1000)
    at_once = [x.tolist() for x, _ in RandomPassages(codes, 5, 2, 6, grid)]
    loader, parts = RandomPassages(codes, 5, 2, 3, grid), []
    for epoch in (2, 1):
        loader.set_epoch(epoch)
        parts.insert(0, [x.tolist() for x, _ in loader])
    assert parts[0] + parts[1] == at_once
    assert len(set(map(str, at_once))) == 6
    assert [x.tolist() for x, _ in RandomPassages(codes, 5, 2, 6, grid, seed=1)] != at_once

"""Coarse layers as means over their intervals: against sums in plain torch, and what they do to errors of a cycle."""

import pytest
import torch
from mpi4py import MPI
from torch import nn

from pint_fem.errors import InputError
from pint_fem.resnet import Dense, Grid, LayerParallel, LayerParallelResNet, SerialResNet
from pint_fem.resnet.parallel.interval_means import IntervalMeans
from tests.limits import time_limit

COMM = MPI.COMM_WORLD


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.mark.parallel([1, 2, 3])
@time_limit(60)
@pytest.mark.parametrize("reverse", [False, True])
def test_means_are_sums_in_order_whatever_the_ranks(reverse):
    """Bitwise, for intervals within a rank, over two and over three ranks, and a last one that is cut short."""
    comm = COMM.Split(0, -COMM.rank) if reverse else COMM
    for n in (3, 5, 7, 12, 13, 24):
        here = slice(n * COMM.rank // COMM.size, n * (COMM.rank + 1) // COMM.size)
        own = [n * r // COMM.size for r in range(COMM.size + 1)]
        rows = torch.randn(n, 3, 2, generator=torch.Generator().manual_seed(n))
        scalars = torch.arange(n, dtype=torch.float64) ** 2
        ordered = [a.flip(0) if reverse else a for a in (rows, scalars)]
        bounds = [n - b for b in reversed(own)] if reverse else own
        for stride in (2, 3, 4, 5):
            means = IntervalMeans(comm, bounds, stride, reverse=reverse)([rows[here], scalars[here]])
            for found, a in zip(means, ordered, strict=True):
                expected = []
                for i in range(n // stride):
                    total = a[i * stride].clone()
                    for j in range(1, stride):
                        total += a[i * stride + j]
                    expected.append(total / stride)
                every = torch.cat(comm.allgather(found))
                assert torch.equal(every, torch.stack(expected) if expected else a[:0])


def dense(coarse, iterations, grid, layers=96):
    torch.manual_seed(0)
    return LayerParallelResNet(
        nn.Linear(2, 8), Dense(8, "tanh"), layers, nn.Linear(8, 5), final_time=4.0, dtype=torch.float64, grid=grid,
        coarse_layers=coarse, forward_iterations=iterations, backward_iterations=1,
        mgrit={"levels": 2, "coarsening": 8, "relax": "F"},
    )  # fmt: skip


def blocks(coarse, iterations, grid, layers=32):
    torch.manual_seed(0)
    return LayerParallel(
        [nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)) for _ in range(layers)], h=4.0 / layers, grid=grid,
        opening=nn.Linear(2, 8), closing=nn.Linear(8, 5), coarse_layers=coarse, forward_iterations=iterations,
        backward_iterations=1, mgrit={"levels": 2, "coarsening": 4, "relax": "F"},
    ).double()  # fmt: skip


def relative_error(net, exact):
    """Of all gradients, in the Euclidean norm over all ranks."""
    sums = torch.zeros(2, dtype=torch.float64)
    for name, p in net.named_parameters():
        expected = exact[name].grad
        if name.startswith("theta"):
            expected = expected[net.lo : net.hi]
        sums += torch.stack([(p.grad - expected).square().sum(), expected.square().sum()])
    COMM.Allreduce(MPI.IN_PLACE, sums.numpy())
    return (sums[0] / sums[1]).sqrt().item()


@pytest.mark.parallel([1, 3])
@time_limit(60)
@pytest.mark.parametrize("make", [dense, blocks])
def test_one_cycle_with_means_is_better_than_two_with_first_layers(make):
    """Random parameters: errors of all gradients, against the same network in plain torch."""
    x = torch.randn(50, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    y = torch.arange(50) % 5
    loss = lambda net: nn.functional.cross_entropy(net(x), y)
    errors = {}
    for coarse, iterations in (("first", 1), ("first", 2), ("mean", 1)):
        net = make(coarse, iterations, Grid())
        if make is blocks:
            serial = net.serial_copy()
        else:
            torch.manual_seed(0)
            ends = nn.Linear(2, 8), Dense(8, "tanh"), 96, nn.Linear(8, 5)
            serial = SerialResNet(*ends, final_time=4.0, dtype=torch.float64)
        loss(net).backward()
        loss(serial).backward()
        errors[coarse, iterations] = relative_error(net, dict(serial.named_parameters()))
    factor = 0.02 if make is dense else 1.0  # where a layer has several products their mean is not that of one product
    assert errors["mean", 1] < factor * errors["first", 2] < errors["first", 1]


@pytest.mark.parallel([1, 2])
@time_limit(60)
def test_layers_of_different_structures_have_no_means():
    wide = lambda n: nn.Sequential(nn.Linear(4, 3 + n % 2), nn.Tanh(), nn.Linear(3 + n % 2, 4))
    net = LayerParallel([wide(n) for n in range(8)], mgrit={"levels": 2, "coarsening": 2})
    assert not net.stages[0].has_means
    assert LayerParallel([wide(2 * n) for n in range(8)], mgrit={"levels": 2, "coarsening": 2}).stages[0].has_means
    for make in (dense, blocks):
        with pytest.raises(InputError, match="coarse_layers 'last'"):
            make("last", 1, Grid())

"""Networks on several ranks: decisions by all of them, data groups that fail, users' functions that raise on one.

Expected values are those of the same network on one rank alone, or the exception that was planted.
"""

import numpy as np
import pytest
import torch
from mpi4py import MPI
from torch import nn

from demos.training_loop import accuracy, train_epoch
from pint_fem.errors import InputError, SolverFailure
from pint_fem.resnet import Adaptive, Dense, Grid, LayerParallelResNet, TrainingProblem
from tests.limits import time_limit
from tests.test_resnet import COMM, one_thread  # noqa: F401
from tests.test_resnet_training import ALONE, direction, peaks_network, problem

LAST = COMM.rank == COMM.size - 1


@pytest.mark.parallel([1, 3])
@time_limit(60)
def test_a_direction_that_is_zero_on_one_rank():
    """J and its gradient at a point where one rank's parameters stay as they are; the others used to wait."""
    p, alone = problem(6, levels=2), problem(6, Grid(comm=ALONE), levels=2)
    for still in range(COMM.size):
        net, d = p.net, direction(p, 3)
        own = slice(*COMM.bcast((net.lo, net.hi), root=still))
        if COMM.size > 1 and COMM.rank == still:
            d[:] = 0
        whole = direction(alone, 3)
        for q in alone.net.stack:
            part = whole[alone._where(q)].reshape(q.shape)
            if COMM.size > 1:
                part[own] = 0
        if COMM.size > 1:
            for module, owner in ((alone.net.opening, 0), (alone.net.closing, COMM.size - 1)):
                for q in module.parameters():
                    whole[alone._where(q)] *= owner != still
        z, z1 = p.x0, alone.x0
        p.value(z)
        p.gradient(z)
        assert p.value(z + 0.1 * d) == pytest.approx(alone.value(z1 + 0.1 * whole), rel=1e-11)
        g = p.gradient(z + 0.1 * d)
        assert p.inner(g, g) == pytest.approx(alone.inner(*2 * [alone.gradient(z1 + 0.1 * whole)]), rel=1e-9)
        p.set(z)
        alone.set(z1)


@pytest.mark.parallel([1, 3])
@time_limit(60)
def test_frozen_layers_of_one_rank():
    """With all parameters of the first rank frozen the others' gradients are what they were."""
    net, x, y = peaks_network(6, levels=2)
    loss = nn.functional.cross_entropy(net(x), y)
    loss.backward()
    want = [p.grad.clone() for p in net.stack]
    net.zero_grad()
    first = COMM.size > 1 and COMM.rank == 0
    for p in net.parameters():
        p.requires_grad_(not first)
    again = nn.functional.cross_entropy(net(x), y)
    again.backward()
    assert again.item() == loss.item()
    for p, g in zip(net.stack, want, strict=True):
        assert p.grad is None if first else torch.equal(p.grad, g)


@pytest.mark.parallel(2)
@time_limit(60)
def test_one_data_group_fails():
    """Its coarse steps give NaN; then both groups step serially, and the gradient is
    the mean of those of the two batches, each by torch alone.
    """
    grid = Grid((2, 1))

    net, x, y = peaks_network(
        8,
        grid,
        levels=2,
        forward_iterations=2,
        backward_iterations=2,
        adaptive=Adaptive(),
        mgrit={"rtol": 0.0, "on_divergence": "report"},
    )
    alone, *_ = peaks_network(8, Grid(comm=ALONE), levels=1)
    half = slice(30 * COMM.rank, 30 * COMM.rank + 30)
    coarse = net.sweeps.solvers["forward"].levels[1].propagator
    sweep = coarse.sweep

    def fails(first, U, G):
        sweep(first, U, G)
        if LAST:
            U[1:] = np.nan

    coarse.sweep = fails
    out = net(x[half])
    nn.functional.cross_entropy(out, y[half]).backward()
    assert net.forward_sweeps.serial
    assert COMM.allgather(net.forward_sweeps.serial) == [True, True]
    (
        sum(nn.functional.cross_entropy(alone(x[30 * r : 30 * r + 30]), y[30 * r : 30 * r + 30]) for r in (0, 1)) / 2
    ).backward()
    # the forward sweep is exact, the backward one two cycles from exact
    for ours, theirs in zip(net.stack, alone.stack, strict=True):
        assert torch.allclose(ours.grad, theirs.grad, rtol=0.2, atol=1e-3)
    net.serial = True
    net.zero_grad()
    nn.functional.cross_entropy(net(x[half]), y[half]).backward()
    for ours, theirs in zip(net.stack, alone.stack, strict=True):
        assert torch.allclose(ours.grad, theirs.grad, rtol=1e-10, atol=1e-13)


@pytest.mark.parallel(2)
@time_limit(60)
@pytest.mark.parametrize("shape", [(2, 1), (1, 2)])
def test_a_batch_that_overflows_on_one_group_fails_on_all(shape):
    grid = Grid(shape)
    net, x, _ = peaks_network(4, grid)
    bad = x.clone()
    if LAST or shape == (1, 2):
        bad[0] = float("nan")
    with pytest.raises(SolverFailure, match="not finite"):
        net(bad)
    net.eval()
    with torch.no_grad():
        assert torch.isfinite(net(x)).all()


class Short(list):
    """A loader with fewer batches on the last rank."""

    def __init__(self, x, y):
        super().__init__([(x, y)] * (1 if LAST else 2))


@pytest.mark.parallel([1, 3])
@time_limit(60)
@pytest.mark.parametrize("shape", ["data", "layers"])
@pytest.mark.parametrize(
    "where", ["loader", "loss", "regularisation", "optimizer", "on_batch", "after_batch", "opening"]
)
def test_a_function_of_the_training_raises_on_one_rank(shape, where):
    net, x, y = peaks_network(4, Grid((COMM.size, 1) if shape == "data" else (1, COMM.size)))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)

    def fails(*_):
        if LAST:
            raise KeyError(where)
        return torch.tensor(0.0) if where in ("regularisation", "loss") else None

    class Loader:
        def __iter__(self):
            yield x, y
            fails()

    options = {where: fails} if where in ("regularisation", "on_batch", "after_batch") else {}
    if where == "loss":
        options["loss_function"] = lambda out, y: fails() or nn.functional.cross_entropy(out, y)
    if where == "optimizer":
        optimizer.step = fails
    fails_here = LAST
    if where == "opening" and net.grid.is_first:
        fails_here = True if shape == "layers" else LAST

        def opening(*_):
            if fails_here:
                raise KeyError(where)
            return nn.Linear(2, 4).double()(x)

        net.opening.forward = opening
    elif where == "opening":
        fails_here = False
    with pytest.raises(KeyError if fails_here else RuntimeError, match=where) as caught:
        train_epoch(
            net, Loader() if where == "loader" else [(x, y)], optimizer, data_comm=net.grid.data_comm, **options
        )
    assert fails_here or isinstance(caught.value.__cause__, KeyError)


@pytest.mark.parallel(2)
@time_limit(60)
def test_loaders_and_networks_that_differ_are_refused():
    net, x, y = peaks_network(4, Grid((2, 1)))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with pytest.raises(InputError, match="not as many batches each"):
        train_epoch(net, Short(x, y), optimizer, data_comm=net.grid.data_comm)
    for options, name in (
        (dict(nlayers=4 + COMM.rank), "nlayers"),
        (dict(nlayers=4, forward_iterations=1 + COMM.rank), "forward_iterations"),
        (dict(nlayers=4, mgrit={"levels": 1 + COMM.rank}), "mgrit levels"),
    ):
        with pytest.raises(InputError, match=f"^{name} is not the same on all ranks"):
            LayerParallelResNet(nn.Linear(2, 3), Dense(3), options.pop("nlayers"), nn.Linear(3, 2), **options)
    with pytest.raises(InputError, match="grid is not the same on all ranks"):
        Grid(("2x1", "1x2")[COMM.rank])


@pytest.mark.parallel(2)
@time_limit(60)
def test_batches_that_differ_on_ranks_that_share_layers_are_refused():
    """Shuffled otherwise; data groups have their own."""
    net, x, y = peaks_network(4, Grid((1, 2)))
    turned = slice(None) if COMM.rank == 0 else torch.arange(len(x) - 1, -1, -1)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    before = [p.detach().clone() for p in net.parameters()]
    message = "batches of other values or types on layer rank 1 than on layer rank 0"
    for training in (True, False):
        net.train(training)
        with pytest.raises(InputError, match=message):
            net(x[turned])
    with pytest.raises(InputError, match=message):
        train_epoch(net, [(x[turned], y)], optimizer)
    with pytest.raises(InputError, match="ranks that share the layers are given other labels"):
        train_epoch(net, [(x, y[turned])], optimizer)
    for given, name in (((x[turned], y), "x"), ((x, y[turned]), "y")):
        with pytest.raises(InputError, match=f"^{name} is not the same on all ranks"):
            TrainingProblem(net, *given)
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))
    assert torch.isfinite(net(x.float())).all()
    net, *_ = peaks_network(4, Grid((2, 1)))
    train_epoch(net, [(x[turned], y[turned])], torch.optim.SGD(net.parameters(), lr=0.1), data_comm=COMM)


@pytest.mark.parallel([1, 3])
@time_limit(60)
def test_an_evaluation_that_fails_in_one_group():
    """``accuracy`` over groups, where the last one's data are of another width."""
    net, x, y = peaks_network(4, Grid((COMM.size, 1)))
    data = torch.utils.data.TensorDataset(torch.cat([x, x])[:, : 1 if LAST else 2], torch.cat([y, y]))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        accuracy(net, data, batch_size=30, grid=net.grid)


@pytest.mark.parallel([1, 3])
@time_limit(60)
def test_a_loss_without_second_derivative_fails_on_all_ranks():
    """It is known to the last rank only, which has the classification layer."""
    p = problem(4)

    def loss(out, y):
        if MPI.COMM_WORLD.rank == COMM.size - 1 and len(calls) > 0:
            raise NotImplementedError("no second derivative")
        return nn.functional.cross_entropy(out, y)

    calls, p.loss = [], loss
    z = p.x0
    J = p.value(z)
    calls.append(1)
    with pytest.raises(NotImplementedError if LAST else RuntimeError, match="no second derivative"):
        p.hessian_action(z, np.ones_like(z))
    calls.clear()
    h = p.hessian_action(z, np.ones_like(z))  # nothing of the failed one is left
    assert np.isfinite(h).all()
    assert p.value(z) == J

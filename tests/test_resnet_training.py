"""Training of layer-parallel networks: modes, warm starts, regularisation, grids, optimisers, restarts."""

import numpy as np
import pytest

pytest.importorskip("torch", reason="pint_fem.resnet needs torch (pip install 'pint_fem[resnet]')")

import torch
from mpi4py import MPI
from torch import nn

from demos.training_loop import train_epoch
from pint_fem.errors import InputError
from pint_fem.optimize import minimize_one_shot, minimize_trust_region, scipy_minimize
from pint_fem.resnet import (
    Adaptive,
    Dense,
    Grid,
    LayerParallelResNet,
    Regularisation,
    TrainingProblem,
    load_checkpoint,
    refine,
    save_checkpoint,
)
from problems.classification import peaks, shared_loader
from tests.test_resnet import COMM, one_thread, step  # noqa: F401

ALONE = MPI.COMM_SELF


def peaks_network(nlayers, grid=None, *, levels=1, rtol=1e-12, T=2.0, classes=5, count=60, width=4, **options):
    """A network for peaks, its full batch, all in float64."""
    torch.manual_seed(1)
    points, labels = peaks(count, classes, seed=4).tensors
    opening, closing = nn.Sequential(nn.Linear(2, width), nn.Tanh()), nn.Linear(width, classes)
    options["mgrit"] = {"levels": levels, "coarsening": 2, "rtol": rtol, **options.get("mgrit", {})}
    options = dict(final_time=T, grid=grid or Grid(), dtype=torch.float64) | options
    return LayerParallelResNet(opening, Dense(width), nlayers, closing, **options), points, labels


def problem(nlayers, grid=None, *, weights=(1e-3, 1e-3, 1e-3), inner_product="l2", **how):
    """Deterministic training of it."""
    net, x, y = peaks_network(nlayers, grid, **how)
    return TrainingProblem(net, x, y, regularisation=Regularisation(net, *weights), inner_product=inner_product)


def direction(p, seed):
    """A vector that does not depend on the ranks: parts of one of all layers."""
    rng, out = np.random.default_rng(seed), np.zeros(len(p.weights))
    net = p.net
    for q in net.stack:
        full = rng.standard_normal((net.nlayers, *q.shape[1:]))
        out[p._where(q)] = full[net.lo : net.hi].ravel()
    ends = rng.standard_normal(200)
    for module in (net.opening, net.closing):
        for q in module.parameters() if module is not None else ():
            out[p._where(q)] = ends[: q.numel()]
    return out


@pytest.mark.parallel([1, 3])
@pytest.mark.parametrize(("levels", "inner"), [(1, "L2"), (3, "l2")])
def test_taylor_remainders_of_the_training_problem(levels, inner):
    """Remainders of J fall with the third power of the step, given gradient and Hessian action."""
    p = problem(11, levels=levels, rtol=1e-14, inner_product=inner)
    z, v = p.x0, direction(p, 0)
    J, g, Hv = p.value(z), p.gradient(z).copy(), p.hessian_action(z, v).copy()
    first, second = p.inner(g, v), p.inner(Hv, v)
    steps = [2e-2, 1e-2, 5e-3]
    remainders = [abs(p.value(z + e * v) - J - e * first - 0.5 * e**2 * second) for e in steps]
    rates = np.diff(np.log(remainders)) / np.log(0.5)
    assert (rates > 2.8).all(), rates
    w = direction(p, 1)
    assert p.inner(Hv, w) == pytest.approx(p.inner(p.hessian_action(z, w), v), rel=1e-10)


@pytest.mark.parallel([1, 3])
def test_lbfgs_reproduces_itself(capsys):
    """Acceptance: 32 layers, full batch, L-BFGS: the same for every number of ranks and of levels."""

    def run(grid, levels):
        p = problem(32, grid, levels=levels, rtol=1e-13)
        result = scipy_minimize(p, p.x0, "L-BFGS-B", comm=p.net.grid.layer_comm, options={"maxiter": 12})
        return p, result, p.value(result.x)

    p, here, J = run(Grid(), 4)
    factors = {name: result.factor for name, result in p.net.results.items()}
    _, alone, J1 = run(Grid(comm=ALONE), 4)
    p1, serial, J2 = run(Grid(comm=ALONE), 1)
    with capsys.disabled():
        if COMM.rank == 0:
            text = ", ".join(f"{name} {factor:.3f}" for name, factor in factors.items())
            print(f"\n  residual factors on {COMM.size} ranks: {text}")
    assert all(f < 0.3 for f in factors.values())
    assert J == pytest.approx(J1, rel=1e-12)
    assert pytest.approx(J2, rel=1e-8) == J
    assert here.nit == alone.nit == serial.nit
    start = problem(32, Grid(comm=ALONE))
    assert J < 0.9 * start.value(start.x0)
    p.set(here.x), p1.set(serial.x)
    for ours, theirs in zip(p.net.stack, p1.net.stack, strict=True):
        assert (ours - theirs[p.net.lo : p.net.hi]).abs().max() < 1e-6


class Lift(nn.Module):
    """An opening layer without parameters."""

    def forward(self, x):
        """Two more features, zero."""
        return nn.functional.pad(x, (0, 2))


def test_trust_region_and_one_shot_find_the_same_optimum():
    """Newton's method to a minimum; the one-shot method, with one cycle a design, comes back to it from nearby."""
    x, y = peaks(40, 2, seed=4).tensors

    def posed():
        torch.manual_seed(2)
        how = dict(final_time=2.0, dtype=torch.float64, mgrit={"levels": 2, "coarsening": 2, "rtol": 1e-12})
        net = LayerParallelResNet(Lift(), Dense(4), 7, nn.Linear(4, 2), **how)
        return TrainingProblem(net, x, y, regularisation=Regularisation(net, 3e-3, 3e-2, 1e-2), inner_product="L2")

    p, q = posed(), posed()
    newton = minimize_trust_region(p, p.x0, gtol_rel=1e-7, max_it=60)
    assert newton.converged
    shot = minimize_one_shot(q, newton.x + 0.03 * direction(q, 3), gtol_rel=1e-4, max_it=300)
    assert shot.converged
    assert q.counts["advance"] > 5
    assert shot.value == pytest.approx(newton.value, rel=1e-6)
    assert p.inner(newton.x - shot.x, newton.x - shot.x) < 1e-4 * p.inner(newton.x, newton.x)


@pytest.mark.parallel(3)
def test_optimisers_do_not_depend_on_the_ranks():
    """Two Newton steps and four one-shot iterations, beside the same on this rank alone."""
    runs = [problem(8, grid, levels=2, inner_product="L2") for grid in (Grid(), Grid(comm=ALONE))]
    for minimize in (
        lambda p: minimize_trust_region(p, p.x0, max_it=2),
        lambda p: minimize_one_shot(p, p.x0, max_it=4),
    ):
        ours, alone = (minimize(p) for p in runs)
        assert ours.value == pytest.approx(alone.value, rel=1e-9)
        for p, result in zip(runs, (ours, alone), strict=True):
            p.set(result.x)
        for a, b in zip(runs[0].net.stack, runs[1].net.stack, strict=True):
            assert torch.allclose(a, b[runs[0].net.lo : runs[0].net.hi], rtol=1e-7, atol=1e-9)


@pytest.mark.parallel([1, 3])
def test_regularisation_is_its_formula():
    """Value and gradients beside plain torch on all layers."""
    net, *_ = peaks_network(13)
    alone, *_ = peaks_network(13, Grid(comm=ALONE))
    R = Regularisation(net, 0.3, 0.2, 0.1)()
    R.backward()
    theta = [p.detach().clone().requires_grad_() for p in alone.stack]
    closing = [p.detach().clone().requires_grad_() for p in alone.closing.parameters()]
    exact = sum(0.15 * net.h * (p**2).sum() + 0.1 / net.h * (torch.diff(p, dim=0) ** 2).sum() for p in theta)
    exact = exact + 0.05 * sum((p**2).sum() for p in closing)
    exact.backward()
    assert R.item() == pytest.approx(exact.item(), rel=1e-13)
    pairs = [(p, q.grad[net.lo : net.hi]) for p, q in zip(net.stack, theta, strict=True)]
    if net.grid.is_last:
        pairs += [(p, q.grad) for p, q in zip(net.closing.parameters(), closing, strict=True)]
    for p, g in pairs:
        assert torch.allclose(p.grad, g, rtol=1e-12, atol=1e-14)


@pytest.mark.parallel([1, 3])
@pytest.mark.parametrize(("coarse", "fine"), [(6, 12), (5, 13)])
def test_refinement_interpolates_in_depth(coarse, fine):
    """Weights linear in depth stay so."""
    a, b = peaks_network(coarse)[0], peaks_network(fine)[0]
    with torch.no_grad():
        for p in a.stack:
            p.copy_(torch.arange(a.lo, a.hi, dtype=p.dtype).reshape(-1, *[1] * (p.ndim - 1)).expand_as(p) * a.h)
    refine(a, b)
    t = torch.arange(b.lo, b.hi, dtype=torch.float64) * b.h
    for p in b.stack:
        assert torch.allclose(p.reshape(len(p), -1), t.clamp(max=(coarse - 1) * a.h)[:, None], rtol=1e-13, atol=1e-14)


def train_steps(net, x, y, steps, *, lr=0.05, **flags):
    """Losses of some steps of Adam."""
    optimizer, losses = torch.optim.Adam(net.parameters(), lr=lr), []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(x, **flags), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parallel([1, 3])
def test_warm_starts_remember():
    """With one cycle a sweep, visits end at the exact gradient at fixed weights; cold sweeps do not come nearer.

    F-relaxation is exact after as many cycles as there are coarse steps: four visits for the state, four more for the
    adjoint.
    """
    its = dict(forward_iterations=1, backward_iterations=1, mgrit={"coarsening": 8, "relax": "F"})
    net, x, y = peaks_network(32, levels=2, T=6.0, **its)
    exact, *_ = peaks_network(32, levels=2, T=6.0)
    g = step(exact, x, y)[2]
    error = lambda ours: COMM.allreduce(max(np.abs(ours[n] - g[n]).max() for n in g), op=MPI.MAX)
    cold = [error(step(net, x, y)[2]) for _ in range(2)]
    warm = [error(step(net, x, y, batch="a")[2]) for _ in range(9)]
    assert cold[0] == cold[1] == warm[0]
    assert cold[0] > 1e-3
    assert warm[-1] < 1e-13
    net.invalidate()
    assert error(step(net, x, y, batch="a")[2]) == cold[0]


@pytest.mark.parallel([1, 3])
def test_adaptive_iterations():
    """Small weights: the number of cycles stays. Large ones, on which cycles diverge: serial and exact from then on."""
    adaptive = Adaptive(every=3, enough=0.5, most=4)
    its = dict(
        forward_iterations=1, backward_iterations=1, adaptive=adaptive, mgrit={"coarsening": 4, "relax": "F"},
        coarse_layers="first",
    )  # fmt: skip
    net, x, y = peaks_network(32, levels=2, **its)
    train_steps(net, x, y, 7)
    for sweeps in (net.forward_sweeps, net.backward_sweeps):
        assert [h[:2] for h in sweeps.history] == [(3, 1), (6, 1)]
        assert all(0 < h[2] <= 0.5 for h in sweeps.history)
    its["adaptive"] = Adaptive(every=2, enough=0.5, most=3)
    wild, x, y = peaks_network(64, levels=2, T=20.0, **its)
    exact, *_ = peaks_network(64, T=20.0)
    with torch.no_grad():
        for p in [*wild.stack, *exact.stack]:
            p *= 3
    for _ in range(8):
        step(wild, x, y)
    assert [h[1] for h in wild.forward_sweeps.history] == [2, 3, 0]
    assert [h[1] for h in wild.backward_sweeps.history] == [0]
    assert wild.backward_sweeps.history[0][2] > 1
    assert wild.serial
    ours, theirs = step(wild, x, y), step(exact, x, y)
    assert ours[1] == theirs[1]
    assert all(np.array_equal(ours[2][n], theirs[2][n]) for n in theirs[2])


@pytest.mark.parallel(4)
def test_grid_of_data_and_layers_trains_like_the_whole_batch():
    """Two groups with half a batch each make the steps that one makes with the whole."""
    grid = Grid((2, COMM.size // 2))
    net, x, y = peaks_network(9, grid, levels=2, rtol=1e-14)
    alone, *_ = peaks_network(9, Grid(comm=ALONE), levels=2, rtol=1e-14)
    half = slice(30 * grid.data_comm.rank, 30 * grid.data_comm.rank + 30)
    train_steps(net, x[half], y[half], 5)
    train_steps(alone, x, y, 5)
    for ours, theirs in zip(net.stack, alone.stack, strict=True):
        assert torch.allclose(ours, theirs[net.lo : net.hi], rtol=1e-9, atol=1e-11)
        others = grid.data_comm.allgather(ours.detach().numpy())
        assert np.array_equal(others[0], others[1])


@pytest.mark.parallel([1, 3])
def test_checkpoint_goes_on_with_the_same_bits(tmp_path):
    """Four steps and four more after a restart are eight steps; another network is refused; ranks may change."""
    path = COMM.bcast(tmp_path) / "run"
    make = lambda grid=None: peaks_network(7, grid, forward_iterations=2, backward_iterations=1, levels=2)
    net, x, y = make()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)

    def go(net, optimizer, steps):
        for _ in range(steps):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x), y).backward()
            optimizer.step()

    assert load_checkpoint(path, net, optimizer) is None
    go(net, optimizer, 4)
    save_checkpoint(path, net, optimizer, {"epoch": 4})
    save_checkpoint(path, net, optimizer, {"epoch": 4})
    go(net, optimizer, 4)
    again = make()[0]
    other = torch.optim.Adam(again.parameters(), lr=0.01)
    assert load_checkpoint(path, again, other) == {"epoch": 4}
    go(again, other, 4)
    for a, b in zip(net.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    if COMM.rank == 0:
        alone = make(Grid(comm=ALONE))[0]
        one = torch.optim.Adam(alone.parameters(), lr=0.01)
        load_checkpoint(path, alone, one)
        go(alone, one, 4)
        for a, b in zip(net.stack, alone.stack, strict=True):
            assert torch.allclose(a, b[net.lo : net.hi], rtol=1e-13, atol=1e-15)
    with pytest.raises(InputError, match="another network"):
        load_checkpoint(path, peaks_network(8)[0])


def test_means_of_an_epoch_are_those_of_its_samples():
    """Batches of 50, 50 and 30 with a rate of zero: loss and accuracy of all at once."""
    data, net = peaks(130, 5), nn.Linear(2, 5).double()
    loader = torch.utils.data.DataLoader(data, batch_size=50)
    epoch = train_epoch(net, loader, torch.optim.SGD(net.parameters(), lr=0.0))
    x, y = data.tensors
    assert epoch["loss"] == pytest.approx(nn.functional.cross_entropy(net(x), y).item(), rel=1e-12)
    assert epoch["train_accuracy"] == pytest.approx((net(x).argmax(1) == y).double().mean().item(), rel=1e-12)


@pytest.mark.parallel([1, 3])
def test_training_loop_with_a_data_loader():
    """An epoch of batches, some shorter: the loss falls, as the serial copy's does."""
    net, *_ = peaks_network(16, levels=2, forward_iterations=2, backward_iterations=1)
    data = peaks(130, 5)
    loader = shared_loader(data, 50, net.grid, seed=1)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
    told = []
    for epoch in range(6):
        loader.sampler.set_epoch(epoch)
        told.append(train_epoch(net, loader, optimizer))
    assert told[-1]["loss"] < 0.9 * told[0]["loss"]
    assert told[0]["forward_cycles"] == 2
    assert len(set(COMM.allgather(told[-1]["loss"]))) == 1

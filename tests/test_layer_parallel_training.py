"""Ordinary training loops of layer-parallel networks give, on every rank, what the same network does in plain torch."""

import pytest

pytest.importorskip("torch", reason="pint_fem.resnet needs torch (pip install 'pint_fem[resnet]')")

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from pint_fem.errors import InputError
from pint_fem.resnet import LayerParallel, Repeat
from tests.layer_parallel_networks import COMM, KINDS, PlainLayers, make, require_same_state, take_step
from tests.limits import time_limit
from tests.test_resnet import one_thread  # noqa: F401

RANKS = pytest.mark.parallel([1, 2, 3])
SEVERAL = pytest.mark.parallel([2, 3])
OPTIMISERS = {
    "dense": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-2),
    "conv": lambda p: torch.optim.RMSprop(p, lr=1e-2, momentum=0.5),
    "groupnorm": lambda p: torch.optim.AdamW(p, lr=2e-2, weight_decay=1e-1, amsgrad=True),
    "stages": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
}


@RANKS
@time_limit(60)
@pytest.mark.parametrize("kind", KINDS)
def test_three_steps_of_an_optimiser(kind):
    """Losses, parameters and buffers after three steps with a schedule, and the evaluation after them."""
    task = make(kind)
    nets = (task.net, task.plain)
    optimisers = [OPTIMISERS.get(kind, lambda p: torch.optim.Adam(p, lr=2e-2))(m.parameters()) for m in nets]
    schedules = [torch.optim.lr_scheduler.ExponentialLR(o, 0.5) for o in optimisers]
    for _ in range(3):
        ours, theirs = (take_step(task, m, o) for m, o in zip(nets, optimisers, strict=True))
        assert ours == pytest.approx(theirs, rel=1e-10)
        for schedule in schedules:
            schedule.step()
    require_same_state(*nets, 1e-9)  # quotients of Adam amplify the round-off of small gradients
    with torch.no_grad():
        ours, theirs = (m.eval()(task.x, *task.extra) for m in nets)
    assert torch.allclose(ours, theirs, rtol=1e-8, atol=1e-9)


@RANKS
@time_limit(60)
@pytest.mark.parametrize("kind", ["conv", "attention", "stages"])
def test_accumulated_and_clipped_gradients(kind):
    """Two batches' gradients add up; their norms, numbers of parameters and clipped values are torch's."""
    task = make(kind)
    nets = net, plain = task.net, task.plain
    for part in (slice(0, 2), slice(2, None)):
        for m in nets:
            (task.loss(m, part) / 2).backward()
    require_same_state(*nets, gradients=True)
    norms = torch.nn.utils.get_total_norm
    theirs = [p.grad for p in plain.parameters()]
    for order in (1.0, 2.0, float("inf")):
        assert net.gradient_norm(order).item() == pytest.approx(norms(theirs, order).item(), rel=1e-10)
    limit = 0.5 * norms(theirs).item()
    for clip in (net.clip_grad_norm_, lambda norm: nn.utils.clip_grad_norm_(plain.parameters(), norm)):
        before = clip(1e3)  # large enough to change nothing
        assert before.item() == pytest.approx(2 * limit, rel=1e-10)
        clip(limit)
    require_same_state(*nets, gradients=True)
    next(plain.closing.parameters()).requires_grad_(False)
    if net.grid.is_last:
        next(net.closing.parameters()).requires_grad_(False)
    for trainable in (False, True):
        want = sum(p.numel() for p in plain.parameters() if p.requires_grad or not trainable)
        assert net.parameter_count(trainable=trainable) == want
    if net.grid.is_last:
        next(net.parameters()).grad.fill_(torch.nan)
    with pytest.raises(RuntimeError, match="nothing was clipped"):
        net.clip_grad_norm_(1.0, error_if_nonfinite=True)


@SEVERAL
@time_limit(60)
@pytest.mark.parametrize("call", ["parameter_count", "gradient_norm", "full_state_dict"])
def test_a_rank_that_calls_something_else(call):
    """While another trains: named on both, and the next step is right."""
    task = make("dense")
    with pytest.raises(InputError, match="all ranks have to make the same calls in the same order"):
        getattr(task.net, call)() if COMM.rank == 1 else task.net(task.x)
    for m in (task.net, task.plain):
        task.loss(m).backward()
    require_same_state(task.net, task.plain, gradients=True)


@RANKS
@time_limit(60)
@pytest.mark.parametrize("kind", ["batchnorm", "attention", "tuple"])
def test_learning_rates_by_layer_and_frozen_layers(kind):
    """Every third layer frozen, the last ones trained faster, all biases frozen, and one layer trained again."""
    task = make(kind)
    optimisers = []
    for m in (task.net, task.plain):
        groups = [{"params": [*m.opening.parameters(), *m.closing.parameters()], "lr": 1e-3}]
        for n, layer in enumerate(m.layers):
            layer.requires_grad_(n % 3 != 1)
            for name, p in layer.named_parameters():
                p.requires_grad_(p.requires_grad and name.split(".")[-1] != "bias")
            groups.append({"params": list(layer.parameters()), "lr": 1e-3 * (n + 1)})
        optimisers.append(torch.optim.AdamW(groups, weight_decay=0.1))
    for step in range(3):
        if step == 2:
            for m in (task.net, task.plain):
                m.layers[1].requires_grad_(True)
        ours, theirs = (take_step(task, m, o) for m, o in zip((task.net, task.plain), optimisers, strict=True))
        assert ours == pytest.approx(theirs, rel=1e-9)
        require_same_state(task.net, task.plain, 1e-9, gradients=True)
    require_same_state(task.net, task.plain, 1e-9)


@RANKS
@time_limit(60)
@pytest.mark.parametrize("kind", ["batchnorm", "attention"])
def test_dropout_and_shuffled_batches(kind):
    """All ranks draw the same batches and masks, those of the serial copy, though each layer is on one rank."""
    task = make(kind, p=0.3)
    x = torch.cat([task.x, -task.x, 0.5 * task.x])
    y = torch.arange(len(x)) % 3
    found, shuffled = [], []
    for m in (task.net, task.plain):
        torch.manual_seed(8)
        optimizer, losses = torch.optim.SGD(m.parameters(), lr=0.1), []
        data = DataLoader(TensorDataset(x, y), batch_size=4, shuffle=True)
        for _ in range(2):
            for xb, yb in data:
                m.train()
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(m(xb, *task.extra), yb)
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
                shuffled.append(yb.tolist())
            with torch.no_grad():
                losses.append(m.eval()(x, *task.extra).sum().item())
        found.append(losses)
    assert shuffled[: len(shuffled) // 2] == shuffled[len(shuffled) // 2 :]
    assert found[0] == pytest.approx(found[1], rel=1e-8)
    require_same_state(task.net, task.plain, 1e-8)
    with torch.no_grad():  # the masks differ from batch to batch
        task.net.train()
        assert not torch.allclose(task.net(x, *task.extra), task.net(x, *task.extra))


@RANKS
@time_limit(60)
def test_generators_that_differ_between_ranks():
    """``torch.manual_seed(rank)`` changes neither masks nor who has which parameters, but batches, which is refused."""
    torch.manual_seed(COMM.rank)
    task = make("batchnorm", p=0.5)
    for m in (task.net, task.plain):
        task.loss(m).backward()
    require_same_state(task.net, task.plain, gradients=True)
    block = lambda n: nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5))
    for blocks in ([block(n) for n in range(4)], Repeat(block, 4)):
        net = LayerParallel(blocks, h=0.3, mgrit={"levels": 2, "coarsening": 2})
        alone = net.serial_copy()
        x = torch.ones(3, 2)
        assert torch.allclose(net(x), alone(x), rtol=1e-4)
    same = COMM.bcast([p.detach() for p in alone.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(same, alone.parameters(), strict=True))
    loader = DataLoader(TensorDataset(torch.arange(32.0).reshape(16, 2)), batch_size=16, shuffle=True)
    torch.manual_seed(COMM.rank)
    (xb,) = next(iter(loader))
    if COMM.size > 1:
        with pytest.raises(InputError, match="batches of other values or types on layer rank 1"):
            task.net(xb.double())
    else:
        task.net(xb.double())


@SEVERAL
@time_limit(60)
@pytest.mark.parametrize("kind", ["conv", "attention"])
def test_what_differs_between_ranks_is_refused(kind):
    """By name on every rank, without a wait; then the network works as before."""
    task = make(kind)
    net, x, extra, last = task.net, task.x, task.extra, COMM.rank == COMM.size - 1

    def call(x=x, extra=extra, training=True, grads=True, **options):
        net.train(training)
        with torch.set_grad_enabled(grads):
            net(x, *extra, **options)

    noisy = x.clone()
    noisy[-1, -1, -1] += 1e-15 + 1e-12 * last
    wrong = {
        "batches of": dict(x=x[: 2 + last]),
        "batches of other values": dict(x=noisy),
        "batches of other values or types": dict(x=x.float() if last else x),
        "training: ": dict(training=not last),
        "gradients enabled: ": dict(grads=not last),
        "batch: ": dict(batch=int(last)),
        "inputs with derivatives": dict(x=x.clone().requires_grad_(last)),
    }
    if extra:
        wrong["batches of other values or types on layer"] = dict(extra=(extra[0] + 0.1 * last,))
    for match, arguments in wrong.items():
        with pytest.raises(InputError, match=match):
            call(**arguments)
        raised = COMM.allgather(1)
        assert len(raised) == COMM.size
    net.train()
    for m in (net, task.plain):
        task.loss(m).backward()
    require_same_state(net, task.plain, gradients=True)


@RANKS
@time_limit(60)
def test_fixed_iterations_are_within_the_printed_residual():
    """One cycle forward: the error is of the size of the residual that is reported; many cycles: exact."""
    errors = {}
    for cycles in (1, 6):
        task = make("groupnorm", forward_iterations=cycles, backward_iterations=cycles)
        for m in (task.net, task.plain):
            task.loss(m).backward()
        with torch.no_grad():
            exact = task.plain(task.x)
            errors[cycles] = (task.net(task.x) - exact).abs().max().item() / exact.abs().max().item()
        out = task.net(task.x).detach()
        errors[cycles] = ((out - exact).abs().max() / exact.abs().max()).item()
        residual = task.net.results[0]["forward"].relative_residual
        assert errors[cycles] <= 20 * residual + 1e-12
    assert errors[1] > 1e-8
    assert errors[6] < 1e-10
    require_same_state(task.net, task.plain, gradients=True)


def test_a_plain_loop_is_what_it_says():
    """The reference of these tests: u + h f(u) by hand, for two layers of one number."""
    layer = nn.Linear(1, 1, bias=False, dtype=torch.float64)
    plain = PlainLayers(nn.Identity(), [[layer, layer]], [], nn.Identity(), residual=True, h=0.5)
    w = layer.weight.item()
    assert plain(torch.ones(1, 1, dtype=torch.float64)).item() == pytest.approx((1 + 0.5 * w) ** 2)

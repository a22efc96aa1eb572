"""Optimisers on distributed parameters: those that work entry by entry step as on one rank, others are refused."""

import copy
import pickle
import warnings

import pytest

pytest.importorskip("torch", reason="pint_fem.resnet needs torch (pip install 'pint_fem[resnet]')")

import torch
from mpi4py import MPI
from torch import nn

from pint_fem.errors import InputError
from pint_fem.resnet import LayerParallel, Repeat
from pint_fem.resnet.training.optimisers import coupling, mark_distributed, require_local_step
from tests.test_resnet import build, one_thread, serial_copy  # noqa: F401

COMM = MPI.COMM_WORLD
ENTRYWISE = ["ASGD", "Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD"]


class OwnStep(torch.optim.Optimizer):
    """A user's optimiser: steepest descent, divided by a norm of the gradient of a parameter or of all of them."""

    def __init__(self, params, lr=0.1, of="entry"):
        self.of = of
        super().__init__(params, {"lr": lr, "of": of})

    @torch.no_grad()
    def step(self, closure=None):
        loss = None if closure is None else closure()
        parameters = [p for group in self.param_groups for p in group["params"]]
        total = sum(float((p.grad**2).sum()) for p in parameters)
        for p in parameters:
            size = {"entry": 1.0, "tensor": p.grad.norm(), "all": total**0.5}[self.of]
            if self.of == "random":
                size = torch.rand(())
            p -= self.param_groups[0]["lr"] * p.grad / size
        return loss


class PerTensor(OwnStep):
    def __init__(self, params, lr=0.1):
        super().__init__(params, lr, "tensor")


class OverAll(OwnStep):
    def __init__(self, params, lr=0.1):
        super().__init__(params, lr, "all")


class Unusual(OwnStep):
    """It cannot be made from its defaults."""

    def __init__(self, params, model):
        super().__init__(params)


def of(kind, shape=(3, 3), **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return kind([nn.Parameter(torch.ones(shape))], **options)


def test_how_optimisers_work():
    """LBFGS is one method for all parameters; Adafactor factors a tensor, Muon makes it orthogonal; others neither."""
    for name in ENTRYWISE:
        assert coupling(of(getattr(torch.optim, name), lr=0.0)) == (False, False), name
    assert coupling(of(torch.optim.SparseAdam)) == (False, False)
    assert coupling(of(torch.optim.LBFGS)) == (True, True)
    for kind in (torch.optim.Adafactor, torch.optim.Muon, PerTensor):
        assert coupling(of(kind)) == (False, True)
    assert coupling(of(OverAll)) == (True, True)
    assert coupling(of(OwnStep)) == (False, False)


def test_random_numbers_and_parameters_stay_as_they_were(caplog):
    torch.manual_seed(0)
    state = torch.get_rng_state()
    optimizer = of(Unusual, model=None)
    mark_distributed(optimizer.param_groups[0]["params"], stacked=True)
    for _ in range(2):
        require_local_step(optimizer)
    assert coupling(optimizer) is None
    assert [r.message for r in caplog.records if "could not be tried" in r.message and "Unusual" in r.message] != []
    assert sum("Unusual" in r.message for r in caplog.records) == 1
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(optimizer.param_groups[0]["params"][0].detach(), torch.ones(3, 3))


def test_parameters_that_no_network_has_marked_are_free():
    p = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.LBFGS([p])
    optimizer.step(lambda: (optimizer.zero_grad(), (p**2).sum().backward(), (p**2).sum())[2])
    assert p.detach().abs().max() < 0.5
    mark_distributed([p], stacked=False)  # layers with tensors of their own
    require_local_step(torch.optim.Adafactor([p]))
    with pytest.raises(InputError, match="optimiser LBFGS: it sums over all parameters"):
        require_local_step(optimizer)


def train(net, x, y, make, steps=2):
    """Parameters after some steps."""
    optimizer = make(net.parameters())

    def closure():
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(x), y)
        loss.backward()
        return loss

    for _ in range(steps):
        optimizer.step(closure)
    return dict(net.named_parameters())


def equal(net, ours, theirs):
    for name, p in ours.items():
        q = theirs[name][net.lo : net.hi] if name.startswith("theta") else theirs[name]
        assert torch.allclose(p, q, rtol=0, atol=1e-10), name


@pytest.mark.parallel([1, 2, 3])
def test_a_training_by_each():
    """Equal to the serial copy, or refused on all ranks before the network is evaluated."""
    for name in ("Adam", "SGD", "LBFGS", "Adafactor"):
        net, x, y = build("dense", 5, mgrit={"coarsening": 2})
        make = lambda parameters, name=name: getattr(torch.optim, name)(parameters, lr=0.05)
        if COMM.size == 1 or name in ("Adam", "SGD"):
            equal(net, train(net, x, y, make), train(serial_copy("dense", 5), x, y, make))
            continue
        before = [p.detach().clone() for p in net.parameters()]
        what = "it sums over all parameters.*L-BFGS-B" if name == "LBFGS" else "depends on the other entries"
        with pytest.raises(InputError, match=f"optimiser {name}: .*{what}"):
            train(net, x, y, make)
        assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))
        assert net.results == {}


@pytest.mark.parallel(2)
def test_copies_of_a_network_are_distributed_as_well():
    net, x, y = build("dense", 5, mgrit={"coarsening": 2})
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        with pytest.raises(InputError, match="optimiser LBFGS: it sums over all parameters"):
            train(other, x, y, torch.optim.LBFGS)


def scaled_training(net, x, y, scale, factor, steps=6):
    """Scales after each step of a training with a gradient scaler, and the number of steps that it left out."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=3)
    scales = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(steps):
            optimizer.zero_grad()
            scaler.scale(factor * nn.functional.cross_entropy(net(x), y)).backward()
            scaler.step(optimizer)
            scaler.update()
            scales.append(scaler.get_scale())
    return scales


@pytest.mark.parallel([1, 2, 3])
@pytest.mark.parametrize("where", ["closing", "opening", "layers", "all", "none"])
def test_gradient_scalers_of_torch_skip_the_steps_of_the_serial_copy(where):
    """A gradient overflows in one part of the network only: no rank steps, and all halve their scales."""
    net, x, y = build("dense", 5, mgrit={"coarsening": 2}, nonfinite="gradient", dtype=torch.float32)
    copy = serial_copy("dense", 5, dtype=torch.float32)
    x = x.float()
    big = 2.0**60
    for part in (net, copy):
        with torch.no_grad():
            if where == "closing":  # a derivative of big inputs: its weight alone
                for p in part.closing.parameters():
                    p.mul_(1 / big)
                if part is copy or net.grid.is_last:
                    part.closing.register_forward_pre_hook(lambda m, args: (big * args[0],))
            elif where == "opening":
                if part is copy or net.grid.is_first:
                    part.opening.weight.mul_(1 / big)
                    part.opening.register_forward_pre_hook(lambda m, args: (big * args[0],))
    scale, factor = {"layers": (2.0**126, 64.0), "all": (2.0**127, 2.0**30), "none": (2.0**10, 1.0)}.get(
        where, (2.0**70, 1.0)
    )
    ours, theirs = (scaled_training(n, x, y, scale, factor) for n in (net, copy))
    assert min(theirs) < scale or where == "none"
    assert ours == theirs
    assert len(set(COMM.allgather(tuple(ours)))) == 1
    for name, p in net.named_parameters():
        q = dict(copy.named_parameters())[name]
        q = q[net.lo : net.hi] if name.startswith("theta") else q
        assert torch.allclose(p, q, rtol=1e-4, atol=1e-6), name


@pytest.mark.parallel([1, 3])
def test_loss_scaling_with_half_precision():
    """Autocast to float16 with gradients that overflow at first: scales fall as the serial copy's do."""
    torch.manual_seed(0)
    block = lambda n: nn.Sequential(nn.Linear(6, 6), nn.Tanh())
    net = LayerParallel(
        Repeat(block, 6), opening=nn.Linear(2, 6), closing=nn.Linear(6, 4), h=0.3, nonfinite="gradient",
        mgrit={"coarsening": 2}, batched=False,
    )  # fmt: skip
    copy, x, y = net.serial_copy(), torch.linspace(-1, 1, 16).reshape(8, 2), torch.arange(8) % 4
    cast = lambda n: lambda z: n(z).float()

    class Cast(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, z):
            with torch.autocast("cpu", torch.float16):
                return cast(self.inner)(z)

    scale, before = 2.0**22, [p.detach().clone() for p in net.parameters()]
    ours, theirs = (scaled_training(Cast(n), x, y, scale, 1.0, steps=12) for n in (net, copy))
    assert ours == theirs
    assert 2.0 <= theirs[-1] < scale / 4
    for name, p in net.named_parameters():
        q = dict(copy.named_parameters())[name]
        assert torch.allclose(p, q, rtol=1e-2, atol=2e-3), name
    assert all((p - q).abs().max() > 0.01 for p, q in zip(net.parameters(), before, strict=True))

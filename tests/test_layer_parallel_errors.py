"""What fails on one rank is raised on all ranks, by name, and the next batch is computed as if nothing had happened."""

import pytest

pytest.importorskip("torch", reason="pint_fem.resnet needs torch (pip install 'pint_fem[resnet]')")

import torch
from torch import nn

from pint_fem.errors import InputError, SolverFailure
from pint_fem.resnet import Dense, LayerParallel, LayerParallelResNet
from tests.layer_parallel_networks import COMM, is_here, make, require_same_state
from tests.limits import time_limit
from tests.test_resnet import one_thread  # noqa: F401

RANKS = pytest.mark.parallel([1, 2, 3])
SEVERAL = pytest.mark.parallel([2, 3])
HIERARCHY = {"levels": 2, "coarsening": 2}


class Planted(Exception):
    """What the tests raise."""


class FailsBackward(torch.autograd.Function):
    """The identity, whose derivative fails."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g):
        raise Planted("in a derivative")


def fail(*_):
    raise Planted("in a module")


def fail_backward(module, inputs, output):
    return FailsBackward.apply(output)


def step_is_right(task):
    """The gradients of a batch are those of the plain network."""
    task.plain.load_state_dict(task.net.full_state_dict())  # statistics of normalisation that a failed batch changed
    for m in (task.net, task.plain):
        m.zero_grad()
        task.loss(m).backward()
    require_same_state(task.net, task.plain, gradients=True)


def on_all_ranks(here, match):
    """The exception itself on its rank, one that names it on the others; then all ranks are there."""
    kind = Planted if here or COMM.size == 1 else RuntimeError
    return pytest.raises(kind, match=match)


PLACES = ("opening", "closing", "transitions.0", "layers.0", "layers.3", "layers.7")


@RANKS
@time_limit(60)
def test_modules_that_raise():
    """In the forward pass: in training, in evaluation, and in a pass without gradients."""
    task = make("stages", mgrit=HIERARCHY)
    net = task.net
    for number, place in enumerate(PLACES):
        module = net.get_submodule(place)
        here = is_here(module)
        net.train(number % 3 != 1)
        with torch.set_grad_enabled(number % 3 != 2):
            planted = module.register_forward_pre_hook(fail)
            with on_all_ranks(here, "in a module"):
                net(task.x)
            planted.remove()
        net.train()
        step_is_right(task)


@RANKS
@time_limit(60)
@pytest.mark.parametrize("kind", ["stages", "attention"])
def test_derivatives_that_raise(kind):
    """In layers plain ``backward`` raises on all ranks; at the ends of the network ``collective.backward`` does."""
    task = make(kind)
    net = task.net
    for place in PLACES if kind == "stages" else ("opening", "closing", "layers.2", "layers.6"):
        module = net.get_submodule(place)
        planted = module.register_forward_hook(fail_backward) if is_here(module) else None
        loss = task.loss(net)
        with on_all_ranks(planted is not None, "in a derivative"):
            if place.startswith("layers"):
                loss.backward()
            else:
                net.collective.backward(loss)
        if planted is not None:
            planted.remove()
        step_is_right(task)


@SEVERAL
@time_limit(60)
def test_a_rank_that_leaves_a_batch():
    """Its exception, caught in the loop, is one of the others in their next message; they are in step again."""
    task = make("groupnorm")
    net = task.net
    for where in ("before", "loss", "closing"):
        planted = (
            net.closing.register_forward_hook(fail_backward) if where == "closing" and is_here(net.closing) else None
        )
        lonely = COMM.rank == COMM.size - 1
        raised = []
        for size in (4, 3):
            try:
                if where == "before" and lonely and not raised:
                    raise Planted("no data")
                loss = task.loss(net, slice(size))
                if where == "loss" and lonely and not raised:
                    raise Planted("in the loss")
                loss.backward()
            except (Planted, InputError) as error:
                raised.append(error)
                if planted is not None:
                    planted.remove()
                    planted = None
                if isinstance(error, InputError):
                    break
        # who left raises by itself, then with the others, which do so once
        assert [type(e) for e in raised] == ([Planted, InputError] if lonely else [InputError])
        named = "batches of" if where == "before" else "all ranks have to make the same calls in the same order"
        assert named in str(raised[-1])
        step_is_right(task)


@RANKS
@time_limit(60)
def test_what_layers_may_not_do():
    """A layer that changes the shape, writes to its input or returns whole numbers is refused by name on all ranks."""

    class Integers(nn.Module):
        def forward(self, u):
            return (u > 0).long()

    good = lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True))
    wrong = {
        "layer 2 .*maps a state of shape .*5, 4.* to one of shape .*5, 3": lambda: nn.Linear(4, 3),
        "layer 2 .*writes to its input": lambda: nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 4)),
        "layer 2 .* type torch.int64": Integers,
        "Tuple|tuple": lambda: nn.LSTM(4, 4),
    }
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
    for match, bad in wrong.items():
        for options in ({"batched": False, "mgrit": HIERARCHY}, {"mgrit": {"levels": 1}}):
            net = LayerParallel([good(), good(), bad(), good(), good()], h=0.2, **options)
            for grads in (True, False):
                with torch.set_grad_enabled(grads), pytest.raises(InputError, match=match):
                    net(x)
    for match, bad in list(wrong.items())[:2]:
        net = LayerParallel([bad() for _ in range(6)], h=0.2, batched=True, mgrit=HIERARCHY)
        for grads in (True, False):
            with torch.set_grad_enabled(grads), pytest.raises(InputError, match=match.replace("layer 2", "layers?")):
                net(x)
    net = LayerParallel([good() for _ in range(6)], h=0.2, mgrit=HIERARCHY)
    plain = net.serial_copy()
    for m in (net, plain):
        m(x).sum().backward()
    require_same_state(net, plain, 1e-5, gradients=True)


@RANKS
@time_limit(60)
@pytest.mark.parametrize("kind", ["groupnorm", "attention", "dense"])
def test_autocast(kind):
    """In bfloat16 values and gradients are those of the plain network to its accuracy, and none is missing."""
    task = make(kind, dtype=torch.float32)
    nets, net = (task.net, task.plain), task.net
    losses = []
    for m in nets:
        with torch.autocast("cpu", torch.bfloat16):
            loss = task.loss(m)
        loss.backward()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=2e-2)
    require_same_state(*nets, 4e-2, gradients=True)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        a, b = (m.eval()(task.x, *task.extra) for m in nets)
    assert a.dtype == b.dtype
    assert torch.allclose(a.float(), b.float(), atol=5e-2)
    with torch.autocast("cpu", torch.bfloat16, enabled=COMM.rank > 0):
        if COMM.size > 1:
            with pytest.raises(InputError, match="autocast: "):
                net(task.x, *task.extra)


class ClosingOfManyTypes(nn.Module):
    """Nested output: tensors with and without derivatives, numbers and names."""

    def __init__(self, width):
        super().__init__()
        self.linear = nn.Linear(width, 3)

    def forward(self, u):
        z = self.linear(u)
        return {
            "logits": z,
            "aux": (z.argmax(1), u.mean(0), {"scale": 2.5, "name": "head", "none": None}),
            "list": [z.exp()],
        }


@RANKS
@time_limit(60)
def test_outputs_of_many_types():
    torch.manual_seed(1)
    opening, closing, x = nn.Linear(2, 4), ClosingOfManyTypes(4), torch.randn(5, 2, dtype=torch.float64)
    nets = [
        LayerParallelResNet(opening, Dense(4, "tanh"), 6, closing, dtype=torch.float64, mgrit=HIERARCHY),
        LayerParallel(
            [nn.Linear(4, 4) for _ in range(6)], opening=opening, closing=closing, h=0.1, mgrit=HIERARCHY
        ).double(),
    ]
    for net in nets:
        state = net.full_state_dict()
        out = net(x)
        want = closing.double()(out["aux"][1].new_zeros(5, 4))
        assert list(out) == list(want)
        assert out["aux"][2] == want["aux"][2]
        assert out["aux"][0].dtype == torch.int64
        assert torch.equal(out["aux"][0], out["logits"].argmax(1))
        assert torch.allclose(out["list"][0], out["logits"].exp())
        (out["logits"].sum() + out["list"][0].sum() + out["aux"][1].sum()).backward()
        # d/db of sum z + sum exp z
        if net.grid.is_last:
            assert torch.allclose(net.closing.linear.bias.grad, 5 + out["list"][0].sum(0))
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())
        assert state.keys() == net.full_state_dict().keys()


@RANKS
@time_limit(60)
def test_other_devices():
    """A batch on another device than the network, and a network on one, are refused on all ranks."""
    task = make("dense")
    with pytest.raises((InputError, RuntimeError), match="meta"):
        task.net(task.x.to("meta"))
    step_is_right(task)
    moved = make("dense").net.to("meta")
    with pytest.raises(InputError, match="the opening layer gives values on meta"):
        moved(task.x.to("meta"))
    blocks = make("groupnorm")
    with pytest.raises(InputError, match="values on meta, and the layers are on cpu"):
        blocks.net(blocks.x.to("meta"))
    step_is_right(blocks)


@RANKS
@time_limit(60)
@pytest.mark.parametrize("kind", ["conv", "groupnorm"])
def test_values_that_are_not_finite(kind):
    """Raise on all ranks with what has overflowed, forward and backward, and the network goes on."""
    task = make(kind)
    bad = task.x.clone()
    bad[0, 0, 0, 0] = torch.nan
    with pytest.raises(SolverFailure, match="forward"):
        task.net(bad)
    loss = task.loss(task.net)
    with pytest.raises(SolverFailure, match="backward"):
        (loss * float("inf")).backward()
    step_is_right(task)

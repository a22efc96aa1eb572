"""What ordinary loops differentiate: inputs, frozen networks, several networks, several losses, on every rank alike."""

import gc
import weakref

import pytest

pytest.importorskip("torch", reason="pint_fem.resnet needs torch (pip install 'pint_fem[resnet]')")

import torch
from torch import nn

from pint_fem.errors import InputError
from tests.layer_parallel_networks import COMM, KINDS, make, own_part, require_same_state
from tests.limits import time_limit
from tests.test_resnet import one_thread  # noqa: F401

RANKS = pytest.mark.parallel([1, 2, 3])
SEVERAL = pytest.mark.parallel([2, 3])


def close(ours, theirs, tolerance=1e-10):
    """Whether tensors agree to a part of the largest value."""
    return (ours - theirs).abs().max() <= tolerance * max(1.0, theirs.abs().max())


def freeze(module):
    for p in module.parameters():
        p.requires_grad_(False)


@RANKS
@time_limit(60)
@pytest.mark.parametrize("kind", KINDS)
def test_derivatives_of_inputs(kind):
    """FGSM in training, then a saliency map in evaluation mode with all parameters frozen; extra inputs, too."""
    task = make(kind)
    nets, found = (task.net, task.plain), []
    for m in nets:
        x = task.x.clone().requires_grad_()
        extra = tuple(t.clamp(min=-5.0).requires_grad_() for t in task.extra)
        nn.functional.cross_entropy(m(x, *extra), task.y).backward()
        attacked = (x + 0.1 * x.grad.sign()).detach()
        values = [x.grad, *(t.grad for t in extra), attacked]
        freeze(m.eval())
        x = attacked.clone().requires_grad_()
        m(x, *extra).max(dim=1).values.sum().backward()
        values += [x.grad, *(t.grad for t in extra)]
        (again,) = torch.autograd.grad(m(x, *extra).square().sum(), x)
        found.append([*values, again])
    require_same_state(*nets, gradients=True)
    for ours, theirs in zip(*found, strict=True):
        assert close(ours, theirs)


@RANKS
@time_limit(60)
@pytest.mark.parametrize("kind", ["dense", "batchnorm", "stages"])
def test_frozen_parts(kind):
    """Linear probes from both ends, a single trained layer, nothing at all, and everything again."""
    task = make(kind)
    nets = net, plain = task.net, task.plain
    inner = "theta." if kind == "dense" else "layers.3." if kind == "batchnorm" else "transitions."
    for trained in ("closing.", "opening.", inner, "", "all"):
        for m in nets:
            m.zero_grad()
            for name, p in m.named_parameters():
                p.requires_grad_(trained == "all" or (bool(trained) and name.startswith(trained)))
        losses = [task.loss(m) for m in nets]
        assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-10)
        for loss in losses:
            assert loss.requires_grad == bool(trained)
            if trained:
                loss.backward()
            else:
                with pytest.raises(RuntimeError, match="does not require grad"):
                    loss.backward()
        require_same_state(net, plain, gradients=True)
    require_same_state(net, plain)


@RANKS
@time_limit(60)
def test_two_networks():
    """In a row with code of the user between them, and side by side; one of them frozen in between."""
    first, second, third = make("dense"), make("batchnorm"), make("dense", seed=4)
    third.plain.load_state_dict(third.net.full_state_dict())
    assert not torch.equal(first.plain.theta["weight"], third.plain.theta["weight"])
    tasks = (first, second, third)
    for frozen in (None, first, second):
        results = []
        for which in ("net", "plain"):
            a, b, c = (getattr(t, which) for t in tasks)
            for t in tasks:
                m = getattr(t, which)
                m.zero_grad()
                m.requires_grad_(t is not frozen)
            x = first.x.clone().requires_grad_()
            middle = torch.tanh(a(x))[:, :2]
            out = b(middle) + 0.5 * c(x) * torch.sigmoid(c(x.detach()))
            loss = nn.functional.cross_entropy(out, first.y) + middle.square().mean()
            loss.backward()
            results.append([loss.detach(), x.grad])
        for ours, theirs in zip(*results, strict=True):
            assert close(ours, theirs)
        for t in tasks:
            require_same_state(t.net, t.plain, gradients=True)


@RANKS
@time_limit(60)
@pytest.mark.parametrize("kind", ["conv", "attention", "stages"])
def test_losses_and_passes_of_other_kinds(kind):
    """``autograd.grad``, one graph twice, an output used twice, derivatives of a part of it, batches in between."""
    task = make(kind)
    nets = net, plain = task.net, task.plain
    own = list(net.named_parameters())
    found = torch.autograd.grad(task.loss(plain), list(plain.parameters()))
    theirs = dict(zip(dict(plain.named_parameters()), found, strict=True))
    for (name, _), g in zip(own, torch.autograd.grad(task.loss(net), [p for _, p in own]), strict=True):
        assert close(g, own_part(net, name, theirs[name]))
    require_same_state(*nets, gradients=True)  # none

    for m in nets:
        out = m(task.x, *task.extra)
        other = m(task.x[:2], *task.extra)  # a batch before the first one's backward pass
        with torch.no_grad():
            m(task.x[1:], *task.extra)
        loss = nn.functional.cross_entropy(out, task.y) + 0.1 * out.square().mean() + out[0, 0]
        loss.backward(retain_graph=True)
        loss.backward(retain_graph=True)
        (2.0 * loss).backward()
        other.backward(torch.ones_like(other))
    require_same_state(*nets, gradients=True)
    require_same_state(*nets)

    with pytest.raises(InputError, match="create_graph=True: a layer-parallel network has first derivatives only"):
        torch.autograd.grad(task.loss(net), [p for _, p in own], create_graph=True)
    for m in nets:
        m.zero_grad(set_to_none=False)
        task.loss(m).backward()
    require_same_state(*nets, gradients=True)


@RANKS
@time_limit(60)
def test_passes_without_gradients_in_training_mode():
    """They update the statistics of normalisation and the number of the masks, as in plain torch."""
    task = make("batchnorm", p=0.3)
    nets = (task.net, task.plain)
    for step in range(3):
        for m in nets:
            with torch.no_grad():
                m(task.x + step)
            with torch.inference_mode():
                m(task.x - step)
    require_same_state(*nets)
    for m in nets:
        task.loss(m).backward()
    require_same_state(*nets, gradients=True)
    for m in nets:  # statistics of some layers alone are fixed, on whatever rank they are
        m.zero_grad()
        m.layers[2].eval()
        m.layers[5].eval()
        task.loss(m).backward()
    require_same_state(*nets, gradients=True)
    require_same_state(*nets)


@SEVERAL
@time_limit(60)
@pytest.mark.parametrize("kind", ["dense", "groupnorm"])
def test_a_loss_that_ignores_the_output_on_one_rank(kind):
    """All ranks raise: at once with ``collective.backward``, in the next call of the network otherwise."""
    task = make(kind)
    net = task.net
    nothing = torch.ones(1, dtype=torch.float64, requires_grad=True)
    for lonely in range(COMM.size):
        out = net(task.x)
        loss = nothing.sum() if COMM.rank == lonely else out.sum()
        with pytest.raises(InputError, match="does not depend on the output of the network"):
            net.collective.backward(loss)
        out = net(task.x)
        if COMM.rank == lonely:
            nothing.sum().backward()
        call = (lambda: net(task.x)) if COMM.rank == lonely else out.sum().backward
        with pytest.raises(InputError, match="all ranks have to make the same calls"):
            call()
    net.zero_grad()
    for m in (net, task.plain):
        task.loss(m).backward()
    require_same_state(net, task.plain, gradients=True)


@RANKS
@time_limit(60)
def test_functional_call():
    """Other values in place of the parameters, of whatever rank they are."""
    task = make("groupnorm")
    found = []
    for m in (task.net, task.plain):
        values = {name: (0.9 * p).detach().requires_grad_() for name, p in m.named_parameters()}
        out = torch.func.functional_call(m, values, (task.x,))
        nn.functional.cross_entropy(out, task.y).backward()
        found.append({name: v.grad for name, v in values.items()})
    for name, g in found[0].items():
        assert close(g, found[1][name]), name


@RANKS
@time_limit(60)
@pytest.mark.parametrize("kind", ["conv", "attention"])
def test_nothing_keeps_a_batch(kind):
    """Its input and output are freed with the last reference, without the collector of cycles."""
    task = make(kind)
    net, owner = task.net, lambda o: (o.graphs.now if hasattr(o, "graphs") else o).network
    for _ in range(2):
        task.loss(net).backward()
    gc.collect()
    gc.disable()
    try:
        x = task.x.clone().requires_grad_()
        extra = tuple(t.clamp(min=-5.0).requires_grad_() for t in task.extra)
        out = net(x, *extra)
        out.sum().backward()
        kinds = ("BlockTrajectory", "Pass")
        mine = [o for o in gc.get_objects() if type(o).__name__ in kinds and owner(o) is net]
        alive = [weakref.ref(o) for o in mine]
        del mine
        assert alive
        del out
        assert not [r() for r in alive if r() is not None], "a batch is still referenced"
    finally:
        gc.enable()

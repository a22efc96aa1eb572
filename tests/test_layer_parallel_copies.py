"""What torch and its users do with a module as a whole: copies, averages, files, compilation, hooks, other types."""

import copy
import io
import pickle

import pytest

pytest.importorskip("torch", reason="pint_fem.resnet needs torch (pip install 'pint_fem[resnet]')")

import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

from pint_fem.errors import InputError
from pint_fem.resnet import Dense, Grid, LayerParallel, LayerParallelResNet
from tests.layer_parallel_networks import COMM, DEPTH, KINDS, PlainLayers, make, own_part, require_same_state, take_step
from tests.limits import time_limit
from tests.ranks import cases
from tests.test_resnet import one_thread  # noqa: F401

RANKS = pytest.mark.parallel([1, 2, 3])


def through_pickle(net):
    return pickle.loads(pickle.dumps(net))


def through_a_file(net):
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@RANKS
@time_limit(60)
@pytest.mark.parametrize("kind", ["dense", "attention", "stages"])
def test_copies_are_networks(kind):
    """After a batch with a name and an optimiser's step: a copy computes the same and is trained by itself."""
    task = make(kind, p=0.2 if kind == "attention" else 0.0)
    nets = net, plain = task.net, task.plain
    for m in nets:
        take_step(task, m, torch.optim.SGD(m.parameters(), lr=0.1))
    net(task.x, *task.extra, batch="named")
    plain(task.x, *task.extra)
    for copied in (copy.deepcopy, through_pickle, through_a_file):
        ours, theirs = copied(net), copy.deepcopy(plain)
        assert type(ours) is type(net)
        for m in (ours, theirs):
            take_step(task, m, torch.optim.SGD(m.parameters(), lr=0.5))
        require_same_state(ours, theirs, gradients=True)
        require_same_state(ours, theirs)
    for m in nets:
        m.zero_grad()
        task.loss(m).backward()
    require_same_state(*nets, gradients=True)
    require_same_state(*nets)


@RANKS
@time_limit(60)
@pytest.mark.parametrize("kind", ["conv", "batchnorm"])
def test_averaged_models(kind):
    """An exponential mean of the parameters, its statistics of normalisation, and its evaluation."""
    task, found = make(kind), []
    for m in (task.net, task.plain):
        ema = AveragedModel(m, multi_avg_fn=get_ema_multi_avg_fn(0.6))
        optimizer = torch.optim.SGD(m.parameters(), lr=0.3)
        for _ in range(3):
            take_step(task, m, optimizer)
            ema.update_parameters(m)
        update_bn([task.x, 0.5 * task.x], ema)
        with torch.no_grad():
            found += [ema.eval()(task.x), m.eval()(task.x)]
        averaged = ema.module
        if m is task.net:
            ours = averaged
    require_same_state(ours, averaged)
    assert torch.allclose(found[0], found[2], rtol=1e-9)
    assert torch.allclose(found[1], found[3], rtol=1e-9)
    assert not torch.allclose(found[0], found[1], rtol=1e-3)


@RANKS
@time_limit(60)
@pytest.mark.parametrize("kind", cases(KINDS, on_ranks=["dense", "attention", "stages"]))
def test_states_of_the_whole_network(kind):
    """The gathered state loads into the plain network; what that has become loads into the network."""
    task = make(kind)
    nets = net, plain = task.net, task.plain
    take_step(task, net, torch.optim.SGD(net.parameters(), lr=0.1))
    state = net.full_state_dict()
    plain.load_state_dict(state)
    require_same_state(*nets, 0.0)
    take_step(task, plain, torch.optim.SGD(plain.parameters(), lr=0.1))
    net.load_state_dict(plain.state_dict())
    require_same_state(*nets, 0.0)
    for m in nets:
        m.zero_grad()
        task.loss(m).backward()
    require_same_state(*nets, gradients=True)
    net.load_state_dict(net.state_dict())  # of this rank alone
    require_same_state(*nets, 1e-10)
    wrong = plain.state_dict()
    lost = next(name for name in reversed(wrong) if not name.startswith("theta"))
    del wrong[lost]
    with pytest.raises(RuntimeError, match=lost):
        net.load_state_dict(wrong)
    if kind not in ("dense", "conv"):
        deeper = {**plain.state_dict(), f"layers.{len(plain.layers)}.weight": torch.zeros(1)}
        with pytest.raises(RuntimeError, match=f"layers.{len(plain.layers)}.weight"):
            net.load_state_dict(deeper)


@pytest.mark.parallel([1, 2])
@time_limit(60)
def test_compiled_models_that_contain_a_network():
    """``torch.compile`` of what is around it; of the network itself it is the network."""
    task = make("groupnorm")
    found = []
    for net in (task.net, task.plain):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(2)
            model = nn.Sequential(nn.Conv2d(1, 1, 1), net, nn.Linear(3, 3)).double()
        if net is task.net:
            model = torch.compile(model, backend="aot_eager")
            assert torch.allclose(torch.compile(net, backend="eager")(task.x), net(task.x), rtol=1e-10)
        loss = task.loss(model)
        loss.backward()
        found.append([loss.detach(), *(p.grad for n, p in model.named_parameters() if "1." not in n)])
    for ours, theirs in zip(*found, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-9, atol=1e-11)
    require_same_state(task.net, task.plain, gradients=True)


def initialise(module):
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        nn.init.normal_(module.weight, std=0.3)
        nn.init.uniform_(module.bias)


@RANKS
@time_limit(60)
@pytest.mark.parametrize("kind", ["attention", "stages"])
def test_initialisation_by_apply(kind):
    """The same values for every number of ranks, those of the serial copy; torch's generator advances alike."""
    task = make(kind)
    before = task.net.full_state_dict()
    alone = task.net.serial_copy()
    after = []
    for m in (task.net, alone):
        torch.manual_seed(11)
        assert m.apply(initialise) is m
        after.append(torch.rand(1).item())
    assert after[0] == after[1]
    require_same_state(task.net, alone, 0.0)
    weights = [v for k, v in task.net.full_state_dict().items() if k.endswith("weight") and v.ndim > 1]
    assert not any(torch.equal(v, before[k]) for k, v in task.net.full_state_dict().items() if v.ndim > 1)
    assert not torch.equal(weights[-2], weights[-3])


@RANKS
@time_limit(60)
@pytest.mark.parametrize("kind", cases(["dense", "groupnorm", "stages"], on_ranks=["dense", "stages"]))
def test_other_types_of_values(kind):
    """A float32 network made float64, and back."""
    task = make(kind, dtype=torch.float32)
    task.net.to(torch.float64)
    task.plain.to(torch.float64)
    task.x = task.x.double()
    for m in (task.net, task.plain):
        loss = task.loss(m)
        assert loss.dtype == torch.float64
        loss.backward()
    require_same_state(task.net, task.plain, gradients=True)
    assert {p.dtype for p in task.net.parameters()} == {torch.float64}
    task.net.float()
    task.plain.float()
    task.x = task.x.float()
    for m in (task.net, task.plain):
        m.zero_grad()
        loss = task.loss(m)
        assert loss.dtype == torch.float32
        loss.backward()
    require_same_state(task.net, task.plain, 1e-4, gradients=True)


@RANKS
@time_limit(60)
@pytest.mark.parametrize("kind", cases(KINDS, on_ranks=["dense", "attention", "stages"]))
def test_names_and_hooks(kind):
    """Ranks have parts of the plain network's parameters, in its order; hooks of modules and parameters are called."""
    task = make(kind)
    nets = net, plain = task.net, task.plain
    names = [name for own in COMM.allgather([n for n, _ in net.named_parameters()]) for name in own]
    assert set(names) == set(dict(plain.named_parameters()))
    if kind not in ("dense", "conv"):
        assert len(names) == len(set(names))
        assert len(net.layers) == len(plain.layers)
    calls = []
    for m in nets:
        m.register_forward_hook(lambda module, x, out: out * 2.0)
        for name, p in m.named_parameters():
            p.register_hook(lambda g: g + 1.0)
            p.register_post_accumulate_grad_hook(lambda p, m=m, name=name: calls.append((m is net, name)))
        task.loss(m).backward()
    require_same_state(*nets, gradients=True)
    assert sorted(name for ours, name in calls if ours) == sorted(name for name, _ in net.named_parameters())
    seen = []
    for layer in getattr(net, "layers", ()):
        layer.register_forward_hook(lambda module, x, out: seen.append(id(module)))
    with torch.no_grad():
        net(task.x, *task.extra)
    own = [m for m in getattr(net, "layers", ()) if next(m.parameters(), None) is not None]
    assert set(seen) == {id(m) for m in own}


@RANKS
@time_limit(60)
@pytest.mark.parametrize("normalised", [weight_norm, spectral_norm])
def test_parametrised_layers(normalised):
    """Weights that are computed from others, with buffers that each evaluation in training changes."""
    torch.manual_seed(4)
    blocks = [nn.Sequential(normalised(nn.Linear(3, 3)), nn.Tanh()).double() for _ in range(DEPTH)]
    net = LayerParallel(blocks, h=0.3, mgrit={"levels": 2, "coarsening": 2})
    plain = PlainLayers(nn.Identity(), [blocks], [], nn.Identity(), True, 0.3)
    if COMM.size > 1:
        with pytest.raises(InputError, match="a layer cannot be sent to other ranks"):
            net.serial_copy()
    x = torch.randn(5, 3, dtype=torch.float64)
    for m in (net, plain):
        optimizer = torch.optim.SGD(m.parameters(), lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            m(x).square().sum().backward()
            optimizer.step()
    require_same_state(net, plain, gradients=True)
    require_same_state(net, plain)


@RANKS
@time_limit(60)
def test_shared_parameters_are_refused():
    """Layers are copied, so one module in several places would silently become several."""
    block = nn.Linear(3, 3)
    with pytest.raises(InputError, match="layer 0 and layer 1 share the parameter weight"):
        LayerParallel([block] * DEPTH, h=0.1)
    tied = nn.Linear(3, 3)
    tied.weight = block.weight
    with pytest.raises(InputError, match="opening and closing share the parameter weight"):
        LayerParallelResNet(block, Dense(3), DEPTH, tied, mgrit={"levels": 1})
    other = [nn.Linear(3, 3) for _ in range(DEPTH)]
    other[3].bias = block.bias
    with pytest.raises(InputError, match="opening and layer 3 share the parameter bias"):
        LayerParallel(other, opening=block)


def groups_network(kind, grid, p):
    torch.manual_seed(COMM.rank)  # groups would begin with parameters of their own
    options = dict(grid=grid, mgrit={"levels": 2, "coarsening": 2})
    if kind == "dense":
        return LayerParallelResNet(
            nn.Linear(2, 4), Dense(4, "tanh"), 6, nn.Linear(4, 3), dtype=torch.float64, seed=3, **options
        )
    blocks = [nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Dropout(p)).double() for _ in range(6)]
    for block in blocks:
        block[1].running_mean.normal_()
    opening = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4)).double()
    return LayerParallel(blocks, opening=opening, closing=nn.Linear(4, 3).double(), h=0.3, **options)


@time_limit(60)
@pytest.mark.parametrize("kind", ["dense", "batchnorm"])
@pytest.mark.parametrize(
    "shape", [pytest.param((2, 1), marks=pytest.mark.parallel(2)), pytest.param((2, 2), marks=pytest.mark.parallel(4))]
)
def test_data_groups(kind, shape):
    """They start and stay equal; gradients are means of those of the groups' batches, and so are statistics."""
    grid = Grid(shape)
    group = grid.data_comm.rank
    net = groups_network(kind, grid, 0.0)
    state = net.full_state_dict()
    plains = []
    alone = Grid(comm=COMM.Split(COMM.rank))
    for _ in range(2):
        m = groups_network(kind, alone, 0.0)
        m.load_state_dict(state)
        plains.append(m if kind == "dense" else m.serial_copy())
    x = torch.randn(8, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    y = torch.arange(8) % 3
    optimisers = [torch.optim.Adam(m.parameters(), lr=0.05) for m in (net, *plains)]
    for step in range(3):
        for m, opt, part in zip((net, *plains), optimisers, (group, 0, 1), strict=True):
            opt.zero_grad()
            nn.functional.cross_entropy(m(x[4 * part : 4 * part + 4] + step), y[4 * part : 4 * part + 4]).backward()
        with torch.no_grad():
            for a, b in zip(*(m.parameters() for m in plains), strict=True):
                a.grad.add_(b.grad).mul_(0.5)
                b.grad.copy_(a.grad)
            for a, b in zip(*(m.buffers() for m in plains), strict=True):
                if a.is_floating_point():
                    a.add_(b).mul_(0.5)
                    b.copy_(a)
        for opt in optimisers:
            opt.step()
    theirs = {**dict(plains[0].named_parameters()), **dict(plains[0].named_buffers())}
    for name, t in {**dict(net.named_parameters()), **dict(net.named_buffers())}.items():
        assert torch.allclose(t, own_part(net, name, theirs[name]), rtol=1e-8, atol=1e-9), name
        for other in grid.data_comm.allgather(t.detach()):
            assert torch.equal(t, other)
    with torch.no_grad():  # evaluation needs no other group
        net.eval()
        if group == 0:
            net(x)

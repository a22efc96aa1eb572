"""Forms of serial networks are one network: gradients beside autograd of a loop written out, times, refusals."""

import pytest

pytest.importorskip("torch")

import torch
from torch import nn

from pint_fem.errors import InputError
from pint_fem.resnet import Convolution, Dense, SerialResNet
from problems import serial_networks
from problems.layers import Training
from problems.serial_networks import (
    FORMS,
    Fastest,
    agreement,
    fastest,
    fastest_for_training,
    forms,
    gradients,
    residual_network,
)

N, WIDTH = 7, 4


def eager_backend(graph, inputs):
    """A backend of torch.compile that traces and runs, without a compiler of C++."""
    return graph.forward


def traced(function, **options):
    return torch.compile(function, backend=eager_backend, **options)


def batch(dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return torch.rand(6, 2, generator=generator, dtype=dtype), torch.arange(6) % 3


def blocks(dtype=torch.float64):
    torch.manual_seed(3)
    make = lambda: nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.GELU())
    return [make().to(dtype) for _ in range(N)]


def ends(dtype=torch.float64):
    torch.manual_seed(5)
    return nn.Linear(2, WIDTH).to(dtype), nn.Linear(WIDTH, 3).to(dtype)


def plain(opening, layers, closing, x, y, h, residual):
    """Gradients by autograd of the loop written out here."""
    u = opening(x)
    for layer in layers:
        u = u + h * layer(u) if residual else layer(u)
    parameters = [list(layer.parameters()) for layer in layers]
    flat = [p for ps in parameters for p in ps] + list(opening.parameters()) + list(closing.parameters())
    found = torch.autograd.grad(nn.functional.cross_entropy(closing(u), y), flat)
    k = len(parameters[0])
    return [torch.stack(found[i : k * N : k]) for i in range(k)] + list(found[k * N :])


@pytest.mark.parametrize("residual", [True, False])
def test_forms_of_blocks_have_the_gradients_of_the_loop(residual):
    (x, y), (opening, closing), layers = batch(), ends(), blocks()
    exact = plain(opening, layers, closing, x, y, 0.3, residual)
    network = residual_network(opening, layers, closing, h=0.3, residual=residual)
    made = forms(network, chunk=3, compiler=traced)
    assert tuple(made) == FORMS
    for form in made.values():
        Training(form, x, y).gradients()
        assert agreement(gradients(form), exact) < 1e-13
        with torch.no_grad():
            assert torch.allclose(form(x), network(x), rtol=1e-13, atol=0)
    made["stacked"].theta[0].data.add_(1.0)
    assert torch.equal(made["compiled"].theta[0], made["eager"].layers[0][0].weight.expand(N, WIDTH))


@pytest.mark.parametrize("layer", [Dense(WIDTH), Convolution(2)])
def test_forms_of_a_residual_network_have_its_gradients(layer):
    """The gradients of :class:`SerialResNet`, by autograd."""
    opening, closing = ends()
    x, y = batch()
    if isinstance(layer, Convolution):
        opening = nn.Sequential(nn.Linear(2, 18), nn.Unflatten(1, (2, 3, 3)))
        closing = nn.Sequential(nn.Flatten(), nn.Linear(18, 3))
    network = SerialResNet(opening, layer, N, closing, final_time=2.0, dtype=torch.float64)
    Training(network, x, y).gradients()
    ended = [p.grad for part in (network.opening, network.closing) for p in part.parameters()]
    exact = [network.theta[name].grad for name in layer.shapes] + ended
    for form in forms(network, chunk=4, compiler=traced).values():
        Training(form, x, y).gradients()
        assert agreement(gradients(form), exact) < 1e-13


def test_all_chunks_of_a_size_are_one_compilation():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiler = lambda function, **options: torch.compile(function, backend=backend, **options)
    x, y = batch()
    network = SerialResNet(*(lambda a, b: (a, Dense(WIDTH), 12, b))(*ends()), dtype=torch.float64)
    form = forms(network, ["compiled"], chunk=4, compiler=compiler)["compiled"]
    Training(form, x, y).step()
    assert len(graphs) == 1
    Training(form, x[:4], y[:4]).step()
    with torch.no_grad():
        form(x)
    assert len(graphs) == 1, "other shapes and evaluations are not compiled"


def test_fastest_is_the_least_time_and_counts_the_update():
    x, y = batch()
    network = SerialResNet(*(lambda a, b: (a, Dense(WIDTH), N, b))(*ends()), dtype=torch.float64)
    made = forms(network, ["eager", "stacked"])
    start = made["stacked"].theta[0].detach().clone()
    found = fastest(made, lambda net: Training(net, x, y), threads=(1, 2), repeats=2)
    assert set(found.seconds) == {(form, count) for form in made for count in (1, 2)}
    assert found.seconds[found.best] == min(found.seconds.values()) > 0
    assert found.differences["eager"] == 0
    assert found.differences["stacked"] < 1e-13
    assert not torch.equal(start, made["stacked"].theta[0])
    assert "stacked on 2" in str(found)
    assert Fastest(seconds={("eager", 1): 2.0, ("compiled", 2): 1.0}).best == ("compiled", 2)


def test_a_compiler_that_fails_leaves_the_other_forms():
    def broken(function, **options):
        def call(*args):
            raise RuntimeError("no C++ compiler")

        return call

    x, y = batch()
    made = forms(residual_network(ends()[0], blocks(), ends()[1]), compiler=broken)
    found = fastest(made, lambda net: Training(net, x, y), repeats=1)
    assert found.failed == {"compiled": "RuntimeError: no C++ compiler"}
    assert {form for form, _ in found.seconds} == {"eager", "stacked"}
    with pytest.raises(InputError, match="no form"):
        fastest({"compiled": made["compiled"]}, lambda net: Training(net, x, y))
    past = fastest(made, lambda net: Training(net, x, y), repeats=3, deadline=0.0)
    assert past.failed == {"stacked": "no time left", "compiled": "no time left"}
    assert past.seconds


def test_other_gradients_are_refused():
    x, y = batch()
    made = forms(residual_network(ends()[0], blocks(), ends()[1]), ["eager", "stacked"])
    made["stacked"].h = 1.0 + 1e-6
    before = torch.get_num_threads()
    with pytest.raises(ArithmeticError, match="gradients of form 'stacked' differ by"):
        fastest(made, lambda net: Training(net, x, y), threads=(before + 1,))
    assert torch.get_num_threads() == before


def test_what_has_no_forms_is_refused():
    with pytest.raises(InputError, match="give some of"):
        forms(residual_network(ends()[0], blocks(), ends()[1]), ["jit"])
    layers = [nn.BatchNorm1d(WIDTH) for _ in range(2)]
    with pytest.raises(InputError, match="GroupNorm"):
        forms(residual_network(ends()[0], layers, ends()[1]))
    assert serial_networks.CHUNK == 32


def test_the_form_of_a_training(monkeypatch):
    """First parameters, whatever was measured; compiled where it is worth it; other networks stay what they are."""
    x, y = batch()
    opening, closing = ends()
    network = SerialResNet(opening, Dense(WIDTH), N, closing, dtype=torch.float64)
    found, count, told = fastest_for_training(network, (x, y), threads=[1], batches=1)
    assert count == 1
    assert "compiled layers are tried from 120 s" in told
    assert torch.equal(found(x), network(x))
    monkeypatch.setattr(serial_networks.torch, "compile", lambda function, **options: function)
    told = fastest_for_training(network, (x, y), threads=[1], batches=10**9)[2]
    assert "compiled on 1" in told

    def no_compiler(function, **options):
        raise RuntimeError("none")

    monkeypatch.setattr(serial_networks.torch, "compile", lambda function, **options: no_compiler)
    told = fastest_for_training(network, (x, y), threads=[1], batches=10**9)[2]
    assert "no form of the serial network can be evaluated" in told
    other = nn.Sequential(opening, nn.BatchNorm1d(WIDTH), closing).double()
    before = other[1].running_mean.clone()
    found, _, told = fastest_for_training(other, (x, y), threads=[1], batches=10**9)
    assert found is other
    assert torch.equal(before, other[1].running_mean)
    assert "the loop itself on 1" in told

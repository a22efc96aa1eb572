"""Networks of users' blocks against the same blocks in a plain loop of torch, differentiated by autograd."""

import copy
import math

import numpy as np
import pytest
import torch
from mpi4py import MPI
from torch import nn

from pint_fem.errors import InputError
from pint_fem.resnet import Grid, LayerParallel, Repeat
from tests.block_networks import COMM, ConvolutionBlock, image_batch, largest_difference, network
from tests.limits import time_limit

KINDS = ["group", "batch", "stages", "attention", "coupling"]


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


# -- exact sweeps are the plain network --------------------------------------------------------------------------------
@pytest.mark.parallel([1, 2, 3])
@time_limit(120)
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_gradients_and_buffers_are_those_of_the_serial_copy(kind):
    """In the first pass and in the second, which continues the serial copy's statistics and masks."""
    options = [
        {"mgrit": {"levels": 2, "coarsening": 3}},
        {"mgrit": {"levels": 3, "coarsening": 2, "relax": "FCF"}, "checkpoint": True},
        {"mgrit": {"levels": 1}},
    ]
    for given in options:
        net, x, y, extra = network(kind, **given)
        serial = net.serial_copy()
        for _ in range(2):
            assert largest_difference(net, serial, x, y, extra) < 1e-10
        net.eval()
        serial.eval()
        with torch.no_grad():
            assert torch.allclose(net(x, *extra), serial(x, *extra), rtol=0, atol=1e-12)


@pytest.mark.parallel([1, 2])
@time_limit(60)
def test_the_serial_copy_is_a_plain_loop():
    """The copy itself, against a loop written here with the blocks' parameters and no random numbers."""
    net, x, _y, _ = network("group")
    serial = net.serial_copy()
    u = serial.opening(x)
    for block in serial.layers:
        u = u + 0.2 * block(u)
    assert torch.allclose(serial(x), serial.closing(u), rtol=0, atol=1e-13)
    assert len(serial.layers) == 9


@pytest.mark.parallel([1, 3])
@time_limit(60)
@pytest.mark.parametrize("kind", ["group", "batch", "coupling"])
def test_batched_calls_give_the_same(kind):
    net, x, y, extra = network(kind, batched=True)
    serial = net.serial_copy()
    for _ in range(2):
        assert largest_difference(net, serial, x, y, extra) < 1e-10


@time_limit(60)
def test_what_is_batched_is_measured_and_said():
    net, x, y, extra = network("group")
    assert net.batching == ["not measured yet: layer by layer"]
    nn.functional.cross_entropy(net(x, *extra), y).backward()
    assert "measured ratio" in net.batching[0]
    net, x, y, extra = network("attention")
    nn.functional.cross_entropy(net(x, *extra), y).backward()
    assert "random" in net.batching[0]  # one mask for each layer: not in one call


class Scaled(nn.Module):
    """A layer with a number that its description does not show."""

    def __init__(self, scale):
        super().__init__()
        self.linear, self.scale = nn.Linear(4, 4), scale

    def forward(self, u):
        return self.scale * torch.tanh(self.linear(u))


@time_limit(60)
def test_layers_that_differ_in_what_no_description_shows_are_not_batched():
    """Each layer scales by a number of its own, which a batched call would take from the first."""

    x, y = torch.randn(5, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 0])
    net = LayerParallel([Scaled(0.1 * n) for n in range(12)], mgrit={"levels": 2, "coarsening": 3}).double()
    serial = net.serial_copy()
    for _ in range(3):
        assert largest_difference(net, serial, x, y) < 1e-10
    assert "different" in net.batching[0]


# -- a number of cycles ------------------------------------------------------------------------------------------------
@pytest.mark.parallel([1, 2, 3])
@time_limit(60)
@pytest.mark.parametrize("kind", ["group", "attention"])
def test_errors_of_fixed_cycles_are_within_what_residuals_say(kind):
    """The error falls with the cycles and is of the size of the residual that is printed; the last number is exact."""
    errors, residuals = [], []
    for cycles in (1, 2, 3):
        net, x, y, extra = network(
            kind, 12, forward_iterations=cycles, backward_iterations=cycles, mgrit={"levels": 2, "coarsening": 4}
        )
        serial = net.serial_copy()
        errors.append(largest_difference(net, serial, x, y, extra))
        result = net.results[0]["forward"]
        assert result.cycles == cycles
        residuals.append(result.residuals[-1])
    assert errors[0] > 1e-8
    assert errors[2] < 1e-12
    for error, residual in zip(errors[:2], residuals[:2], strict=True):
        assert error < 20 * residual
    assert errors[1] < 0.5 * errors[0]


@pytest.mark.parallel([2, 3])
@time_limit(60)
@pytest.mark.parametrize("kind", KINDS)
def test_results_are_bitwise_the_same_for_every_number_of_ranks(kind):
    """Against the network on each rank alone, with a number of cycles that is not exact, in float32."""
    results = []
    for grid in (Grid(), Grid(comm=MPI.COMM_SELF)):
        net, x, y, extra = network(
            kind, 12, grid=grid, batched=False, forward_iterations=2, backward_iterations=1,
            mgrit={"levels": 3, "coarsening": 2, "relax": "F"},
        )  # fmt: skip
        net = net.float()
        out = net(x.float(), *extra)
        nn.functional.cross_entropy(out, y).backward()
        results.append((out, {name: p.grad for name, p in net.named_parameters()}))
    (out, gradients), (alone, expected) = results
    assert torch.equal(out, alone)
    for name, g in gradients.items():
        assert torch.equal(g, expected[name]), name


@pytest.mark.parallel([1, 2])
@time_limit(60)
def test_warm_starts_begin_from_the_last_states():
    cold, warm = [], []
    net, x, y, extra = network(
        "group", 12, forward_iterations=1, backward_iterations=1, mgrit={"levels": 2, "coarsening": 4}
    )
    for name, into in ((None, cold), ("a", warm), ("a", warm), ("a", warm)):
        nn.functional.cross_entropy(net(x, *extra, batch=name), y).backward()
        into.append(net.results[0]["forward"].residuals[-1])
    assert warm[0] == pytest.approx(cold[0], rel=1e-12)
    assert warm[1] < 0.5 * warm[0]
    assert warm[2] < 1e-12


# -- gradients, independently ------------------------------------------------------------------------------------------
@pytest.mark.parallel([1, 2])
@time_limit(60)
def test_gradients_are_finite_differences():
    net, x, y, extra = network("coupling", 6)
    loss = nn.functional.cross_entropy(net(x, *extra), y)
    loss.backward()
    g = torch.Generator().manual_seed(7 + COMM.rank)
    directions = [torch.randn(p.shape, generator=g, dtype=p.dtype) for p in net.parameters()]
    slope = COMM.allreduce(sum((p.grad * d).sum().item() for p, d in zip(net.parameters(), directions, strict=True)))
    remainders = []
    for eps in (1e-3, 5e-4):
        values = []
        for sign in (1, -2, 1):
            with torch.no_grad():
                for p, d in zip(net.parameters(), directions, strict=True):
                    p.add_(d, alpha=sign * eps)
            if sign != 1 or not values:
                values.append(nn.functional.cross_entropy(net(x, *extra), y).item())
        remainders.append(abs((values[0] - values[1]) / (2 * eps) - slope))
    assert math.log2(remainders[0] / remainders[1]) == pytest.approx(2, abs=0.2)


class Conditioned(nn.Module):
    """A layer with extra inputs."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, u, c, scale):
        return torch.tanh(self.linear(u) + c["shift"]) * scale


@pytest.mark.parallel([1, 3])
@time_limit(60)
def test_a_conditioning_input_is_differentiated():
    """Every layer uses it; its derivative is the sum over layers, on every rank."""

    torch.manual_seed(0)
    net = LayerParallel([Conditioned() for _ in range(7)], h=0.3, mgrit={"levels": 2, "coarsening": 2}).double()
    serial = net.serial_copy()
    x = torch.randn(5, 4, dtype=torch.float64)
    shift = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    scale = torch.ones(4, dtype=torch.float64)
    for make in (serial, net):
        make(x, {"shift": shift * 2}, scale).square().sum().backward()
    grads = shift.grad.clone()
    shift.grad = None
    serial(x, {"shift": shift * 2}, scale).square().sum().backward()
    assert torch.allclose(grads, 2 * shift.grad, rtol=1e-10)


# -- numbers of other types, and devices -------------------------------------------------------------------------------
@pytest.mark.parallel([1, 2])
@time_limit(60)
@pytest.mark.parametrize("how", ["autocast", "bfloat16", "float32"])
def test_shorter_types_are_as_accurate_as_in_the_serial_copy(how):
    """The error of the layer-parallel network against float64 is at most some times that of plain torch."""
    net, x, y, _extra = network("group")
    reference = net.serial_copy()
    dtype = torch.bfloat16 if how == "bfloat16" else torch.float32
    net, serial = net.to(dtype), copy.deepcopy(reference).to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        out, plain = net(x.to(dtype)), serial(x.to(dtype))
    losses = [nn.functional.cross_entropy(o.double(), y) for o in (out, plain, reference(x))]
    for loss in losses:
        loss.backward()
    exact, theirs = dict(reference.named_parameters()), dict(serial.named_parameters())
    scale = max(p.grad.abs().max().item() for p in exact.values())
    ours = max((p.grad.double() - exact[name].grad).abs().max().item() for name, p in net.named_parameters())
    plain_error = max((p.grad.double() - exact[name].grad).abs().max().item() for name, p in theirs.items())
    assert ours < 4 * plain_error + {"autocast": 0.02, "bfloat16": 0.02, "float32": 1e-5}[how] * scale
    assert out.dtype == plain.dtype
    assert net.layers[-1].first.weight.dtype == dtype if COMM.rank == COMM.size - 1 else True


@time_limit(60)
@pytest.mark.parametrize("batched", [False, True])
def test_no_value_is_read_from_a_device(batched):
    """On torch's meta device, where reading raises: a whole training step with a fixed number of cycles."""
    mgrit = {"levels": 2, "coarsening": 4, "residual": "none"}
    net, x, y, _ = network(
        "group", 12, forward_iterations=2, backward_iterations=1, mgrit=mgrit, batched=batched, nonfinite="gradient"
    )
    net = net.to("meta")
    out = net(x.to("meta"))
    nn.functional.cross_entropy(out, y.to("meta")).backward()
    assert out.shape == (6, 3)
    assert all(p.grad is not None and p.grad.is_meta for p in net.parameters())


# -- structures --------------------------------------------------------------------------------------------------------
@pytest.mark.parallel([1, 2, 3])
@time_limit(60)
def test_layers_of_different_structures():
    """Two kinds in turn, and each its own width inside; coarse levels take whichever is at their points."""
    torch.manual_seed(2)
    width = lambda n: nn.Sequential(nn.Linear(4, 3 + n % 3), nn.Tanh(), nn.Linear(3 + n % 3, 4))
    blocks = [width(n) if n % 2 else nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4)) for n in range(11)]
    net = LayerParallel(blocks, h=0.1, mgrit={"levels": 3, "coarsening": [2, 2]}).double()
    x, y = torch.randn(5, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 0])
    assert largest_difference(net, net.serial_copy(), x, y) < 1e-10


@pytest.mark.parallel([1, 2, 3])
@time_limit(60)
def test_layers_that_are_made_where_they_are_needed():
    """Each rank makes its own and the few copies that its coarse levels need; parameters do not depend on the ranks."""
    made = []

    def make(n):
        made.append(n)
        return nn.Linear(3, 3)

    net = LayerParallel(Repeat(make, 24, seed=5), h=0.1, mgrit={"levels": 2, "coarsening": 4}).double()
    assert len(set(made)) <= -(-24 // COMM.size) + 2
    sums = [p.detach().sum().item() for m in net.serial_copy().layers for p in m.parameters()]
    assert len(set(sums)) == 48
    torch.manual_seed(99)
    again = LayerParallel(Repeat(make, 24, seed=5), h=0.1, mgrit={"levels": 1}).double()
    assert [p.detach().sum().item() for m in again.serial_copy().layers for p in m.parameters()] == sums


@pytest.mark.parallel([1, 2])
@time_limit(60)
def test_activation_memory_counts_what_is_kept():
    net, x, _, _ = network("group")
    kept = {}
    for checkpoint in (False, True):
        net, x, _y, _ = network("group", checkpoint=checkpoint)
        net(x)
        kept[checkpoint] = net.activation_memory()
    own = sum(len(list(m.parameters())) > 0 for m in net.layers)
    assert kept[True]["states"] == kept[False]["states"] == (own + 1) * 6 * 4 * 36 * 8
    assert kept[False]["graphs"] == own * kept[True]["graphs"]
    # the input, the first convolution's result and that of relu, at least
    assert kept[True]["graphs"] >= 3 * 6 * 4 * 36 * 8


# -- what is refused ---------------------------------------------------------------------------------------------------
@pytest.mark.parallel([1, 2])
@time_limit(60)
def test_refused_networks():
    lin = lambda: nn.Linear(3, 3)
    for blocks, options, message in (
        ([], {}, "no layers"),
        ([lin(), torch.relu], {}, "layer 1 is a builtin"),
        (lin(), {}, "give a list of modules"),
        ([[lin()], lin()], {}, "not both"),
        ([[lin(), lin()], [lin(), lin()]], {}, "0 transitions for 2 stages"),
        ([lin(), lin()], {"h": -1.0}, "h = -1.0"),
        ([lin(), lin()], {"h": 0.5, "residual": False}, "leave h out"),
        ([lin(), lin()], {"batched": "yes"}, "batched 'yes'"),
        ([lin(), lin()], {"nonfinite": "ignore"}, "nonfinite 'ignore'"),
        ([lin(), lin()], {"evaluation": "fast"}, "evaluation 'fast'"),
        ([lin(), lin()], {"mgrit": [{}, {}]}, "2 sets of mgrit options for 1 stage"),
        ([lin(), lin()], {"mgrit": {"storage": "C", "coarsening": 2}}, "storage"),
        (Repeat(lambda n: torch.relu, 4), {}, "instead of a torch module"),
    ):
        with pytest.raises(InputError, match=message):
            LayerParallel(blocks, **options)
    for count in (0, 2.5, True):
        with pytest.raises(InputError, match="Repeat count"):
            Repeat(lin, count)


@pytest.mark.parallel([1, 3])
@time_limit(60)
@pytest.mark.parametrize("residual", [True, False])
def test_layers_that_change_the_shape_or_write_to_their_input(residual):
    x = torch.randn(5, 4)

    class Fault(nn.Module):
        def __init__(self, n, kind):
            super().__init__()
            self.linear, self.kind = nn.Linear(4, 4), kind if n == 5 else None

        def forward(self, u):
            if self.kind == "shape":
                return self.linear(u)[:, :3]
            if self.kind == "list":
                return [self.linear(u)]
            if self.kind == "in place":
                return self.linear(u.relu_())
            if self.kind == "integers":
                return self.linear(u).argmax(1)
            return self.linear(u)

    for kind, message in (
        ("shape", "layers? .*5 .*maps a state of shape"),
        ("list", "layers? .*5 "),
        ("in place", "writes to its input|in-place|inplace"),
        ("integers", "torch.int64"),
    ):
        net = LayerParallel(
            [Fault(n, kind) for n in range(8)], residual=residual, mgrit={"levels": 2, "coarsening": 2}
        )
        for grads in (True, False):
            with torch.set_grad_enabled(grads), pytest.raises((InputError, RuntimeError), match=message):
                net(x)


@pytest.mark.parallel([1, 2])
@time_limit(60)
def test_states_that_are_no_states():
    for opening, message in (
        (nn.Embedding(5, 4), None),
        (nn.Identity(), "floating-point"),
        (_Dict(), "dict"),
    ):
        net = LayerParallel([nn.Linear(4, 4), nn.Linear(4, 4)], opening=opening)
        if message is None:
            assert net(torch.tensor([0, 1, 2])).shape == (3, 4)
            continue
        with pytest.raises(InputError, match=message):
            net(torch.ones(3, 4, dtype=torch.int64))


class _Dict(nn.Module):
    def forward(self, x):
        return {"u": x.float()}


@pytest.mark.parallel([1, 2])
@time_limit(60)
def test_random_numbers_leave_the_users_generators_alone():
    net, x, y, extra = network("attention")
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    nn.functional.cross_entropy(net(x, *extra), y).backward()
    assert torch.equal(torch.rand(3), expected)
    # masks change from pass to pass, and not within one
    net.eval()
    a, b = net(x, *extra), net(x, *extra)
    assert torch.equal(a, b)
    net.train()
    assert not torch.equal(net(x, *extra), net(x, *extra))


@time_limit(60)
def test_dropout_in_evaluation_mode_draws_anew():
    """Monte Carlo dropout: dropout modules alone are in training mode."""
    net, x, _y, extra = network("attention")
    net.eval()
    for m in net.modules():
        if isinstance(m, nn.Dropout):
            m.train()
    with torch.no_grad():
        samples = torch.stack([net(x, *extra) for _ in range(4)])
    assert np.unique(samples[:, 0, 0].numpy()).size == 4
    # the masks of the training that goes on are those without evaluations
    net.train()
    assert net.passes == 0


@pytest.mark.parallel([1, 2])
@time_limit(60)
def test_statistics_are_updated_without_gradients_too():
    """A pass in training mode under no_grad updates the statistics of normalisation once, as in plain torch."""
    net, x, _, _ = network("batch")
    serial = net.serial_copy()
    with torch.no_grad():
        net(x)
        serial(x)
    theirs = dict(serial.named_buffers())
    for name, b in net.named_buffers():
        assert torch.allclose(b.double(), theirs[name].double(), rtol=0, atol=1e-12), name


def test_a_network_of_one_layer_and_image_batches():
    net = LayerParallel([ConvolutionBlock(1, "batch")]).double()
    x, _ = image_batch()
    loss = lambda out, _: out.square().sum()
    assert largest_difference(net, net.serial_copy(), x, None, loss=loss) < 1e-10


def _resident():
    """Memory of this process in bytes."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


@time_limit(60)
@pytest.mark.parametrize("options", [{}, {"checkpoint": True}, {"batched": True}])
def test_memory_does_not_grow_with_the_number_of_passes(options):
    """States of all layers are 7 MB, and ten passes that each leave them in memory 70."""
    net = LayerParallel(
        [nn.Sequential(nn.Linear(64, 64), nn.Tanh()) for _ in range(8)], h=0.1, forward_iterations=1,
        backward_iterations=1, mgrit={"levels": 2, "coarsening": 4}, **options,
    )  # fmt: skip
    x, before = torch.randn(3000, 64), 0
    for step in range(12):
        net(x).square().mean().backward()
        net.zero_grad()
        if step == 1:
            before = _resident()
    assert _resident() - before < 35e6

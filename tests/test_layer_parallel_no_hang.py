"""Loops with faults on single ranks end: every rank is told by name, or the run is, and what follows is right."""

import random
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="pint_fem.resnet needs torch (pip install 'pint_fem[resnet]')")

import torch
from torch import nn

from pint_fem.errors import InputError
from tests.layer_parallel_networks import COMM, make, require_same_state
from tests.limits import time_limit
from tests.ranks import cases, program_environment
from tests.test_resnet import one_thread  # noqa: F401

RANKS = pytest.mark.parallel([1, 2, 3])
FAULTS = ("data", "loss", "ignored", "mode", "batch", "opening", "closing", "layer", "backward", "count")


class Planted(Exception):
    """What the tests raise."""


class Loop:
    """A training loop whose steps are drawn, the same on all ranks but for what fails on one."""

    def __init__(self, kind, seed):
        self.draw = random.Random(seed)
        cycles = self.draw.choice([None, None, 9])
        mgrit = {"levels": self.draw.choice([1, 2, 3]), "coarsening": 2, "relax": self.draw.choice(["F", "FCF"])}
        options = dict(forward_iterations=cycles, backward_iterations=cycles, mgrit=mgrit)
        if kind not in ("dense", "conv"):
            options |= dict(batched=self.draw.choice([True, False, "auto"]), checkpoint=self.draw.random() < 0.3)
        self.task = make(kind, **options)
        self.nets = (self.task.net, self.task.plain)
        self.optimisers = [torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.5) for m in self.nets]
        self.faults = 0

    def batch(self):
        """An odd number of samples, of values that were not there before."""
        size, scale = self.draw.randint(2, len(self.task.x)), self.draw.uniform(0.5, 1.5)
        return scale * self.task.x[:size], self.task.y[:size]

    def train(self):
        x, y = self.batch()
        named, clip, losses = self.draw.choice([None, None, len(x)]), self.draw.random() < 0.3, []
        for m, opt in zip(self.nets, self.optimisers, strict=True):
            opt.zero_grad(set_to_none=clip)
            extra = (*self.task.extra,)
            out = m(x, *extra, batch=named) if m is self.task.net else m(x, *extra)
            loss = nn.functional.cross_entropy(out, y)
            if loss.requires_grad:
                loss.backward()
                if clip:
                    m.clip_grad_norm_(0.5) if m is self.task.net else nn.utils.clip_grad_norm_(m.parameters(), 0.5)
                opt.step()
            losses.append(loss.item())
        assert losses[0] == pytest.approx(losses[1], rel=1e-6)

    def evaluate(self):
        x, _ = self.batch()
        with torch.no_grad():
            ours, theirs = (m.eval()(x, *self.task.extra) for m in self.nets)
        for m in self.nets:
            m.train()
        assert torch.allclose(ours, theirs, rtol=1e-6, atol=1e-7)

    def attack(self):
        x, _ = self.batch()
        grads = []
        for m in self.nets:
            z = x.clone().requires_grad_()
            grads.append(torch.autograd.grad(m(z, *self.task.extra).square().sum(), z)[0])
        assert torch.allclose(*grads, rtol=1e-5, atol=1e-7)

    def freeze(self):
        names = [name.split(".") for name, _ in self.task.plain.named_parameters()]
        part = ".".join(self.draw.choice(names)[:2])
        trained = self.draw.random() < 0.5
        for m in self.nets:
            for name, p in m.named_parameters():
                if name.startswith(part):
                    p.requires_grad_(trained)

    def fault(self):
        """Something fails on one rank, is caught in the loop, and all ranks go on with the next batch."""
        kind, lonely = self.draw.choice(FAULTS), self.draw.randrange(COMM.size)
        here, net = COMM.rank == lonely, self.task.net
        x, y = self.batch()
        place = {"backward": "closing", "layer": "layers.2" if hasattr(net, "layers") else "opening"}.get(kind, kind)
        planted = None
        if kind in ("opening", "closing", "layer", "backward"):
            module = net.get_submodule(place)

            def fail(module, inputs, output=None):
                if kind == "backward":
                    output.register_hook(raises)
                    return
                raise Planted(kind)

            hook = module.register_forward_hook if kind == "backward" else module.register_forward_pre_hook
            here = next(module.parameters(), None) is not None
            planted = hook(fail)
        error = None
        try:
            if here and kind == "data":
                raise Planted(kind)
            net.train(not (here and kind == "mode"))
            if here and kind == "count":
                net.parameter_count()
            out = net(x + 1.0 if here and kind == "batch" else x, *self.task.extra)
            loss = nn.functional.cross_entropy(out, y)
            if here and kind == "loss":
                raise Planted(kind)
            if here and kind == "ignored":
                loss = torch.zeros((), requires_grad=True)
            if loss.requires_grad or kind == "backward":
                loss.backward()
            net.full_state_dict()  # whoever is ahead or behind meets the others in another call
        except (Planted, InputError, RuntimeError) as failure:
            error = failure
            if isinstance(failure, Planted) and kind in ("data", "loss", "backward"):
                with suppress(InputError):
                    net.full_state_dict()
        finally:
            net.train()
            if planted is not None:
                planted.remove()
        raised = COMM.allgather(None if error is None else f"{type(error).__name__}: {error}")
        if COMM.size > 1 or kind in ("data", "loss", "opening", "closing"):
            frozen = not any(COMM.allgather(any(p.requires_grad for p in net.parameters())))
            expected = kind not in ("backward", "ignored") or not frozen
            if kind == "backward" and not COMM.allreduce(any(p.requires_grad for p in net.parameters())):
                expected = False
            self.faults += expected
            if expected and kind != "loss":
                assert all(raised), (kind, raised)
        self.task.plain.load_state_dict(net.full_state_dict())  # statistics of a batch that failed on the way

    def run(self, steps):
        self.train()
        for _ in range(steps):
            getattr(self, self.draw.choice(["train", "train", "evaluate", "attack", "freeze", "fault", "fault"]))()
        for m in self.nets:
            m.requires_grad_(True)
        self.train()
        require_same_state(*self.nets, 1e-6)


def raises(_):
    raise Planted("backward")


@RANKS
@time_limit(60)
@pytest.mark.parametrize(
    ("kind", "seed"),
    cases([(k, s) for k in ("dense", "groupnorm", "batchnorm", "attention", "stages", "tuple") for s in range(2)],
          on_ranks=[("dense", 1), ("dense", 2), ("batchnorm", 3), ("attention", 4), ("stages", 5)]),
)  # fmt: skip
def test_drawn_loops(kind, seed):
    """Training, evaluation, attacks, freezing, odd batches and faults, as a loop of drawn steps."""
    loop = Loop(kind, seed)
    loop.run(14)


PROGRAM = """
import sys
import torch
from mpi4py import MPI
from pint_fem.resnet import Dense, LayerParallelResNet
def hook(kind, error, trace):
    print("HOOK OF THE USER", file=sys.stderr)
    sys.__excepthook__(kind, error, trace)
sys.excepthook = hook
rank = MPI.COMM_WORLD.rank
net = LayerParallelResNet(torch.nn.Linear(2, 4), Dense(4), 8, torch.nn.Linear(4, 2), mgrit={"levels": 1})
again = LayerParallelResNet(torch.nn.Linear(2, 4), Dense(4), 8, torch.nn.Linear(4, 2), mgrit={"levels": 1})
def loss_of_the_user(out):
    if rank == 1 and sys.argv[1] == "loss":
        raise ValueError("in the loss of one rank")
    return out.sum()
for step in range(3):
    loss_of_the_user(net(torch.ones(4, 2))).backward()
    if sys.argv[1] == "exit" and rank == 1 and step == 1:
        sys.exit(3)
print("done", flush=True)
"""


def start(*arguments):
    """The program on two ranks."""
    env = program_environment()
    command = ["mpiexec", "-n", "2", sys.executable, "-c", PROGRAM, *arguments]
    root = Path(__file__).resolve().parent.parent
    return subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, timeout=100, check=False)


@pytest.mark.starts_mpi
def test_an_exception_that_one_rank_does_not_catch_ends_the_run():
    """Its traceback is printed, by the user's own hook, once; the other rank, which waits in the network, ends."""
    done = start("loss")
    assert done.returncode != 0
    assert "done" not in done.stdout
    assert done.stderr.count("in the loss of one rank") == 1 + done.stderr.count('raise ValueError("in the loss')
    assert "in loss_of_the_user" in done.stderr
    assert done.stderr.count("HOOK OF THE USER") == 1
    assert "rank 1 leaves with an exception of its own, which ends the run of all ranks" in done.stderr


@pytest.mark.starts_mpi
def test_a_rank_whose_program_ends():
    """By ``sys.exit`` between two batches: the other one raises by name, and both end by themselves."""
    done = start("exit")
    assert done.returncode != 0
    assert "done" not in done.stdout
    assert (
        "layer rank 0 is in the forward pass of the network and layer rank 1 in its end of the program" in done.stderr
    )
    assert "which ends the run of all ranks" not in done.stderr
    assert "MPI_ABORT" not in done.stderr

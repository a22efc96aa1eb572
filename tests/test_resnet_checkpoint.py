"""Checkpoints of networks that are damaged, of another network, in use, or cannot be written."""

import json
import os
import shutil
import zlib
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="pint_fem.resnet needs torch (pip install 'pint_fem[resnet]')")

import torch
from mpi4py import MPI
from torch import nn

from pint_fem.errors import InputError
from pint_fem.resnet import (
    Adaptive,
    Dense,
    Grid,
    LayerParallelResNet,
    load_checkpoint,
    reserve_checkpoint,
    save_checkpoint,
)
from pint_fem.resnet.training import checkpoint
from tests.broken_files import COMM, another_process, largest_file, shared
from tests.limits import time_limit
from tests.test_resnet import one_thread  # noqa: F401

LABELS = torch.tensor([0, 1, 2, 0, 1, 2])


def network(activation="tanh", *, width=4, nlayers=5, first=nn.Tanh, dtype=torch.float64, T=1.0, **options):
    """A small network with parameters that depend on the layer."""
    torch.manual_seed(1)
    opening, closing = nn.Sequential(nn.Linear(2, width), first()), nn.Linear(width, 3)
    options |= dict(final_time=T, dtype=dtype, mgrit={"coarsening": 2})
    return LayerParallelResNet(opening, Dense(width, activation), nlayers, closing, **options)


def trained(net, kind=torch.optim.Adam):
    """Its optimiser after a step."""
    optimizer = kind(net.parameters(), lr=0.01)
    x = torch.linspace(-1, 1, 12, dtype=net.dtype).reshape(6, 2)
    nn.functional.cross_entropy(net(x), LABELS).backward()
    optimizer.step()
    return optimizer


def on_root(work):
    """Let the first rank change the files, the others wait."""
    COMM.barrier()
    if COMM.rank == 0:
        work()
    COMM.barrier()


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parallel([1, 3])
@pytest.mark.parametrize("rank", ["first", "last"])
@time_limit(60)
def test_a_save_that_fails_on_one_rank(tmp_path, rank):
    """As on a full disk: one line on all ranks, no signal, and the last one stays and is read."""
    path, rank = shared(tmp_path) / "run", 0 if rank == "first" else COMM.size - 1
    net = network(width=32)
    optimizer = trained(net)
    save_checkpoint(path, net, optimizer, {"epoch": 1})
    COMM.barrier()
    before = contents(path)
    kept = [p.detach().clone() for p in net.parameters()]
    with torch.no_grad():
        for p in net.parameters():
            p += 1
    COMM.barrier()
    with largest_file(2000, rank), pytest.raises(InputError, match=r"run cannot be written: File too large"):
        save_checkpoint(path, net, optimizer, {"epoch": 2})
    COMM.barrier()
    assert contents(path) == before
    assert load_checkpoint(path, net, optimizer) == {"epoch": 1}
    assert all(torch.equal(a, b) for a, b in zip(kept, net.parameters(), strict=True))
    COMM.barrier()
    save_checkpoint(path, net, optimizer, {"epoch": 2})
    assert load_checkpoint(path, net, optimizer) == {"epoch": 2}


def spoil(path, what):
    """Damage a checkpoint."""
    folder = path / (path / "latest").read_text().split()[0]
    head = folder / "head.json"
    if what == "latest a folder":
        (path / "latest").unlink()
        (path / "latest").mkdir()
    elif what == "latest a FIFO":
        (path / "latest").unlink()
        os.mkfifo(path / "latest")
    elif what == "latest no number":
        (path / "latest").write_bytes(b"\xff../../etc")
    elif what == "latest a link":
        (path / "latest").rename(path / "other")
        (path / "latest").symlink_to("other")
    elif what == "latest of nothing":
        (path / "latest").write_text("77")
    elif what == "head missing":
        head.unlink()
    elif what == "head truncated":
        head.write_text(head.read_text()[:50])
        (path / "latest").write_text(folder.name)
    elif what == "head a list":
        head.write_text("[1, 2]")
        (path / "latest").write_text(folder.name)
    elif what == "head without keys":
        text = json.dumps({k: v for k, v in json.loads(head.read_text()).items() if k not in ("network", "arrays")})
        head.write_text(text)
        (path / "latest").write_text(f"{folder.name} {zlib.crc32(text.encode()):08x}")
    elif what == "head with a flipped byte":
        head.write_text(head.read_text().replace('"epoch": 1', '"epoch": 3'))
    elif what == "another shape":
        np.save(folder / "theta.bias.npy", np.zeros((5, 1)))
    elif what == "another type":
        np.save(folder / "theta.bias.npy", np.zeros((5, 4), np.float32))
    elif what in ("theta.weight.npy", "optimizer.weight.exp_avg.npy", "opening.pt", "closing.pt"):
        raw = bytearray((folder / what).read_bytes())
        raw[-20 if what.endswith("npy") else len(raw) // 2] ^= 0x01
        (folder / what).write_bytes(raw)
    elif what == "theta.bias.npy truncated":
        raw = (folder / "theta.bias.npy").read_bytes()
        (folder / "theta.bias.npy").write_bytes(raw[:-8])
    elif what == "theta.bias.npy missing":
        (folder / "theta.bias.npy").unlink()


DAMAGES = {
    "latest a folder": "file .*latest is a folder",
    "latest a FIFO": "file .*latest is a FIFO",
    "latest no number": "'latest' is damaged, it has .* instead of a number",
    "latest a link": "latest is a symbolic link",
    "latest of nothing": "'latest' names 77, where there is no head",
    "head missing": "where there is no head.json",
    "head truncated": "head.json is damaged",
    "head a list": "head.json is damaged: it has no network, arrays",
    "head without keys": "head.json is damaged: it has no network, arrays",
    "head with a flipped byte": "head.json is damaged: the checksum is another",
    "another shape": r"theta.bias.npy is float64 \(5, 1\), not float64 \(5, 4\)",
    "another type": r"theta.bias.npy is float32 \(5, 4\), not float64 \(5, 4\)",
    "theta.weight.npy": "theta.weight.npy is damaged in row 4",
    "optimizer.weight.exp_avg.npy": "optimizer.weight.exp_avg.npy is damaged in row 4",
    "opening.pt": "opening.pt is damaged: the checksum is another",
    "closing.pt": "closing.pt is damaged: the checksum is another",
    "theta.bias.npy truncated": "theta.bias.npy ends within its values",
    "theta.bias.npy missing": "theta.bias.npy is missing",
}


@pytest.mark.parallel([1, 3])
@time_limit(100)
def test_damaged_checkpoints_are_refused_in_one_line(tmp_path):
    """On all ranks, and the network stays as it was; "remove" is never advised for a folder."""
    path, net = shared(tmp_path) / "run", network()
    optimizer = trained(net)
    save_checkpoint(path, net, optimizer, {"epoch": 1})
    good = path.with_name("good")
    on_root(lambda: shutil.copytree(path, good))
    for what, message in DAMAGES.items():

        def restore(what=what):
            shutil.rmtree(path)
            shutil.copytree(good, path)
            spoil(path, what)

        on_root(restore)
        other = network(nlayers=5)
        before = [p.detach().clone() for p in other.parameters()]
        with pytest.raises(InputError, match=message) as caught:
            load_checkpoint(path, other, torch.optim.Adam(other.parameters()))
        assert "\n" not in str(caught.value), what
        assert "remove" not in str(caught.value), what
        assert all(torch.equal(a, b) for a, b in zip(before, other.parameters(), strict=True)), what


@pytest.mark.parallel([1, 3])
@time_limit(60)
def test_what_is_no_folder_is_refused(tmp_path):
    """A file and a link, for reading and for writing; what they name stays."""
    folder, net = shared(tmp_path), network()
    on_root(lambda: [(folder / "file").write_text("mine"), (folder / "link").symlink_to("."), (folder / "s").mkdir()])
    for name, kind in (("file", "no folder"), ("link", "a symbolic link")):
        for work in (lambda p: load_checkpoint(p, net), lambda p: save_checkpoint(p, net)):
            with pytest.raises(InputError, match=f"{name} is {kind}: give the name of a folder of its own"):
                work(folder / name)
    on_root(lambda: ((folder / "s" / "1").symlink_to(folder), (folder / "s" / "latest").symlink_to(folder / "file")))
    save_checkpoint(folder / "s", net)
    COMM.barrier()
    assert (folder / "file").read_text() == "mine"
    assert not (folder / "s" / "latest").is_symlink()
    assert load_checkpoint(folder / "s", net) == {}


class Named:
    """A function with the name of another one."""

    def __init__(self, name, factor):
        self.__name__, self.factor = name, factor

    def __call__(self, z):
        return torch.tanh(self.factor * z)


OTHERS = {
    "activation": dict(activation="relu"),
    "values of the activation": dict(activation=Named("tanh", 0.9)),
    "opening": dict(first=nn.ReLU),
    "final_time": dict(T=2.0),
    "dtype": dict(dtype=torch.float32),
    "layers": dict(nlayers=6),
    "parameters": dict(width=5),
}


@pytest.mark.parallel([1, 3])
@time_limit(60)
def test_another_network_or_optimiser_is_refused(tmp_path):
    """By the name of what differs. Cycles are those of the run that goes on."""
    path, net = shared(tmp_path) / "run", network(forward_iterations=2, backward_iterations=1)
    save_checkpoint(path, net, trained(net))
    for name, changes in OTHERS.items():
        with pytest.raises(InputError, match=f"of another network: .*{name}: the file has"):
            load_checkpoint(path, network(**changes))
    same = network(forward_iterations=3, backward_iterations=2)
    with pytest.raises(InputError, match="written with the optimiser Adam, this run has SGD"):
        load_checkpoint(path, same, torch.optim.SGD(same.parameters(), lr=0.1))
    assert load_checkpoint(path, same) == {}
    assert (same.forward_sweeps.cycles, same.backward_sweeps.cycles) == (3, 2)
    learns = network(forward_iterations=2, backward_iterations=1, adaptive=Adaptive(every=7))
    learns.forward_sweeps.cycles = 5
    save_checkpoint(path, learns)
    for every, cycles in ((7, 5), (8, 2)):
        again = network(forward_iterations=2, backward_iterations=1, adaptive=Adaptive(every=every))
        load_checkpoint(path, again)
        assert again.forward_sweeps.cycles == cycles


def made_old(path, version):
    """Make a checkpoint what the first or the second version wrote."""
    folder = path / (path / "latest").read_text().split()[0]
    head = json.loads((folder / "head.json").read_text())
    tensors = lambda scalars: {name: {k: v[1] for k, v in of.items()} for name, of in scalars.items()}
    (runs,), (head["iterations"],) = head.pop("runs"), head["iterations"]
    head["parts"] = [[lo, hi, sorted(head["arrays"]), tensors(scalars)] for lo, hi, _, scalars, _ in runs]
    head["version"], head["scalars"] = 2, head["parts"][0][3]
    for name in ("options", "order", "kinds", "passes", "scheduler", "run"):
        del head[name]
    for place in ("opening", "closing"):
        stored = torch.load(folder / f"{place}.pt", weights_only=True)
        del stored["options"]
        torch.save(stored, folder / f"{place}.pt")
        head["ends"][place] = zlib.crc32((folder / f"{place}.pt").read_bytes())
    (folder / "run.pt").unlink()
    if version == 1:
        for name in ("kind", "activation", "values of the activation", "opening", "closing"):
            del head["network"][name]
        del head["version"], head["optimizer"], head["ends"], head["parts"]
        head["iterations"] = {k: v[:3] for k, v in head["iterations"].items()}
        for sums in folder.glob("*.crc32.npy"):
            sums.unlink()
    text = json.dumps(head)
    (folder / "head.json").write_text(text)
    (path / "latest").write_text(folder.name if version == 1 else f"{folder.name} {zlib.crc32(text.encode()):08x}")


@pytest.mark.parallel([1, 3])
@time_limit(60)
@pytest.mark.parametrize("version", [1, 2])
def test_checkpoints_of_earlier_versions_are_read(tmp_path, version, caplog):
    """Learning rates are those of the optimiser, which is logged once."""
    path, net = shared(tmp_path) / "run", network()
    optimizer = trained(net)
    save_checkpoint(path, net, optimizer, {"epoch": 1})
    on_root(lambda: made_old(path, version))
    again = network()
    other = torch.optim.Adam(again.parameters(), lr=0.03)
    assert load_checkpoint(path, again, other) == {"epoch": 1}
    for a, b in zip(net.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
        for name in ("exp_avg", "step"):
            assert torch.equal(optimizer.state[a][name], other.state[b][name])
    assert other.param_groups[0]["lr"] == 0.03
    assert sum("without learning rates" in r.message for r in caplog.records) == (COMM.rank == 0)
    with pytest.raises(InputError, match="was written without a scheduler, this run has StepLR"):
        load_checkpoint(path, again, other, scheduler=torch.optim.lr_scheduler.StepLR(other, 1))


def groups_of(net):
    """An optimiser with a group for each part of the network, which some ranks do not have."""
    parts = [list(net.opening.parameters()), [net.theta["weight"]], [net.theta["bias"]], list(net.closing.parameters())]
    options = [dict(lr=0.01), dict(betas=(0.8, 0.99)), dict(lr=torch.tensor(0.02)), dict(weight_decay=0.1)]
    given = [{"params": p, **o} for p, o in zip(parts, options, strict=True)]
    return torch.optim.AdamW(given, lr=0.05, foreach=False)


def steps(net, optimizer, scheduler, count):
    x = torch.linspace(-1, 1, 12, dtype=net.dtype).reshape(6, 2)
    for _ in range(count):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), LABELS).backward()
        optimizer.step()
        scheduler.step()


SCHEDULES = {
    "step": lambda o: torch.optim.lr_scheduler.StepLR(o, 2, 0.5),
    "milestones": lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [1, 3], 0.3),
    "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 6),
    "one cycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=9),
    "sequence": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o,
        [torch.optim.lr_scheduler.LinearLR(o, 0.5, total_iters=2), torch.optim.lr_scheduler.ExponentialLR(o, 0.9)],
        [2],
    ),
}


@pytest.mark.parallel([1, 2, 3])
@time_limit(100)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_schedule_of_groups_goes_on(tmp_path, schedule):
    """Three steps, a restart on the same and on one rank, and three more are six steps: rates of all groups, betas."""
    path, make = shared(tmp_path) / "run", SCHEDULES[schedule]
    net = network()
    optimizer = groups_of(net)
    scheduler = make(optimizer)
    steps(net, optimizer, scheduler, 3)
    generator = torch.Generator().manual_seed(5)
    torch.rand(3, generator=generator)
    save_checkpoint(
        path, net, optimizer, {"epoch": 3}, scheduler=scheduler, extra={"generator": generator.get_state(), "a": (1, 2)}
    )
    rates = [[float(g["lr"]), g["betas"], g["weight_decay"]] for g in optimizer.param_groups]
    steps(net, optimizer, scheduler, 3)
    for grid in (Grid(), Grid(comm=MPI.COMM_SELF)):
        again = network(grid=grid)
        other = torch.optim.AdamW(
            [{"params": g["params"]} for g in groups_of(again).param_groups], lr=0.7, betas=(0.1, 0.2), weight_decay=0.5
        )
        second = make(other)
        progress = load_checkpoint(path, again, other, scheduler=second)
        assert progress["epoch"] == 3
        assert progress["extra"]["a"] == (1, 2)
        g = torch.Generator()
        g.set_state(progress["extra"]["generator"])
        twin = torch.Generator().manual_seed(5)
        torch.rand(3, generator=twin)
        assert torch.equal(torch.rand(4, generator=g), torch.rand(4, generator=twin))
        assert [[float(g["lr"]), g["betas"], g["weight_decay"]] for g in other.param_groups] == rates
        assert torch.is_tensor(other.param_groups[2]["lr"])
        assert other.param_groups[0]["foreach"] is False
        steps(again, other, second, 3)
        for name, p in net.named_parameters():
            q = dict(again.named_parameters())[name]
            q = q[net.lo : net.hi] if name.startswith("theta") and again.nlayers == len(q) else q
            assert torch.equal(p, q) if grid.layer_size == net.grid.layer_size else torch.allclose(p, q, atol=1e-13)


@pytest.mark.parallel([1, 3])
@time_limit(60)
def test_groups_that_mix_others_and_other_schedulers_are_refused(tmp_path):
    """By name, on all ranks; the optimiser stays as it was."""
    path, net = shared(tmp_path) / "run", network()
    optimizer = groups_of(net)
    steps(net, optimizer, SCHEDULES["step"](optimizer), 1)
    save_checkpoint(path, net, optimizer)
    again = network()
    other = torch.optim.AdamW(again.parameters(), lr=0.3)
    with pytest.raises(InputError, match="group 0 of the optimiser has parameters that were written in groups with "):
        load_checkpoint(path, again, other)
    assert other.param_groups[0]["lr"] == 0.3
    assert not other.state
    same = groups_of(again)
    with pytest.raises(InputError, match="was written without a scheduler, this run has StepLR"):
        load_checkpoint(path, again, same, scheduler=SCHEDULES["step"](same))
    with pytest.raises(InputError, match=r"extra could not be read again .*give numbers, text"):
        save_checkpoint(path, net, optimizer, extra={"network": net.closing})
    with pytest.raises(InputError, match="extra is a list: give a mapping"):
        save_checkpoint(path, net, optimizer, extra=[1])
    assert load_checkpoint(path, again) == {}


@pytest.mark.parallel([1])
def test_states_that_do_not_belong_to_layers_are_refused(tmp_path):
    """Adafactor's factors of stacked biases, LBFGS's history: they used to be lost without a message."""
    net = network()
    with pytest.raises(
        InputError, match=r"Adafactor has col_var .1, 4. of theta.bias, which does not belong to single"
    ):
        save_checkpoint(tmp_path / "run", net, trained(net, torch.optim.Adafactor))
    optimizer = torch.optim.ASGD(net.parameters(), lr=0.1)  # scalars that are tensors
    x = torch.linspace(-1, 1, 12, dtype=net.dtype).reshape(6, 2)
    nn.functional.cross_entropy(net(x), LABELS).backward()
    optimizer.step()
    save_checkpoint(tmp_path / "other", net, optimizer)
    again = network()
    other = torch.optim.ASGD(again.parameters(), lr=0.1)
    load_checkpoint(tmp_path / "other", again, other)
    for a, b in zip(net.parameters(), again.parameters(), strict=True):
        want, got = optimizer.state[a], other.state[b]
        assert want.keys() == got.keys()
        assert all(torch.equal(v, got[k]) and v.dtype == got[k].dtype for k, v in want.items())


@pytest.mark.parallel([1, 3])
@time_limit(60)
def test_two_trainings_do_not_write_one_checkpoint(tmp_path):
    """The second is refused before it trains; reading goes on."""
    path, net = shared(tmp_path) / "run", network()
    on_root(lambda: path.mkdir())
    holder, pid = another_process(path)
    for work in (lambda: reserve_checkpoint(path, net.grid), lambda: save_checkpoint(path, net)):
        with pytest.raises(InputError, match=rf"run is being written by another run \(process {pid} on "):
            work()
    assert load_checkpoint(path, net) is None
    if holder is not None:
        holder.kill()
        holder.wait()
    COMM.barrier()
    reserve_checkpoint(path, net.grid)
    save_checkpoint(Path(path), net)


@pytest.mark.parallel([1, 3])
@time_limit(60)
@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize("frozen", ["first", "last"])
def test_layers_of_one_rank_are_frozen(tmp_path, frozen, later):
    """From the beginning or after a step: parameters, arrays and steps come back, and nothing where nothing was."""
    path, net = shared(tmp_path) / "run", network()
    optimizer = trained(net) if later else torch.optim.Adam(net.parameters(), lr=0.01)
    save_checkpoint(path, net, optimizer, {"epoch": 0})
    still = COMM.rank == (0 if frozen == "first" else COMM.size - 1)
    for p in net.stack if still else ():
        p.requires_grad_(False)
    optimizer.zero_grad()
    nn.functional.cross_entropy(net(torch.linspace(-1, 1, 12, dtype=net.dtype).reshape(6, 2)), LABELS).backward()
    optimizer.step()
    save_checkpoint(path, net, optimizer, {"epoch": 1})
    again = network()
    other = trained(again)  # what it has of layers without a state goes
    assert load_checkpoint(path, again, other) == {"epoch": 1}
    for a, b in zip(net.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
        want, got = optimizer.state.get(a, {}), other.state.get(b, {})
        assert want.keys() == got.keys()
        assert all(torch.equal(want[key], got[key]) for key in want)
    steps = [float(optimizer.state[p]["step"]) if p in optimizer.state else 0 for p in net.stack]
    assert steps == [(1 if later else 0) if still else (2 if later else 1)] * 2
    # one rank with all layers has no single number of steps
    alone = network(grid=Grid(comm=MPI.COMM_SELF))
    there = torch.optim.Adam(alone.parameters())
    firsts = COMM.allgather(net.lo)
    if COMM.rank == 0 and COMM.size > 1:
        other = firsts[1] if frozen == "first" else firsts[-1]
        with pytest.raises(InputError, match=f"layer {other} was trained for other steps than layer 0"):
            load_checkpoint(path, alone, there)
        assert load_checkpoint(path, alone) == {"epoch": 1}
    COMM.barrier()


@pytest.mark.parallel(3)
@time_limit(60)
def test_what_differs_between_ranks_is_refused_and_the_last_checkpoint_stays(tmp_path):
    path, net = shared(tmp_path) / "run", network()
    optimizer, last = trained(net), COMM.rank == 1
    save_checkpoint(path, net, optimizer, {"epoch": 1})
    other = torch.optim.SGD(net.parameters(), lr=0.1) if last else optimizer
    for given, message in (
        ((other, {}), "optimizer is not the same on all ranks .rank 0: 'Adam'; rank 1: 'SGD'"),
        ((None if last else optimizer, {}), "optimizer is not the same on all ranks .rank 0: 'Adam'; rank 1: None"),
        ((optimizer, [1, 2] if last else {}), "progress is a list: give a mapping"),
    ):
        with pytest.raises(InputError, match=message):
            save_checkpoint(path, net, *given)
    with pytest.raises(InputError, match="optimizer is not the same on all ranks"):
        load_checkpoint(path, net, other)
    assert load_checkpoint(path, net, optimizer) == {"epoch": 1}


@pytest.mark.parallel([1, 3])
@time_limit(60)
def test_the_last_checkpoint_stays_until_the_next_one_can_be_read(tmp_path, monkeypatch):
    """A disk on which one rank's rows of the optimiser come to be others than were written."""
    path, net = shared(tmp_path) / "run", network()
    optimizer = trained(net)
    save_checkpoint(path, net, optimizer, {"epoch": 1})
    write = checkpoint.write_rows

    def writes(file, first, rows, count):
        write(file, first, rows, count)
        if COMM.rank == COMM.size - 1 and "exp_avg.npy" in file.name:
            with file.open("r+b") as opened:
                opened.seek(-8, os.SEEK_END)
                opened.write(b"12345678")

    monkeypatch.setattr(checkpoint, "write_rows", writes)
    with pytest.raises(InputError, match=r"cannot be written: optimizer.*exp_avg\.npy is damaged in row 4"):
        save_checkpoint(path, net, optimizer, {"epoch": 2})
    assert load_checkpoint(path, net, optimizer) == {"epoch": 1}

"""Checkpoints of a training: every rank writes its own layers' rows into shared ``.npy`` files; nothing is gathered.

A checkpoint is a folder with the parameters ``theta.weight.npy (N, ...)``, the optimiser's arrays of the same shape,
the opening and the classification layer, and ``head.json``. It is written beside the last one, and a small file
``latest``, replaced in one go, says which one is whole: whenever the process is killed, a complete one is there. A run
may go on with another number of ranks.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from pint_fem.errors import InputError
from pint_fem.resnet.network import LayerParallelResNet

__all__ = ["load_checkpoint", "save_checkpoint"]


def _fingerprint(net: LayerParallelResNet) -> dict:
    shapes = {name: list(shape) for name, shape in net.layer.shapes.items()}
    return {"layers": net.nlayers, "parameters": shapes, "dtype": str(net.dtype), "final_time": net.final_time}


def _agree(net: LayerParallelResNet, problem: str | None) -> None:
    problem = next((p for p in net.grid.comm.allgather(problem) if p), None)
    if problem:
        raise InputError(problem)


def _arrays(net: LayerParallelResNet, optimizer) -> dict[str, torch.Tensor]:
    """What is distributed by layers, by file name: parameters and the optimiser's arrays of their shape."""
    out = {f"theta.{name}": net.theta[name].detach() for name in net.layer.shapes}
    for name in net.layer.shapes if optimizer else ():
        for key, value in optimizer.state.get(net.theta[name], {}).items():
            if torch.is_tensor(value) and value.shape == net.theta[name].shape:
                out[f"optimizer.{name}.{key}"] = value
    return out


def _scalars(net: LayerParallelResNet, optimizer) -> dict:
    """The optimiser's other values of a layer parameter, the same on every rank."""
    out = {}
    for name in net.layer.shapes if optimizer else ():
        state = optimizer.state.get(net.theta[name], {})
        out[name] = {
            k: float(v)
            for k, v in state.items()
            if v is not None and (not torch.is_tensor(v) or v.numel() == 1 != net.theta[name].numel())
        }
    return out


def _end(module, optimizer) -> dict:
    states = [optimizer.state.get(p, {}) for p in module.parameters()] if optimizer else []
    return {"module": module.state_dict(), "optimizer": states}


def save_checkpoint(
    path: str | Path, net: LayerParallelResNet, optimizer=None, progress: Mapping | None = None
) -> None:
    """Write a checkpoint (collective); the last one is kept until this one is whole.

    Parameters
    ----------
    path
        A folder of its own; made where it is not there.
    optimizer
        Whose state is kept with the parameters.
    progress
        What else the run needs to go on, for JSON: epochs done, curves.

    Raises
    ------
    InputError
        On every rank, where it cannot be written.
    """
    path, grid, problem, name = Path(path), net.grid, None, None
    arrays = _arrays(net, optimizer)
    if grid.is_root:
        try:
            path.mkdir(parents=True, exist_ok=True)
            before = (path / "latest").read_text() if (path / "latest").exists() else "0"
            name = str(int(before) + 1)
            shutil.rmtree(path / name, ignore_errors=True)
            (path / name).mkdir()
            for key, a in arrays.items():
                kind = a.numpy().dtype
                np.lib.format.open_memmap(path / name / f"{key}.npy", "w+", kind, (net.nlayers, *a.shape[1:])).flush()
            its = {k: [s.cycles, s.serial, s.batches] for k, s in _iterations(net).items()}
            head = {"network": _fingerprint(net), "arrays": sorted(arrays), "iterations": its}
            head |= {"scalars": _scalars(net, optimizer), "progress": dict(progress or {})}
            (path / name / "head.json").write_text(json.dumps(head))
        except (OSError, ValueError, TypeError) as error:
            problem = f"checkpoint {path} cannot be written: {error}"
    _agree(net, problem)
    folder = path / grid.comm.bcast(name, root=0)
    try:
        if grid.data_comm.rank == 0:
            for key, a in arrays.items():
                rows = np.load(folder / f"{key}.npy", mmap_mode="r+")
                rows[net.lo : net.hi] = a.numpy()
                rows.flush()
            for place, module in (("opening", net.opening), ("closing", net.closing)):
                if module is not None:
                    torch.save(_end(module, optimizer), folder / f"{place}.pt")
    except OSError as error:
        problem = f"checkpoint {folder} cannot be written: {error}"
    _agree(net, problem)
    if grid.is_root:
        (path / "latest.new").write_text(folder.name)
        os.replace(path / "latest.new", path / "latest")
        shutil.rmtree(path / str(int(folder.name) - 1), ignore_errors=True)
    grid.comm.Barrier()


def _iterations(net: LayerParallelResNet) -> dict:
    return {"forward": net.forward_sweeps, "backward": net.backward_sweeps}


def load_checkpoint(path: str | Path, net: LayerParallelResNet, optimizer=None) -> dict | None:
    """Put parameters and the optimiser's state back (collective).

    Returns
    -------
    dict or None
        The progress that was given, ``None`` where there is no checkpoint.

    Raises
    ------
    InputError
        On every rank, where it is damaged or of another network.
    """
    path, grid, problem, progress = Path(path), net.grid, None, None
    found = (path / "latest").read_text() if grid.is_root and (path / "latest").exists() else None
    name = grid.comm.bcast(found, root=0)
    if name is None:
        return None
    folder = path / name
    try:
        head = json.loads((folder / "head.json").read_text())
        if head["network"] != _fingerprint(net):
            problem = (
                f"checkpoint {path} is of another network: it has {head['network']}, this one is {_fingerprint(net)}"
            )
        else:
            _restore(folder, head, net, optimizer)
            progress = head["progress"]
    except Exception as error:
        problem = f"checkpoint {folder} cannot be read ({type(error).__name__}: {error}); remove {path} to start anew"
    _agree(net, problem)
    return progress


def _restore(folder: Path, head: dict, net: LayerParallelResNet, optimizer) -> None:
    own = lambda key: torch.from_numpy(np.array(np.load(folder / f"{key}.npy", mmap_mode="r")[net.lo : net.hi]))
    with torch.no_grad():
        for name in net.layer.shapes:
            net.theta[name].copy_(own(f"theta.{name}"))
    for key in head["arrays"] if optimizer else ():
        if key.startswith("optimizer."):
            _, name, what = key.split(".", 2)
            optimizer.state[net.theta[name]][what] = own(key)
    for name, values in head["scalars"].items() if optimizer else ():
        for what, value in values.items():
            optimizer.state[net.theta[name]][what] = torch.tensor(value) if what == "step" else value
    for place, module in (("opening", net.opening), ("closing", net.closing)):
        if module is not None:
            kept = torch.load(folder / f"{place}.pt", weights_only=True)
            module.load_state_dict(kept["module"])
            for p, state in zip(module.parameters(), kept["optimizer"], strict=True) if optimizer else ():
                optimizer.state[p].update(state)
    for kind, (cycles, serial, batches) in head["iterations"].items():
        its = _iterations(net)[kind]
        its.cycles, its.serial, its.batches = cycles, serial, batches

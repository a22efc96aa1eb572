"""Checkpoints of a training: every rank writes its own layers' rows into shared ``.npy`` files; nothing is gathered.

A checkpoint is a folder. A numbered folder in it holds the parameters ``theta.weight.npy (N, ...)``, the optimiser's
arrays of the same shape, the opening and the classification layer, and ``head.json``. It is written beside the last
one, and a small file ``latest``, replaced in one step, names the one that is complete: whenever the process is killed
or the disk is full, a complete one is there. Rows, layers and head have checksums. A run may go on with another number
of ranks, and only with the network and the kind of optimiser that were written.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch

from pint_fem import files
from pint_fem.collective import collectively, on_first_rank, require_same
from pint_fem.errors import InputError
from pint_fem.resnet.grid import Grid
from pint_fem.resnet.network import LayerParallelResNet
from pint_fem.resnet.parallel.parameters import Elsewhere
from pint_fem.resnet.training.optimizer_state import (
    gather_parts,
    layer_arrays,
    layer_scalars,
    part_of_own_layers,
    replace_state,
)
from pint_fem.resnet.training.row_files import create_rows, read_rows, write_rows

__all__ = ["load_checkpoint", "reserve_checkpoint", "save_checkpoint"]

_VERSION = 2  # 1: no checksums, nothing of activations, opening and classification layer
_ANEW = "give another folder to start anew"
_NEEDED = ("network", "arrays", "scalars", "iterations", "progress")
_PROBES = torch.linspace(-2, 2, 9, dtype=torch.float64)
_locks: dict[Path, files.FileLock] = {}
"""Locks of this process, by the folder; they last as long as the process."""


# -- the network, described --------------------------------------------------------------------------------------------
def _fingerprint(net: LayerParallelResNet) -> dict:
    """Properties that have to be equal in a network that goes on (collective)."""
    ends = {name: re.sub(r" at 0x[0-9a-f]+", "", repr(m)) for name, m in _ends(net).items()}
    on_ranks = net.grid.comm.allgather(ends)
    opening, closing = (next(ends[name] for ends in on_ranks if name in ends) for name in ("opening", "closing"))
    act = net.layer.activation
    return {
        "layers": net.nlayers,
        "parameters": {name: list(shape) for name, shape in net.layer.shapes.items()},
        "dtype": str(net.dtype),
        "final_time": net.final_time,
        "kind": type(net.layer).__name__,
        "activation": act.name,
        "values of the activation": [round(v, 9) for v in act.function(_PROBES.clone()).tolist()],
        "opening": opening,
        "closing": closing,
    }


def _require_fit(path: Path, head: dict, net: LayerParallelResNet, optimizer: torch.optim.Optimizer) -> None:
    """Require the network and the kind of optimiser that were written (collective)."""
    written, own = head["network"], _fingerprint(net)
    names = [name for name in own if name in written and written[name] != own[name]]  # the first version has fewer
    if "activation" in names:
        names.remove("values of the activation")
    if names:
        other = "; ".join(f"{name}: the file has {written[name]}, this network {own[name]}" for name in names)
        raise InputError(f"checkpoint {path} is of another network: {other}; give the same, or another folder")
    if optimizer is not None and head.get("optimizer", _class_name(optimizer)) != _class_name(optimizer):
        raise InputError(
            f"checkpoint {path} was written with the optimiser {head['optimizer']}, this run has "
            f"{_class_name(optimizer)}: give the same, or load it without one and go on with a new one"
        )


def _class_name(optimizer: torch.optim.Optimizer) -> str | None:
    """Name of an optimiser's class."""
    return None if optimizer is None else type(optimizer).__name__


def _ends(net: LayerParallelResNet) -> dict[str, torch.nn.Module]:
    """The opening and the classification layer, as far as this rank has them, by the names of their files."""
    return {name: m for name, m in (("opening", net.opening), ("closing", net.closing)) if not isinstance(m, Elsewhere)}


def _iterations(net: LayerParallelResNet) -> dict[str, list]:
    """State of the numbers of cycles of both kinds of sweeps, and the rule by which they change."""
    out = {}
    for kind, its in (("forward", net.forward_sweeps), ("backward", net.backward_sweeps)):
        rule = None if its.adaptive is None else [its.adaptive.every, its.adaptive.enough, its.adaptive.most]
        out[kind] = [its.cycles, its.serial, its.batches, rule]
    return out


# -- the folder ------------------------------------------------------------------------------------------------------
def _check_folder(path: Path) -> bool:
    """Whether the folder exists; a link and anything else of that name is refused."""
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        kind = "a symbolic link" if path.is_symlink() else "no folder"
        raise InputError(f"checkpoint {path} is {kind}: give the name of a folder of its own")
    return path.exists()


def _latest(path: Path) -> tuple[str, int | None] | None:
    """Number of the complete checkpoint and the checksum of its head, ``None`` where there is none."""
    if not _check_folder(path) or not files.require_regular(path / "latest", "checkpoint's file", _ANEW):
        return None
    with files.as_input_error(f"checkpoint {path}: its file 'latest' cannot be read", _ANEW):
        text = (path / "latest").read_bytes().decode("latin-1").strip()
    match = re.fullmatch(r"(\d+)(?: ([0-9a-f]{8}))?", text)
    if not match:
        raise InputError(
            f"checkpoint {path}: its file 'latest' is damaged, it has {text[:40]!r} instead of a number; {_ANEW}"
        )
    return match[1], None if match[2] is None else int(match[2], 16)


def _read_head(path: Path) -> tuple[str, dict] | None:
    """Number and head of the complete checkpoint, ``None`` where there is none."""
    latest = _latest(path)
    if latest is None:
        return None
    name, crc = latest
    file = path / name / "head.json"
    if file.parent.is_symlink() or not file.parent.is_dir() or not files.require_regular(file, "head", _ANEW):
        raise InputError(f"checkpoint {path}: 'latest' names {name}, where there is no head.json; {_ANEW}")
    with files.as_input_error(f"checkpoint {file} cannot be read", _ANEW):
        text = file.read_bytes()
    if crc is not None and zlib.crc32(text) != crc:
        raise InputError(f"checkpoint {file} is damaged: the checksum is another; {_ANEW}")
    with files.as_input_error(f"checkpoint {file} is damaged", _ANEW, (ValueError, TypeError)):
        head = json.loads(text)
        missing = [key for key in _NEEDED if key not in head]
    if missing or not isinstance(head, dict):
        raise InputError(f"checkpoint {file} is damaged: it has no {', '.join(missing)}; {_ANEW}")
    return name, head


def reserve_checkpoint(path: str | Path, grid: Grid) -> None:
    """Check before a training that a checkpoint can be written, and keep other processes from it (collective).

    The folder is made where it is missing. The right to write it lasts as long as this process.

    Parameters
    ----------
    path
        A folder for this checkpoint alone.
    grid
        Process grid of the network.

    Raises
    ------
    InputError
        On every rank, if the folder cannot be made or written to, or another run writes it.
    """
    on_first_rank(grid.comm, "", _reserve, Path(path))


def _reserve(path: Path) -> None:
    """Make the folder and acquire its lock."""
    _check_folder(path)
    with files.as_input_error(f"checkpoint {path} cannot be written"):
        path.mkdir(parents=True, exist_ok=True)
    _locks.setdefault(path.resolve(), files.FileLock(path, "checkpoint")).acquire()


# -- writing ---------------------------------------------------------------------------------------------------------
def save_checkpoint(
    path: str | Path,
    net: LayerParallelResNet,
    optimizer: torch.optim.Optimizer | None = None,
    progress: Mapping | None = None,
) -> None:
    """Write a checkpoint (collective); the last one is removed when this one is complete and on the disk.

    Parameters
    ----------
    path
        A folder for this checkpoint alone; made where it is missing.
    net
        The network.
    optimizer
        Its state is written, too.
    progress
        Other data that the run needs to go on, in types of JSON: epochs done, curves.

    Raises
    ------
    InputError
        On every rank, where it cannot be written, as on a full disk, or another run writes it; the last one stays.
    """
    path, comm = Path(path), net.grid.comm
    require_same(comm, optimizer=_class_name(optimizer))
    reserve_checkpoint(path, net.grid)
    # TypeError: a progress that JSON does not take
    guarded = files.as_input_error(f"checkpoint {path} cannot be written", errors=(OSError, ValueError, TypeError))
    head, arrays = collectively(comm, "", guarded(_describe), net, optimizer, progress)
    head["network"] = collectively(comm, "", _fingerprint, net)
    kinds, head["parts"] = gather_parts(net, arrays, head["scalars"])
    head["arrays"] = sorted(kinds)
    folder = None
    try:
        folder = path / on_first_rank(comm, "", guarded(_begin), path, net.nlayers, kinds)
        sums = collectively(comm, "", guarded(_write), folder, net, optimizer, arrays, kinds)
        collectively(comm, "", guarded(_verify), folder, net, sums, kinds)
        gathered = comm.gather(sums)
        if net.grid.is_root:
            head["ends"] = {place: crc for part in gathered for place, crc in part.items()}
        on_first_rank(comm, "", guarded(_finish), path, folder, head)
    except InputError:
        if net.grid.is_root and folder is not None and not _is_latest(path, folder):
            shutil.rmtree(folder, ignore_errors=True)  # an incomplete one would only occupy the disk
        raise


def _describe(
    net: LayerParallelResNet, optimizer: torch.optim.Optimizer, progress
) -> tuple[dict, dict[str, torch.Tensor]]:
    """The head as far as it follows from this rank alone, and this rank's arrays."""
    if not isinstance(progress, Mapping | None):
        raise InputError(f"progress is a {type(progress).__name__}: give a mapping that JSON takes, such as a dict")
    head = {
        "version": _VERSION,
        "optimizer": _class_name(optimizer),
        "scalars": layer_scalars(net, optimizer),
        "iterations": _iterations(net),
        "progress": dict(progress or {}),
    }
    return head, layer_arrays(net, optimizer)


def _begin(path: Path, nlayers: int, kinds: dict) -> str:
    """Make the next numbered folder and its arrays; its name."""
    name = str(1 + max((int(p.name) for p in _numbered(path)), default=0))
    (path / name).mkdir()
    try:
        for key, (shape, kind) in kinds.items():
            create_rows(path / name / f"{key}.npy", (nlayers, *shape), kind)
    except OSError:
        shutil.rmtree(path / name, ignore_errors=True)
        raise
    return name


def _numbered(path: Path) -> list[Path]:
    """The numbered folders of a checkpoint."""
    return [p for p in path.iterdir() if p.name.isdecimal() and p.name.isascii()]


def _write(
    folder: Path, net: LayerParallelResNet, optimizer: torch.optim.Optimizer, arrays: dict, kinds: dict
) -> dict[str, int]:
    """Write this rank's rows, zero where it has no array, and its opening and classification layer; their checksums."""
    sums = {}
    if net.grid.data_comm.rank == 0:
        for key, (shape, kind) in kinds.items():
            rows = arrays[key].numpy() if key in arrays else np.zeros((net.hi - net.lo, *shape), kind)
            write_rows(folder / f"{key}.npy", net.lo, rows, net.nlayers)
        for place, module in _ends(net).items():
            states = [optimizer.state.get(p, {}) for p in module.parameters()] if optimizer else []
            content = io.BytesIO()
            torch.save({"module": module.state_dict(), "optimizer": states}, content)
            files.write_whole(folder / f"{place}.pt", content.getvalue())
            sums[place] = zlib.crc32(content.getvalue())
    return sums


def _verify(folder: Path, net: LayerParallelResNet, sums: dict[str, int], kinds: dict) -> None:
    """Read what this rank has written, before the last checkpoint is removed."""
    if net.grid.data_comm.rank == 0:
        for key, (shape, kind) in kinds.items():
            read_rows(folder / f"{key}.npy", net.lo, net.hi, (net.nlayers, *shape), kind, checked=True)
        for place, crc in sums.items():
            if zlib.crc32((folder / f"{place}.pt").read_bytes()) != crc:
                raise ValueError(f"{place}.pt is not what was written")


def _finish(path: Path, folder: Path, head: dict) -> None:
    """Write the head, make the folder the latest one and remove the others."""
    text = json.dumps(head).encode()
    files.write_whole(folder / "head.json", text)
    files.force_to_disk(folder)
    files.write_whole(path / "latest", f"{folder.name} {zlib.crc32(text):08x}".encode())
    for other in _numbered(path):
        if other.name != folder.name:
            if other.is_symlink():
                os.unlink(other)
            else:
                shutil.rmtree(other, ignore_errors=True)


def _is_latest(path: Path, folder: Path) -> bool:
    """Whether ``latest`` names a folder."""
    try:
        return (_latest(path) or ("",))[0] == folder.name
    except InputError:
        return False


# -- reading ---------------------------------------------------------------------------------------------------------
def load_checkpoint(
    path: str | Path, net: LayerParallelResNet, optimizer: torch.optim.Optimizer | None = None
) -> dict | None:
    """Set the parameters and the optimiser's state from a checkpoint (collective).

    Step sizes and other hyperparameters are those of ``optimizer``, numbers of cycles those of ``net``; only numbers
    that were adapted by the same rule are taken from the checkpoint.

    Parameters
    ----------
    path
        Folder of the checkpoint.
    net, optimizer
        What is set; left as it is where the checkpoint is refused.

    Returns
    -------
    dict or None
        The progress that was given, ``None`` where there is no checkpoint.

    Raises
    ------
    InputError
        On every rank, where it is damaged, of another network (sizes, type, activation, opening or classification
        layer) or of another kind of optimiser.
    """
    path, comm = Path(path), net.grid.comm
    require_same(comm, optimizer=_class_name(optimizer))
    found = on_first_rank(comm, "", _read_head, path)
    if found is None:
        return None
    name, head = found
    collectively(comm, "", _require_fit, path, head, net, optimizer)
    guarded = files.refuse_unreadable(f"checkpoint {path / name}", _ANEW)
    collectively(comm, "", guarded(_read), path / name, head, net, optimizer)()
    return head["progress"]


def _read(folder: Path, head: dict, net: LayerParallelResNet, optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    """Read this rank's part; the function that is returned sets it, once all ranks have read theirs."""
    checked = "version" in head

    def rows(key: str, like: torch.Tensor) -> torch.Tensor:
        shape, kind = (net.nlayers, *like.shape[1:]), like.detach().numpy().dtype
        return torch.from_numpy(read_rows(folder / f"{key}.npy", net.lo, net.hi, shape, kind, checked=checked))

    theta = {name: rows(f"theta.{name}", net.theta[name]) for name in net.layer.shapes}
    states: dict[str, dict] = {name: {} for name in net.layer.shapes}
    keys, scalars = part_of_own_layers(folder, head, net) if optimizer else ([], {})
    for key in keys:
        if key.startswith("optimizer."):
            _, name, what = key.split(".", 2)
            states[name][what] = rows(key, net.theta[name])
    for name, values in scalars.items():
        states[name] |= {what: torch.tensor(value) if what == "step" else value for what, value in values.items()}
    sums = head.get("ends", {})
    ends = [
        (module, _read_end(folder / f"{place}.pt", module, sums.get(place), checked=checked))
        for place, module in _ends(net).items()
    ]

    def apply() -> None:
        with torch.no_grad():
            for name, values in theta.items():
                net.theta[name].copy_(values)
        for name, values in states.items() if optimizer else ():
            replace_state(optimizer, net.theta[name], values)
        for module, stored in ends:
            module.load_state_dict(stored["module"])
            for p, state in zip(module.parameters(), stored["optimizer"], strict=True) if optimizer else ():
                replace_state(optimizer, p, state)
        own = _iterations(net)
        for kind, (cycles, serial, batches, *rule) in head["iterations"].items():
            its = net.forward_sweeps if kind == "forward" else net.backward_sweeps
            if its.adaptive is not None and rule in ([], own[kind][3:]):  # the first version has no rule
                its.cycles, its.serial, its.batches = cycles, serial, batches

    return apply


def _read_end(path: Path, module: torch.nn.Module, crc: int | None, *, checked: bool) -> dict:
    """State of the opening or classification layer, which has to have the shapes and types of the module."""
    if not files.require_regular(path, "layer", _ANEW):
        raise ValueError(f"{path.name} is missing")
    content = path.read_bytes()
    if checked and zlib.crc32(content) != crc:
        raise ValueError(f"{path.name} is damaged: the checksum is another")
    stored = torch.load(io.BytesIO(content), weights_only=True)
    own, found = ({k: (v.dtype, tuple(v.shape)) for k, v in s.items()} for s in (module.state_dict(), stored["module"]))
    if own != found:
        raise ValueError(f"{path.name} has {found}, not {own}")
    return stored

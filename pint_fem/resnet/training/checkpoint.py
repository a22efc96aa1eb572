"""Checkpoints of a training: every rank writes its own layers' rows into shared ``.npy`` files; nothing is gathered.

A checkpoint is a folder. A numbered folder in it holds the parameters ``theta.weight.npy (N, ...)``, the optimiser's
arrays of the same shape, the opening and the classification layer, and ``head.json``. It is written beside the last
one, and a small file ``latest``, replaced in one go, names the one that is whole: whenever the process is killed or the
disk is full, a complete one is there. Rows, layers and head have checksums. A run may go on with another number of
ranks, and only with the network and the kind of optimiser that were written.
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
from pint_fem.resnet.iterations import Iterations
from pint_fem.resnet.network import LayerParallelResNet
from pint_fem.resnet.training.optimizer_state import (
    of_all_ranks,
    of_own_layers,
    own_arrays,
    own_scalars,
    replace_state,
)
from pint_fem.resnet.training.row_files import create_rows, read_rows, write_rows

__all__ = ["load_checkpoint", "reserve_checkpoint", "save_checkpoint"]

_VERSION = 2  # 1: no checksums, nothing of activations, opening and classification layer
_ANEW = "give another folder to start anew"
_NEEDED = ("network", "arrays", "scalars", "iterations", "progress")
_PROBES = torch.linspace(-2, 2, 9, dtype=torch.float64)
_locks: dict[Path, files.FileLock] = {}


def _fingerprint(net: LayerParallelResNet) -> dict:
    """What has to be the same in a network that goes on (collective)."""
    ends = [None if m is None else re.sub(r" at 0x[0-9a-f]+", "", repr(m)) for m in (net.opening, net.closing)]
    reports = net.grid.comm.allgather(ends)
    opening, closing = (next(r[i] for r in reports if r[i] is not None) for i in (0, 1))
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


def _differences(kept: dict, own: dict) -> str:
    """What is not the same; earlier versions kept less."""
    names = [name for name in own if name in kept and kept[name] != own[name]]
    if "activation" in names:
        names.remove("values of the activation")
    return "; ".join(f"{name}: the file has {kept[name]}, this network {own[name]}" for name in names)


def _described(net: LayerParallelResNet, optimizer, progress) -> tuple[dict, dict]:
    """Head, as far as this rank knows it alone, and this rank's arrays."""
    if not isinstance(progress, Mapping | None):
        raise InputError(f"progress is a {type(progress).__name__}: give a mapping that JSON takes, such as a dict")
    head = {
        "version": _VERSION,
        "optimizer": _kind(optimizer),
        "scalars": own_scalars(net, optimizer),
        "iterations": {k: [s.cycles, s.serial, s.batches, _rule(s)] for k, s in _iterations(net).items()},
        "progress": dict(progress or {}),
    }
    return head, own_arrays(net, optimizer)


def _kind(optimizer) -> str | None:
    return None if optimizer is None else type(optimizer).__name__


def _end(module, optimizer) -> bytes:
    states = [optimizer.state.get(p, {}) for p in module.parameters()] if optimizer else []
    out = io.BytesIO()
    torch.save({"module": module.state_dict(), "optimizer": states}, out)
    return out.getvalue()


# -- the folder ------------------------------------------------------------------------------------------------------
def _check_folder(path: Path) -> bool:
    """Whether the folder is there; what is no folder is refused, and a link is not followed."""
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


def _head(path: Path) -> tuple[str, dict] | None:
    """Number and head of the complete checkpoint."""
    found = _latest(path)
    if found is None:
        return None
    name, crc = found
    folder = path / name
    if folder.is_symlink() or not folder.is_dir() or not files.require_regular(folder / "head.json", "head", _ANEW):
        raise InputError(f"checkpoint {path}: 'latest' names {name}, where there is no head.json; {_ANEW}")
    with files.as_input_error(f"checkpoint {folder / 'head.json'} cannot be read", _ANEW):
        text = (folder / "head.json").read_bytes()
    if crc is not None and zlib.crc32(text) != crc:
        raise InputError(f"checkpoint {folder / 'head.json'} is damaged: the checksum is another; {_ANEW}")
    try:
        head = json.loads(text)
        missing = [key for key in _NEEDED if key not in head]
    except (ValueError, TypeError) as error:
        raise InputError(f"checkpoint {folder / 'head.json'} is damaged: {error}; {_ANEW}") from error
    if missing or not isinstance(head, dict):
        raise InputError(f"checkpoint {folder / 'head.json'} is damaged: it has no {', '.join(missing)}; {_ANEW}")
    return name, head


def reserve_checkpoint(path: str | Path, grid: Grid) -> None:
    """Find out before a training whether a checkpoint can be written, and keep other processes from it (collective).

    The folder is made where it is not there. The right to write it lasts as long as this process.

    Raises
    ------
    InputError
        On every rank, if the folder cannot be made or written to, or another run writes it.
    """
    on_first_rank(grid.comm, "", _reserve, Path(path))


def _reserve(path: Path) -> None:
    _check_folder(path)
    with files.as_input_error(f"checkpoint {path} cannot be written"):
        path.mkdir(parents=True, exist_ok=True)
    lock = _locks.setdefault(path.resolve(), files.FileLock(path, "checkpoint"))
    lock.acquire()


# -- writing ---------------------------------------------------------------------------------------------------------
def save_checkpoint(
    path: str | Path, net: LayerParallelResNet, optimizer=None, progress: Mapping | None = None
) -> None:
    """Write a checkpoint (collective); the last one is kept until this one is whole and on the disk.

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
        On every rank, where it cannot be written, as on a full disk, or another run writes it. The last one stays; a
        training that is to go on without catches it.
    """
    path, grid = Path(path), net.grid
    require_same(grid.comm, optimizer=_kind(optimizer))
    reserve_checkpoint(path, grid)
    head, arrays = collectively(grid.comm, "", _guarded, path, _described, net, optimizer, progress)
    head["network"] = collectively(grid.comm, "", _fingerprint, net)
    kinds, head["parts"] = of_all_ranks(net, arrays, head["scalars"])
    head["arrays"] = sorted(kinds)
    folder = None
    try:
        folder = path / on_first_rank(grid.comm, "", _guarded, path, _begin, path, net.nlayers, kinds)
        sums = collectively(grid.comm, "", _guarded, path, _write, folder, net, optimizer, arrays, kinds)
        collectively(grid.comm, "", _guarded, path, _verify, folder, net, sums, kinds)
        gathered = grid.comm.gather(sums)
        if grid.is_root:
            head["ends"] = {place: crc for part in gathered for place, crc in part.items()}
        on_first_rank(grid.comm, "", _guarded, path, _finish, path, folder, head)
    except InputError:
        if grid.is_root and folder is not None and not _is_latest(path, folder):
            shutil.rmtree(folder, ignore_errors=True)  # half of a checkpoint would only be in the way
        raise


def _guarded(path: Path, work: Callable, *args):
    try:
        return work(*args)
    except (OSError, ValueError, TypeError) as error:  # TypeError: a progress that JSON does not take
        if isinstance(error, InputError):
            raise
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"checkpoint {path} cannot be written: {reason}") from error


def _begin(path: Path, nlayers: int, kinds: dict) -> str:
    """Make the next numbered folder and its arrays."""
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
    return [p for p in path.iterdir() if p.name.isdecimal() and p.name.isascii()]


def _write(folder: Path, net: LayerParallelResNet, optimizer, arrays: dict, kinds: dict) -> dict[str, int]:
    """This rank's rows, zeros of what it has not, and its opening or classification layer; checksums of the latter."""
    sums = {}
    if net.grid.data_comm.rank == 0:
        for key, (shape, kind) in kinds.items():
            rows = arrays[key].numpy() if key in arrays else np.zeros((net.hi - net.lo, *shape), kind)
            write_rows(folder / f"{key}.npy", net.lo, rows, net.nlayers)
        for place, module in (("opening", net.opening), ("closing", net.closing)):
            if module is not None:
                content = _end(module, optimizer)
                files.write_whole(folder / f"{place}.pt", content)
                sums[place] = zlib.crc32(content)
    return sums


def _verify(folder: Path, net: LayerParallelResNet, sums: dict[str, int], kinds: dict) -> None:
    """Read what this rank has written, before the last checkpoint is given up."""
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
    """Whether a folder is the one to be read, also if something failed after that was written."""
    try:
        return (_latest(path) or ("",))[0] == folder.name
    except InputError:
        return False


def _iterations(net: LayerParallelResNet) -> dict[str, Iterations]:
    return {"forward": net.forward_sweeps, "backward": net.backward_sweeps}


def _rule(sweeps: Iterations) -> list | None:
    """How numbers of cycles are learned."""
    a = sweeps.adaptive
    return None if a is None else [a.every, a.enough, a.most]


# -- reading ---------------------------------------------------------------------------------------------------------
def load_checkpoint(path: str | Path, net: LayerParallelResNet, optimizer=None) -> dict | None:
    """Put parameters and the optimiser's state back (collective).

    Step sizes and other hyperparameters are those of ``optimizer``, numbers of cycles those of ``net``; only what
    adaptive iterations with the same rule have learned comes from the checkpoint.

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
    path, grid = Path(path), net.grid
    require_same(grid.comm, optimizer=_kind(optimizer))
    found = on_first_rank(grid.comm, "", _head, path)
    if found is None:
        return None
    name, head = found
    collectively(grid.comm, "", _require_fit, path, head, net, optimizer)
    collectively(grid.comm, "", _reading, path / name, head, net, optimizer)()
    return head["progress"]


def _require_fit(path: Path, head: dict, net: LayerParallelResNet, optimizer) -> None:
    """Require the network and the kind of optimiser that were written (collective)."""
    other = _differences(head["network"], _fingerprint(net))
    if other:
        raise InputError(f"checkpoint {path} is of another network: {other}; give the same, or another folder")
    if optimizer is not None and head.get("optimizer", type(optimizer).__name__) != type(optimizer).__name__:
        raise InputError(
            f"checkpoint {path} was written with the optimiser {head['optimizer']}, this run has "
            f"{type(optimizer).__name__}: give the same, or load it without one and go on with a new one"
        )


def _reading(folder: Path, head: dict, net: LayerParallelResNet, optimizer) -> Callable[[], None]:
    try:
        return _read(folder, head, net, optimizer)
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"checkpoint {folder} cannot be read ({type(error).__name__}: {error}); {_ANEW}") from error


def _read(folder: Path, head: dict, net: LayerParallelResNet, optimizer) -> Callable[[], None]:
    """Read this rank's part; what is returned puts it where it belongs, once all ranks have theirs."""
    checked = "version" in head

    def own(key: str, like: torch.Tensor) -> torch.Tensor:
        shape, kind = (net.nlayers, *like.shape[1:]), like.detach().numpy().dtype
        return torch.from_numpy(read_rows(folder / f"{key}.npy", net.lo, net.hi, shape, kind, checked=checked))

    theta = {name: own(f"theta.{name}", net.theta[name]) for name in net.layer.shapes}
    states: dict[str, dict] = {name: {} for name in net.layer.shapes}
    keys, scalars = of_own_layers(folder, head, net) if optimizer else ([], {})
    for key in keys:
        if key.startswith("optimizer."):
            _, name, what = key.split(".", 2)
            states[name][what] = own(key, net.theta[name])
    for name, values in scalars.items():
        states[name] |= {what: torch.tensor(value) if what == "step" else value for what, value in values.items()}
    ends = [
        (module, _read_end(folder / f"{place}.pt", module, head.get("ends", {}).get(place), checked=checked))
        for place, module in (("opening", net.opening), ("closing", net.closing))
        if module is not None
    ]

    def put() -> None:
        with torch.no_grad():
            for name, values in theta.items():
                net.theta[name].copy_(values)
        for name, values in states.items() if optimizer else ():
            replace_state(optimizer, net.theta[name], values)
        for module, kept in ends:
            module.load_state_dict(kept["module"])
            for p, state in zip(module.parameters(), kept["optimizer"], strict=True) if optimizer else ():
                replace_state(optimizer, p, state)
        for kind, (cycles, serial, batches, *rule) in head["iterations"].items():
            its = _iterations(net)[kind]
            if its.adaptive is not None and rule in ([], [_rule(its)]):  # earlier versions kept no rule
                its.cycles, its.serial, its.batches = cycles, serial, batches

    return put


def _read_end(path: Path, module, crc: int | None, *, checked: bool) -> dict:
    """State of the opening or classification layer, of the same shapes and types."""
    if not files.require_regular(path, "layer", _ANEW):
        raise ValueError(f"{path.name} is missing")
    content = path.read_bytes()
    if checked and zlib.crc32(content) != crc:
        raise ValueError(f"{path.name} is damaged: the checksum is another")
    kept = torch.load(io.BytesIO(content), weights_only=True)
    own, found = ({k: (v.dtype, tuple(v.shape)) for k, v in s.items()} for s in (module.state_dict(), kept["module"]))
    if own != found:
        raise ValueError(f"{path.name} has {found}, not {own}")
    return kept

"""Checkpoints of a training: every rank writes its own layers' rows into shared ``.npy`` files; nothing is gathered.

A checkpoint is a folder. A numbered folder in it holds the parameters and buffers of the layers ``NAME.npy (N, ...)``,
the optimiser's arrays of the layers, the modules at the ends of the network, ``run.pt`` with the state of a scheduler
and values of the user, and ``head.json``. It is written beside the last one, and a small file ``latest``, replaced in
one step, names the one that is complete: whenever the process is killed or the disk is full, a complete one is there.
Rows, modules and head have checksums. A run may go on with another number of ranks, and only with the network and the
kind of optimiser that were written; learning rates and other options of the optimiser are those that were written.
"""

from __future__ import annotations

import io
import shutil
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pint_fem import files
from pint_fem.collective import collectively, on_first_rank, require_same
from pint_fem.errors import InputError
from pint_fem.logs import logger
from pint_fem.resnet.parallel.module import LayerParallelModule
from pint_fem.resnet.training import optimizer_state as states
from pint_fem.resnet.training.checkpoint_folder import (
    ANEW,
    finish,
    is_latest,
    next_folder,
    read_head,
    reserve_checkpoint,
)
from pint_fem.resnet.training.network_rows import LayerRows, as_array, ends_of, fingerprint, iterations, rows_of
from pint_fem.resnet.training.restore import read_network, read_run
from pint_fem.resnet.training.row_files import create_rows, read_rows, write_rows

__all__ = ["load_checkpoint", "reserve_checkpoint", "save_checkpoint"]

# 1: no checksums, nothing of activations, opening and classification layer; 2: no options of the optimiser
_VERSION = 3
Optimizer = torch.optim.Optimizer


def _require_fit(path: Path, head: dict, net: LayerParallelModule, optimizer: Optimizer | None) -> None:
    """Require the network and the kind of optimiser that were written (collective)."""
    written, own = head["network"], fingerprint(net)
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


def _class_name(given: Any) -> str | None:
    """Name of an optimiser's or scheduler's class."""
    return None if given is None else type(given).__name__


# -- writing ---------------------------------------------------------------------------------------------------------
def save_checkpoint(
    path: str | Path,
    net: LayerParallelModule,
    optimizer: Optimizer | None = None,
    progress: Mapping | None = None,
    *,
    scheduler: Any = None,
    extra: Mapping | None = None,
) -> None:
    """Write a checkpoint (collective); the last one is removed when this one is complete and on the disk.

    Parameters
    ----------
    path
        A folder for this checkpoint alone; made where it is missing.
    net
        The network.
    optimizer
        Its state and the options of its groups of parameters (learning rates) are written, too.
    progress
        Other data that the run needs to go on, in types of JSON: epochs done, curves.
    scheduler
        Of learning rates, with ``state_dict()``, the same on all ranks; that of the first rank is written.
    extra
        Values of the first rank that JSON does not take: tensors, such as ``generator.get_state()``.

    Raises
    ------
    InputError
        On every rank, where it cannot be written, as on a full disk, or another run writes it; the last one stays.
    """
    path, comm = Path(path), net.grid.comm
    net._agree("writing of a checkpoint", shares=True)
    require_same(comm, optimizer=_class_name(optimizer), scheduler=_class_name(scheduler))
    reserve_checkpoint(path, net.grid)
    # TypeError: a progress that JSON does not take
    guarded = files.as_input_error(f"checkpoint {path} cannot be written", errors=(OSError, ValueError, TypeError))
    head, run, arrays, runs, texts = collectively(
        comm, "", guarded(_describe), net, optimizer, progress, scheduler, extra
    )
    head["network"] = collectively(comm, "", fingerprint, net)
    kinds, head["runs"], head["options"], head["order"] = states.gather_runs(comm, runs, arrays, texts)
    head["arrays"] = sorted(kinds)
    head["kinds"] = {key: [list(shape), str(kind)] for key, (shape, kind) in kinds.items()}
    folder = None
    try:
        folder = path / on_first_rank(comm, "", guarded(_begin), path, net, kinds, run)
        sums = collectively(comm, "", guarded(_write), folder, net, optimizer, arrays, kinds)
        collectively(comm, "", guarded(_verify), folder, net, sums, kinds)
        gathered = comm.gather(sums)
        if net.grid.is_root:
            head["ends"] = {place: crc for part in gathered for place, crc in part.items()}
        on_first_rank(comm, "", guarded(finish), path, folder, head)
    except InputError:
        if net.grid.is_root and folder is not None and not is_latest(path, folder):
            shutil.rmtree(folder, ignore_errors=True)  # an incomplete one would only occupy the disk
        raise


def _describe(
    net: LayerParallelModule, optimizer: Optimizer | None, progress: Any, scheduler: Any, extra: Any
) -> tuple:
    """The head as far as it follows from this rank alone, ``run.pt``, and this rank's arrays, runs and options."""
    for name, given in (("progress", progress), ("extra", extra)):
        if not isinstance(given, Mapping | None):
            takes = "JSON takes, such as a dict" if name == "progress" else "names values"
            raise InputError(f"{name} is a {type(given).__name__}: give a mapping that {takes}")
    run = _run_of(scheduler, extra)
    head = {
        "version": _VERSION,
        "optimizer": _class_name(optimizer),
        "scheduler": _class_name(scheduler),
        "iterations": iterations(net),
        "passes": net.passes,
        "progress": dict(progress or {}),
        "run": zlib.crc32(run),
    }
    texts, options = states.option_texts(optimizer), states.options_of_parameters(optimizer)
    arrays, runs = {}, []
    for rows in rows_of(net):
        if rows.hi > rows.lo:
            arrays |= {rows.prefix + name: rows.stack(name) for name in rows.tensors}
        arrays |= states.optimizer_arrays(optimizer, rows)
        runs.append(states.layer_runs(optimizer, rows, options))
    return head, run, arrays, runs, texts


def _run_of(scheduler: Any, extra: Mapping | None) -> bytes:
    """State of the scheduler and values of the user, which are read back before anything is written."""
    content = io.BytesIO()
    state = None if scheduler is None else scheduler.state_dict()
    torch.save({"scheduler": state, "extra": None if extra is None else dict(extra)}, content)
    try:
        torch.load(io.BytesIO(content.getvalue()), weights_only=True)
    except Exception as error:
        raise InputError(
            f"the state of the scheduler or extra could not be read again ({type(error).__name__}): give numbers, text "
            "and tensors, and lists and dictionaries of them"
        ) from error
    return content.getvalue()


def _stages(net: LayerParallelModule, kinds: Mapping) -> list[tuple[LayerRows, list[str]]]:
    """The stages of a network with the names of their arrays."""
    out = []
    for rows in rows_of(net):
        begins = (rows.prefix, f"optimizer.{rows.short}")
        out.append((rows, [key for key in kinds if key.startswith(begins)]))
    return out


def _begin(path: Path, net: LayerParallelModule, kinds: dict, run: bytes) -> str:
    """Make the next numbered folder, its arrays and ``run.pt``; its name."""
    name = next_folder(path)
    try:
        for rows, keys in _stages(net, kinds):
            for key in keys:
                shape, kind = kinds[key]
                create_rows(path / name / f"{key}.npy", (rows.count, *shape), kind)
        files.write_whole(path / name / "run.pt", run)
    except OSError:
        shutil.rmtree(path / name, ignore_errors=True)
        raise
    return name


def _write(
    folder: Path, net: LayerParallelModule, optimizer: Optimizer | None, arrays: dict, kinds: dict
) -> dict[str, int]:
    """Write this rank's rows, zero where it has no array, and its modules at the ends; their checksums."""
    sums = {}
    if net.grid.data_comm.rank == 0:
        for rows, keys in _stages(net, kinds):
            for key in keys:
                shape, kind = kinds[key]
                own = as_array(arrays[key]) if key in arrays else np.zeros((rows.hi - rows.lo, *shape), kind)
                write_rows(folder / f"{key}.npy", rows.lo, own, rows.count)
        options = states.options_of_parameters(optimizer)
        for place, module in ends_of(net).items():
            stored = {"module": module.state_dict()}
            stored["optimizer"] = [optimizer.state.get(p, {}) for p in module.parameters()] if optimizer else []
            stored["options"] = [options.get(id(p)) for p in module.parameters()]
            content = io.BytesIO()
            torch.save(stored, content)
            files.write_whole(folder / f"{place}.pt", content.getvalue())
            sums[place] = zlib.crc32(content.getvalue())
    return sums


def _verify(folder: Path, net: LayerParallelModule, sums: dict[str, int], kinds: dict) -> None:
    """Read what this rank has written, before the last checkpoint is removed."""
    if net.grid.data_comm.rank == 0:
        for rows, keys in _stages(net, kinds):
            for key in keys:
                shape, kind = kinds[key]
                read_rows(folder / f"{key}.npy", rows.lo, rows.hi, (rows.count, *shape), kind, checked=True)
        for place, crc in sums.items():
            if zlib.crc32((folder / f"{place}.pt").read_bytes()) != crc:
                raise ValueError(f"{place}.pt is not what was written")


# -- reading ---------------------------------------------------------------------------------------------------------
def load_checkpoint(
    path: str | Path, net: LayerParallelModule, optimizer: Optimizer | None = None, *, scheduler: Any = None
) -> dict | None:
    """Set the parameters and the optimiser's state from a checkpoint (collective).

    Learning rates and other options of the groups of parameters are those that were written; files of earlier versions
    have none, which is logged. Numbers of cycles are those of ``net``; only numbers that were adapted by the same rule
    are taken from the checkpoint. Warm starts are discarded.

    Parameters
    ----------
    path
        Folder of the checkpoint.
    net, optimizer, scheduler
        What is set; left as it is where the checkpoint is refused.

    Returns
    -------
    dict or None
        The progress that was given, with the values ``extra`` under that name where some were; ``None`` where there is
        no checkpoint.

    Raises
    ------
    InputError
        On every rank, where it is damaged, of another network (sizes, type, activation, modules at the ends), of
        another kind of optimiser or scheduler, or of other groups of parameters.
    """
    path, comm = Path(path), net.grid.comm
    net._agree("reading of a checkpoint", shares=True)
    require_same(comm, optimizer=_class_name(optimizer), scheduler=_class_name(scheduler))
    found = on_first_rank(comm, "", read_head, path)
    if found is None:
        return None
    name, head = found
    collectively(comm, "", _require_fit, path, head, net, optimizer)
    guarded = files.refuse_unreadable(f"checkpoint {path / name}", ANEW)
    apply = collectively(comm, "", guarded(read_network), path / name, head, net, optimizer)
    run = collectively(comm, "", guarded(read_run), path / name, head, scheduler)
    apply()
    if net.grid.is_root and optimizer is not None and head.get("version", 1) < 3:
        logger.info("checkpoint %s is of an earlier version, without learning rates: those of the optimiser stay", path)
    return head["progress"] | ({} if run["extra"] is None else {"extra": run["extra"]})

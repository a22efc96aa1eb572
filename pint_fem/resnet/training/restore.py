"""Reading of checkpoints: this rank's layers, the modules that it has at the ends, and the optimiser's state of both.

Nothing is set while a rank reads: what is returned sets it, once all ranks have read theirs.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from pint_fem import files
from pint_fem.errors import InputError
from pint_fem.resnet.parallel.module import LayerParallelModule
from pint_fem.resnet.training import optimizer_state as states
from pint_fem.resnet.training.checkpoint_folder import ANEW
from pint_fem.resnet.training.network_rows import LayerRows, as_array, as_tensor, ends_of, iterations, rows_of
from pint_fem.resnet.training.row_files import read_rows

__all__ = ["read_network", "read_run"]

Optimizer = torch.optim.Optimizer


class _Reader(NamedTuple):
    """Reads the own rows of arrays of one stage."""

    folder: Path
    head: dict
    rows: LayerRows

    def __call__(self, key: str, like: torch.Tensor) -> torch.Tensor:
        """The own rows; ``like``, one of them or all, has the shape and type that are expected."""
        rows, checked = self.rows, "version" in self.head
        size = (rows.count, *(like.shape[1:] if rows.stacked else like.shape))
        kind = as_array(like).dtype
        return as_tensor(
            read_rows(self.folder / f"{key}.npy", rows.lo, rows.hi, size, kind, checked=checked), like.dtype
        )

    def state(self, key: str, like: torch.Tensor) -> torch.Tensor:
        """The own rows of an array of the optimiser, with the shape and type that were written."""
        if "kinds" not in self.head:
            return self(key, like)
        shape, kind = self.head["kinds"][key]
        rows, kind = self.rows, np.dtype(kind)
        values = read_rows(self.folder / f"{key}.npy", rows.lo, rows.hi, (rows.count, *shape), kind, checked=True)
        return as_tensor(values, torch.bfloat16) if kind == np.int16 else torch.from_numpy(values)


def read_network(folder: Path, head: dict, net: LayerParallelModule, optimizer: Optimizer | None) -> Callable[[], None]:
    """Read this rank's part; the function that is returned sets it.

    Raises
    ------
    InputError, ValueError, OSError
        Where a file is damaged, or the state does not fit the layers of this rank or the groups of the optimiser.
    """
    version, sums = head.get("version", 1), head.get("ends", {})
    values: list[tuple[LayerRows, str, torch.Tensor]] = []
    replaced: list[tuple[torch.Tensor, dict]] = []
    options: dict[int, set[str]] = {}
    for rows, runs in zip(rows_of(net), _runs(head), strict=True):
        read = _Reader(folder, head, rows)
        values += [(rows, name, read(rows.prefix + name, own[0])) for name, own in rows.tensors.items() if len(own)]
        if optimizer is not None:
            mine = states.own_runs(folder, runs, rows)
            replaced += _states(read, mine)
            for name in rows.tensors:
                for lo, hi, p in rows.layers_of(name):
                    there = [run[4][name] for run in mine if run[0] < hi and run[1] > lo and name in run[4]]
                    options[id(p)] = {head["options"][i] for i in there}
    ends = []
    for place, module in ends_of(net).items():
        stored = _read_end(folder / f"{place}.pt", module, sums.get(place), checked=version >= 2)
        ends.append((module, stored))
        if optimizer is not None:
            replaced += zip(module.parameters(), stored["optimizer"], strict=True)
            texts = zip(module.parameters(), stored.get("options", ()), strict=False)  # earlier versions have none
            options |= {id(p): {text} for p, text in texts if text is not None}
    groups = []
    if optimizer is not None and version >= 3:
        order = None if head["order"] is None else [head["options"][i] for i in head["order"]]
        groups = states.restored_options(optimizer, lambda p: options.get(id(p), set()), order)

    def apply() -> None:
        with torch.no_grad():
            for rows, name, own in values:
                rows.set(name, own)
        for module, stored in ends:
            module.load_state_dict(stored["module"])
        if optimizer is not None:
            for p, state in replaced:
                states.replace_state(optimizer, p, state)
            for group, found in groups:
                group.update(found)
        net.passes = head.get("passes", net.passes)
        _set_iterations(net, head["iterations"])
        net.invalidate()

    return apply


def _runs(head: dict) -> list[list]:
    """Runs of layers of each stage."""
    if "runs" in head:
        return head["runs"]
    # the first version has one run of all layers, the second no options
    runs = head.get("parts", [[0, head["network"]["layers"], head["arrays"], head.get("scalars", {})]])
    return [[[*run, {}] for run in runs]]


def _states(read: _Reader, runs: Sequence[list]) -> Iterator[tuple[torch.Tensor, dict]]:
    """The optimiser's state of each tensor of the own layers."""
    rows, version = read.rows, read.head.get("version", 1)
    for name in rows.tensors:
        begin = f"optimizer.{rows.short}{name}."
        keys = {key: key[len(begin) :] for run in runs for key in run[2] if key.startswith(begin)}
        arrays = {key: (what, read.state(key, rows.tensors[name][0])) for key, what in keys.items() if "." not in what}
        for lo, hi, p in rows.layers_of(name):
            run = next(run for run in runs if run[0] <= lo < run[1])
            own = slice(lo - rows.lo, hi - rows.lo)
            state = states.restored_scalars(run[3].get(name, {}), version)
            for key, (what, found) in arrays.items():
                if key in run[2]:
                    state[what] = (found[own] if rows.stacked else found[own][0].clone()).to(p.device)
            yield p, state


def _set_iterations(net: LayerParallelModule, written: dict | list) -> None:
    """Take numbers of cycles that were adapted by the rule of this run."""
    written = [written] if isinstance(written, dict) else written
    for stage, own, kinds in zip(net.stages, iterations(net), written, strict=True):
        for kind, (cycles, serial, batches, *rule) in kinds.items():
            its = stage.forward_sweeps if kind == "forward" else stage.backward_sweeps
            if its.adaptive is not None and rule in ([], own[kind][3:]):  # the first version has no rule
                its.cycles, its.serial, its.batches = cycles, serial, batches


def _read_end(path: Path, module: torch.nn.Module, crc: int | None, *, checked: bool) -> dict:
    """State of a module at an end, which has to have the shapes and types of the module."""
    stored = torch.load(io.BytesIO(_checked_bytes(path, crc, checked=checked)), weights_only=True)
    own, found = ({k: (v.dtype, tuple(v.shape)) for k, v in s.items()} for s in (module.state_dict(), stored["module"]))
    if own != found:
        raise ValueError(f"{path.name} has {found}, not {own}")
    return stored


def _checked_bytes(path: Path, crc: int | None, *, checked: bool = True) -> bytes:
    """The contents of a file, whose checksum has to be ``crc`` if it is ``checked``."""
    if not files.require_regular(path, "layer", ANEW):
        raise ValueError(f"{path.name} is missing")
    content = path.read_bytes()
    if checked and zlib.crc32(content) != crc:
        raise ValueError(f"{path.name} is damaged: the checksum is another")
    return content


def read_run(folder: Path, head: dict, scheduler: Any) -> dict:
    """Read ``run.pt`` and set the scheduler; the values of the user are those under ``"extra"``.

    Raises
    ------
    InputError, ValueError, OSError
        Where the file is damaged, or was written with another kind of scheduler.
    """
    written, own = head.get("scheduler"), None if scheduler is None else type(scheduler).__name__
    if scheduler is not None and written != own:
        with_what = f"with the scheduler {written}" if written else "without a scheduler"
        raise InputError(
            f"checkpoint {folder} was written {with_what}, this run has {own}: give the same, or load it without one"
        )
    if "run" not in head:  # earlier versions
        return {"extra": None}
    run = torch.load(io.BytesIO(_checked_bytes(folder / "run.pt", head["run"])), weights_only=True)
    if scheduler is not None:
        scheduler.load_state_dict(run["scheduler"])
    return run

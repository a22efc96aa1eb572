r"""Memory of a map from controls to readings and of its posterior on a rank, by formulas, before they are computed.

With :math:`m_r` own readings, :math:`n_z` own static unknowns, a group of :math:`g` sensors that are swept at once,
blocks of :math:`l` lags, :math:`s` stages and states of :math:`n` own unknowns:

====================  ==================================================================================================
rows                  :math:`m_r n_z`; on a disk where they are kept in a file, then those of a group only
sweep                 :math:`g\,l\,(1 + 2 s)\,n`
reduced rows          :math:`2 r_r n_z` for :math:`r_r` own reduced rows, and with the prior's covariance
modes                 :math:`3 k\, n_z / P` for :math:`k` modes, divided among the ranks in time
dense matrices        five of :math:`k \times k`, on the first rank
columns               in the space of the controls: :math:`2 m\, n_z / P`
====================  ==================================================================================================

Rows in a file are mapped into memory: what is not in use is on the disk. The file has no name, so that nothing is left
where a run ends, and its space is reserved first, so that a full disk is an error before the sweep.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from mpi4py import MPI

from pint_fem import files
from pint_fem.capacity import readable, require_memory
from pint_fem.collective import collectively, on_first_rank, require_same
from pint_fem.errors import InputError
from pint_fem.logs import logger

if TYPE_CHECKING:
    from pint_fem.inverse.map import ParameterToObservable

__all__ = ["allocate_rows", "map_bytes", "posterior_bytes", "require_rows_argument", "state_memory"]


def map_bytes(F: ParameterToObservable, group: int, lags: int) -> dict[str, int]:
    """Bytes of the rows of this rank, and of the sweep's blocks of lags.

    Parameters
    ----------
    F
        The map, of which the rows need not be there.
    group, lags
        Sensors that are swept at once, and lags of a block.
    """
    n, stages, width = F.propagator.evolution.state_size, F.propagator.dirk.stages, F.layout.static_size
    own = [own.rows.stop - own.rows.start for own in F.readings]
    rows = sum(own)
    if F.on_disk:
        rows = max((sum(own[i : i + group]) for i in range(0, len(own), group)), default=0)
    work = min(group, len(F.sensors)) * (lags + 1) * (1 + 2 * stages) * n
    return {"rows" + " of a group" * F.on_disk: 8 * rows * width, "sweep": 8 * work}


def posterior_bytes(F: ParameterToObservable, modes: int, *, data_space: bool) -> dict[str, int]:
    """Bytes of this rank for a posterior beside the map.

    Parameters
    ----------
    F
        The map.
    modes
        Number of modes: of reduced rows of all ranks, or of controls.
    data_space
        Whether it is computed in the space of the readings.
    """
    ranks, width = F.spacetime.time_size, F.layout.static_size
    out = {"modes": 8 * 3 * modes * -(-width // ranks)}
    if data_space:
        out["reduced rows"] = 8 * 2 * len(F.reduced.C) * width
    else:
        out["columns"] = 8 * 2 * F.table.size * -(-width // ranks)
    dense = 5 if F.spacetime.comm.rank == 0 else 3
    return out | {"dense matrices": 8 * dense * modes**2}


def state_memory(F: ParameterToObservable, parts: Mapping[str, int], what: str, advice: str) -> None:
    """Print what this rank needs where the time solver's option ``view`` is set, and refuse it where the machines do
    not have as much (collective).

    Parameters
    ----------
    F
        The map.
    parts
        Bytes by part.
    what, advice
        What needs them, and what a user can do.

    Raises
    ------
    InputError
        On every rank, if a rank exceeds the limit of its process or the ranks of a machine exceed its memory.
    """
    comm = F.spacetime.comm
    if F.view:
        text = ", ".join(f"{name} {readable(size)}" for name, size in parts.items())
        disk = f"; rows on disk {readable(8 * len(F.numbers) * F.layout.static_size)}" if F.on_disk else ""
        on_first_rank(comm, "logging", logger.info, f"memory of a rank for {what}: {text}{disk}")
    require_memory(comm, sum(parts.values()), what, advice)


def require_rows_argument(comm: MPI.Comm, rows: str, path: str | Path | None) -> None:
    """Refuse arguments for where rows are kept that do not fit (collective).

    Raises
    ------
    InputError
        On every rank.
    """
    require_same(comm, rows=rows, path=None if path is None else str(path))
    if rows not in ("memory", "file"):
        raise InputError(f"parameter_to_observable: rows = {rows!r}: give 'memory' or 'file'")
    if (rows == "file") != (path is not None):
        raise InputError(
            f"parameter_to_observable: rows = {rows!r} and path = {path!r}: give rows='file' with path=, a folder on a "
            "disk with enough space, or leave both out"
        )


def allocate_rows(comm: MPI.Comm, shape: tuple[int, int], folder: str | Path | None) -> np.ndarray:
    """Zero rows in memory, or in a file without a name in a folder (collective).

    Raises
    ------
    InputError
        On every rank, if there is no such folder, or its disk is full.
    """
    if folder is None:
        return np.zeros(shape)

    def mapped() -> np.ndarray:
        size = 8 * shape[0] * shape[1]
        what = f"rows of the map from controls to readings, {readable(size)} in folder {folder}, cannot be written"
        with files.as_input_error(what, "give another folder, or fewer readings", errors=(OSError, ValueError)):
            with tempfile.TemporaryFile(dir=folder) as file:
                if not size:
                    return np.zeros(shape)
                os.posix_fallocate(file.fileno(), 0, size)
                return np.asarray(np.memmap(file, float, "r+", shape=shape))

    return collectively(comm, "", mapped)

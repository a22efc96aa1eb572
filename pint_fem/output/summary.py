"""The summary of a run as a JSON file; imports numpy only."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from pint_fem import files

__all__ = ["write_json"]


def write_json(path: Path, data: dict) -> None:
    """Write a summary; numbers that are not finite become ``null``, and other objects their text.

    Raises
    ------
    InputError
        Where it cannot be written; an earlier file is then unchanged.
    """

    def plain(x):
        if isinstance(x, dict):
            return {str(k): plain(v) for k, v in x.items()}
        if isinstance(x, (list, tuple, np.ndarray)):
            return [plain(v) for v in x]
        if isinstance(x, np.generic):
            x = x.item()
        if isinstance(x, float) and not np.isfinite(x):
            return None
        return x if x is None or isinstance(x, (str, int, float, bool)) else str(x)

    with files.as_input_error(f"{path} cannot be written"):
        files.write_whole(path, (json.dumps(plain(data), indent=2) + "\n").encode())

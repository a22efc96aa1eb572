"""The README's code runs."""

import re
from pathlib import Path

import numpy as np
import pytest

README = Path(__file__).resolve().parent.parent / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


@pytest.mark.parallel([1, 2])
@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_block(number):
    names = {}
    exec(compile(BLOCKS[number], f"README block {number}", "exec"), names)
    if "result" in names:
        assert names["result"].converged
        assert names["source"].function_space() == names["V"]
    else:
        assert np.allclose(names["U"][:, 0], (1 + 1 / 64) ** -np.arange(65.0), rtol=1e-7)


def test_there_are_blocks():
    assert len(BLOCKS) == 2

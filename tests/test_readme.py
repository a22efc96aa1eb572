"""The code of the README runs."""

import re
from functools import cache
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"


def blocks(path):
    return re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL)


BLOCKS = blocks(README)


@cache
def executed(number):
    """What a block defines, together with the blocks before that it goes on with."""
    names = {}
    if "(heat, pf.PointSensors" in BLOCKS[number]:  # a block that goes on with the evolution of the first one
        names |= executed(0)
        assert "posterior" not in names
    if "pf.Experiments" in BLOCKS[number]:  # and one that goes on with the sensors of the second one, too
        names |= executed(1)
    exec(compile(BLOCKS[number], f"README block {number}", "exec"), names)
    return names


@pytest.mark.parallel([1, 3])
@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_block(number):
    names = executed(number)
    if "conductivity" in names:
        J, result = names["J"], names["result"]
        assert J.problem.value(result.x) < J.problem.value(np.zeros(J.layout.size))
        assert J.problem.terms[0].problem._joint
    elif "posterior" in names:
        every, last = names["posterior"], names["law"]
        scale = np.abs(every.x).max(initial=1e-300)
        assert np.allclose(last.x, every.x, rtol=0, atol=1e-8 * scale)  # that of all readings
        assert np.allclose(last.variance(), every.variance(), rtol=1e-8)
        assert len(names["samples"]) == 4
        assert names["later"].x.shape == every.x.shape
        assert 0 < names["chosen"].alpha
    elif "result" in names:
        assert names["result"].converged
        assert names["source"].function_space() == names["V"]
    else:
        assert np.allclose(names["U"][:, 0], (1 + 1 / 64) ** -np.arange(65.0), rtol=1e-7)


def test_there_are_blocks():
    assert len(BLOCKS) == 4

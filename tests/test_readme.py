"""The code of the README and of pages of the guide runs."""

import re
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"


def blocks(path):
    return re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL)


GUIDE = ROOT / "docs" / "guide"


@cache
def executed(path):
    """What the blocks of a page define, in order; a block that begins with imports begins anew."""
    parts = []
    for number, block in enumerate(blocks(path)):
        names = {} if block.startswith(("from ", "import ")) or not parts else dict(parts[-1])
        exec(compile(block, f"{path.name}, block {number}", "exec"), names)
        parts.append(names)
    return parts


@pytest.mark.parallel([1, 3])
def test_blocks_of_the_readme():
    """The inverse problem is solved by the map, and the network learns in one epoch, on all ranks."""
    inverse, network = executed(README)
    assert inverse["result"].converged
    assert inverse["result"].choice.startswith("map")
    J = inverse["J"]
    assert J.problem.value(inverse["result"].x) < J.problem.value(np.zeros(J.layout.size))
    assert network["loss"].item() < 2.0  # log(10) = 2.3 by chance


@pytest.mark.parallel([1, 3])
def test_blocks_of_the_heat_page():
    """A converged minimisation, then the posterior and its stream: the last law is that of all readings."""
    first, names = executed(GUIDE / "heat.md")
    assert first["result"].converged
    assert first["source"].function_space() == first["V"]
    every, last = names["posterior"], names["law"]
    scale = np.abs(every.x).max(initial=1e-300)
    assert np.allclose(last.x, every.x, rtol=0, atol=1e-8 * scale)
    assert np.allclose(last.variance(), every.variance(), rtol=1e-8)
    assert len(names["samples"]) == 4
    assert names["later"].x.shape == every.x.shape
    assert 0 < names["chosen"].alpha


@pytest.mark.parallel([1, 3])
def test_blocks_of_the_page_on_coefficients():
    """The experiments are solved together, and the sum decreases."""
    names = executed(GUIDE / "coefficients.md")[-1]
    J, result = names["J"], names["result"]
    assert J.problem.value(result.x) < J.problem.value(np.zeros(J.layout.size))
    assert J.problem.terms[0].problem._joint


def test_the_readme_is_a_screen_or_two():
    lines = README.read_text().splitlines()
    assert len(lines) <= 120
    assert all(len(line) <= 110 for line in lines if not line.startswith(("|", "![")))
    picture = ROOT / re.search(r"!\[[^]]*\]\((\S+\.gif)\)", README.read_text())[1]
    assert picture.stat().st_size < 900_000
    with Image.open(picture) as moving:
        assert moving.n_frames > 10


@pytest.mark.parametrize("path", [README, ROOT / "problems" / "README.md", *sorted(GUIDE.glob("*.md"))], ids=str)
def test_links(path):
    """Files that are linked exist, but for pictures that the build of the site draws."""
    found = re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", path.read_text())
    assert all((path.parent / link).exists() for link in found if "_build/" not in link), found
    drawn = re.findall(r"_build/pictures/(\w+)-(?:light|dark)\.svg", path.read_text())
    assert all((ROOT / "docs" / "pictures" / f"{name}.py").is_file() for name in drawn)

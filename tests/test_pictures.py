"""Pictures and summaries show the numbers that they are given: data, scales, names and titles of what is drawn."""

import json
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
from firedrake import COMM_SELF, SpatialCoordinate, UnitTriangleMesh
from matplotlib.image import imread

from demos import curves, pictures
from demos.outputs import write_json
from pint_fem.inverse.inference.regularisation_choice import RegularisedFit
from pint_fem.spacetime import SpaceTime
from tests.meshes import square
from tests.pictures import assert_drawn

EXTENT = (0.0, 2.0, 0.0, 1.0)


@pytest.fixture
def figures(monkeypatch):
    """The figures that are drawn, as matplotlib has them."""
    kept, close = [], pictures.plt.close
    monkeypatch.setattr(pictures.plt, "close", kept.append)
    yield kept
    for fig in kept:
        close(fig)


def images(count):
    x, y = np.meshgrid(np.linspace(0, 2, 40), np.linspace(0, 1, 20))
    return [(n + 1) * np.sin(3 * x + n) * y for n in range(count)]


def test_rasters_are_samples():
    mesh = square(4, COMM_SELF)
    x, y = SpatialCoordinate(mesh)
    raster = pictures.Raster(mesh, width=10)
    centres = (np.arange(10) + 0.5) / 10
    assert raster.shape == (10, 10)
    assert raster.extent == (0, 1, 0, 1)
    np.testing.assert_allclose(raster(2 * x - 3 * y), 2 * centres[None] - 3 * centres[:, None], atol=1e-12)


def test_pixels_outside_the_mesh_are_not_numbers():
    """A triangle with the corners (0, 0), (2, 0) and (0, 1); near its long side values may be extrapolated."""
    mesh = UnitTriangleMesh(2, comm=COMM_SELF)
    mesh.coordinates.dat.data[:, 0] *= 2
    x, y = SpatialCoordinate(mesh)
    raster = pictures.Raster(mesh, width=10)
    cx, cy = np.meshgrid(0.2 * (np.arange(10) + 0.5), 0.2 * (np.arange(5) + 0.5))
    assert raster.shape == (5, 10)
    assert raster.extent == EXTENT
    image, inside, outside = raster(2 * x - 3 * y), cx / 2 + cy < 1, cx / 2 + cy > 1.3
    np.testing.assert_allclose(image[inside], (2 * cx - 3 * cy)[inside], atol=1e-12)
    assert np.isnan(image[outside]).all()


@pytest.mark.parallel([1, 3])
def test_images_of_all_ranks_in_the_order_of_time():
    """On the first rank, by the number of the point; none on the others."""
    spacetime = SpaceTime()
    rank, size = spacetime.time_comm.rank, spacetime.time_comm.size
    own = {n: np.full((2, 3), float(n)) for n in (2 * rank + 1, 2 * rank)}
    found = pictures.gather_images(own, spacetime)
    assert list(found) == (list(range(2 * size)) if rank == 0 else [])
    assert all((image == n).all() for n, image in found.items())


def test_fields(tmp_path, figures):
    """One symmetric scale for all, which the largest value sets; sensors as dots."""
    path, (a, b), points = tmp_path / "fields.png", images(2), np.array([[0.5, 0.5], [1.5, 0.2], [1.0, 0.9]])
    pictures.plot_fields(path, [("true", a), ("found", b)], EXTENT, points=points, title="sources", label="in W")
    (fig,), limit = figures, abs(b).max()
    assert fig.get_suptitle() == "sources; dots: sensors"
    assert [ax.get_title() for ax in fig.axes[:2]] == ["true", "found"]
    assert fig.axes[2].get_ylabel() == "in W"
    for ax, image in zip(fig.axes, (a, b), strict=False):
        (shown,), (dots,) = ax.images, ax.lines
        np.testing.assert_array_equal(shown.get_array(), image)
        assert shown.get_clim() == (-limit, limit)
        assert tuple(shown.get_extent()) == EXTENT
        np.testing.assert_array_equal(dots.get_xydata(), points)
    assert_drawn(path, panels=2, colours=200)


def test_fields_and_deviations(tmp_path, figures):
    """Deviations in the last column, on a scale of their own between the least one and the one of most pixels."""
    path, (a, b), deviation = tmp_path / "fields.png", images(2), 1 + np.abs(images(1)[0])
    given = [("true", a), ("found", b), ("difference", a - b)]
    pictures.plot_fields(path, given, EXTENT, deviations=[("deviation", deviation)], rows=2, label="in W")
    panels = {ax.get_title(): ax for ax in figures[0].axes if ax.get_title()}
    places = {name: ax.get_subplotspec().get_geometry()[2] for name, ax in panels.items()}
    assert places == {"true": 0, "found": 2, "difference": 1, "deviation": 3}  # numbers of a grid of two by two
    assert panels["deviation"].images[0].get_clim() == (deviation.min(), np.quantile(deviation, 0.99))
    limit = max(abs(image).max() for _, image in given)
    assert all(panels[name].images[0].get_clim() == (-limit, limit) for name, _ in given)
    assert [ax.get_ylabel() for ax in figures[0].axes if not ax.get_title()] == 4 * ["in W"]
    assert_drawn(path, panels=2, colours=200)


def test_sensors(tmp_path, figures):
    """Readings and fit of as many sensors as asked for, and the residuals of all."""
    path, times, rng = tmp_path / "sensors.png", np.linspace(0, 1, 9), np.random.default_rng(0)
    measured, predicted = rng.standard_normal((2, 9, 5))
    curves.plot_sensors(path, times, measured, predicted, names="abcde", show=3, quantity="E")
    left, right = figures[0].axes
    assert left.get_ylabel() == "E"
    assert [text.get_text() for text in left.get_legend().get_texts()] == [f"sensor {n}" for n in "ace"]
    for n, s in enumerate((0, 2, 4)):
        for line, values in zip(left.lines[2 * n : 2 * n + 2], (measured, predicted), strict=True):
            np.testing.assert_array_equal(line.get_xydata(), np.stack([times, values[:, s]], axis=1))
    heights, edges = np.histogram(predicted - measured, bins=40)
    np.testing.assert_array_equal([bar.get_height() for bar in right.patches], heights)
    assert right.patches[0].get_x() == pytest.approx(edges[0])
    assert_drawn(path, colours=100)


def test_bands_of_sensors(tmp_path, figures):
    """Two deviations around the fit, and of the sensor with the widest band without and with the noise."""
    path, times, rng = tmp_path / "sensors.png", np.linspace(0, 1, 9), np.random.default_rng(0)
    measured, predicted = rng.standard_normal((2, 9, 5))
    deviation = np.full((9, 5), 0.3) + 0.1 * (np.arange(5) == 3)
    given = dict(names="abcde", show=3, deviation=deviation, noise=0.3)
    curves.plot_sensors(path, times, measured, predicted, **given)
    left, middle, _ = figures[0].axes
    for band, s in zip(left.collections, (0, 2, 4), strict=True):
        heights = band.get_paths()[0].vertices[:, 1]
        assert np.isclose(heights.max(), (predicted[:, s] + 0.6).max())
        assert np.isclose(heights.min(), (predicted[:, s] - 0.6).min())
    np.testing.assert_allclose(middle.lines[0].get_ydata(), (measured - predicted)[:, 3])
    assert [band.get_paths()[0].vertices[:, 1].max() for band in middle.collections] == pytest.approx([1.0, 0.8])
    assert "sensor d" in middle.get_title()
    assert_drawn(path, panels=2, colours=100)


def test_convergence(tmp_path, figures):
    """J and gradient of each iteration, residuals relative to the first, and the bound's line."""
    path = tmp_path / "convergence.png"
    history = [SimpleNamespace(iteration=n, value=10.0**-n, gradient_norm=2.0**-n if n < 3 else 0.0) for n in range(4)]
    curves.plot_convergence(path, history, {"state": [2.0, 0.2, 0.02], "adjoint": [3.0, 0.0]}, bound=0.1)
    left, middle, right = figures[0].axes
    np.testing.assert_allclose(left.lines[0].get_xydata(), [[n, 10.0**-n] for n in range(4)])
    np.testing.assert_allclose(middle.lines[0].get_ydata(), [1, 0.5, 0.25, 1e-300])
    state, adjoint, bound = right.lines
    np.testing.assert_allclose(state.get_ydata(), [1, 0.1, 0.01])
    np.testing.assert_allclose(adjoint.get_ydata(), [1])
    np.testing.assert_allclose(bound.get_ydata(), [1, 0.1, 0.01])
    texts = [text.get_text() for text in right.get_legend().get_texts()]
    assert texts == ["first state sweep", "first adjoint sweep", "two-level bound 0.1 a cycle"]
    assert all(ax.get_yscale() == "log" for ax in (left, middle, right))
    assert_drawn(path, panels=3)


def test_regularisation(tmp_path, figures):
    """The curve, the criteria and a mark on the curve for each choice, of one eigenvalue in closed form."""
    path, fit = tmp_path / "regularisation.png", RegularisedFit(*np.array([[4.0], [1.0], [3.0]]), 10.0, 5, 0.0)
    alphas = np.geomspace(1e-2, 1e2, 401)
    curves.plot_regularisation(path, fit.curve(alphas), {"one": 4.0, "other": 0.5}, readings=5)
    left, right, density = figures[0].axes
    line, *marks = left.lines
    np.testing.assert_allclose(line.get_xdata(), 1 + 9 * (alphas / (alphas + 4)) ** 2)
    np.testing.assert_allclose(line.get_ydata(), 36 / (alphas + 4) ** 2)
    np.testing.assert_allclose([mark.get_xydata()[0] for mark in marks], [[3.25, 0.5625], [10 / 9, 16 / 9]], rtol=1e-3)
    assert [text.get_text() for text in left.get_legend().get_texts()] == ["one: 4", "other: 0.5"]
    np.testing.assert_allclose(right.lines[0].get_ydata(), line.get_xdata() / 5)
    np.testing.assert_allclose(right.lines[1].get_ydata(), fit.gcv(alphas))  # already for one reading
    np.testing.assert_allclose(density.lines[0].get_ydata(), fit.log_evidence(alphas))
    assert_drawn(path, panels=2)


def test_snapshots_and_animation(tmp_path, figures):
    """All images on one scale, with their titles; a frame for each."""
    path, shown, titles = tmp_path / "snapshots.png", images(5), [f"t = {n}" for n in range(5)]
    limit = abs(shown[-1]).max()
    pictures.plot_snapshots(path, shown, titles, EXTENT, label="field")
    axes = [ax for ax in figures[0].axes if ax.images]
    assert [ax.get_title() for ax in axes] == titles
    for ax, image in zip(axes, shown, strict=True):
        np.testing.assert_array_equal(ax.images[0].get_array(), image)
        assert ax.images[0].get_clim() == (-limit, limit)
    assert_drawn(path, colours=200)
    moving = tmp_path / "field.gif"
    pictures.animate(moving, shown, titles, EXTENT)
    assert_drawn(moving)
    from PIL import Image, ImageSequence

    with Image.open(moving) as gif:
        assert gif.n_frames == 5
        middle = [np.asarray(f.convert("RGB"))[120:200, 100:200].astype(float) for f in ImageSequence.Iterator(gif)]
    assert min(abs(a - b).mean() for a, b in pairwise(middle)) > 10
    assert imread(moving).shape[:2] == (320, 368)


def test_summary(tmp_path):
    """Numbers as they are, arrays as lists, other objects as text; what is not finite is null, as JSON has no NaN."""
    path = tmp_path / "summary.json"
    data = {"J": np.float64(0.5), 4: [np.nan, -np.inf, np.int64(3)], "z": np.array([1.5, np.nan]), "path": path}
    write_json(path, data | {"none": None, "yes": np.bool_(True)})
    found = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    expected = {"J": 0.5, "4": [None, None, 3], "z": [1.5, None], "path": str(path), "none": None, "yes": True}
    assert found == expected
    assert [type(found["4"][2]), found["yes"]] == [int, True]
